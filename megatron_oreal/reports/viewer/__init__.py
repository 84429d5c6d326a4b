"""Shows the samples of a run: as one page of HTML, or as a table in the terminal."""

"""What is drawn and printed from finished runs."""

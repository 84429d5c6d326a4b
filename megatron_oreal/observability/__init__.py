"""What a run says about itself: metrics, progress, reports, and files that are whole or absent."""

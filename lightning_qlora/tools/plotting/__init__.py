"""What a run logged, as curves in the terminal and on a page."""

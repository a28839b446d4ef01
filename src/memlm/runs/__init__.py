"""A recipe as a plan of steps, whose folders are found by content."""

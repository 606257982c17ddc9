"""Parameter counts of the paper, on shapes alone."""

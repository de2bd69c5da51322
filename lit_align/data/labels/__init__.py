"""Which image of a pair is chosen: human labels, stored votes, live votes."""

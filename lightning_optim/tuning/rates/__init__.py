"""Learning rates: what a sweep or a few trials of them tell."""

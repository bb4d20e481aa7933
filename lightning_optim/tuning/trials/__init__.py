"""Trials: short runs from one point, after each of which everything is as it was."""

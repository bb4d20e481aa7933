"""Compiled loops for CPUs, through numba."""

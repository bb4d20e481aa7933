"""Triton backend: one kernel launch for all tensors."""

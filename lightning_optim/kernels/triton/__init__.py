"""One launch for all tensors, through Triton."""

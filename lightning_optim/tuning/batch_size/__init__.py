"""The batch size: the largest that fits, how large is worth it, and the rate that goes with another one."""

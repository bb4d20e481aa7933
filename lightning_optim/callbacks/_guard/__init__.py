"""Parts of DivergenceGuard."""

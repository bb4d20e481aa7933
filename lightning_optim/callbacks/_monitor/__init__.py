"""Parts of OptimizerMonitor."""

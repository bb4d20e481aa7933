"""Snapshots of the state of a run: captured while it trains, restored in place."""

from lightning_optim.divergence.snapshots.pair import SnapshotPair
from lightning_optim.divergence.snapshots.parts import OptimizerState, Part, StateDict, Tensors, bytes_needed
from lightning_optim.divergence.snapshots.snapshot import Snapshot

__all__ = ["OptimizerState", "Part", "Snapshot", "SnapshotPair", "StateDict", "Tensors", "bytes_needed"]

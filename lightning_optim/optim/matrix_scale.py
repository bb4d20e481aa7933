"""Factors of the learning rate for the shape of a matrix whose update is orthogonal."""

from __future__ import annotations

import math
from functools import lru_cache

SCALES = ("original", "keller", "match_rms_adamw", "spectral", "spectral_unclamped")
"""Names of the factors, for a matrix of A rows (outputs) and B columns (inputs):

- `original`, torch's name, or `keller`: √max(1, A/B), of Jordan et al., https://kellerjordan.github.io/posts/muon.
- `match_rms_adamw`: 0.2·√max(A, B), with which the RMS of an update is that of AdamW's (Liu et al., 2025,
  https://arxiv.org/abs/2502.16982).
- `spectral`, or torch's name from 2.14 on, `spectral_unclamped`: √(A/B), with which the change of the outputs does not
  depend on the width (Yang et al., 2023, https://arxiv.org/abs/2310.17813; microsoft/dion's `spectral_norm`). NVIDIA's
  Emerging-Optimizers call √max(A, B) `spectral`; that is `match_rms_adamw` at five times the learning rate.
"""


@lru_cache(maxsize=4096)
def step_ratio(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """Return the factor of the learning rate for a matrix, [rows, columns]."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / max(columns, 1)
    return math.sqrt(ratio if adjust_lr_fn in ("spectral", "spectral_unclamped") else max(1.0, ratio))

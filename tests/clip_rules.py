"""Every clip rule, with limits that bind now and then for the gradients of the models that tests train.

One table for each model, because a limit that never binds tests nothing. Adding a clip rule adds a row to each.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_optim.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    BlockRMS,
    ClipRule,
    GlobalNorm,
    GroupNorm,
    MomentumRatio,
    UpdateRMS,
    Value,
    ZClip,
)

Rules = dict[str, Callable[[], ClipRule]]

# `tests.helpers.Net`, whose norm is about 1.
OF_NET: Rules = {
    "adagc": lambda: AdaGC(max_norm=0.5, warmup=4, patience=3),
    "agc": lambda: AGC(0.02, exclude=["^head"]),
    "autoclip": lambda: AutoClip(50.0, window=4),
    "block_rms": lambda: BlockRMS(0.1),
    "global_norm": lambda: GlobalNorm(0.5),
    "group_norm": lambda: GroupNorm(0.4, {"no_decay": 0.1}),
    "momentum_ratio": lambda: MomentumRatio(1.5, warmup=2),
    "update_rms": lambda: UpdateRMS(0.9),
    "value": lambda: Value(0.05),
    "zclip": lambda: ZClip(threshold=0.5, warmup=3, window=8, max_norm=2.0),
}
# `tests.optimizer_cases.set_gradients`; warmups end within a few dozen steps.
OF_CASES: Rules = {
    "adagc": lambda: AdaGC(max_norm=2.0, warmup=4, patience=5),
    "agc": lambda: AGC(0.5),
    "autoclip": lambda: AutoClip(80.0, window=8, warmup=2),
    "block_rms": lambda: BlockRMS(0.9),
    "global_norm": lambda: GlobalNorm(3.5),
    "group_norm": lambda: GroupNorm(3.5),
    "momentum_ratio": lambda: MomentumRatio(ratio=2.0, warmup=3),
    "update_rms": lambda: UpdateRMS(0.9),
    "value": lambda: Value(1.5),
    "zclip": lambda: ZClip(threshold=0.5, window=12, warmup=4, patience=5),
}
# `tests.optim.tensor_parallel_checks.Block`.
OF_BLOCK: Rules = {
    "adagc": lambda: AdaGC(max_norm=0.2, warmup=1, patience=3),
    "agc": lambda: AGC(0.005),
    "autoclip": lambda: AutoClip(1.0, window=2),
    "block_rms": lambda: BlockRMS(0.005),
    "global_norm": lambda: GlobalNorm(0.1),
    "group_norm": lambda: GroupNorm(0.1, {"1": 0.02}),
    "momentum_ratio": lambda: MomentumRatio(0.8, warmup=1),
    "update_rms": lambda: UpdateRMS(0.5),
    "value": lambda: Value(0.01),
    "zclip": lambda: ZClip(threshold=0.1, warmup=1, window=4, max_norm=0.2),
}

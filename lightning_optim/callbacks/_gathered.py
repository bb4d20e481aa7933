from __future__ import annotations

import torch
from torch import nn

from lightning_optim.core.flat_shards import free_gathered_flat


def free_gathered(model: nn.Module) -> None:
    """Free whole weights that FSDP has gathered, before shards are written, so that the next pass gathers them anew.

    After a forward pass without a backward pass, as in validation, the outermost modules keep the whole weights, and
    the next pass would use these whatever has been written into the shards.

    Args:
        model: A model of whose modules some may be in shards (FSDP or FSDP2).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    free_gathered_flat(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

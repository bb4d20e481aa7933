"""A small byte-level transformer that learns to write Python from the standard library of the Python running it.

Nothing here knows lightning_optim: this is the LightningModule and LightningDataModule anyone has, with the
``configure_optimizers`` anyone starts from. What is added to them is in ``char_lm.yaml``.
"""

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

NUM_BYTES = 256
# Tests and codec tables are repetitive and would flatter the model; installed packages differ between machines.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def rotate(x: Tensor) -> Tensor:
    """Turn ``x``, `[..., time, dim]`, by angles that grow with time, so that dot products see distances (RoPE)."""
    half = x.shape[-1] // 2
    # Base 1000, not the paper's 10000: the contexts here are short.
    frequency = 1000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * frequency
    cos, sin = angle.cos().type_as(x), angle.sin().type_as(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, `[batch, time, dim]`, over its past."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2])
        return self.out(F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers around a squared ReLU, which learns faster here than GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of ``x``, `[batch, time, dim]`, alone."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, `[batch, time, dim]`, plus what attention and MLP add to it."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CharLM(L.LightningModule):
    """A GPT over bytes; its losses are in nats per byte.

    Args:
        dim: Width of the residual stream.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads per block; ``dim`` divided by it must be even.
    """

    byte_counts: Tensor

    def __init__(self, dim: int = 128, num_layers: int = 3, num_heads: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(NUM_BYTES, dim)
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, NUM_BYTES, bias=False)
        self.head.weight = self.embed.weight
        # The default of 1 suits an embedding; as a head it would start far above the uniform loss.
        nn.init.normal_(self.embed.weight, std=0.02)
        # How often each byte was seen in training; starting from one is add-one smoothing.
        self.register_buffer("byte_counts", torch.ones(NUM_BYTES, dtype=torch.long))

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of each next byte, `[batch, time, 256]`, for ``text``, `[batch, time]`."""
        return self.head(self.norm(self.blocks(self.embed(text))))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss on ``batch``, `[batch, time + 1]`."""
        # Not bincount, which makes the host wait for the largest value.
        self.byte_counts.scatter_add_(0, batch.flatten(), torch.ones_like(batch).flatten())
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss and, to compare it with, that of a model that only knows how often each byte occurs."""
        target = batch[:, 1:].flatten()
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), target)
        unigram = (self.byte_counts / self.byte_counts.sum()).log()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_unigram_entropy", -unigram[target].mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that everybody starts from."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def stdlib_sources() -> Iterator[tuple[float, Path]]:
    """Yield the standard library's source files, each with its place in [0, 1) by a hash of its relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            # Forward slashes, so that the split is the same everywhere.
            yield zlib.crc32(path.relative_to(root).as_posix().encode()) / 2**32, path


class StdlibText(L.LightningDataModule):
    """The source files of the running Python's standard library, as windows of bytes.

    Whole files go to training or to validation, by a hash of their path, so that neither has seen the other's.

    Args:
        context: Bytes the model reads at once; a window has one more, the last target.
        batch_size: Windows in a batch.
        train_windows: Windows in an epoch, at random places of the training files.
        val_windows: Windows to validate on, spread evenly over the validation files.
        val_fraction: Share of the files that are for validation.
        seed: Decides the places of the training windows.
    """

    def __init__(
        self,
        context: int = 128,
        batch_size: int = 16,
        train_windows: int = 12_800,
        val_windows: int = 512,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.train_windows = train_windows
        self.val_windows = val_windows
        self.val_fraction = val_fraction
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the files and place the windows."""
        train, val = bytearray(), bytearray()
        # Sorted, because folders list their files in no particular order.
        for place, path in sorted(stdlib_sources()):
            (val if place < self.val_fraction else train).extend(path.read_bytes())
        train_places, val_places = (
            torch.frombuffer(text, dtype=torch.uint8).long().unfold(0, self.context + 1, 1) for text in (train, val)
        )
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(train_places), (self.train_windows,), generator=generator)
        self.train = Subset(train_places, starts.tolist())
        self.val = Subset(val_places, torch.linspace(0, len(val_places) - 1, self.val_windows).long().tolist())

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the training windows in random order."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation windows, always the same."""
        return DataLoader(self.val, self.batch_size)

"""A small convolutional network on scikit-learn's handwritten digits: 1797 images of 8 × 8 pixels.

Nothing here knows lightning_optim; what is added is in ``digits.yaml``.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

NUM_CLASSES = 10


class DigitsNet(L.LightningModule):
    """Three convolutions with batch normalization, then a linear head.

    Args:
        width: Channels of the first convolution; the others have twice as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = conv(1, width)
        self.body = nn.Sequential(conv(width, 2 * width), nn.MaxPool2d(2), conv(2 * width, 2 * width), nn.MaxPool2d(2))
        self.head = nn.Linear(2 * width * 2 * 2, NUM_CLASSES)
        self.val_acc = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, `[batch, 10]`, of ``images``, `[batch, 1, 8, 8]`."""
        return self.head(self.body(self.stem(images)).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that everybody starts from."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3 × 3 convolution that keeps the image's size; its bias is left to the normalization."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Digits(L.LightningDataModule):
    """The digits, split into training and validation with every digit's share alike in both.

    Args:
        batch_size: Images in a batch.
        val_fraction: Share of the images held out.
        seed: Seed of the split.
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load and split the images; their pixels are whole numbers from 0 to 16."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        x_train, x_val, y_train, y_val = train_test_split(
            images, labels, test_size=self.val_fraction, stratify=labels, random_state=self.seed
        )
        self.train, self.val = TensorDataset(x_train, y_train), TensorDataset(x_val, y_val)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images."""
        return DataLoader(self.val, batch_size=256)

"""A generative adversarial network that draws handwritten digits of 8 × 8 pixels, after scikit-learn's.

Two optimizers in manual optimization. Nothing here knows lightning_optim; what is added is in ``gan.yaml``.
"""

from itertools import pairwise

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS = 64


class DigitsGAN(L.LightningModule):
    """A generator and a discriminator, both of two hidden layers.

    Args:
        latent: Random numbers that a drawing is made from.
        width: Units of a hidden layer.
    """

    def __init__(self, latent: int = 32, width: int = 256) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent = latent
        self.automatic_optimization = False
        self.gen = nn.Sequential(perceptron(latent, width, width, PIXELS), nn.Sigmoid())
        self.disc = perceptron(PIXELS, width, width, 1)

    def forward(self, noise: Tensor) -> Tensor:
        """Return drawings, `[batch, 64]`, from ``noise``, `[batch, latent]`."""
        drawn: Tensor = self.gen(noise)
        return drawn

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take a step of the discriminator, then one of the generator."""
        gen, disc = self.optimizers()  # type: ignore[attr-defined]  # a list, if there are several
        real = batch[0].flatten(1)
        drawn = self(self.noise(len(real)))

        disc_loss = (F.softplus(-self.disc(real)) + F.softplus(self.disc(drawn.detach()))).mean()
        disc.zero_grad()
        self.manual_backward(disc_loss)
        disc.step()

        gen_loss = F.softplus(-self.disc(drawn)).mean()
        gen.zero_grad()
        self.manual_backward(gen_loss)
        gen.step()
        self.log_dict({"disc_loss": disc_loss, "gen_loss": gen_loss}, prog_bar=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log how far the drawings are from the digits: their energy distance, which is 0 for the same distribution."""
        real = batch[0].flatten(1)
        drawn = self(self.noise(len(real)))
        within = torch.cdist(real, real).mean() + torch.cdist(drawn, drawn).mean()
        self.log("distance", 2 * torch.cdist(real, drawn).mean() - within, prog_bar=True)

    def noise(self, count: int) -> Tensor:
        """Return what ``count`` drawings are made from."""
        return torch.randn(count, self.latent, device=self.device)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of generator and discriminator."""
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.gen, self.disc)]


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers between these widths, with leaky units between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])

"""A tiny model of each kind that a recipe is for: a LightningModule that the command line can make, with its data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY, WIDTH, LENGTH, CLASSES = 64, 16, 8, 4


class Kind(L.LightningModule):
    """Random data of its kind, in 6 batches of 4."""

    def samples(self, count: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def loss(self, *batch: Tensor) -> Tensor:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return DataLoader(TensorDataset(*self.samples(24)), batch_size=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)


def tokens(count: int, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (count, length))


def labels(count: int) -> Tensor:
    return torch.randint(CLASSES, (count,))


class ProjectedAttention(nn.Module):
    """Attention by functions, as in LLaMA: only the names of its projections tell."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x)[:, None] for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (self.attn(y, y, y)[0] if isinstance(self.attn, nn.MultiheadAttention) else self.attn(y))
        return x + self.mlp(self.norm2(x))


def heads() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True)


class LlamaLike(Kind):
    make_attention: Any = staticmethod(ProjectedAttention)

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(self.make_attention()) for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return (tokens(count),)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed_tokens(text)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


class GPT(LlamaLike):
    """The same by torch's own attention, with a tied head."""

    make_attention = staticmethod(heads)

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed_tokens.weight


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"words": nn.Embedding(VOCABULARY, WIDTH), "norm": nn.LayerNorm(WIDTH)})
        self.layer = nn.ModuleList(Block(heads()) for _ in range(2))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embeddings["norm"](self.embeddings["words"](text))
        for layer in self.layer:
            x = layer(x)
        return x.mean(1)


class Bert(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = Encoder(), nn.Linear(WIDTH, CLASSES)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return tokens(count), labels(count)

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.encoder(batch[0])), batch[1])


class LowRank(nn.Module):
    """A frozen linear layer and a low-rank correction, under the names of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Adapted(LlamaLike):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for layer in self.layers:
            layer.attn.q_proj = LowRank(layer.attn.q_proj)


class EncoderDecoder(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, 0.0, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return tokens(count), tokens(count)

    def loss(self, *batch: Tensor) -> Tensor:
        x = self.transformer(self.shared(batch[0]), self.shared(batch[1][:, :-1]))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), batch[1][:, 1:].flatten())


class Recurrent(LlamaLike):
    def __init__(self) -> None:
        Kind.__init__(self)
        self.embed, self.rnn = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embed(text))[0])


class Images(Kind):
    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, 3, 8, 8), labels(count)

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class ViT(Images):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 2, 2)
        self.pos_embed, self.cls_token = nn.Parameter(torch.zeros(1, 17, WIDTH)), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(heads()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet(Images):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2 = Residual(8, 8), Residual(8, WIDTH, 2)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


class Frozen(ResNet):
    """The same with all but the head frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.fc.requires_grad_(True)


class ConvNextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(WIDTH, WIDTH, 7, 1, 3, groups=WIDTH), nn.LayerNorm(WIDTH)
        self.pwconv1, self.pwconv2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gamma = nn.Parameter(1e-6 * torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1)))))
        return x + (self.gamma * y).movedim(-1, 1)


class ConvNeXt(Images):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, 2)
        self.stages = nn.Sequential(ConvNextBlock(), ConvNextBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean((2, 3))))


class UNet(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, WIDTH, 3, 2, 1), nn.InstanceNorm2d(WIDTH, affine=True), nn.LeakyReLU())
        self.up, self.out = nn.ConvTranspose2d(WIDTH, 8, 2, 2), nn.Conv2d(16, CLASSES, 1)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, 3, 8, 8), torch.randint(CLASSES, (count, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(x)
        return self.out(torch.cat([x, self.up(self.down2(x))], 1))

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Denoiser(UNet):
    """The same network told of a time step."""

    def __init__(self) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 8))
        self.out = nn.Conv2d(16, 3, 1)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, 3, 8, 8),)

    def loss(self, *batch: Tensor) -> Tensor:
        image = batch[0]
        time, noise = torch.rand(len(image), 1, device=image.device), torch.randn_like(image)
        x = self.down1((1 - time[..., None, None]).sqrt() * image + time[..., None, None].sqrt() * noise)
        x = x + self.time_mlp(time)[..., None, None]
        return F.mse_loss(self.out(torch.cat([x, self.up(self.down2(x))], 1)), noise)


class ConformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), heads(), nn.LayerNorm(WIDTH)
        self.pointwise = nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.depthwise(F.glu(self.pointwise(self.norm2(x).mT), 1)).mT


class Conformer(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.subsample, self.blocks = nn.Conv1d(8, WIDTH, 3, 2, 1), nn.Sequential(ConformerBlock(), ConformerBlock())
        self.ctc_head = nn.Linear(WIDTH, CLASSES)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, 8, 16), torch.randint(CLASSES, (count, 8))

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self.ctc_head(self.blocks(self.subsample(batch[0]).mT)).mT, batch[1])


class Clicks(Kind):
    """Tables with sparse gradients."""

    sparse = True

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(200, 4, mode="sum", sparse=self.sparse) for _ in range(3))
        self.top = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randint(200, (count, 3)), torch.randint(2, (count,)).float()

    def loss(self, *batch: Tensor) -> Tensor:
        x = torch.cat([table(batch[0][:, [i]]) for i, table in enumerate(self.tables)], 1)
        return F.binary_cross_entropy_with_logits(self.top(x)[:, 0], batch[1])


class DenseClicks(Clicks):
    sparse = False


class Oscillator(Kind):
    """y'' = -y by a smooth network of one coordinate."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
        self.net = nn.Sequential(*layers)

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return (torch.rand(count, 1),)

    def loss(self, *batch: Tensor) -> Tensor:
        x = batch[0].requires_grad_(True)
        y = self.net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return ((bend + y) ** 2).mean() + ((self.net(torch.zeros(1, 1, device=x.device)) - 1) ** 2).mean()


class Table(Kind):
    """Regression of 10 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, 10), torch.randn(count)

    def loss(self, *batch: Tensor) -> Tensor:
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])


class ActorCritic(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, 4), torch.randint(2, (count,)), torch.randn(count)

    def loss(self, *batch: Tensor) -> Tensor:
        states, actions, returns = batch
        values = self.critic(states)[:, 0]
        log_probs = self.actor(states).log_softmax(-1).gather(1, actions[:, None])[:, 0]
        return F.mse_loss(values, returns) - (log_probs * (returns - values.detach())).mean()


class GAN(Kind):
    """Two networks, two optimizers."""

    names = ("generator", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        generator, discriminator = self.names
        setattr(self, generator, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)))
        setattr(self, discriminator, nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)))

    def samples(self, count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, 6),)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        draw, judge = (getattr(self, name) for name in self.names)
        optimizers: Any = self.optimizers()
        gen, disc = optimizers
        drawn = draw(torch.randn(len(batch[0]), 4, device=self.device))
        disc.zero_grad()
        self.manual_backward((F.softplus(-judge(batch[0])) + F.softplus(judge(drawn.detach()))).mean())
        disc.step()
        gen.zero_grad()
        self.manual_backward(F.softplus(-judge(drawn)).mean())
        gen.step()


class ShortNamesGAN(GAN):
    names = ("gen", "disc")


OF_RECIPE: dict[str, type[Kind]] = {
    "gpt": GPT,
    "gpt-muon": LlamaLike,
    "bert-finetune": Bert,
    "lora": Adapted,
    "t5": EncoderDecoder,
    "lstm": Recurrent,
    "vit": ViT,
    "resnet": ResNet,
    "convnext": ConvNeXt,
    "vision-finetune": ResNet,
    "linear-probe": Frozen,
    "segmentation": UNet,
    "gan": GAN,
    "diffusion": Denoiser,
    "speech": Conformer,
    "sparse-embeddings": Clicks,
    "pinn": Oscillator,
    "mlp": Table,
    "rl-policy-gradient": ActorCritic,
}
"""A model for each recipe."""

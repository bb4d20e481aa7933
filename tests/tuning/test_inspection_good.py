"""Models that are as they should be, of many kinds: a look finds nothing, except for notes."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from examples.char_lm import CharLM
from examples.digits import Digits, DigitsNet
from examples.gan import DigitsGAN
from tests.divergence.trainings import TRAININGS, Module
from tests.helpers import make_trainer


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def look(model: nn.Module, data: Any, loss: Any = F.cross_entropy, **options: Any) -> list[str]:
    inspection = lo.inspect_model(model, data, loss=None if "step" in options else loss, **options)
    assert inspection.error is None
    return [str(finding) for finding in inspection.problems]


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_that_go_well(name):
    training = TRAININGS[name]
    loader = DataLoader(TensorDataset(*training.data()), training.batch_size, shuffle=True)
    trainer = make_trainer(precision=training.precision)
    inspection = lo.inspect_model(Module(training, seed=0), loader, trainer)
    assert [str(finding) for finding in inspection.problems] == []
    assert len(inspection.rows) >= 2
    assert all(row.gradient_rms > 0 for row in inspection.rows if row.weight_gain is not None)


@pytest.mark.parametrize("make", [DigitsNet, DigitsGAN], ids=lambda make: make.__name__)
def test_examples(make):
    inspection = lo.inspect_model(make(), Digits(), make_trainer())
    assert [str(finding) for finding in inspection.findings] == []


def test_the_language_model_of_the_examples():
    text = torch.randint(32, 127, (48, 65))
    loader = DataLoader(text, 16)
    inspection = lo.inspect_model(CharLM(dim=64, num_layers=2), loader, make_trainer())
    assert [str(finding) for finding in inspection.findings] == []


def images(size: int = 32, count: int = 2, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 3, size, size), torch.randint(classes, (16,))) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("test_convnext", {}),
        ("test_vit", {}),
        ("test_efficientnet", {}),
        ("test_mambaout", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 96}),
        ("resnet18", {}),
    ],
)
def test_vision_models_of_timm(name, options):
    timm = pytest.importorskip("timm", exc_type=ImportError)  # which needs torchvision
    size = {"vit_tiny_patch16_224": 32, "test_vit": 160}.get(name, 64)
    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    assert look(model, images(size, 1)) == []


def _causal(transformers: Any) -> Any:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _masked(transformers: Any) -> Any:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    return transformers.BertForMaskedLM(config)


def _llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [_causal, _masked, _llama])
def test_language_models_of_transformers(make):
    transformers = pytest.importorskip("transformers")
    batches = []
    for _ in range(2):
        tokens = torch.randint(100, (8, 16))
        batches.append({"input_ids": tokens, "labels": tokens.clone()})
    assert look(make(transformers), batches, loss=None) == []


def test_a_whole_transformer_of_torch():
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(40, 32), nn.Embedding(40, 32)
            self.transformer = nn.Transformer(32, 2, 2, 2, 64, dropout=0.1, batch_first=True)
            self.head = nn.Linear(32, 40)

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.head(self.transformer(self.source(pair[0]), self.target(pair[1]))).flatten(0, 1)

    batch = (torch.randint(40, (8, 10)), torch.randint(40, (8, 12)))
    assert look(Translate(), [(batch, torch.randint(40, (96,)))]) == []


class Residual(nn.Module):
    """Residual blocks whose last layer starts at zero, as many do."""

    def __init__(self, depth: int = 6, dim: int = 32, zero: str = "branch") -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, dim), nn.Linear(dim, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(depth)
        )
        block: Any
        for block in self.blocks:
            if zero == "branch":
                nn.init.zeros_(block[-1].weight)
                nn.init.zeros_(block[-1].bias)
        if zero == "head":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def rows(size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 16), torch.randint(10, (size,))) for _ in range(2)]


@pytest.mark.parametrize("zero", ["branch", "head", "none"])
def test_residual_branches_and_heads_that_start_at_zero(zero):
    assert look(Residual(zero=zero), rows()) == []


def test_a_diffusion_transformer_with_all_its_zeros():
    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(dim, elementwise_affine=False)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
            nn.init.zeros_(self.modulation[1].weight)
            nn.init.zeros_(self.modulation[1].bias)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            shift, scale, gate = self.modulation(c).chunk(3, -1)
            return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)

    class DiT(nn.Module):
        def __init__(self, dim: int = 32) -> None:
            super().__init__()
            self.embed, self.time = nn.Linear(16, dim), nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
            self.blocks, self.head = nn.ModuleList(Block(dim) for _ in range(3)), nn.Linear(dim, 16)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
            x, c = self.embed(noisy), self.time(time)
            for block in self.blocks:
                x = block(x, c)
            return self.head(x)

    def step(model: nn.Module, batch: Tensor) -> Tensor:
        time, noise = torch.rand(len(batch), 1), torch.randn_like(batch)
        return F.mse_loss(model((1 - time) * batch + time * noise, time), noise - batch)

    assert look(DiT(), [torch.randn(32, 16) for _ in range(2)], step=step) == []


def test_low_rank_adapters():
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Parameter(torch.randn(4, base.in_features) / base.in_features**0.5)
            self.b = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.T @ self.b.T

    model = nn.Sequential(LoRA(nn.Linear(16, 32)), nn.ReLU(), LoRA(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 10))
    assert look(model, rows()) == []


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.ELU, nn.PReLU])
def test_shallow_networks_of_any_activation(activation):
    model = nn.Sequential(nn.Linear(16, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10))
    assert look(model, rows()) == []


def test_deep_networks_with_batch_norm():
    layers: list[nn.Module] = []
    for index in range(12):
        layers += [nn.Linear(32 if index else 16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(inplace=True)]
    assert look(nn.Sequential(*layers, nn.Linear(32, 10)), rows()) == []


def test_deep_networks_after_he():
    layers: list[nn.Module] = []
    for index in range(12):
        linear = nn.Linear(64 if index else 16, 64)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    assert look(nn.Sequential(*layers, nn.Linear(64, 10)), rows()) == []


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_networks(cell):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = (
                nn.Embedding(50, 16),
                cell(16, 32, 2, batch_first=True),
                nn.Linear(32, 10),
            )

        def forward(self, text: Tensor) -> Tensor:
            return self.head(self.cell(self.embed(text))[0][:, -1])

    assert look(Net(), [(torch.randint(50, (32, 12)), torch.randint(10, (32,)))]) == []


def test_a_physics_informed_network():
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def step(model: nn.Module, batch: Tensor) -> Tensor:
        points = batch.clone().requires_grad_()
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        residual = slope[:, 1:] + u * slope[:, :1]
        start = model(torch.cat((batch[:, :1], torch.zeros(len(batch), 1)), 1))
        return F.mse_loss(residual, torch.zeros_like(residual)) + F.mse_loss(start, -torch.sin(batch[:, :1]))

    assert look(net, [torch.rand(64, 2) * 2 - 1 for _ in range(2)], step=step) == []


def test_sinusoidal_networks():
    class Siren(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)])
            for index, layer in enumerate(self.layers):
                bound = 1 / 2 if index == 0 else (6 / 64) ** 0.5 / 30
                nn.init.uniform_(layer.weight, -bound, bound)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:-1]:
                x = torch.sin(30 * layer(x))
            return self.layers[-1](x)

    data = [(torch.rand(128, 2) * 2 - 1, torch.rand(128, 1)) for _ in range(2)]
    assert look(Siren(), data, loss=F.mse_loss) == []


def test_a_variational_autoencoder():
    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
            self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_var = self.encoder(x).chunk(2, -1)
            return self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var

    def step(model: nn.Module, batch: Tensor) -> Tensor:
        drawn, mean, log_var = model(batch)
        kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        return (F.binary_cross_entropy(drawn, batch, reduction="sum") + kl) / len(batch)

    assert look(VAE(), [torch.rand(32, 64) for _ in range(2)], step=step) == []


def test_contrastive_learning_with_labels_of_its_own():
    encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
    frozen = copy.deepcopy(encoder)
    model = nn.ModuleDict({"query": encoder, "key": frozen})  # the keys' encoder is an average, and never trained

    def step(model: Any, batch: Tensor) -> Tensor:
        q = F.normalize(model["query"](batch + 0.1 * torch.randn_like(batch)), dim=1)
        with torch.no_grad():
            k = F.normalize(model["key"](batch), dim=1)
        scores = torch.cat(((q * k).sum(1, keepdim=True), q @ torch.randn(32, 63) / 32**0.5), 1) / 0.2
        return F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.long))

    assert look(model, [torch.randn(32, 16) for _ in range(2)], step=step) == []


def test_q_learning_with_a_target_network():
    online = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    model = nn.ModuleDict({"online": online, "target": copy.deepcopy(online)})

    def step(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        state, action, reward, after = batch
        value = model["online"](state).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            wanted = reward + 0.99 * model["target"](after).max(1).values
        return F.smooth_l1_loss(value, wanted)

    batch = torch.randn(64, 4), torch.randint(2, (64,)), torch.ones(64), torch.randn(64, 4)
    assert look(model, [batch], step=step) == []


def test_a_mixture_of_experts():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 10)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(8)
            )
            with torch.no_grad():
                self.gate.bias[5] = -100  # an expert that no sample goes to

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            weight, chosen = self.gate(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                sample, place = torch.where(chosen == index)
                if len(sample):
                    out.index_add_(0, sample, expert(x[sample]) * weight[sample, place, None])
            return self.head(x + out)

    assert look(Mixture(), rows()) == []


def test_fine_tuning_with_most_layers_frozen():
    model = Residual(zero="none")
    model.requires_grad_(False)
    model.blocks[-1].requires_grad_(True)
    model.head.requires_grad_(True)
    assert look(model, rows()) == []
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)  # biases and norms only
    assert look(model, rows()) == []


def test_a_frozen_backbone_between_an_adapter_and_a_head():
    backbone = [part for _ in range(3) for part in (nn.Linear(32, 32), nn.ReLU())]
    for part in backbone:
        part.requires_grad_(False)
    assert look(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), *backbone, nn.Linear(32, 10)), rows()) == []


def test_large_weights_before_a_normalisation():
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.normal_(model[0].weight, std=5.0)
    assert look(model, rows()) == []


def test_a_stem_that_is_frozen_and_norms_that_are():
    model: Any = Residual(zero="none")
    model.stem.requires_grad_(False)
    for block in model.blocks:
        block[0].requires_grad_(False)
    assert look(model, rows()) == []


def test_images_to_images_and_several_losses():
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
            self.up, self.out = nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.Conv2d(19, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            low = F.relu(self.down(x))
            return self.out(torch.cat((x, F.relu(self.up(F.relu(self.middle(low))))), 1))

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        dice = 1 - (logits.softmax(1) * F.one_hot(batch[1], 5).movedim(-1, 1)).mean()
        return F.cross_entropy(logits, batch[1]) + dice

    data = [(torch.randn(4, 3, 16, 16), torch.randint(5, (4, 16, 16))) for _ in range(2)]
    assert look(UNet(), data, step=step) == []
    assert look(UNet(), data) == []


def test_losses_over_tokens_of_which_most_are_ignored():
    model = nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 50), nn.Flatten(0, 1))
    data = []
    for _ in range(2):
        labels = torch.randint(50, (8, 16))
        labels[torch.rand(8, 16) > 0.15] = -100
        data.append((torch.randint(50, (8, 16)), labels.flatten()))
    assert look(model, data) == []


def test_sums_over_tokens_divided_by_hand():
    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum") / len(targets)

    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    assert look(model, rows(), loss=mean) == []


def test_a_module_with_several_optimizers_and_a_penalty_of_gradients():
    class Critic(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.gen = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
            self.critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            gen, critic = self.optimizers()  # type: ignore[attr-defined]
            real = batch[0]
            self.toggle_optimizer(critic)
            fake = self.gen(torch.randn(len(real), 8)).detach()
            mixed = torch.lerp(real, fake, torch.rand(len(real), 1)).requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
            loss = self.critic(fake).mean() - self.critic(real).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()
            critic.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(critic, 1.0)
            critic.step()
            self.untoggle_optimizer(critic)
            gen.zero_grad()
            self.manual_backward(-self.critic(self.gen(torch.randn(len(real), 8))).mean())
            gen.step()
            self.log("critic", loss)

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters()) for part in (self.gen, self.critic)]

    loader = DataLoader(TensorDataset(torch.randn(64, 16)), 16)
    assert lo.inspect_model(Critic(), loader, make_trainer()).findings == []


class _Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(torch.sparse.mm(edges, F.relu(self.first(torch.sparse.mm(edges, x)))))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_graph_network_with_sparse_edges(layout):
    edges = (torch.rand(50, 50) < 0.1).float()
    edges = (edges / edges.sum(1, keepdim=True).clamp(min=1)).to_sparse(layout=layout)
    data = [(torch.randn(50, 16), edges, torch.randint(4, (50,)))] * 2
    assert look(_Graph(), data, step=lambda model, batch: F.cross_entropy(model(*batch[:2]), batch[2])) == []


def test_a_bottleneck_of_four_units_most_of_which_are_flat_by_chance():
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 10))
    with torch.no_grad():
        model[0].bias[:3] = -20.0
    data = [(torch.randn(64, 16), torch.randint(10, (64,))) for _ in range(2)]
    assert look(model, data) == []

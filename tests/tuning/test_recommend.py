"""`recommend` looks at a model, names the recipe of its kind, and leaves everything as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.tuning.recipes import RECIPES, recommend
from tests.helpers import Net
from tests.tuning import kinds
from tests.tuning.kinds import OF_RECIPE

EXPECTED = {
    kinds.GPT: ["gpt", "gpt-muon"],
    kinds.LlamaLike: ["gpt", "gpt-muon"],
    kinds.Bert: ["bert-finetune"],
    kinds.Adapted: ["lora"],
    kinds.EncoderDecoder: ["t5"],
    kinds.Recurrent: ["lstm"],
    kinds.ViT: ["vit"],
    kinds.ResNet: ["resnet"],
    kinds.Frozen: ["linear-probe"],
    kinds.ConvNeXt: ["convnext"],
    kinds.UNet: ["segmentation"],
    kinds.Denoiser: ["diffusion"],
    kinds.Conformer: ["speech"],
    kinds.Clicks: ["sparse-embeddings"],
    kinds.DenseClicks: ["sparse-embeddings"],
    kinds.Oscillator: ["pinn", "mlp"],
    kinds.Table: ["mlp"],
    kinds.ActorCritic: ["rl-policy-gradient"],
    kinds.GAN: ["gan"],
    kinds.ShortNamesGAN: ["gan"],
}


def names(model):
    return [each.recipe for each in recommend(model)]


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_the_recipe_of_each_kind(kind):
    found = recommend(kind())
    assert [each.recipe for each in found] == EXPECTED[kind]
    for each in found:
        assert each.recipe in RECIPES
        assert re.match(r"[A-Z0-9].*\.$", each.reason)
        assert any("parameters" in fact for fact in each.seen)


def test_each_recipe_is_recommended_for_a_model_of_its_kind():
    missing = [name for name, kind in OF_RECIPE.items() if name not in names(kind())]
    assert missing == ["vision-finetune"]  # Nothing tells whether weights are pretrained, unless some are frozen.


def test_nothing_changes():
    for kind in EXPECTED:
        model = kind()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()
        }
        trained = [param.requires_grad for param in model.parameters()]
        random = torch.get_rng_state()
        recommend(model)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
        after = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()
        }
        assert after == hooks
        assert [param.requires_grad for param in model.parameters()] == trained
        assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(
    "attention", ["c_attn", "qkv", "query_key_value", ("query", "key"), ("wq", "wk"), ("to_q", "to_kv")]
)
def test_attention_is_known_by_its_projections(attention):
    wanted = (attention,) if isinstance(attention, str) else attention
    block = nn.ModuleDict({name: nn.Linear(16, 16) for name in wanted})
    model = nn.ModuleDict({"wte": nn.Embedding(99, 16), "h": nn.ModuleList([block]), "lm_head": nn.Linear(16, 99)})
    assert names(model) == ["gpt", "gpt-muon"]


def test_the_rate_by_size_is_in_the_reason():
    (first, _) = recommend(kinds.LlamaLike())
    assert re.search(r"lr \d\.\de-0\d", first.reason)
    assert "vocabulary of 64" in first.reason


def test_the_parts_of_a_gan_are_named():
    (found,) = recommend(kinds.ShortNamesGAN())
    assert "part: gen " in found.reason
    assert "part: disc " in found.reason
    assert "manual optimization" in found.seen


def test_several_networks_of_a_role_and_their_paths():
    inside = nn.Module()
    for name in ("netG_A", "netG_B", "netD_A", "netD_B"):
        setattr(inside, name, nn.Linear(2, 2))
    model = nn.Module()
    model.nets = inside
    (found,) = recommend(model)
    assert "part: [nets.netG_A, nets.netG_B] for the generator" in found.reason
    assert "part: [nets.netD_A, nets.netD_B] for the discriminator" in found.reason


def test_a_discriminator_beside_an_autoencoder():
    model = kinds.GAN()
    model.encoder, model.decoder = model.generator, nn.Linear(6, 6)
    del model.generator
    assert "part: [encoder, decoder] for the generator" in recommend(model)[0].reason
    model.automatic_optimization = True  # one optimizer: nothing tells that it is one
    assert names(model) == ["mlp"]


def test_sparse_gradients_are_named():
    (found,) = recommend(kinds.Clicks())
    assert "'tables.0'" in found.reason
    assert "sparse gradients of 'tables.2'" in found.seen


def test_lazy_layers():
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    (found,) = recommend(lazy)
    assert found.recipe == "resnet"
    assert "no shape yet" in found.reason
    assert isinstance(lazy[0].weight, nn.parameter.UninitializedParameter)


def test_parameters_in_16_bits():
    (found, _) = recommend(kinds.LlamaLike().bfloat16())
    assert "kahan_sum" in found.reason
    assert "parameters in bfloat16" in found.seen


def test_on_the_meta_device():
    with torch.device("meta"):
        model = kinds.ViT()
    assert names(model) == ["vit"]


def test_part_of_a_pretrained_model_frozen():
    text, images = kinds.Bert(), kinds.ResNet()
    text.encoder.embeddings.requires_grad_(False)
    text.encoder.layer[0].requires_grad_(False)
    images.layer2.requires_grad_(False)
    assert names(text) == ["bert-finetune"]
    assert names(images) == ["vision-finetune"]


def test_a_teacher_and_a_measure_are_no_frozen_part():
    model = kinds.ResNet()
    model.teacher = kinds.ResNet().requires_grad_(False)
    model.perceptual = kinds.GPT().requires_grad_(False)
    assert recommend(model)[0] == recommend(kinds.ResNet())[0]


def test_embeddings_that_are_no_tokens():
    model = kinds.Conformer()
    model.hour_embedding, model.pos_embed = nn.Embedding(24, 16), nn.Embedding(500, 16)
    assert names(model) == ["speech"]


def test_images_and_text():
    model = kinds.ViT()
    model.text = kinds.Bert().encoder
    assert names(model) == ["vit"]


def test_patches_that_linear_layers_mix():
    mixer = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16))
    assert names(mixer) == ["vit"]


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm and its activation in one, as timm has it."""


def test_norms_are_known_by_their_classes():
    norm, other = BatchNormAct2d(8), nn.SyncBatchNorm(8)
    assert recommend(nn.Sequential(nn.Conv2d(3, 8, 3), norm))[0].reason == "Convolutions with BatchNorm."
    assert recommend(nn.Sequential(nn.Conv2d(3, 8, 3), other))[0].reason == "Convolutions with BatchNorm."


def test_upsampling_before_a_classifier_is_no_segmentation():
    class Branches(kinds.UNet):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(16, 4)

    assert names(Branches()) == ["resnet"]


def test_a_small_classifier_of_convolutions_and_wide_linear_layers():
    lenet = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.Flatten(), nn.Linear(400, 120))
    assert names(lenet) == ["resnet"]


def test_models_without_known_layers():
    assert recommend(nn.Identity()) == []
    assert recommend(nn.ParameterList([nn.Parameter(torch.ones(3))])) == []
    with pytest.raises(TypeError, match="model"):
        recommend("gpt")


def test_the_model_within_a_module_counts():
    class Wrapped(kinds.ResNet):
        def __init__(self):
            super().__init__()
            self.net = kinds.ResNet()

    wrapped = nn.Module()
    wrapped.model = nn.Module()
    wrapped.model.gen, wrapped.model.disc = nn.Linear(3, 3), nn.Linear(3, 1)
    assert names(wrapped) == ["gan"]
    assert names(Wrapped()) == ["resnet"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "resnet"),
        ("vit_tiny_patch16_224", "vit"),
        ("convnext_atto", "convnext"),
        ("mobilenetv3_small_050", "resnet"),
        ("efficientnet_b0", "resnet"),
        ("densenet121", "resnet"),
        ("nfnet_f0", "resnet"),
        ("hrnet_w18_small", "resnet"),
        ("swin_tiny_patch4_window7_224", "vit"),
        ("mobilevit_xxs", "vit"),
        ("resmlp_12_224", "vit"),
        ("mixer_s32_224", "vit"),
    ],
)
def test_models_of_timm(name, expected):
    pytest.importorskip("torchvision")  # which its models want; without it another test may have made a stub of timm
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert names(timm.create_model(name))[0] == expected


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        ("GPT2Config", "GPT2LMHeadModel", "gpt"),
        ("LlamaConfig", "LlamaForCausalLM", "gpt"),
        ("BertConfig", "BertForSequenceClassification", "bert-finetune"),
        ("T5Config", "T5ForConditionalGeneration", "t5"),
        ("ViTConfig", "ViTForImageClassification", "vit"),
        ("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel", "speech"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "speech"),
        ("MambaConfig", "MambaForCausalLM", "gpt"),
    ],
)
def test_models_of_transformers(config, model, expected):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)())
    assert names(built)[0] == expected


def test_the_plan_names_the_recipe_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--optim.optimizer=adamw"]
    main(["plan", "--model", "tests.tuning.kinds.ViT", *flags])
    lines = capfd.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("Recommended: ")]
    assert line == "Recommended: lightning-optim recipe vit (2 attention layers over image patches)"


def test_every_reason_fits_the_help_of_the_public_name():
    assert lo.recommend is recommend
    assert recommend(Net())[0].recipe == "mlp"

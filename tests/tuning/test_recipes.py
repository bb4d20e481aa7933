"""Recipes: every number has a source, and each is a configuration that parses, plans and trains a model of its kind."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

import lightning_optim as lo
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.cli import main
from lightning_optim.cli.keys import KEYS
from lightning_optim.cli.optim_cli import PlanningTrainer
from lightning_optim.tuning.recipes import RECIPES, Batch, base
from tests.helpers import make_trainer
from tests.pages import DOCS
from tests.tuning import kinds
from tests.tuning.kinds import OF_RECIPE

BRIEF = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
BRIEF += ["--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
NUMBER = re.compile(r"(?<![\w.])-?\d[\d.]*(e[+-]?\d+)?(?!\w)%?")


@pytest.fixture(params=RECIPES)
def name(request):
    return request.param


def path_of(cls):
    return f"tests.tuning.kinds.{cls.__name__}"


@pytest.fixture
def written(name, tmp_path, monkeypatch, capfd):
    """The recipe as the command prints it, in a file."""
    main(["recipe", name])
    path = tmp_path / "run.yaml"
    path.write_text(capfd.readouterr().out)
    monkeypatch.chdir(tmp_path)
    return path


def test_there_is_a_model_of_each_kind():
    assert list(OF_RECIPE) == list(RECIPES)


def test_each_number_has_a_source_and_each_source_serves(name):
    recipe = lo.recipe(name)
    used = set()
    for line in recipe.settings_yaml.splitlines():
        setting, _, comment = line.partition("  #")
        keys = re.findall(r"\[(\w+)\]", comment)
        assert keys or not NUMBER.search(setting), f"no source: {line}"
        used |= set(keys)
    for text in (*recipe.advice, str(recipe.batch or "")):
        used |= set(re.findall(r"\[(\w+)[^]\d\s]*(?:, [^]]*)?\](?!\w)", text)) - {"no_decay"}
    assert used >= recipe.sources.keys(), "a source that nothing is from"
    assert used - recipe.sources.keys() == set(), "a key without its source"
    for source in recipe.sources.values():
        assert re.search(r"(19|20)\d\d, https://\S+", source), source


def test_the_text_fits_a_screen_and_is_whole(name):
    recipe = lo.recipe(name)
    assert max(map(len, recipe.yaml.splitlines())) <= 120
    assert recipe.yaml.isascii()  # whatever the encoding of a file that a shell writes
    assert yaml.safe_load(recipe.yaml) == recipe.settings
    assert recipe.yaml.startswith(f"# Recipe {name}: ")
    assert all(key in ("trainer", *KEYS) for key in recipe.settings)


def test_the_keys_are_those_of_the_command_line():
    assert base._KEYS == KEYS


def test_it_parses_and_plans_and_its_objects_are_those_of_the_command_line(name, written, monkeypatch, capfd):
    made = []
    plan_of = PlanningTrainer.plan
    monkeypatch.setattr(
        PlanningTrainer, "plan", lambda self, *args, **kw: made.extend(self.callbacks) or plan_of(self, *args, **kw)
    )
    main(["plan", "--config", str(written), "--model", path_of(OF_RECIPE[name]), *BRIEF])
    plan = capfd.readouterr().out
    assert "No conflicts." in plan
    assert "is usual" not in plan  # a note on a rate
    recipe = lo.recipe(name)
    if recipe.lr is not None:
        assert re.search(rf" {recipe.lr:.4g} ", plan)
    objects = recipe.callbacks()
    kinds_of = [type(callback) for callback in objects]
    given = [each for each in made if type(each) in kinds_of]
    assert [type(each) for each in given] == kinds_of
    for same, callback in zip(given, objects, strict=True):
        assert getattr(same, "settings", None) == getattr(callback, "settings", None)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in ("gpt", "gan") else [pytest.mark.slow]) for each in RECIPES]
)
def test_the_command_line_trains_it(written, name):
    main(["fit", "--config", str(written), "--model", path_of(OF_RECIPE[name]), "--trainer.fast_dev_run=3", *BRIEF])


def test_its_objects_train_it(name):
    recipe, model = lo.recipe(name), OF_RECIPE[name]()
    callbacks = recipe.callbacks()
    lo.attach(model, next(each for each in callbacks if isinstance(each, lo.ConfigureOptimizers)))
    before = [param.detach().clone() for param in model.parameters()]
    precision = {key: value for key, value in recipe.trainer.items() if key == "precision"}
    trainer = make_trainer(callbacks, max_steps=6 if name == "gan" else 3, max_epochs=-1, **precision)
    trainer.fit(model)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert any(moved)
    assert not any(move and not param.requires_grad for param, move in zip(model.parameters(), moved, strict=True))
    assert all(param.isfinite().all() for param in model.parameters())


def test_new_objects_at_each_call():
    recipe = lo.recipe("gpt")
    assert not set(map(id, recipe.callbacks())) & set(map(id, recipe.callbacks()))


def test_frozen_parameters_are_in_no_group():
    plan = make_plan(make_trainer(lo.recipe("lora").callbacks(), max_steps=3), _attached("lora"))
    assert sum(group.numel for group in plan.groups) == 2 * 2 * 2 * kinds.WIDTH


def test_layers_have_their_own_rates():
    plan = make_plan(make_trainer(lo.recipe("bert-finetune").callbacks(), max_steps=3), _attached("bert-finetune"))
    rates = sorted({group.lr for group in plan.groups})
    assert rates == pytest.approx([1e-4 * 0.8**depth for depth in (3, 2, 1, 0)])


def _attached(name):
    model = OF_RECIPE[name]()
    lo.attach(model, lo.recipe(name).callbacks()[0])
    return model


def test_parts_of_several_optimizers(tmp_path, capfd):
    recipe = lo.recipe("gan")
    callbacks = recipe.callbacks({"generator": "gen", "discriminator": "disc"})
    model = kinds.ShortNamesGAN()
    lo.attach(model, callbacks[0])
    make_trainer(callbacks, max_steps=4, max_epochs=-1).fit(model)
    (tmp_path / "run.yaml").write_text(recipe.yaml)
    flags = ["--optim.optimizers.generator.part=gen", "--optim.optimizers.discriminator.part=disc"]
    arguments = ["plan", "--config", str(tmp_path / "run.yaml"), "--model", path_of(kinds.ShortNamesGAN)]
    main([*arguments, *flags, *BRIEF])
    assert "No conflicts." in capfd.readouterr().out
    with pytest.raises(ValueError, match="no optimizer 'generater' in 'gan'"):
        recipe.callbacks({"generater": "gen"})


# Batch sizes.


@pytest.mark.parametrize(
    ("name", "size", "lr"),
    [("resnet", 64, 0.025), ("resnet", 1024, 0.4), ("vit", 256, 2.5e-4), ("convnext", 1024, 2e-3)],
)
def test_the_rate_of_another_batch_size(name, size, lr, capfd):
    scaled = lo.recipe(name).scaled_to(size)
    assert scaled.lr == pytest.approx(lr)
    main(["recipe", name, "--batch-size", str(size)])
    printed = capfd.readouterr().out
    assert printed == scaled.yaml
    assert yaml.safe_load(printed)["optim"]["lr"] == pytest.approx(lr)
    (line,) = [line for line in printed.splitlines() if line.startswith("  lr: ")]
    assert f"B = {size}" in line
    assert {**scaled.settings, "optim": None} == {**lo.recipe(name).settings, "optim": None}


def test_the_own_batch_size_changes_nothing():
    assert lo.recipe("resnet").scaled_to(256).settings == lo.recipe("resnet").settings


@pytest.mark.parametrize(
    ("name", "size", "told"), [("gpt", 8, "no rule"), ("mlp", 8, "none"), ("vit", 0, "at least 1")]
)
def test_a_batch_size_without_a_rule_is_refused(name, size, told, capfd):
    with pytest.raises(ValueError, match=told):
        lo.recipe(name).scaled_to(size)
    with pytest.raises(SystemExit):
        main(["recipe", name, "--batch-size", str(size)])
    assert len(capfd.readouterr().err.splitlines()) <= 6


def test_batch_rules():
    assert Batch(64, "a", rule="sqrt").factor(16) == 0.5
    assert "no source" in str(Batch(64, "a")).lower()


# The command line.


@pytest.mark.parametrize(
    ("given", "told"), [("restnet", "'resnet'"), ("gpt3", "'gpt'"), ("Muon", "gpt-muon"), ("nothing", "Available: ")]
)
def test_an_unknown_recipe_is_told_with_the_nearest(given, told, capfd):
    with pytest.raises(SystemExit) as end:
        main(["recipe", given])
    err = capfd.readouterr().err
    assert end.value.code == 2
    assert told in err
    assert len(err.splitlines()) <= 6
    with pytest.raises(ValueError, match=re.escape(told)):
        lo.recipe(given)


def test_spelling_is_forgiven():
    assert lo.recipe("GPT_Muon") is lo.recipe("gpt-muon")


@pytest.mark.parametrize(
    ("pattern", "names"), [("gpt-muon", ["gpt-muon"]), ("*finetune", ["bert-finetune", "vision-finetune"])]
)
def test_the_list(pattern, names, capfd):
    main(["list", "recipes", pattern])
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line and line[0] != " "] == names
    for name in names:
        recipe = lo.recipe(name)
        assert recipe.optimizer in out
        assert recipe.paper in out


def test_the_page_has_every_recipe_as_it_is():
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.*) \| `(.*)` \| (.*) \| `(.*)` \| (.*) \|$",
        (DOCS / "how-to" / "recipes.md").read_text(),
        re.M,
    )
    expected = []
    for recipe in RECIPES.values():
        links = ", ".join(
            f"[{source.partition(',')[0]}]({re.search(r'https?://[^ ,]+', source)[0]})"
            for key, source in recipe.sources.items()
            if key != "bf16"
        )
        lr = "default" if recipe.lr is None else f"{recipe.lr:g}"
        expected.append((recipe.name, recipe.description, recipe.optimizer, lr, recipe.schedule, links))
    assert rows == expected

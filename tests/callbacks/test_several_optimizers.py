"""Several optimizers of one module, each of a part, by name."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_optim as lo
from lightning_optim.callbacks._followed import names_in
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.cli import main
from lightning_optim.factory.plan_text import format_plan
from tests.helpers import BareNet, Net, TwoOptimizers, batches, make_trainer, read_events

FEET = {"name": "feet", "part": ["body", "norm"], "optimizer": "sgd", "lr": 0.1, "param_groups": []}
TOP = {"name": "top", "part": "head", "optimizer": torch.optim.AdamW, "lr": 0.2, "betas": (0.5, 0.9)}


class Both(TwoOptimizers):
    """Steps all optimizers that it has, each once in a batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([[group["lr"] for group in each.param_groups] for each in self.optimizers()])
        return super().training_step(batch, batch_idx)


def configure(*optimizers, **options):
    return lo.ConfigureOptimizers(optimizers=list(optimizers or (FEET, TOP)), **options)


def fit(callbacks, model=None, count=4, **options):
    trainer = make_trainer(callbacks, **options)
    trainer.fit(model or Both(), batches(count))
    return trainer


@pytest.fixture
def printed(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_each_part_has_its_optimizer_in_the_order_given():
    model = Both()
    trainer = fit([configure(TOP, FEET)], model)
    top, feet = trainer.optimizers
    assert type(top) is torch.optim.AdamW
    assert type(feet) is lo.optim.SGD
    assert [group["param_names"] for group in feet.param_groups] == [
        ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    ]
    assert [group["param_names"] for group in top.param_groups] == [["head.bias"], ["head.weight"]]
    assert {group["betas"] for group in top.param_groups} == {(0.5, 0.9)}
    assert model.seen[0] == [[0.2, 0.2], [0.1]]
    assert len(trainer.lr_scheduler_configs) == 2
    assert names_in(trainer) == ["top", "feet"]


def test_the_weights_are_those_of_optimizers_made_by_hand():
    makes = [lambda params: torch.optim.SGD(params, lr=0.1), lambda params: torch.optim.SGD(params, lr=0.3)]
    model, other = Both(), TwoOptimizers(*makes)
    for each in (model, other):
        each.norm.requires_grad_(False)
    plain = {"optimizer": torch.optim.SGD, "param_groups": [], "optimizer_kwargs": {"fused": False}}
    one, two = {"name": "one", "part": "body", "lr": 0.1}, {"name": "two", "part": "head", "lr": 0.3}
    fit([configure({**one, **plain}, {**two, **plain})], model)
    fit([], other)
    for name, param in model.named_parameters():
        assert torch.equal(param, other.get_parameter(name)), name


def test_in_a_module_it_is_the_same():
    class Own(Both):
        def configure_optimizers(self):
            return lo.OptimizerFactories([lo.PartOptimizer(**FEET), TOP])(self)

    class Bare(Both):
        configure_optimizers = BareNet.configure_optimizers  # type: ignore[assignment]

    own, attached = Own(), Bare()
    lo.attach(attached, lo.OptimizerFactories([FEET, TOP]))
    for model in (own, attached):
        fit([], model)
        assert model.seen[0] == [[0.1], [0.2, 0.2]]


def test_one_optimizer_of_all_parts_does_not_need_manual_optimization():
    trainer = fit([configure({"name": "all", "part": ["body", "norm", "head"]})], Net())
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [2]


def test_automatic_optimization_is_refused_with_what_to_write():
    with pytest.raises(
        ValueError, match=r"2 optimizers \(feet, top\).*automatic_optimization = False.*Net\.__init__"
    ) as caught:
        fit([configure()], Net())
    assert "feet, top = self.optimizers()" in str(caught.value)


class Nested(Both):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
        self.scale = nn.Parameter(torch.ones(()))


def test_parts_are_paths_of_submodules_and_of_parameters():
    optimizers = [
        {**FEET, "part": ["net.encoder", "body", "norm.weight", "norm"]},
        {**TOP, "part": ["head", "net.decoder", "scale"]},
    ]
    feet, top = fit([configure(*optimizers)], Nested()).optimizers
    names = [{name for group in each.param_groups for name in group["param_names"]} for each in (feet, top)]
    assert "net.encoder.weight" in names[0]
    assert len(names[0]) == 6
    assert names[1] == {"head.weight", "head.bias", "net.decoder.weight", "net.decoder.bias", "scale"}


@pytest.mark.parametrize(
    ("feet", "top", "message"),
    [
        ("body nrom", "head", r"Optimizer 'feet': Nested has no part 'nrom'\. Did you mean 'norm"),
        ("body norm", "head net.encodr scale", r"no part 'net\.encodr'. Did you mean 'net\.encoder'"),
        ("body norm", "head net scale norm", "'norm.weight' is in the parts of two optimizers, 'feet' and 'top'"),
        ("body norm", "head scale", r"No optimizer has 'net\.encoder\.weight'.*Add 'net' to a `part`"),
        ("body norm", "head net", "No optimizer has 'scale' of Nested: 'feet' has body and norm"),
    ],
)
def test_parts_that_do_not_fit_the_module_are_refused(feet, top, message):
    with pytest.raises(ValueError, match=message):
        fit([configure({**FEET, "part": feet.split()}, {**TOP, "part": top.split()})], Nested())


def test_rules_that_do_not_fit_are_refused_with_the_name():
    rule = lo.ParamGroupRule(name="x", pattern="zzz")
    with pytest.raises(ValueError, match=r"Optimizer 'top': ParamGroupRule 'x' \(pattern='zzz'\) matches no"):
        fit([configure(FEET, {**TOP, "param_groups": [rule]})])


def test_what_is_frozen_needs_no_optimizer_and_a_tied_weight_one():
    model = Nested()
    model.net.requires_grad_(False)
    model.scale.requires_grad_(False)
    assert len(fit([configure()], model).optimizers) == 2
    tied = Both()
    tied.tied = nn.Linear(8, 8, bias=False)
    tied.tied.weight = tied.body.weight
    with pytest.raises(ValueError, match=r"'body\.weight' is in the parts of two optimizers"):
        fit([configure(FEET, {**TOP, "part": ["head", "tied"]})], tied)


@pytest.mark.parametrize(
    ("optimizers", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ("feet", TypeError, "it must be a list"),
        ({"feet": FEET}, TypeError, "it must be a list"),
        ([3], TypeError, r"optimizers\[0\]=3"),
        ([FEET, FEET], ValueError, "Two optimizers are called 'feet'"),
        ([{**FEET, "prt": "x"}], ValueError, r"Unknown key 'prt' in optimizers\[0\]. Did you mean 'part'"),
        ([{"part": "body"}], ValueError, r"optimizers\[0\] has no 'name'"),
        ([{"name": "a"}], ValueError, r"optimizers\[0\] has no 'part'"),
        ([{"name": "a.b", "part": "body"}], ValueError, "Invalid name='a.b'"),
        ([{"name": "0", "part": "body"}], ValueError, "Invalid name='0'"),
        ([{"name": "a", "part": []}], ValueError, r"Invalid part=\[\]"),
        ([FEET, {**TOP, "optimizer": "adm"}], ValueError, "Optimizer 'top': Unknown optimizer 'adm'"),
        ([FEET, {**TOP, "optimizer_kwargs": {"betas": (0.1, 0.2)}}], ValueError, "'betas' is given twice"),
        ([{**FEET, "betas": (0.1, 0.2)}], ValueError, "Optimizer 'feet': SGD has no option 'betas'"),
    ],
)
def test_wrong_lists_are_refused_at_once(optimizers, error, message):
    with pytest.raises(error, match=message):
        lo.ConfigureOptimizers(optimizers=optimizers)


def test_arguments_of_one_optimizer_do_not_go_with_several():
    with pytest.raises(ValueError, match=r"lr, schedule given in addition to optimizers=.*write them into each"):
        lo.ConfigureOptimizers(lr=0.1, schedule="cosine", optimizers=[FEET])
    with pytest.raises(ValueError, match="several optimizers"):
        configure().build(Net())


def test_limits_of_clipping_go_by_name():
    class Lengths(Both):
        """Counts how far each part moves."""

        def training_step(self, batch, batch_idx):
            before = [param.detach().clone() for param in self.parameters()]
            super().training_step(batch, batch_idx)
            moved = [(param - old).square().sum() for param, old in zip(self.parameters(), before, strict=True)]
            self.moved = [sum(moved[:4]).sqrt().item(), sum(moved[4:]).sqrt().item()]

    plain = {"optimizer": "sgd", "lr": 1.0, "param_groups": []}
    optimizers = [{"name": "feet", "part": ["body", "norm"], **plain}, {"name": "top", "part": "head", **plain}]
    for limits, expected in (({"feet": 1e-3, "top": 1e-2}, [1e-3, 1e-2]), ({"top": 1e-2, "feet": None}, [None, 1e-2])):
        model = Lengths()
        fit([configure(*optimizers), lo.GradientClipping(max_norm=limits)], model, count=1)
        for moved, limit in zip(model.moved, expected, strict=True):
            assert moved == pytest.approx(limit, rel=1e-4) if limit else moved > 0.05


def test_limits_by_name_with_another_method():
    clipping = lo.GradientClipping({"feet": 0.5, "top": 2.0}, method="group_norm")
    fit([configure(), clipping])
    assert [clipping.clip_rule_of(name, ["feet", "top"]).max_norm for name in ("feet", "top")] == [0.5, 2.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"feet": 1.0, "topp": 1.0}, "'topp', and there is none. Did you mean 'top'"),
        ({"feet": 1.0}, "no limit for the optimizer 'top'.*top: None"),
    ],
)
def test_limits_that_do_not_fit_are_refused_before_the_first_step(limits, message):
    clipping = lo.GradientClipping(max_norm=limits)
    model = Both()
    with pytest.raises(MisconfigurationException, match=message):
        fit([configure(), clipping], model)
    assert model.seen == []
    plan = make_plan(make_trainer([configure(), lo.GradientClipping(max_norm=limits)]), _with_data(Both()))
    assert any(limit_name in plan.conflicts[0] for limit_name in ("topp", "'top'"))


def test_limits_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one optimizer"):
        lo.GradientClipping(max_norm={"feet": None})
    with pytest.raises(ValueError, match="max_norm"):
        lo.GradientClipping(max_norm={"feet": -1.0})


def test_optimizers_without_a_name_are_numbers():
    model = TwoOptimizers(lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = fit([lo.GradientClipping(max_norm={"0": 1.0, "1": None})], model)
    assert names_in(trainer) == ["0", "1"]


def _with_data(model):
    model.train_dataloader = lambda: batches(4)
    return model


def test_monitor_guard_summary_and_plan_say_the_names(logger, capsys, monkeypatch):
    model = Both(factor=lambda index, batch_idx: float("nan") if (index, batch_idx) == (1, 2) else 1.0)
    parts = [configure(), lo.GradientClipping(1e-3), lo.DivergenceGuard(), lo.OptimizerMonitor(), lo.RunSummary()]
    with pytest.warns(UserWarning, match="Step 2 skipped: top: "):
        fit(parts, model, logger=logger)
    events = read_events(logger.log_dir)
    assert events["optim_lr/feet.default"][0][1] == pytest.approx(0.1)
    assert events["optim_lr/top.no_decay"][0][1] == pytest.approx(0.2)
    assert {"optim_grad_norm/feet.total", "optim_grad_norm/top.total"} <= events.keys()
    assert not [tag for tag in events if "/0." in tag or "/1." in tag]
    assert parts[2].report.entries[0].text.startswith("top: ")
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") > 2}
    assert (lines["feet: steps skipped"], lines["top: steps skipped"]) == ("0", "1")
    assert lines["feet: steps clipped"] == "100.0% of 4"
    assert {"feet.default", "top.no_decay", "top.default"} <= lines.keys()

    plan = make_plan(make_trainer([configure(), lo.GradientClipping({"feet": 1.0, "top": None})]), _with_data(Both()))
    assert plan.conflicts == []
    assert [group.name for group in plan.groups] == ["feet.default", "top.no_decay", "top.default"]
    assert [curve.label.split(":")[0] for curve in plan.curves] == ["feet", "top"]
    assert "top.no_decay" in format_plan(plan)


def test_an_optimizer_that_replaces_another_has_its_name():
    class Renews(Both):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                feet = self.trainer.optimizers[0]
                self.trainer.optimizers = [feet, torch.optim.SGD(self.head.parameters(), lr=0.5)]
            if self.current_epoch == 2:
                self.trainer.optimizers = copy.deepcopy(self.trainer.optimizers[::-1])[::-1]

        def on_train_batch_start(self, batch, batch_idx):
            assert names_in(self.trainer) == ["feet", "top"]

    fit([lo.GradientClipping({"feet": 1.0, "top": None}), configure()], Renews(), max_epochs=2)


def test_names_are_in_checkpoints_and_another_order_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    trainer = fit([configure(), lo.GradientClipping(1.0)])
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["lightning_optim"]["optimizers"] == ["feet", "top"]
    again = make_trainer([configure(on_resume="config"), lo.GradientClipping(1.0)], max_epochs=2)
    again.fit(Both(), batches(4), ckpt_path=path)
    assert again.global_step == 16
    with pytest.raises(ValueError, match=r"the optimizers feet, top, in this order, and the configuration top, feet"):
        make_trainer([configure(TOP, FEET)], max_epochs=2).fit(Both(), batches(4), ckpt_path=path)


class GAN(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        _gen, _disc = self.optimizers()  # type: ignore[attr-defined]
        raise AssertionError("it has got two")

    def configure_optimizers(self):
        return [torch.optim.Adam(self.body.parameters()), torch.optim.Adam(self.head.parameters())]


class Indexes(GAN):
    def training_step(self, batch, batch_idx):
        self.optimizers()[1].step()  # type: ignore[index]


class Other(GAN):
    def training_step(self, batch, batch_idx):
        raise TypeError("cannot unpack non-iterable NoneType object")


@pytest.mark.parametrize("model", [GAN(), Indexes()])
def test_one_optimizer_for_a_module_of_two_is_explained(model, printed):
    with pytest.raises(
        TypeError, match=r"makes one optimizer.*optimizers=\[\{\"name\": \"generator\", \"part\": \"gen\""
    ):
        fit([lo.ConfigureOptimizers("adam", lr=0.1)], model)
    assert "optimizes manually, and `self.optimizers()` returns this one optimizer" in printed.text


def test_too_few_of_several_are_named():
    with pytest.raises(TypeError, match=r"it returns 1: all\."):
        fit([configure({"name": "all", "part": ["body", "norm", "head"]})], GAN())


def test_an_error_of_the_users_own_is_left_alone(printed):
    with pytest.raises(TypeError, match=r"^cannot unpack non-iterable NoneType object$"):
        fit([lo.ConfigureOptimizers("adam", lr=0.1)], Other())
    printed.clear()
    fit([lo.ConfigureOptimizers("adam", lr=0.1)], Net())
    assert "manually" not in printed.text


@pytest.mark.filterwarnings("ignore:lr=")
def test_from_yaml(tmp_path, capsys):
    part = {"lr": 0.1, "optimizer": {"class_path": "lightning_optim.optim.Adam", "init_args": {"betas": [0.5, 0.9]}}}
    optimizers = [
        {"name": "feet", "part": ["body", "norm"], "optimizer": "adam", "lr": 0.1, "betas": [0.5, 0.999],
         "param_groups": [{"name": "norms", "module_types": ["LayerNorm"], "lr_multiplier": 2}]},
        {"name": "top", "part": "head", "schedule": {"class_path": "lightning_optim.schedules.Cosine",
         "init_args": {"warmup": "10%"}}, **{"optimizer": part["optimizer"]}},
    ]  # fmt: skip
    callbacks = [
        {"class_path": "lightning_optim.ConfigureOptimizers", "init_args": {"optimizers": optimizers}},
        {"class_path": "lightning_optim.GradientClipping", "init_args": {"max_norm": {"feet": 1.0, "top": None}}},
    ]
    config = {
        "model": {"class_path": "tests.callbacks.test_several_optimizers.Both"},
        "data": {"class_path": "tests.helpers.Data"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": callbacks},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["plan", "--config", str(path)])
    out = capsys.readouterr().out
    assert "No conflicts." in out
    assert "feet.norms" in out
    assert "top: lr of group" in out


def test_schedules_of_each_kind_and_groups_that_join():
    class Grows(Both):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.more = nn.Linear(2, 2)
                self.trainer.optimizers[1].add_param_group({"params": self.more.parameters(), "lr": 0.1})

    plateau = lo.schedules.ReduceOnPlateau(monitor="val_loss")
    step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}
    trainer = make_trainer([configure({**FEET, "schedule": plateau}, {**TOP, "schedule": step_lr})], max_epochs=2)
    trainer.fit(Grows(), batches(2), batches(1))
    assert [type(each.scheduler).__name__ for each in trainer.lr_scheduler_configs] == [
        "Scheduler",
        "Observer",
        "StepLR",
    ]
    assert trainer.optimizers[1].param_groups[-1]["param_names"] == ["more.weight", "more.bias"]

"""State in checkpoints belongs to parameters and optimizers by name, has a version, and says what it cannot read."""

from __future__ import annotations

import copy

import pytest
import torch

import lightning_optim as lo
from lightning_optim.callbacks._followed import places_of
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.clipping import AdaGC, Clipper
from lightning_optim.core.state_version import VERSION
from lightning_optim.core.stats import GradStats
from lightning_optim.divergence import StepGuard
from lightning_optim.divergence.step_log import StepLog
from tests.clip_rules import OF_NET
from tests.helpers import Net, SaveAt, StatefulLoader, TwoOptimizers, bit_equal, make_trainer

COUNT = 12
ADAPTIVE = ["adagc", "autoclip", "zclip", "momentum_ratio", "update_rms"]
REGROUPED = [
    lo.ParamGroupRule(name="head", pattern=r"^head"),
    lo.ParamGroupRule(name="norm", pattern=r"norm\.bias"),
]


def _fit(rule, model=None, extra=(), ckpt_path=None, **options):
    options = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "param_groups": [], **options}
    parts = [lo.ConfigureOptimizers(**options), lo.GradientClipping(method=OF_NET[rule]()), lo.DivergenceGuard()]
    model, trainer = model or Net(), make_trainer([*parts, *extra])
    trainer.fit(model, StatefulLoader(COUNT, []), ckpt_path=ckpt_path)
    return model, trainer


def _by_name(trainer):
    (clip,) = state_of_last_fit(trainer)["lightning_optim"]["clip"]
    names = [name for group in trainer.optimizers[0].param_groups for name in group["param_names"]]
    values = dict(clip["state"])
    for key in ("gamma", "flags"):
        if key in values and values[key].dim() and len(values[key]) == len(names):
            values[key] = dict(zip(names, values[key].tolist(), strict=True))
    return values


def _as_of_old(path):
    """Make a checkpoint what version 0.1 saved."""
    checkpoint = torch.load(path, weights_only=True)
    ours = checkpoint["lightning_optim"]
    del ours["version"], ours["names"], checkpoint["lightning_optim.divergence_guard"]["version"]
    for clip in ours["clip"]:
        clip.pop("names", None)
        del clip["version"]
    for state in checkpoint["optimizer_states"]:
        del state["optimizer_class"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("rule", ADAPTIVE)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("say", ["checkpoint", "config"])
def test_clip_state_follows_its_parameters_into_other_groups(rule, old, say, tmp_path):
    whole, first = _fit(rule, extra=[SaveAt(6, path := tmp_path / "a.ckpt")])
    if old:
        _as_of_old(path)
    model, second = _fit(rule, ckpt_path=path, param_groups=REGROUPED, on_resume=say)
    names = [[n for g in t.optimizers[0].param_groups for n in g["param_names"]] for t in (first, second)]
    assert names[0] != names[1]
    expected, found = _by_name(first), _by_name(second)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert found[key] == pytest.approx(value, rel=1e-4)
            assert len(set(value.values())) > 1 or key == "flags"
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    counts = [state_of_last_fit(t)["lightning_optim"]["counts"] for t in (first, second)]
    assert counts[0] == counts[1]


def _stats(values):
    return GradStats(torch.tensor(values), (len(values),), places=None)


def _clipper(names, saved=None):
    clipper = Clipper(AdaGC(max_norm=1e9, warmup=1), names=lambda: names)
    if saved is not None:
        clipper.load_state_dict(saved)
    return clipper


def _step(clipper, values):
    clipper.decide(_stats(values), 0, len(values), torch.device("cpu"))
    clipper.commit(torch.tensor(True))
    return clipper.state_dict()


def test_parameters_that_are_new_or_gone_leave_the_state_of_the_others():
    saved = _step(_clipper(["a", "b", "c"]), [1.0, 4.0, 9.0])
    assert saved["state"]["gamma"].tolist() == [1.0, 2.0, 3.0]
    clipper = _clipper(["new", "c", "a"], saved)
    assert bit_equal(clipper.state_dict(), saved)  # before the first step
    state = _step(clipper, [25.0, 9.0, 1.0])
    assert state["names"] == ["new", "c", "a"]
    assert state["state"]["gamma"].tolist() == pytest.approx([5.0, 3.0, 1.0])
    assert int(state["state"]["steps"]) == 2


@pytest.mark.parametrize("names", [[None, None], ["a", None], ["a", "a"]])
def test_without_a_name_for_each_the_position_decides(names):
    saved = _step(_clipper(["b", "a"]), [1.0, 4.0])
    for state in (saved, {key: saved[key] for key in ("rule", "state")}):  # the latter is of version 1
        assert _step(_clipper(names, state), [1.0, 4.0])["state"]["gamma"].tolist() == pytest.approx([1.0, 2.0])
    assert "names" not in _step(_clipper(names), [1.0, 4.0])


# Several optimizers.


class Two(TwoOptimizers):
    """Each optimizer skips steps of its own; ``swapped`` gives them in the other order, which changes no gradient."""

    def __init__(self, swapped=False):
        parts = ("head", "body") if swapped else ("body", "head")
        bad = {"body": (1,), "head": (2, 3)}
        super().__init__(factor=lambda index, batch: float("nan") if batch in bad[parts[index]] else 1.0)
        self.parts = parts

    def configure_optimizers(self):
        return [torch.optim.SGD(getattr(self, part).parameters(), lr=0.0) for part in self.parts]


@pytest.mark.filterwarnings("ignore:Step .* skipped")
def test_counts_clip_state_and_guard_follow_their_optimizer_to_another_place(tmp_path):
    def fit(model, epochs=1, **more):
        guard = lo.DivergenceGuard()
        trainer = make_trainer([lo.GradientClipping(method="adagc"), guard], max_epochs=epochs)
        trainer.fit(model, StatefulLoader(COUNT, []), **more)
        return trainer, guard

    trainer, _ = fit(Two())
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    states = [copy.deepcopy(state_of_last_fit(trainer))]
    for other in (False, True):
        again, guard = fit(Two(other), ckpt_path=path)  # nothing is left to train
        states.append(state_of_last_fit(again))
        trained, guard = fit(Two(other), epochs=2, ckpt_path=path)
        states.append(state_of_last_fit(trained))
        assert guard.skipped_steps == 6
    first, _, straight, _, swapped = states
    assert [skipped for _, _, skipped in first["lightning_optim"]["counts"]] == [1, 2]
    for key, name in (("counts", "lightning_optim"), ("clip", "lightning_optim")):
        assert bit_equal(straight[name][key], swapped[name][key][::-1])
    guards = [state["lightning_optim.divergence_guard"]["optimizers"] for state in (straight, swapped)]
    assert bit_equal([one["judge"]["counts"] for one in guards[0]], [one["judge"]["counts"] for one in guards[1][::-1]])
    assert bit_equal([one["watch"]["spikes"] for one in guards[0]], [one["watch"]["spikes"] for one in guards[1][::-1]])


@pytest.mark.parametrize(
    ("present", "saved", "places"),
    [
        ([["a"], ["b"]], [["b"], ["a"]], [1, 0]),
        ([["a", "b", "d"], ["c"]], [["c", "a"], ["b", "d"]], [1, 0]),
        ([["a"], ["new"]], [["b"], ["a"]], [1, None]),
        ([["a"], ["b"], ["c"]], [["a"]], [0, None, None]),
        ([["a"], [None]], [["b"], ["a"]], [0, 1]),  # by order, where names are missing
        ([["a"], ["b"]], [[], []], [0, 1]),
        ([["a"], ["a"]], [["a"], ["a"]], [0, 1]),
        ([["a"]], [], [None]),
    ],
)
def test_an_optimizer_continues_the_one_with_most_of_its_parameters(present, saved, places):
    assert places_of(present, saved) == places


class Late(StepLog):
    """Rows arrive when they are waited for, as on an accelerator."""

    def read(self, everything=False):
        return super().read() if everything else []


def test_rows_on_their_way_name_the_parameters_at_their_new_places():
    watch = StepGuard(rows=Late())
    for values in ([1.0, float("inf"), 4.0], [1.0, 2.0, 3.0]):
        watch.commit(watch(_stats(values)).float())
    other = StepGuard(rows=Late())
    other.load_state_dict(watch.state_dict())
    other.move([2, 0, -1])
    again = StepGuard(rows=Late())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for one in (other, again):
        bad, good = one.read(everything=True)
        assert (bad.worst, good.worst) == ((0, 2), ())


# Versions.


def _damage(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def _set(*keys, value):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return change


PLACES = {
    "step counts and clip states": ("lightning_optim",),
    "the state of a clip rule": ("lightning_optim", "clip", 0),
    "the state of DivergenceGuard": ("lightning_optim.divergence_guard",),
}


@pytest.mark.parametrize("of", PLACES)
def test_state_of_a_later_version_is_refused_and_unknown_keys_are_named(of, tmp_path):
    _fit("adagc", extra=[SaveAt(6, path := tmp_path / "a.ckpt")])
    saved = torch.load(path, weights_only=True)
    for key in PLACES[of]:
        saved = saved[key]
    assert saved["version"] == VERSION
    _damage(path, _set(*PLACES[of], "colour", value=1))
    with pytest.warns(UserWarning, match=f"{of} with 'colour', which this lightning_optim does not know"):
        _fit("adagc", ckpt_path=path)
    _damage(path, _set(*PLACES[of], "version", value=VERSION + 1))
    with pytest.raises(ValueError, match=f"{of} in version {VERSION + 1}.*reads up to version {VERSION}.*Install"):
        _fit("adagc", ckpt_path=path)


def test_an_unknown_part_of_the_guards_state_is_named(tmp_path):
    _fit("adagc", extra=[SaveAt(6, path := tmp_path / "a.ckpt")])
    _damage(path, _set("lightning_optim.divergence_guard", "ladder", "rungs", value=3))
    with pytest.warns(UserWarning, match="the state of Ladder with 'rungs'"):
        _fit("adagc", ckpt_path=path)

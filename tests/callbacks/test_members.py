"""Our callbacks as members of a hub: subclasses, roles, mocks, and what a fit leaves behind."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any, ClassVar
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.tuner.tuning import Tuner

import lightning_optim as lo
from lightning_optim import callbacks
from lightning_optim.callbacks._hub import CHECKPOINT_KEY, Hub, HubCallback, state_of_last_fit
from tests.helpers import Net, batches, bit_equal, make_trainer

PUBLIC = [getattr(callbacks, name) for name in callbacks.__all__]
# GradientRelease goes neither with a guard nor with this optimizer: test_gradient_release.py.
CLASSES = [cls for cls in PUBLIC if inspect.isclass(cls) and cls is not callbacks.GradientRelease]
HOOKS = [
    name
    for name, method in vars(L.Callback).items()
    if inspect.isfunction(method) and name not in ("state_dict", "load_state_dict")
]
LIMIT = 0.1
ELSEWHERE = {False: callbacks.WeightAverage, True: callbacks.WeightDecay}
"""The callback that does not go with the others, by whether the optimizer is ours: one needs ours, one another."""


class Keeps(Net):
    """With an optimizer that serves our callbacks: schedule-free, and without a decay of its own, or ours."""

    def __init__(self, ours=False):
        super().__init__(nan_batches=[1])
        self.ours = ours

    def configure_optimizers(self):
        return _Ours(self.parameters(), lr=0.1) if self.ours else _Foreign(self.parameters(), lr=0.1)


class _Foreign(torch.optim.SGD):
    def train(self):
        """Has nothing to do."""

    eval = train


class _Ours(lo.optim.SGD):
    option_defaults: ClassVar = {"ema": 0.5}
    train = eval = _Foreign.train


def _arguments(cls, report_dir, ours=False):
    return {
        callbacks.ConfigureOptimizers: {"optimizer": _Ours if ours else _Foreign, "lr": 0.1},
        callbacks.GradientClipping: {"max_norm": LIMIT},
        callbacks.DivergenceGuard: {"report_dir": str(report_dir), "rollback": None},
        callbacks.WeightDecay: {"weight_decay": 0.1},
    }.get(cls, {})


def _silenced(cls, hooks):
    """A subclass that overrides hooks as users do, without ``super()``."""

    def hook(self, *args, **kwargs):
        vars(self).setdefault("heard", set()).add("")

    return type(f"My{cls.__name__}", (cls,), dict.fromkeys(hooks, hook))


def _parts(report_dir, silenced, hooks, ours=False):
    made = {}
    for cls in CLASSES:
        if cls is not ELSEWHERE[ours]:
            made[cls] = (_silenced(cls, hooks) if cls in silenced else cls)(**_arguments(cls, report_dir, ours))
    return made


class Saves(L.Callback):
    """Looks into a checkpoint in the middle of the run, and at what each update used."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.norm = torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()
            self.checkpoint = trainer._checkpoint_connector.dump_checkpoint()


def _fit(parts, ours=False):
    model, saves = Keeps(ours), Saves()
    trainer = make_trainer([*parts, saves], limit_val_batches=0)
    trainer.fit(model, batches(3))
    return trainer, model, saves


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The weights after a fit with all of our callbacks as they come, by whether the optimizer is ours."""
    found = {}
    for ours in (False, True):
        with pytest.warns(UserWarning, match="Step 1 skipped"):
            _, model, _ = _fit(_parts(tmp_path_factory.mktemp("report"), (), (), ours).values(), ours)
        found[ours] = dict(model.state_dict())
    return found


def _assert_all_works(silenced, hooks, unchanged, tmp_path, ours=False):
    parts = _parts(tmp_path, silenced, hooks, ours)
    with pytest.warns(UserWarning, match="Step 1 skipped"):
        trainer, model, saves = _fit(parts.values(), ours)
    assert bit_equal(dict(model.state_dict()), unchanged[ours])
    assert ours or saves.norm <= LIMIT * 1.001  # Ours leave the gradients as they are, and divide in the update.
    assert parts[callbacks.DivergenceGuard].skipped_steps == 1
    assert saves.checkpoint[CHECKPOINT_KEY]["counts"] == [[3, 2, 1]]
    assert saves.checkpoint["lightning_optim.divergence_guard"]["optimizers"]
    assert not any(isinstance(callback, Hub) for callback in trainer.callbacks)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    assert "configure_optimizers" not in vars(model)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_subclass_that_overrides_every_hook_without_super_leaves_all_working(cls, unchanged, tmp_path):
    _assert_all_works({cls}, HOOKS, unchanged, tmp_path, cls is ELSEWHERE[False])


@pytest.mark.parametrize("ours", [False, True])
def test_subclasses_of_all_that_override_every_hook_without_super_work(ours, unchanged, tmp_path):
    _assert_all_works(set(CLASSES), HOOKS, unchanged, tmp_path, ours)


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_subclass_that_overrides_one_hook_without_super_leaves_all_working(cls, hook, unchanged, tmp_path):
    _assert_all_works({cls}, [hook], unchanged, tmp_path, cls is ELSEWHERE[False])


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_subclasses_without_super_are_undone_after_an_exception_which_arrives(kind, tmp_path):
    class Fails(L.Callback):
        def on_train_batch_end(self, *args):
            raise kind("mine")

    parts, model = _parts(tmp_path, set(CLASSES), HOOKS), Keeps()
    trainer = make_trainer([*parts.values(), Fails()])
    with pytest.raises(SystemExit if kind is KeyboardInterrupt else kind):
        trainer.fit(model, batches(2))
    assert not any(isinstance(callback, Hub) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert "configure_optimizers" not in vars(model)
    assert all(part._hub is None for part in parts.values())


def test_a_resumed_run_goes_on_from_counts_whatever_hooks_are_overridden(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    clips = _silenced(lo.GradientClipping, HOOKS)
    make_trainer([clips(LIMIT), Save()]).fit(Keeps(), batches(2))
    looks = []

    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            looks.extend(trainer.callbacks[0].hub.counts())

    make_trainer([clips(LIMIT), Look()], max_epochs=2).fit(Keeps(), batches(2), ckpt_path=tmp_path / "mid.ckpt")
    assert [count.steps for count in looks] == [4]


def test_what_our_own_closing_raises_does_not_replace_the_users_exception(tmp_path):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    class Leaky(lo.GradientClipping):
        def _at_close(self):
            raise RuntimeError("ours")

    guard = lo.DivergenceGuard(report_dir=str(tmp_path))
    trainer = make_trainer([Leaky(1.0), guard])
    with pytest.warns(UserWarning, match="ours"), pytest.raises(KeyError, match="mine"):
        trainer.fit(Fails(), batches(2))
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert guard._hub is None


# Roles.


class MyClipping(lo.GradientClipping):
    pass


class Clips(HubCallback):
    """Somebody's own clipper."""

    def clip_rule(self):
        return lo.clipping.GlobalNorm(0.5)


class MyGuard(lo.DivergenceGuard):
    pass


@pytest.mark.parametrize(
    ("one", "two", "role"),
    [
        (lo.GradientClipping(1.0), MyClipping(2.0), "GradientClipping"),
        (lo.GradientClipping(1.0), Clips(), "GradientClipping"),
        (MyGuard(), lo.DivergenceGuard(), "DivergenceGuard"),
        (lo.ConfigureOptimizers("sgd", lr=0.1), type("Mine", (lo.ConfigureOptimizers,), {})("adamw"), "ConfigureOptim"),
        (lo.OptimizerMonitor(), type("Mine", (lo.OptimizerMonitor,), {})(), "OptimizerMonitor"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_role_has_one_owner_whatever_the_types(one, two, role, swap):
    model = Net()
    with pytest.raises(MisconfigurationException, match=f"Two {role}") as caught:
        make_trainer([two, one] if swap else [one, two]).fit(model, batches(1))
    assert repr(one) in str(caught.value)
    assert repr(two) in str(caught.value)
    assert "configure_optimizers" not in vars(model)
    assert one._hub is two._hub is None


def test_a_supplier_of_optimizers_that_comes_too_late_is_refused():
    class Late(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.callbacks.append(lo.ConfigureOptimizers("sgd", lr=0.1))

    with pytest.raises(MisconfigurationException, match="optimizers were made already"):
        make_trainer([lo.GradientClipping(), Late()]).fit(Net(), batches(1))


class Adds(L.Callback):
    """Changes ``trainer.callbacks`` in one of its hooks."""

    done: bool

    def __init__(self, hook, change):
        def at_hook(trainer, *args):
            if trainer.global_step == (0 if hook == "on_train_start" else 2) and not self.done:
                self.done = True
                change(trainer, self)

        self.done = False
        setattr(self, hook, at_hook)


def _appends(trainer, adds, part):
    trainer.callbacks.append(part)


def _inserts(trainer, adds, part):
    trainer.callbacks.insert(0, part)


def _replaces(trainer, adds, part):
    trainer.callbacks[trainer.callbacks.index(adds)] = part  # as many as before


def _new_list(trainer, adds, part):
    trainer.callbacks = [*trainer.callbacks, part]


@pytest.mark.parametrize("change", [_appends, _inserts, _replaces, _new_list])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
@pytest.mark.parametrize(
    ("others", "silenced"),
    [([], False), ([lo.GradientClipping], False), ([lo.GradientClipping], True)],
    ids=["alone", "with_another", "silenced"],
)
def test_one_that_comes_after_training_has_started_is_refused(change, hook, others, silenced, tmp_path):
    part = (_silenced(lo.DivergenceGuard, HOOKS) if silenced else lo.DivergenceGuard)(report_dir=str(tmp_path))
    taken = []

    class Counts(L.Callback):
        def on_train_batch_end(self, *args):
            taken.append(1)

    adds = Adds(hook, lambda trainer, adds: change(trainer, adds, part))
    # Behind ours: what comes before their turn in `on_train_start` takes part.
    trainer = make_trainer([Counts(), *(other() for other in others), adds])
    with pytest.raises(MisconfigurationException, match=r"DivergenceGuard.* was added .* after training had started"):
        trainer.fit(Net(), batches(5))
    assert len(taken) == (0 if hook == "on_train_start" else 2)
    assert not any(isinstance(callback, Hub) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    assert part._hub is None


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_one_that_comes_before_training_starts_takes_part(hook, tmp_path):
    class Adds(L.Callback):
        pass

    def at_hook(trainer, *args, **kwargs):
        if guard not in trainer.callbacks:
            trainer.callbacks.append(guard)

    adds, guard = Adds(), lo.DivergenceGuard(report_dir=str(tmp_path))
    setattr(adds, hook, at_hook)
    with pytest.warns(UserWarning, match="Step 1 skipped"):
        make_trainer([adds, lo.GradientClipping()]).fit(Net(nan_batches=[1]), batches(3))
    assert guard.skipped_steps == 1


def test_callbacks_of_others_may_come_and_go_while_training():
    other = L.Callback()

    def come(trainer, adds):
        trainer.callbacks.append(other)

    clipping = lo.GradientClipping(LIMIT)
    trainer = make_trainer([clipping, Adds("on_train_batch_end", come)])
    trainer.fit(Net(), batches(4))
    assert other in trainer.callbacks  # type: ignore[attr-defined]
    assert state_of_last_fit(trainer)[CHECKPOINT_KEY]["counts"] == [[4, 4, 0]]


@pytest.mark.parametrize("finder", ["lr", "batch_size", "tuner_lr", "tuner_batch_size"])
def test_lightnings_tuners_which_swap_the_callbacks_for_a_while_are_let_be(finder, tmp_path):
    class Tuned(Net):
        lr, batch_size = 0.1, 1

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=self.batch_size)

        val_dataloader = train_dataloader

        def training_step(self, batch, batch_idx):
            return super().training_step((batch, torch.zeros(len(batch), 2)), batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    guard, clipping = lo.DivergenceGuard(report_dir=str(tmp_path)), lo.GradientClipping(LIMIT)
    own: Any = {
        "lr": [L.callbacks.LearningRateFinder(num_training_steps=3)],
        "batch_size": [L.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1)],
    }.get(finder, [])
    trainer, model = make_trainer([guard, clipping, *own], default_root_dir=tmp_path), Tuned()
    tuner = Tuner(trainer)
    if finder == "tuner_lr":
        tuner.lr_find(model, num_training=3)
    if finder == "tuner_batch_size":
        tuner.scale_batch_size(model, max_trials=2, steps_per_trial=1)
    trainer.fit(model)
    steps = -(-16 // model.batch_size)
    assert state_of_last_fit(trainer)[CHECKPOINT_KEY]["counts"][0][0] == steps


# Callbacks of others.


def test_mocks_and_duck_typed_callbacks_do_not_confuse_it():
    class Duck:
        state_key = "duck"

        def state_dict(self):
            return {}

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: None

    mocks = [Mock(spec=L.Callback), Mock(spec=lo.GradientClipping), Mock(spec=lo.DivergenceGuard)]
    for mock in mocks:
        mock.state_dict.return_value = {}
    guard = lo.DivergenceGuard(report_dir=".")
    make_trainer([*mocks, lo.GradientClipping(LIMIT), Duck(), guard, lo.OptimizerMonitor()]).fit(Net(), batches(2))
    assert all(mock.on_train_start.call_count == 1 for mock in mocks)


def test_others_keep_their_place_and_come_before_checkpoints_are_saved(tmp_path):
    seen = []

    class First(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(trainer.callbacks)

    first, clip, last = First(), lo.GradientClipping(), L.callbacks.ModelCheckpoint(tmp_path)
    trainer = make_trainer([last, first, clip], enable_checkpointing=True)
    trainer.fit(Net(), batches(1))
    assert [type(callback) for callback in seen] == [First, lo.GradientClipping, Hub, L.callbacks.ModelCheckpoint]
    assert trainer.callbacks == [first, clip, last]  # type: ignore[attr-defined]


def test_a_callback_that_passes_its_hooks_on_to_one_of_ours_joins_it():
    class Wraps(L.Callback):
        def __init__(self):
            self.inner = lo.GradientClipping(LIMIT)

        def setup(self, trainer, pl_module, stage):
            self.inner.setup(trainer, pl_module, stage)

    saves = Saves()
    make_trainer([Wraps(), saves]).fit(Net(), batches(3))
    assert saves.norm <= LIMIT * 1.001


# What stays alive.


def _frozen():
    rules = [lo.ParamGroupRule(name="head", pattern="^head", frozen_until="1 steps")]
    return lo.ConfigureOptimizers("adamw", lr=0.1, schedule="cosine", param_groups=rules)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [*(cls for cls in CLASSES if cls is not lo.ConfigureOptimizers), _frozen])
def test_callbacks_that_live_on_keep_nothing_of_a_fit_alive(make, fails, tmp_path):
    class Fails(Keeps):
        def training_step(self, batch, batch_idx):
            if fails and batch_idx == 2:
                raise RuntimeError("mine")
            return super().training_step(batch, 0)

    part = make() if make is _frozen else make(**_arguments(make, tmp_path))

    def fit():
        model, trainer = Fails(make is ELSEWHERE[False]), make_trainer([part])
        try:
            trainer.fit(model, batches(3))
        except RuntimeError:
            assert fails
        return [weakref.ref(each) for each in (trainer, model, trainer.optimizers[0])]

    alive = fit()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("same", [False, True])
def test_an_error_in_the_trial_of_a_tuner_which_no_hook_tells_of_does_not_reach_the_next_fit(same, tmp_path):
    class Fails(Net):
        fails, lr = True, 0.1

        def training_step(self, batch, batch_idx):
            if self.fails:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    def parts():
        return [lo.ConfigureOptimizers("sgd", lr=0.1), lo.GradientClipping(LIMIT)]

    finder = L.callbacks.LearningRateFinder(num_training_steps=2)
    model, first = Fails(), parts()
    with pytest.raises(KeyError, match="mine"):
        make_trainer([*first, finder], default_root_dir=tmp_path).fit(model, batches(2))
    model.fails = False
    second = first if same else parts()
    trainer = make_trainer(second)
    trainer.fit(model, batches(2))
    assert state_of_last_fit(trainer)[CHECKPOINT_KEY]["counts"] == [[2, 2, 0]]
    assert "configure_optimizers" not in vars(model)


@pytest.mark.parametrize("same_module", [False, True])
def test_a_fit_whose_hooks_were_cut_short_leaves_nothing_to_the_next_one_of_its_trainer(same_module):
    class Raises(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise KeyError("another's")

    class Fails(Net):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and batch_idx == 1:
                raise RuntimeError("mine")
            return super().training_step(batch, batch_idx)

    configure, clipping = lo.ConfigureOptimizers("sgd", lr=0.25), lo.GradientClipping(LIMIT)
    trainer, model = make_trainer([Raises(), configure, clipping]), Fails()
    with pytest.raises(KeyError, match="another's"):
        trainer.fit(model, batches(3))
    if not same_module:
        model = Fails()
    model.fails = False
    trainer.fit(model, batches(3))
    assert type(trainer.optimizers[0]) is lo.optim.SGD  # not that of the module's own method
    assert state_of_last_fit(trainer)[CHECKPOINT_KEY]["counts"] == [[3, 3, 0]]
    assert "configure_optimizers" not in vars(model)
    assert not any(type(callback) is Hub for callback in trainer.callbacks)  # type: ignore[attr-defined]


def test_lightning_sets_the_modules_log_on_a_callback_before_any_hook_of_each_run():
    """How a callback of ours hears of a run whatever a subclass overrides."""
    events = []

    class Hears(L.Callback):
        def setup(self, trainer, pl_module, stage):
            events.append(stage)

        def __setattr__(self, name, value):
            if name == "log":
                events.append((name, value.__self__.trainer.state.fn))
            super().__setattr__(name, value)

    trainer = make_trainer([Hears()])
    trainer.fit(Net(), batches(1))
    trainer.validate(Net(), batches(1), verbose=False)
    assert events == [("log", "fit"), "fit", ("log", "validate"), "validate"]


def test_a_subclass_logs_as_every_callback_does(logger):
    class Logs(lo.GradientClipping):
        def on_train_batch_end(self, *args):
            self.log("mine", 1.0)
            self.log_dict({"yours": 2.0})

    trainer = make_trainer([Logs()], logger=logger)
    trainer.fit(Net(), batches(1))
    assert trainer.callback_metrics == {"mine": 1.0, "yours": 2.0}

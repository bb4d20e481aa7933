"""One healthy run, with a guard or without: what the guard reported and did, and how well the model ended."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import lightning.pytorch as L
import torch

import lightning_optim as lo
from lightning_optim.divergence.observation import StepObservation
from tests.benchmarks.healthy import changes, classifiers, gans, reinforcement, representations
from tests.benchmarks.healthy.base import Healthy
from tests.helpers import make_trainer, precision

KINDS: dict[str, type[Healthy]] = {
    "GAN": gans.Gan,
    "GAN, hinge": gans.HingeGan,
    "GAN, least squares": gans.LeastSquaresGan,
    "GAN, Wasserstein": gans.WassersteinGan,
    "VAE, KL annealed": representations.Annealed,
    "diffusion": representations.Diffusion,
    "contrastive, batch doubles": representations.GrowingBatch,
    "contrastive, queue fills": representations.GrowingQueue,
    "REINFORCE": reinforcement.Reinforce,
    "actor-critic": reinforcement.ActorCritic,
    "actor-critic, two optimizers": reinforcement.TwoOptimizersActorCritic,
    "Q-learning": reinforcement.QLearning,
    "a term joins": changes.TermJoins,
    "a large term joins": changes.LargeTermJoins,
    "a term leaves": changes.TermLeaves,
    "curriculum, in jumps": changes.CurriculumInJumps,
    "curriculum, gradual": changes.GradualCurriculum,
    "unfreezing, a group added": changes.Unfreezing,
    "unfreezing, in place": changes.UnfreezingInPlace,
    "two tasks in turn": changes.TasksInTurn,
    "mixture of experts": classifiers.Experts,
    "bf16-mixed": classifiers.Convolutions,
    "16-mixed": classifiers.HalfPrecision,
    "small noisy batches": classifiers.SmallBatches,
    "label noise from mid-run": classifiers.LateLabelNoise,
    "warm restarts": classifiers.WarmRestarts,
    "one cycle, high peak": classifiers.OneCycle,
    "overfitted": classifiers.Overfitted,
}
"""All kinds by name."""


@dataclass
class Outcome:
    """What came of a run.

    Args:
        kind: Name of the kind.
        seed: The seed.
        metric: How well the model does at the end; more is better.
        steps: Number of optimizer steps that the guard looked at, over all optimizers; 0 without one.
        cuts: Number of cuts of the learning rate.
        rollbacks: Number of rollbacks.
        stops: 1 if the run was stopped before its end, else 0.
        skipped: Number of skipped steps whose loss and gradients were finite.
        entries: Step, kind and text of each entry of the guard's report; the kind of a response is ``did``.
        observed: Observations of all steps, of each optimizer; empty unless they were asked for.
        seconds: Time it took.
    """

    kind: str
    seed: int
    metric: float
    steps: int = 0
    cuts: int = 0
    rollbacks: int = 0
    stops: int = 0
    skipped: int = 0
    entries: list[tuple[int, str, str]] = field(default_factory=list)
    observed: dict[int, list[StepObservation]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def alarms(self) -> Counter[str]:
        """Number of alarms of each kind."""
        return Counter(kind for _, kind, _ in self.entries if kind != "did")

    @property
    def harmed(self) -> bool:
        """Whether the guard intervened by more than single skipped steps."""
        return bool(self.cuts or self.rollbacks or self.stops)


class _Steps(L.Callback):
    """Notes every step that the guard reports to its report."""

    def __init__(self, guard: lo.DivergenceGuard) -> None:
        self._guard = guard
        self.seen: list[tuple[int, StepObservation]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        see = self._guard.report.see

        def noted(step: int, optimizer: int, seen: StepObservation) -> None:
            self.seen.append((optimizer, seen))
            see(step, optimizer, seen)

        self._guard.report.see = noted


def run(
    kind: str,
    seed: int,
    guard: lo.DivergenceGuard | None,
    observe: bool = False,
    callbacks: Iterable[L.Callback] = (),
) -> Outcome:
    """Train one run.

    Args:
        kind: Name of one of `KINDS`.
        seed: Seed of weights, data and training.
        guard: The guard; None for none.
        observe: Whether to keep the observations of all steps.
        callbacks: Further callbacks.

    Returns:
        What came of it.
    """
    start = time.perf_counter()
    steps = _Steps(guard) if guard is not None else None
    quiet = logging.getLogger("lightning.pytorch")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    with torch.random.fork_rng(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        module = KINDS[kind](seed)
        parts = [*callbacks, *([guard, steps] if guard is not None and steps is not None else [])]
        options = precision(module.precision, getattr(module, "init_scale", 1024.0))
        trainer = make_trainer(parts, max_epochs=1, log_every_n_steps=module.every, default_root_dir=folder, **options)
        trainer.fit(module)
        torch.manual_seed(seed)
        module.eval()
        with torch.no_grad():
            outcome = Outcome(kind, seed, module.score())
    quiet.setLevel(level)
    if guard is not None and steps is not None:
        outcome.entries = [(entry.step, entry.kind, entry.text) for entry in guard.report.entries]
        responses = [text for _, name, text in outcome.entries if name == "did"]
        outcome.cuts = max(guard.ladder.used["lr_cut"], sum(text.startswith("learning rate") for text in responses))
        outcome.rollbacks = max(guard.rollback_count, sum(text.startswith("back to") for text in responses))
        outcome.stops = int(trainer.should_stop)
        outcome.steps = len(steps.seen)
        outcome.skipped = sum(s.skipped and not (s.bad_tensors or s.bad_loss) for _, s in steps.seen)
        for index, seen in steps.seen if observe else ():
            outcome.observed.setdefault(index, []).append(seen)
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_all(
    kinds: Iterable[str],
    seeds: Iterable[int],
    guards: Sequence[Callable[[], lo.DivergenceGuard | None]] = (lo.DivergenceGuard,),
    jobs: int = 2,
    observe: bool = False,
) -> Iterator[Outcome]:
    """Train many runs in several processes.

    Args:
        kinds: Names of `KINDS`.
        seeds: The seeds of each.
        guards: Each makes a guard for a run of its own: a function or class of a module (`no_guard`), or a
            `functools.partial` of one.
        jobs: Number of processes; 1 for this one.
        observe: As for `run`.

    Yields:
        The outcomes: kind by kind, of each seed by seed, of each guard by guard.
    """
    tasks = [(kind, seed, guard, observe) for kind in kinds for seed in seeds for guard in guards]
    if jobs == 1:
        yield from map(_one, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start) as pool:
        yield from pool.map(_one, tasks)


def no_guard() -> None:
    """Make no guard."""


def _start() -> None:
    torch.set_num_threads(1)


def _one(task: tuple[str, int, Callable[[], lo.DivergenceGuard | None], bool]) -> Outcome:
    kind, seed, guard, observe = task
    return run(kind, seed, guard(), observe)

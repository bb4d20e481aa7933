"""The detectors by themselves, on simulated statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_optim.core.stats import TENSOR_COLUMNS, GradStats
from lightning_optim.divergence import (
    Alarm,
    Detector,
    DivergenceJudge,
    Inspection,
    Ladder,
    LRCut,
    ParameterHealth,
    Rollback,
    SlowDivergence,
    SpikeWindow,
    StepGuard,
    StepLog,
    StepObservation,
)


def _feed(window: SpikeWindow, values) -> list[list[bool]]:
    """Runs a window over rows of values, one per signal, each signal deciding for itself; which were flagged."""
    flags = []
    for row in values.tolist():
        flagged = [math.inf > value > limit for value, limit in zip(row, window.alone, strict=True)]
        window.update(row, flagged, accepted=True)
        flags.append(flagged)
    return flags


def _noisy(steps: int, signals: int, noise: str, seed: int = 0) -> torch.Tensor:
    """Losses that fall as training losses do, with 3 % of noise, shape [steps, signals]."""
    generator = torch.Generator().manual_seed(seed)
    falling = 0.5 + 2.5 * torch.exp(-torch.arange(steps) / 1500.0)
    if noise == "gauss":
        z = torch.randn(steps, signals, generator=generator)
    else:  # gradient norms are skewed and have heavier tails: logs of a t-distribution with 6 degrees of freedom
        z = torch.randn(steps, signals, generator=generator)
        chi = torch.stack([torch.randn(steps, signals, generator=generator).square() for _ in range(6)]).mean(0)
        z = z / chi.sqrt()
    return falling[:, None] * torch.exp(0.03 * z)


def test_clean_runs_give_at_most_one_false_alarm_in_10000_steps():
    runs = torch.cat([_noisy(10_000, 20, "gauss"), _noisy(10_000, 10, "t6")], dim=1)
    flags = torch.tensor(_feed(SpikeWindow(signals=30), runs)).sum(dim=0)
    assert flags[:20].max() <= 1
    assert flags[20:].float().mean() <= 1  # tails that loss and gradient norm rarely have
    for run in runs[:, 15:25].T.tolist():
        trend = SlowDivergence()
        assert sum(trend.update(loss) for loss in run) <= 1


@pytest.mark.parametrize("factor", [1.5, 10.0])
def test_one_spike_is_one_flag_and_moves_no_baseline(factor):
    values = _noisy(300, 4, "gauss")
    window = SpikeWindow(signals=4)
    _feed(window, values[:200])
    before = window.state_dict()
    assert _feed(window, values[200:201] * factor) == [[True] * 4]
    assert window.state_dict()["accepted"] == before["accepted"]
    assert not torch.tensor(_feed(window, values[201:])).any()


def test_a_shift_of_level_is_adopted_after_16_flags():
    values = _noisy(600, 8, "gauss")
    values[300:] *= 1.5
    flags = torch.tensor(_feed(SpikeWindow(signals=8), values))
    assert flags.sum(dim=0).max() == 16
    assert flags.sum(dim=0).min() >= 8
    assert not flags[330:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_that_is_not_finite_enters(bad):
    values = _noisy(200, 1, "gauss")
    window = SpikeWindow(signals=1)
    _feed(window, values[:150])
    before = window.state_dict()
    assert _feed(window, torch.full((20, 1), bad)) == [[False]] * 20
    assert window.state_dict() == before
    assert _feed(window, values[150:151] * 10) == [[True]]


def test_a_signal_around_zero_is_judged_without_logarithm():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 1, generator=generator) - 0.2
    window = SpikeWindow(signals=1)
    assert not any(flag for (flag,) in _feed(window, values))
    assert _feed(window, torch.tensor([[30.0]])) == [[True]]


def test_a_constant_signal_stays_quiet_until_it_really_rises():
    window = SpikeWindow(signals=1)
    assert not any(flag for (flag,) in _feed(window, torch.ones(200, 1)))
    assert _feed(window, torch.tensor([[1.05], [1.2]])) == [[False], [True]]


def test_nothing_is_flagged_before_enough_is_known():
    window = SpikeWindow(signals=1, warmup=10)
    assert _feed(window, torch.tensor([[1.0]] * 9 + [[50.0]]))[-1] == [False]


def test_a_loaded_state_decides_alike():
    values = _noisy(400, 3, "gauss")
    values[300:] *= 1.5
    whole, first, second = (SpikeWindow(signals=3) for _ in range(3))
    expected = _feed(whole, values)
    part = _feed(first, values[:308])  # in the middle of 16 flags
    second.load_state_dict(first.state_dict())
    assert part + _feed(second, values[308:]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold=0.*for instance 8"),
        ({"min_rise": -1}, "min_rise=-1"),
        ({"warmup": 500}, "warmup=500 with window=128"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_thresholds_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpikeWindow(signals=1, **arguments)


def test_a_loss_that_grows_by_three_thousandths_a_step_is_found_within_150_steps():
    for seed in range(20):
        losses = _noisy(1000, 1, "gauss", seed)[:, 0]
        losses[600:] = losses[599] * 1.003 ** torch.arange(400) * losses[600:] / losses[600:].mean()
        trend = SlowDivergence()
        alarms = [step for step, loss in enumerate(losses.tolist()) if trend.update(loss)]
        assert 600 < alarms[0] <= 750


def test_noise_alone_is_no_trend_however_strong():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        trend = SlowDivergence()
        losses = torch.exp(0.5 * torch.randn(10_000, generator=generator)).tolist()
        assert sum(trend.update(loss) for loss in losses) <= 1


def test_a_loaded_trend_decides_alike():
    losses = [1.0 + 0.01 * (step % 7) for step in range(200)] + [1.003**k for k in range(200)]
    whole, first, second = SlowDivergence(), SlowDivergence(), SlowDivergence()
    expected = [whole.update(loss) for loss in losses]
    part = [first.update(loss) for loss in losses[:250]]
    second.load_state_dict(first.state_dict())
    assert part + [second.update(loss) for loss in losses[250:]] == expected
    assert any(expected)


@pytest.mark.parametrize("arguments", [{"rise": 0}, {"patience": 0}, {"decay": 1.0}])
def test_trends_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SlowDivergence(**arguments)


# The watch writes, the judge reads.


def _step(watch: StepGuard, norm_sq, skip=None) -> StepObservation:
    flag = watch(GradStats(torch.tensor(norm_sq), group_sizes=(1, len(norm_sq) - 1))).float()
    watch.commit(flag if skip is None else torch.maximum(flag, torch.tensor(skip)))
    return watch.read()[-1]


def test_a_row_yields_the_observation_of_its_step():
    seen = _step(StepGuard(SpikeWindow(2), loss=lambda: torch.tensor(2.5)), [9.0, 16.0, 0.0])
    assert not seen.skipped
    assert seen.values == {"grad_norm": 5.0, "loss": 2.5}
    assert seen.worst == ()
    assert seen.group_norms == (3.0, 4.0)
    assert seen.spikes == ()


def test_the_culprit_is_named_first():
    watch, judge = StepGuard(), DivergenceJudge()
    (alarm,) = judge.update(_step(watch, [9.0, 16.0, math.inf, 1.0]), dict(enumerate("abcd")))
    assert (alarm.kind, alarm.step, alarm.names) == ("nonfinite", 1, ("c",))
    assert "1 of them, first of all c" in alarm.text


def test_a_loss_that_is_not_finite_skips_though_gradients_are():
    watch = StepGuard(loss=lambda: torch.tensor(math.nan))
    assert _step(watch, [1.0, 1.0]).skipped


def test_overflows_of_the_scaler_raise_an_alarm_only_when_they_persist():
    watch, judge = StepGuard(loss=lambda: torch.tensor(1.0)), DivergenceJudge(scaled=True)
    alarms = [judge.update(_step(watch, [math.inf, 1.0]), {0: "a"}) for _ in range(20)]
    assert alarms[:19] == [[]] * 19
    assert [alarm.kind for alarm in alarms[19]] == ["loss_scale_collapse"]
    assert judge.overflow_steps == 20


@pytest.mark.parametrize(
    ("loss", "norm_sq", "overflow"),
    [(math.inf, math.inf, True), (1.0, math.nan, True), (math.nan, math.inf, False), (math.inf, 1.0, False)],
)
def test_an_infinite_loss_with_infinite_gradients_may_be_the_scale(loss, norm_sq, overflow):
    watch, judge = StepGuard(loss=lambda: torch.tensor(loss)), DivergenceJudge(scaled=True)
    alarms = judge.update(_step(watch, [norm_sq, 1.0]), {0: "a"})
    assert (judge.overflow_steps, [alarm.kind for alarm in alarms]) == ((1, []) if overflow else (0, ["nonfinite"]))


def test_bad_steps_in_a_row_escalate():
    watch, judge = StepGuard(), DivergenceJudge(patience=5)
    alarms = [judge.update(_step(watch, [math.nan, 1.0]), {})[0].escalates for _ in range(10)]
    assert alarms == [False] * 4 + [True] + [False] * 4 + [True]
    judge.update(_step(watch, [1.0, 1.0]), {})
    assert not judge.update(_step(watch, [math.nan, 1.0]), {})[0].escalates


def _judged(judge, values, watch=None):
    """The alarms about a run of gradient norms, after noise of 1 %."""
    watch = watch or StepGuard(SpikeWindow(2))
    alarms = []
    for k, value in enumerate(values):
        alarms += judge.update(_step(watch, [((1 + 0.01 * (k % 5)) * value) ** 2, 0.0]), {})
    return alarms


@pytest.mark.parametrize(("factor", "kind"), [(1.5, "new_level"), (3.0, "jump")])
def test_a_jump_escalates_and_a_shift_does_not(factor, kind):
    alarms = _judged(DivergenceJudge(SlowDivergence()), [1.0] * 100 + [factor] * 100)
    assert [alarm.kind for alarm in alarms] == ["spike", kind]
    assert [alarm.escalates for alarm in alarms] == [False, kind == "jump"]


def test_a_level_beyond_all_that_the_run_has_been_through_is_skipped_until_it_is_adopted():
    watch = StepGuard(SpikeWindow(2))
    alarms = _judged(DivergenceJudge(SlowDivergence()), [1.0] * 100 + [1000.0] * 100, watch)
    assert [alarm.kind for alarm in alarms] == ["spike"] * 16 + ["jump"]


@pytest.mark.parametrize(("fallen", "new_rate"), [(True, True), (True, False), (False, True)])
def test_a_jump_is_put_down_to_the_weights_where_the_loss_has_fallen_and_the_rate_is_new(fallen, new_rate):
    rates = [0.1] * 200 + [3.0 if new_rate else 0.1] * 100
    losses = [1 / (1 + k / 20) if fallen else 1.0 for k in range(199)] + [4.0] * 100
    now = []
    watch = StepGuard(SpikeWindow(2), loss=lambda: torch.tensor(now[0] * (1 + 0.01 * (len(seen) % 5))))
    watch.follow_rate(lambda: now[1])
    judge, seen, alarms = DivergenceJudge(SlowDivergence(), judge_loss=None), [], []
    for now[:] in zip(losses, rates, strict=False):
        seen.append(_step(watch, [1.0, 0.0]))
        alarms += judge.update(seen[-1], {})
    jumps = [alarm for alarm in alarms if alarm.kind == "jump"]
    assert bool(jumps) is (fallen and new_rate)
    assert any(alarm.escalates for alarm in alarms) is (fallen and new_rate)
    if not new_rate:  # One skipped step is all that a change of the data costs.
        assert sum(step.skipped for step in seen) == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_during_a_warm_up_a_term_that_joins_leads_to_nothing_and_a_gradual_rise_does(at_once):
    rise = [5.0] * 60 if at_once else [min(1.3**k, 5.0) for k in range(60)]
    losses = [2.0 * 0.99**k for k in range(70)] + [0.99**69 * 2.0 * x for x in rise]
    noisy = [loss * (1 + 0.01 * (k % 5)) for k, loss in enumerate(losses)]
    watch = StepGuard(SpikeWindow(2), loss=lambda: torch.tensor(noisy[watch.steps]))
    watch.follow_rate(lambda: (watch.steps + 1) / 300)
    judge, alarms = DivergenceJudge(SlowDivergence(), judge_loss=None), []
    for _ in losses:
        alarms += judge.update(_step(watch, [1.0, 0.0]), {})
    assert any(alarm.escalates for alarm in alarms) is not at_once
    assert any(alarm.kind == "slow_divergence" for alarm in alarms)


def _trend_alarms(losses, norms, judge):
    watch, alarms = StepGuard(loss=lambda: torch.tensor(losses[watch.steps])), []
    for norm in norms:
        alarms += judge.update(_step(watch, [norm**2, 0.0]), {})
    return [alarm.escalates for alarm in alarms if alarm.kind == "slow_divergence"]


def test_a_slow_rise_needs_a_higher_gradient_norm_little_noise_and_no_jump():
    falling = [2.0 * 0.99**k for k in range(100)]
    rising = [falling[-1] * 1.004**k for k in range(400)]
    noise = [0.4 * (-1) ** k * (k % 3) for k in range(500)]
    quiet, noisy = falling + rising, [x * math.exp(n) for x, n in zip(falling + rising, noise, strict=True)]
    norms = [1.0] * 100 + [1.002**k for k in range(400)]

    def acts(losses, norms, **options):
        return any(_trend_alarms(losses, norms, DivergenceJudge(SlowDivergence(), **options)))

    assert acts(quiet, norms, judge_loss=None)
    assert not acts(quiet, [1.0] * 500, judge_loss=None)
    assert not acts(noisy, norms, judge_loss=None)
    assert not acts(falling + [falling[-1] * 1.5] * 400, norms, judge_loss=None)
    assert not acts(quiet[100:], norms[100:], judge_loss=None)  # It has never fallen.
    assert acts(quiet, [1.0] * 500, judge_loss=True)
    assert not acts(quiet, norms, judge_loss=False)


def test_a_rise_that_leads_to_nothing_is_reported_once():
    judge = DivergenceJudge(SlowDivergence(), judge_loss=False)
    losses = [1.0 + 0.01 * (k % 3) for k in range(60)] + [1.02**k for k in range(110)] + [9.0] * 400
    watch, alarms = StepGuard(loss=lambda: torch.tensor(losses[watch.steps])), []
    for _ in losses:
        alarms += judge.update(_step(watch, [1.0, 0.0]), {})
    rises = [alarm for alarm in alarms if alarm.kind == "slow_divergence"]
    assert len(rises) > 3
    assert [alarm.is_repeated for alarm in rises] == [False] + [True] * (len(rises) - 1)


def test_a_restart_of_the_rate_drops_the_best_and_a_rate_that_is_new_does_not():
    def bests(rates):
        losses = [1.0] * 100 + [0.99**k for k in range(100)] + [0.5] * 10
        judge, watch = DivergenceJudge(SlowDivergence()), StepGuard(loss=lambda: torch.tensor(losses[watch.steps]))
        watch.follow_rate(lambda: rates[watch.steps])
        for _ in rates:
            judge.update(_step(watch, [1.0, 0.0]), {})
        return judge.trend._seen

    assert bests([1.0] * 100 + [0.01] * 100 + [1.0] * 10) == 10
    assert bests([1.0] * 100 + [0.01] * 100 + [9.0] * 10) == 210


class _Late(StepLog):
    """A log as on an accelerator: given out 8 further rows later."""

    def read(self, everything=False):
        late = 0 if everything else min(8, len(self._pending))
        kept = [self._pending.pop() for _ in range(late)]
        rows = super().read(everything)
        self._pending.extend(reversed(kept))
        return rows


@pytest.mark.parametrize("rows", [StepLog, _Late])
def test_what_the_host_hears_late_costs_no_more_steps(rows):
    watch = StepGuard(SpikeWindow(2), rows=rows())
    generator = torch.Generator().manual_seed(0)
    skipped = []
    for k in range(400):
        norm = math.exp(0.03 * float(torch.randn((), generator=generator))) * (1.5 if k >= 200 else 1.0)
        norm *= 10 if k == 150 else 1
        flag = watch(GradStats(torch.tensor([norm**2]), group_sizes=(1,)))
        watch.commit(flag.float())
        skipped += [k] if flag else []
    assert skipped[0] == 150
    assert len(skipped[1:]) == 1  # The second spike in a row is taken, which the device decides by itself.
    assert 200 <= skipped[1] < 210
    assert [seen.step for seen in watch.read(everything=True)] == list(range(1, 401))


def test_a_watch_resumed_with_rows_on_their_way_decides_alike():
    losses = [(1.0 + 0.01 * (k % 5)) * (9.0 if k in (90, 97, 130) else 1.5 if k > 100 else 1.0) for k in range(140)]
    now = []

    def run(watch, steps):
        flags = []
        for k in steps:
            now[:] = [torch.tensor(losses[k])]
            flags.append(bool(watch(GradStats(torch.tensor([1.0, 2.0]), group_sizes=(1, 1)))))
            watch.commit(torch.tensor(float(flags[-1])))
        return flags, [(seen.step, seen.levels) for seen in watch.read()]

    whole, first, second = (StepGuard(SpikeWindow(2), loss=lambda: now[0], rows=_Late()) for _ in range(3))
    expected, seen = run(whole, range(140))
    before, seen_before = run(first, range(100))
    second.load_state_dict(first.state_dict())
    after, seen_after = run(second, range(100, 140))
    assert before + after == expected
    assert seen_before + seen_after == seen
    assert expected[90]
    assert expected[97]
    assert [k for k in range(101, 140) if expected[k]] == [101, 130]  # The second step at the new level is taken.


class Every(Detector):
    """Asks for every ``period``-th step to be skipped."""

    def __init__(self, period):
        self.period, self.count = period, 0
        self.reason = f"{period} steps have passed"

    def __call__(self, stats):
        return torch.tensor((self.count + 1) % self.period == 0)

    def commit(self, skip):
        self.count += 1

    def state_dict(self):
        return {"period": self.period, "count": self.count}

    def load_state_dict(self, state):
        assert state["period"] == self.period
        self.count = state["count"]


def _guarded_steps(watch, steps):
    for _ in range(steps):
        skip = watch(GradStats(torch.tensor([1.0, 4.0]), group_sizes=(1, 1)))
        watch.commit(skip.float())


def test_two_detectors_of_one_class_have_a_state_each():
    saved = StepGuard(detectors=[Every(2), Every(3)])
    _guarded_steps(saved, 5)
    resumed = StepGuard(detectors=[Every(2), Every(3)])
    resumed.load_state_dict(saved.state_dict())
    detectors: list[Any] = list(resumed.detectors)
    assert [detector.count for detector in detectors] == [5, 5]
    _guarded_steps(resumed, 1)
    (seen,) = resumed.read()
    assert seen.detected == ("every: 2 steps have passed", "every: 3 steps have passed")


@pytest.mark.parametrize("present", [[], [Every(2), Every(5)]])
def test_rows_in_transfer_at_a_save_are_read_with_their_own_layout(present):
    saved = StepGuard(detectors=[Every(2)], rows=_Late())
    _guarded_steps(saved, 2)
    resumed = StepGuard(detectors=present, rows=_Late())
    resumed.load_state_dict(saved.state_dict())
    seen = resumed.read(everything=True)
    assert [one.group_norms for one in seen] == [(1.0, 2.0)] * 2
    assert [one.skipped for one in seen] == [False, True]
    assert [one.detected for one in seen] == [(), ()]  # which of those there are now has asked is not known


def test_rows_come_in_order_and_once():
    rows = StepLog()
    rows.write(1, torch.tensor([1.0]))
    rows.write(2, torch.tensor([2.0]))
    assert [(row.step, row.values.tolist()) for row in rows.read()] == [(1, [1.0]), (2, [2.0])]
    assert rows.read() == []
    rows.write(3, torch.tensor([3.0]))
    other = StepLog()
    other.load_state_dict(rows.state_dict())
    assert [(row.step, row.values.tolist()) for row in other.read()] == [(3, [3.0])]


# What is more than a bad batch, and what it takes.


def test_two_signals_that_stand_out_together_need_less_than_one_alone():
    generator = torch.Generator().manual_seed(0)
    wide = torch.exp(0.4 * torch.randn(300, 1, generator=generator)) * torch.tensor([[1.0, 0.1]])  # small batches
    window = SpikeWindow(signals=2)
    _feed(window, wide)
    highest = wide[-128:].amax(dim=0)
    assert window.together == pytest.approx((2 * highest).tolist())
    assert all(both < one for both, one in zip(window.together, window.alone, strict=True))


def test_together_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"together=0\.5"):
        SpikeWindow(signals=2, together=0.5)


def test_a_loss_far_above_its_best_raises_an_alarm_within_eight_steps_and_again():
    trend = SlowDivergence()
    assert not any(trend.update(1.0 + 0.1 * (k % 3)) for k in range(100))
    alarms = [k for k in range(60) if trend.update(50.0)]
    assert alarms == [7, 22, 51]
    assert trend.lost


def test_a_loss_that_rises_by_half_is_one_alarm():
    trend = SlowDivergence()
    losses = [1.0 + 0.01 * (k % 3) for k in range(100)] + [1.5 + 0.01 * (k % 3) for k in range(400)]
    assert sum(trend.update(loss) for loss in losses) == 1
    assert not trend.lost


def test_a_run_that_diverges_from_its_first_step_on_is_found():
    trend = SlowDivergence()
    assert any(trend.update(loss) for loss in [4.8, 4.0, 17.9, 8.3, 21.6, 27.4, *[28.0, 31.0] * 15])


def test_one_huge_loss_is_neither_an_alarm_nor_noise():
    trend = SlowDivergence()
    losses = [1.0 + 0.1 * (k % 3) for k in range(100)]
    assert not any(trend.update(loss) for loss in [*losses, 1e9, *losses])
    assert any(trend.update(2.5) for _ in range(20))


def test_lost_weights_need_no_lower_rate_first():
    ladder = Ladder(LRCut(), Rollback(), cooldown=0)
    assert ladder.act(10, can_roll_back=True, lost=True) == "rollback"
    assert Ladder(LRCut(), Rollback()).act(10, can_roll_back=False, lost=True) == "lr_cut"
    assert Ladder(LRCut(), Rollback()).act(10, can_roll_back=True) == "lr_cut"


def test_a_network_that_is_mostly_dead_is_lost_unless_it_has_learned():
    dead = Alarm("dead", 50, "the gradient is exactly 0 in a", ("a",), most=True)
    judge = DivergenceJudge(SlowDivergence())
    for k in range(40):
        judge.trend.update(2.3 + 0.01 * (k % 2))
    assert judge.assess(dead).kind == "collapsed"
    assert judge.assess(dead).lost
    assert judge.assess(Alarm("dead", 50, "", ("a",))).kind == "dead"
    for _ in range(100):
        judge.trend.update(1.0)
    assert judge.assess(dead) is dead


def test_nothing_is_done_within_the_cooldown():
    ladder = Ladder(LRCut(), Rollback(), cooldown=10)
    assert [ladder.act(step, can_roll_back=True) for step in (10, 19, 20)] == ["lr_cut", None, "rollback"]


@pytest.mark.parametrize(("every", "told"), [(1, []), (10, [70])])
def test_advice_on_the_rate_wants_looks_that_are_apart(every, told):
    against = {"grad_sq": 1.0, "clipped_sq": 1.0, "param_sq": 1.0, "update_sq": 1e-6, "momentum_sq": 1.0}
    row = [(against | {"grad_exp_avg": -0.9}).get(column, 0.0) for column in TENSOR_COLUMNS]
    health = ParameterHealth()
    looks = range(30, 30 + 5 * every, every)
    alarms = [alarm for step in looks for alarm in health.update(Inspection(step, row, ["w"], [1], [("g", 0.1, 1)]))]
    assert [alarm.step for alarm in alarms if alarm.kind == "lr_too_high"] == told


def _skipped(losses):
    """The steps that are skipped, and those that are flagged, of a run with a gradient norm of 1."""
    watch = StepGuard(SpikeWindow(2), loss=lambda: torch.tensor(losses[watch.steps]))
    seen = [_step(watch, [1.0, 0.0]) for _ in losses]
    return [s.step - 1 for s in seen if s.skipped], [s.step - 1 for s in seen if s.spikes]


def test_a_spike_that_does_no_harm_is_reported_and_taken():
    quiet = [1.0 + 0.001 * (k % 3) for k in range(100)]
    assert _skipped([*quiet, 1.3, *quiet]) == ([], [100])
    assert _skipped([*quiet, 1.6, *quiet]) == ([100], [100])


def test_a_loss_that_has_been_fitted_to_nothing_has_no_spikes():
    falling = [0.9**k for k in range(200)]
    assert _skipped([*falling, *[0.0] * 130, 1e-4, 0.0, 5e-4, 0.0]) == ([], [])
    assert _skipped([*falling, *[0.0] * 130, 0.5, 0.0])[0] == [330]


@pytest.mark.parametrize(("height", "skipped"), [(30.0, 1), (200.0, 5)])
def test_spikes_in_a_row_are_taken_from_the_second_on_unless_they_are_unheard_of(height, skipped):
    quiet = [1.0 + 0.01 * (k % 3) for k in range(100)]
    assert len(_skipped([*quiet, *[height] * 5, *quiet])[0]) == skipped


def test_a_term_that_joins_a_negative_loss_costs_one_step():
    quiet = [-0.9 + 0.01 * (k % 3) for k in range(100)]
    assert _skipped([*quiet, *[2.0] * 5, *quiet])[0] == [100]


def test_two_spikes_that_are_not_in_a_row_are_both_skipped():
    quiet = [1.0 + 0.01 * (k % 3) for k in range(100)]
    assert _skipped([*quiet, 30.0, *quiet[:4], 30.0, *quiet])[0] == [100, 105]


@pytest.mark.parametrize(("responded", "quiet", "acts"), [(False, 50, False), (True, 50, True), (True, 1000, False)])
def test_a_run_is_unstable_for_a_thousand_steps_after_a_response(responded, quiet, acts):
    judge = DivergenceJudge(SlowDivergence(), judge_loss=None)
    if responded:
        judge.responded()
    losses = [1.0 + 0.01 * (k % 3) for k in range(quiet)] + [9.0] * 20
    assert any(_trend_alarms(losses, [1.0] * len(losses), judge)) is acts


def test_losses_of_a_task_that_takes_its_turn_are_usual():
    turns = [(6.0 if k % 4 == 3 else 2.3) * (1 + 0.003 * (-k % 5)) for k in range(300)]
    assert _skipped(turns) == ([], [])
    assert _skipped([*turns, 20.0, *turns])[0] == [300]

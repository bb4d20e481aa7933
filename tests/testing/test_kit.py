"""The kit itself: it finds each defect, and nothing in an optimizer without one."""

from __future__ import annotations

import functools
import unittest

import pytest
import torch

import lightning_optim
from lightning_optim.testing import Check, ConformanceError, Report, Result, check_optimizer, checks
from lightning_optim.testing.subject import Subject
from tests.testing.correct import Correct, formula
from tests.testing.defects import DEFECTS

USUAL = [check.name for check in checks()]
NO_DEFECT_POSSIBLE = {"state_size"}
"""Checks that only note facts."""
NEED_A_GPU = {"state_device"}


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.name)
def test_a_correct_optimizer_passes(check):
    result = check.run(Subject(Correct, reference=formula))
    skipped = {"sparse_gradients", "complex_parameters", *NEED_A_GPU}
    assert (result.status, result.seen) == ("skipped" if check.name in skipped else "passed", result.seen)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(name):
    cls, names = DEFECTS[name]
    report = check_optimizer(cls, only=names, reference=formula)
    assert {r.check.name for r in report.failures} == names
    assert all(r.seen for r in report.failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_and_no_other_check_fails(name):
    cls, names = DEFECTS[name]
    report = check_optimizer(cls, reference=formula)
    assert {r.check.name for r in report.failures} == names, str(report)


def test_every_check_has_a_defect_that_it_finds():
    found = set().union(*(names for _, names in DEFECTS.values()))
    assert found | NO_DEFECT_POSSIBLE | NEED_A_GPU == set(USUAL)


def test_facts():
    facts = check_optimizer(torch.optim.Adam, only=["weight_decay", "gradient_scale", "state_size"]).facts
    assert facts["weight decay"] == "L2"
    assert facts["gradient scale"] == "invariant"
    assert facts["state"] == "2 values, 8 bytes per weight (float32)"


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1), "L2, which is the same as decoupled here"),
        (torch.optim.AdamW, "decoupled, scaled by lr"),
        (lightning_optim.optim.Lion, "decoupled, scaled by lr"),
        (lambda params: torch.optim.AdamW(params, weight_decay=0.1), "decoupled, scaled by lr"),
    ],
)
def test_the_kind_of_weight_decay(optimizer, kind):
    assert check_optimizer(optimizer, only="weight_decay").facts["weight decay"] == kind


def test_decay_that_lr_does_not_scale():
    class Unscaled(Correct):
        def decayed(self, group, value, lr):
            return value * (1 - group["weight_decay"])

    assert check_optimizer(Unscaled, only="weight_decay").facts["weight decay"] == "decoupled, not scaled by lr"


def test_a_claim_that_is_not_so_fails():
    report = check_optimizer(torch.optim.Adam, only="weight_decay", claims={"weight decay": "decoupled"})
    assert [r.seen for r in report.failures] == ["weight decay is 'L2', claimed was 'decoupled'"]


def test_a_claim_about_no_fact_is_refused():
    with pytest.raises(ValueError, match="weight decay"):
        check_optimizer(torch.optim.Adam, claims={"weight_decay": "L2"})


def test_a_function_serves_as_factory():
    report = check_optimizer(lambda params: Correct(params, lr=0.01), skip=["compile", "memory_flat"])
    assert report.passed, str(report)


def test_misspelt_names_are_answered():
    with pytest.raises(ValueError, match="Did you mean 'zero_grad'"):
        checks(only=["zero_gradd"])
    with pytest.raises(ValueError, match="Invalid skip='maximise'"):
        checks(skip=["maximise"])
    with pytest.raises(TypeError, match="no argument 'learning_rate'"):
        check_optimizer(Correct, learning_rate=0.1)
    with pytest.raises(TypeError, match="must be a class"):
        check_optimizer(3)


def test_that_a_defect_is_found_depends_on_no_threads_or_order():
    cls, names = DEFECTS["IsNoisyInTheEnd"]
    found = [check_optimizer(cls, only=["updates", "state", "copies", "compile"]).failures for _ in range(3)]
    assert [{r.check.name for r in failures} for failures in found] == [names] * 3


def test_what_cannot_step_at_all_fails_once():
    def broken(params):
        return Correct([])

    report = check_optimizer(broken)
    (failure,) = report.failures
    assert failure.check.name == "plain_step"
    assert len(report.skipped) == len(USUAL)


def test_the_report_fits_a_terminal_and_raises():
    report = check_optimizer(DEFECTS["GoesUphill"][0], only=["descent", "sparse_gradients"])
    assert not report.passed
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("FAILED sign (descent)", "expected:", "seen:", "why:", "fix:", "sparse_gradients: it refuses"):
        assert part in text
    with pytest.raises(ConformanceError, match="GoesUphill fails 3 of 7 checks"):
        report.raise_for_failures()
    Report("Nothing", [Result(checks()[0], "passed")]).raise_for_failures()


def test_a_check_is_a_test():
    (check,) = checks(only=["maximize"])
    assert isinstance(check, Check)
    assert check.__name__ == "maximize"
    assert check(Correct, lr=0.1) is None
    with pytest.raises(AssertionError, match=r"(?s)expected: .*seen: .*why: .*fix: "):
        check(DEFECTS["IgnoresMaximize"][0])
    with pytest.raises(unittest.SkipTest, match="no option 'maximize'"):
        check(lambda params: torch.optim.LBFGS(params))


def test_every_check_says_what_why_and_how():
    for check in checks(only=["default", "compile", "distributed", "gpu"]):
        assert check.expected.endswith("."), check.name
        assert check.why.endswith("."), check.name
        assert check.fix.endswith("."), check.name


@pytest.mark.slow
def test_two_processes():
    report = check_optimizer(Correct, only="distributed")
    assert {r.check.name: (r.status, r.seen) for r in report.results} == {
        "ddp": ("passed", ""),
        "fsdp2": ("passed", ""),
    }

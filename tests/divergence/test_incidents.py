"""Which alarms make one incident, and which incidents are kept."""

from __future__ import annotations

import json
import math

from lightning_optim.divergence import DivergenceReport, StepObservation
from lightning_optim.divergence.report import Entry


def _step(step: int, loss: float = 1.0) -> StepObservation:
    values = {"loss": loss, "grad_norm": 1.0}
    return StepObservation(step, False, 0, False, (), (), {}, values, dict(values), (), (1.0,), rate=0.1)


def _run(
    alarms: dict[int, str], steps: int, report: DivergenceReport | None = None, start: int = 0
) -> DivergenceReport:
    report = report or DivergenceReport()
    for step in range(start, steps):
        report.see(step, 0, _step(step))
        for kind in alarms.get(step, "").split():
            report.add(Entry(step, 0, [step], 0, kind, kind))
    return report


def _spans(report: DivergenceReport) -> list[tuple[int, int]]:
    return [(incident["first_step"], incident["last_step"]) for incident in report.as_dict()["incidents"]]


def _steps(report: DivergenceReport, place: int = 0) -> list[int]:
    return [step["at"] for step in report.as_dict()["incidents"][place]["steps"]]


def test_it_has_64_steps_before_and_16_after_however_long_the_run_goes_on() -> None:
    report = _run({500: "spike"}, 2000)
    assert _spans(report) == [(500, 500)]
    assert _steps(report) == list(range(436, 517))
    assert [step["at"] for step in report.as_dict()["last_steps"]] == list(range(1936, 2000))


def test_alarms_within_64_steps_are_one_incident_without_a_gap() -> None:
    report = _run({100: "spike", 164: "nonfinite did", 229: "spike"}, 400)
    assert _spans(report) == [(100, 164), (229, 229)]
    assert report.as_dict()["incidents"][0]["kinds"] == ["spike", "nonfinite", "did"]
    assert _steps(report) == list(range(36, 181))
    assert _steps(report, 1) == list(range(165, 246))


def test_the_steps_before_a_response_are_there_in_a_stretch_of_endless_alarms() -> None:
    report = _run({step: "nonfinite did" if step == 2020 else "nonfinite" for step in range(100, 6000, 30)}, 6000)
    (found,) = (i for i in report.as_dict()["incidents"] if "did" in i["kinds"])
    steps = [step["at"] for step in found["steps"]]
    assert set(range(2020 - 64, 2021)) <= set(steps)
    assert len(report.incidents.kept) == 16
    assert sum(incident.rows for incident in report.incidents.kept) < 16 * 300


def test_single_skipped_spikes_make_room_for_responses() -> None:
    alarms = dict.fromkeys(range(100, 10100, 100), "spike")
    alarms |= {3000: "jump did", 5000: "nonfinite did"}
    report = _run(alarms, 10_100)
    spans = [first for first, _ in _spans(report)]
    assert len(spans) == 16
    assert {3000, 5000} <= set(spans)
    assert spans[:4] == [100, 200, 300, 400]
    assert spans[-4:] == [9700, 9800, 9900, 10_000]
    assert report.as_dict()["incidents_left_out"] == 100 - 16
    assert "84 incidents" in report.markdown()


def test_endless_responses_are_bounded_as_well() -> None:
    report = _run(dict.fromkeys(range(100, 5000, 100), "jump did"), 5000)
    assert len(_spans(report)) == 16
    assert _spans(report)[0] == (100, 100)
    assert _spans(report)[-1] == (4900, 4900)


def test_advice_starts_no_incident() -> None:
    report = _run({50: "lr_too_low stalled", 300: "spike", 310: "vanishing", 500: "dead"}, 600)
    assert _spans(report) == [(300, 300)]
    assert report.as_dict()["incidents"][0]["kinds"] == ["spike", "vanishing"]
    assert "| 599 | 0 |" in _run({50: "lr_too_low"}, 600).markdown()


def test_each_of_several_optimizers_has_its_64_steps() -> None:
    report = DivergenceReport()
    for step in range(200):
        for optimizer in range(3):
            report.see(step, optimizer, _step(step))
            if (step, optimizer) == (150, 1):
                report.add(Entry(step, 0, [step], 1, "spike", "spike"))
    (incident,) = report.as_dict()["incidents"]
    for optimizer in range(3):
        steps = [step["at"] for step in incident["steps"] if step["optimizer"] == optimizer]
        assert steps == list(range(150 - 64 - (optimizer == 2), 167))


def test_steps_that_arrive_late_are_there() -> None:
    """On an accelerator the host knows of several steps of one optimizer at a time."""
    report = DivergenceReport()
    for block in range(0, 200, 8):
        for optimizer in range(2):
            for step in range(block, block + 8):
                report.see(step, optimizer, _step(step))
                if step in (100, 150) and optimizer == 0:
                    report.add(Entry(step, 0, [step], 0, "spike", "spike"))
    (incident,) = report.as_dict()["incidents"]
    for optimizer in range(2):
        steps = [step["at"] for step in incident["steps"] if step["optimizer"] == optimizer]
        assert set(range(40, 167)) <= set(steps)
        assert steps == sorted(set(steps))


def test_a_report_goes_on_from_its_state() -> None:
    alarms = {100: "spike", 110: "did", 300: "nonfinite", 420: "spike"}
    whole = _run(alarms, 600)
    first = _run(alarms, 310)
    second = DivergenceReport()
    second.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_numbers))
    _run(alarms, 600, second, start=310)
    assert second.as_dict() == whole.as_dict()
    assert second.markdown() == whole.markdown()


def _numbers(values: dict[str, object]) -> dict[object, object]:
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}


def test_json_has_no_number_that_is_not_finite() -> None:
    report = DivergenceReport()
    report.see(0, 0, _step(0, math.nan))
    report.add(Entry(0, 0, [0], 0, "nonfinite", "its loss is not finite"))
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(text)["incidents"][0]["steps"][0]["values"]["loss"] is None

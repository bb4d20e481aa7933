"""Draws each schedule into docs/images/schedules, from the code: run `python docs/schedule_plots.py` after a change."""

from __future__ import annotations

from pathlib import Path

from lightning_optim.schedules import Cooldown, Schedule, get_schedule, list_schedules

FOLDER = Path(__file__).parent / "images" / "schedules"
TOTAL = 200
WIDTH, HEIGHT, MARGIN = 240, 110, 8

WRITTEN = {
    "constant": {"warmup": "10%"},
    "cosine_restarts": {"warmup": "10%", "cycles": 3, "length_multiplier": 2, "peak_multiplier": 0.7},
    "inverse_sqrt": {"warmup": "10%", "cooldown": Cooldown("20%", "linear")},
    "one_cycle": {},
    "polynomial": {"warmup": "10%", "power": 2},
    "reduce_on_plateau": {"warmup": "10%"},
    "step": {"warmup": "10%", "factor": 0.5},
}
"""Arguments that show what is particular; the others have a warmup of a tenth."""


def example(name: str) -> Schedule:
    """The schedule that is drawn under ``name``."""
    return get_schedule(name)(**WRITTEN.get(name, {"warmup": "10%"}))


def svg(schedule: Schedule) -> str:
    """The multiplier over the run, and a little beyond its end, as a line."""
    steps = range(TOTAL + 10)
    values = [schedule(step, TOTAL) for step in steps]
    if type(schedule).__name__ == "ReduceOnPlateau":  # what two plateaus would make of it
        values = [
            value * (1 if step < 90 else 0.4 if step < 150 else 0.16) for step, value in zip(steps, values, strict=True)
        ]
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN

    def point(step: int, value: float) -> str:
        return f"{MARGIN + step / steps[-1] * (right - MARGIN):.1f},{bottom - value * (bottom - MARGIN):.1f}"

    line = " ".join(point(step, value) for step, value in zip(steps, values, strict=True))
    end = point(TOTAL, 0).split(",")[0]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f"<title>{schedule}</title>\n"
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#8a8a8a"/>\n'
        f'<path d="M{end} {MARGIN}V{bottom}" fill="none" stroke="#8a8a8a" stroke-dasharray="2 3"/>\n'
        f'<polyline points="{line}" fill="none" stroke="#4c78d8" stroke-width="2" stroke-linejoin="round"/>\n'
        "</svg>\n"
    )


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in list_schedules():
        (FOLDER / f"{name}.svg").write_text(svg(example(name)))

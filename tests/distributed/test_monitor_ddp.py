"""The monitor on two ranks: its quantities, and the noise scale from what each rank has computed."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.monitor_fits import BATCH, KINDS, MEAN, SPREAD, STEPS, fit_all
from tests.distributed.ranks import Ranks
from tests.helpers import read_events
from tests.quantities import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One start of the ranks for all."""
    folder = tmp_path_factory.mktemp("monitor")
    with Ranks(2) as ranks:
        return folder, ranks.run(fit_all, folder, timeout=250)


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantity_on_ranks(runs, kind):
    folder, ranks = runs
    for rows in (rank[kind] for rank in ranks):  # both have seen the same
        compare(rows, read_events(folder / kind / "0"))


def test_each_noise_scale_is_the_formulas(runs):
    folder, ranks = runs
    events = read_events(folder / "alone" / "0")
    noise = signal = 0.0
    expected = []
    alone = zip(*(rank["alone"] for rank in ranks), strict=True)
    for step, (norms, (_, total)) in enumerate(zip(alone, events["optim_grad_norm/total"], strict=True)):
        small, large = float(sum(norms)) / 2, total**2
        signal = 0.9 * signal + 0.1 * (4 * large - 2 * small) / 2
        noise = 0.9 * noise + 0.1 * (small - large) / (1 / 2 - 1 / 4)
        if signal > 0 and noise > 0:
            expected.append((step, pytest.approx(noise / signal, rel=1e-3)))
    assert len(expected) > 2
    assert events["optim_grad/noise_scale"] == expected
    assert {value for _, value in events["optim_grad/batch_size"]} == {4.0}


def test_the_noise_scale_of_noise_that_is_known(runs):
    """tr(Σ)/|G|² = SPREAD²/MEAN², of which single estimates scatter."""
    folder, _ = runs
    events = read_events(folder / "drift" / "0")
    values = torch.tensor([value for _, value in events["optim_grad/noise_scale"]])
    assert len(values) > 0.9 * STEPS
    assert values.median().item() == pytest.approx(SPREAD**2 / MEAN**2, rel=0.25)
    assert {value for _, value in events["optim_grad/batch_size"]} == {2.0 * BATCH}

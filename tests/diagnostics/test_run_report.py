from __future__ import annotations

import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.diagnostics import PerTensor
from lightning_optim.diagnostics.run_report import Run, convergence, generalisation, read_run, read_runs
from tests.helpers import Net, batches, make_trainer, read_events


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("slow", 1e-4), ("fast", 1e-1)):
        logger = TensorBoardLogger(root, name=name, version="0")
        monitor = lo.OptimizerMonitor(per_tensor=PerTensor(heat_maps=["grad_norm"]) if name == "fast" else None)
        parts = [lo.ConfigureOptimizers("adamw", lr=lr), lo.GradientClipping(1.0), monitor]
        model = Net(nan_batches=[5] if name == "fast" else [])
        make_trainer(parts, logger=logger, max_epochs=2).fit(model, batches(8), batches(2))
    return [root / "slow" / "0", root / "fast" / "0"]


def test_the_command_writes_one_self_contained_page(folders, tmp_path, capsys):
    main(["report", *map(str, folders), "--out", str(tmp_path / "out"), "--loss", "1.5"])
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "slow/0" in text
    assert "fast/0" in text
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:5] == ["Convergence", "Generalisation", "Stability", "Learning curves", "Learning rate"]
    assert {"Update over parameters", "Cosine of gradient and momentum", "Alarms of fast/0"} <= set(titles)
    sources = re.findall('src="(.*?)"', text)
    assert len(sources) == len(list((tmp_path / "out").glob("*.png"))) == 10
    assert [title for title in titles if "of each tensor" in title] == ["grad_norm of each tensor in fast/0"]
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "http" not in text
    assert "Step 5: 6 gradients are not finite" in text


def test_what_is_read_is_what_was_logged(folders):
    slow, fast = read_runs(folders)
    assert (slow.name, fast.name) == ("slow/0", "fast/0")
    logged = read_events(folders[0])
    assert {tag: [(step, value) for step, value, _ in points] for tag, points in slow.scalars.items()} == logged
    assert not slow.alarms
    assert all(seconds >= 0 for points in fast.scalars.values() for *_, seconds in points)


def test_convergence_and_gap():
    run = Run("r", {"optim_loss/mean": [(0, 4.0, 0.0), (5, 2.0, 1.0), (9, 1.0, 2.5)], "val_loss": [(9, 1.5, 2.5)]})
    other = Run("o", {"train_loss": [(0, 4.0, 0.0), (9, 3.0, 9.0)]})
    assert convergence([run, other], [2.0]) == [["r", "2", "5", "1.0"], ["o", "2", "never", "-"]]
    assert [row[1] for row in convergence([run])] == ["2.5", "1.75", "1.3"]
    assert generalisation([run, other]) == [["r", "1.5", "9", "1", "+0.5"]]
    assert convergence([Run("empty", {})]) == []


def test_a_folder_without_event_files_is_refused_naming_folders_below_that_have_some(folders, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=str(folders[0])):
        read_run(folders[0].parent)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "No event files" in capsys.readouterr().err

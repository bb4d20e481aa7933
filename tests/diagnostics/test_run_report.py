from __future__ import annotations

import builtins
import re
import struct

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.diagnostics import PerTensor
from lightning_optim.diagnostics.run_report import Run, convergence, generalisation, read_run, read_runs, write_report
from lightning_optim.diagnostics.run_report.analysis import convergence_of, generalisation_of
from lightning_optim.diagnostics.run_report.charts import charts_of, thinned
from lightning_optim.diagnostics.run_report.verdict import of_run
from tests.helpers import RULES, Net, batches, make_trainer, read_events


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("slow", 1e-4), ("fast", 1e-1)):
        logger = TensorBoardLogger(root, name=name, version="0")
        monitor = lo.OptimizerMonitor(per_tensor=PerTensor(heat_maps=["grad_norm"]) if name == "fast" else None)
        optimizer = lo.ConfigureOptimizers("adamw", lr=lr, schedule="cosine", param_groups=RULES)
        model = Net(nan_batches=[5] if name == "fast" else [])
        parts = [optimizer, lo.GradientClipping(1.0), monitor]
        make_trainer(parts, logger=logger, max_epochs=2).fit(model, batches(8), batches(2))
    return [root / "slow" / "0", root / "fast" / "0"]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    """The folder of a page of both runs, made by the command."""
    out = tmp_path_factory.mktemp("report") / "out"
    main(["report", *map(str, folders), "--out", str(out), "--loss", "1.5", "--level", "val_loss=2"])
    return out


def _without_library(text: str) -> str:
    """The page without scripts and pictures."""
    return re.sub(r"data:image/png;base64,[^\"]+", "", re.sub("<script.*?</script>", "", text, flags=re.DOTALL))


def _curve(values, scale=1.0):
    return [(10 * place, float(value), scale * place) for place, value in enumerate(values)]


def test_the_page_says_what_was_trained_and_how_it_went_then_shows_it(page):
    text = _without_library((page / "report.html").read_text())
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:3] == ["What was trained", "Loss", "Gap between validation and training"]
    assert {"Learning rate", "Update over parameters", "Convergence", "Generalisation", "Stability"} <= set(titles)
    for setting in (
        "AdamW",
        "Cosine",
        "0.0001",
        "GlobalNorm(max_norm=1.0)",
        "no_decay: lr 0.1",
        "batch size",
        "torch 2.",
    ):
        assert setting in text, setting
    assert re.search("has the lowest val_loss: [0-9.]+ at step", text)
    assert "Step 5: 6 gradients are not finite" in text
    assert re.search(r"<th>val_loss</th><th>≤ 2</th>", text)


def test_the_page_needs_no_other_file_and_the_pictures_are_kept(page):
    text = (page / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="(.*?)"', _without_library(text))
    assert [source for source in sources if source] == []
    assert "Bokeh" in text
    assert len(text) < 2_000_000  # a page has the library, of 1.3 MB
    pictures = sorted(path.name for path in page.glob("*.png"))
    assert {"loss.png", "learning_rate.png", "grad_norm_of_each_tensor_in_fast_0.png"} <= set(pictures)


def test_what_is_read_is_what_was_logged(folders):
    slow, fast = read_runs(folders)
    assert (slow.name, fast.name) == ("slow/0", "fast/0")
    logged = read_events(folders[0])
    assert {tag: [(step, value) for step, value, _ in points] for tag, points in slow.scalars.items()} == logged
    assert not slow.alarms
    assert all(seconds >= 0 for points in fast.scalars.values() for *_, seconds in points)
    assert list(fast.settings.items())[:2] == [("optim/lr", "0.1"), ("optim/optimizer", "AdamW")]
    assert [row[0] for row in fast.groups] == ["group", "head", "no_decay", "default"]


def test_convergence_and_gap():
    run = Run("r", {"optim_loss/mean": [(0, 4.0, 0.0), (5, 2.0, 1.0), (9, 1.0, 2.5)], "val_loss": [(9, 1.5, 2.5)]})
    other = Run("o", {"train_loss": [(0, 4.0, 0.0), (9, 3.0, 9.0)]})
    assert convergence([run, other], [2.0]) == [["r", "2", "5", "1.0"], ["o", "2", "never", "-"]]
    assert [row[1] for row in convergence([run])] == ["2.5", "1.75", "1.3"]
    assert generalisation([run, other]) == [["r", "1.5", "9", "1", "+0.5"]]
    assert convergence([Run("empty", {})]) == []


def test_convergence_and_gap_of_metrics_that_are_better_higher():
    run = Run("r", {"val_acc": _curve([0.5, 0.75, 0.9]), "train_acc": _curve([0.5, 0.8, 1.0])})
    assert convergence_of([run], {}) == [
        ["val_acc", "r", "0.7", "10", "1.0"],
        ["val_acc", "r", "0.8", "20", "2.0"],
        ["val_acc", "r", "0.86", "20", "2.0"],
    ]
    assert convergence_of([run], {"val_acc": [0.75, 0.95]})[-1] == ["val_acc", "r", "0.95", "never", "-"]
    assert generalisation_of([run]) == [["val_acc", "r", "0.9", "20", "1", "+0.1"]]


def test_metrics_of_all_runs_are_in_one_chart_with_validation_beside_training():
    runs = [
        Run(n, {"train_acc": _curve([0, 1]), "val_acc": _curve([0, 0.5]), "val_loss": _curve([2, 1])}) for n in "ab"
    ]
    loss, accuracy = charts_of(runs)
    assert (loss.title, loss.series, loss.log) == ("Loss", ["val_loss"], False)
    assert accuracy.series == ["train_acc", "val_acc"]
    assert [(line.run, line.dash) for line in accuracy.lines] == [
        (0, "solid"),
        (0, "dashed"),
        (1, "solid"),
        (1, "dashed"),
    ]


def test_events_are_marked_on_the_curve():
    counts = {f"optim_health/{name}": _curve([0, 1, 1, 3]) for name in ("skipped_steps", "lr_cuts", "rollbacks")}
    run = Run("r", {"optim_loss/mean": _curve([4, 3, 2, 1]), "optim_health/clip_rate": _curve([1, 1, 0, 0]), **counts})
    loss = charts_of([run])[0]
    marks = {(mark.kind, mark.step, mark.value, mark.text) for mark in loss.marks}
    assert {("skip", 10, 3.0, "1 step skipped"), ("skip", 30, 1.0, "2 steps skipped")} <= marks
    assert {("cut", 10, 3.0, "1 cut of the rate"), ("rollback", 30, 1.0, "2 rollbacks")} <= marks
    assert [value == value for _, value, _ in loss.clipped[0].points] == [True, True, False, False]


@pytest.mark.parametrize(
    ("loss", "more", "words"),
    [
        ([4, 2, 1, 0.9, 0.9], {}, "fell from 4 to 0.9"),
        ([4, 2, 1, float("nan")], {}, "not finite at the end; it was not at step 30"),
        ([4, 2, 1, 50], {}, "diverged"),
        ([4, 4, 4, 4], {}, "has not fallen"),
        ([3725, 2.6, 2.4, 2.7, 2.6, 2.5, 2.58], {}, "hardly fallen: it began at 2.6, and ended at 2.58"),
        ([5 - 0.1 * place for place in range(40)], {}, "still falling"),
        ([4, 2, 1], {"optim_health/skipped_steps": _curve([0, 0, 3])}, "3 steps were skipped"),
        ([4, 2, 1], {"optim_health/clip_rate": _curve([1, 1, 0.7])}, "90% of the steps were clipped, so that"),
        ([4, 3, 2, 1, 0.5], {"val_loss": _curve([3, 2, 2.5, 3, 4])}, "overfits: val_loss was best at step 10"),
    ],
)
def test_the_verdict_is_in_words(loss, more, words):
    assert words in " ".join(text for _, text in of_run(Run("r", {"optim_loss/mean": _curve(loss), **more})))


def test_a_long_report_of_the_guard_is_folded(tmp_path):
    told = "# Divergence report\n\n" + "| 1 | 2 |\n" * 70
    run = Run("r", {"optim_loss/mean": _curve([2, 1])}, ("one sentence", told))
    text = write_report([run], tmp_path).read_text()
    assert "<li><pre>one sentence</pre></li>" in text
    assert "<details><summary>Divergence report</summary><pre>| 1 | 2 |" in text


AWKWARD = "</script><b>$x$ $$y$$ %%body%% _" + "n" * 220


def test_any_name_is_fine(tmp_path):
    scalars = {"optim_loss/mean": _curve([2, 1]), f"val_{AWKWARD}": _curve([2, 1]), "_own$acc": _curve([0.5, 1])}
    runs = [Run(AWKWARD, scalars, settings={AWKWARD: AWKWARD}), Run(AWKWARD, scalars), Run("_x", scalars, (AWKWARD,))]
    text = write_report(runs, tmp_path).read_text()
    assert "</script><b>" not in text
    assert text.index("<h1>3 runs</h1>") > text.index("<body>")
    assert text.count('class="run"') == 3
    assert "(2)" in text


def test_seven_runs_have_colours_of_their_own_and_few_lines_at_first(tmp_path):
    tags = [f"optim_lr/{group}" for group in ("head", "body", "default", "no_decay")]
    runs = [Run(f"run {n}", {tag: _curve([n + 1, 1]) for tag in tags}) for n in range(7)]
    (chart,) = charts_of(runs)
    assert (chart.shown, len(chart.lines)) == (["default"], 28)
    text = write_report(runs, tmp_path).read_text()
    chips = re.findall(r'<button class="run".*?background:(#\w+)', text)
    assert len(set(chips)) == 7


def test_two_folders_of_one_name_and_one_folder_twice_are_two_runs(folders):
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["slow/0", "slow/0 (2)"]
    assert read_runs(folders[:1])[0].name == "slow/0"


def test_long_curves_keep_their_extremes():
    points = [(step, 1.0, 0.0) for step in range(100_000)]
    points[777], points[50_001] = (777, 9.0, 0.0), (50_001, -9.0, 0.0)
    few = thinned(points)
    assert len(few) <= 1300
    assert {9.0, -9.0} <= {value for _, value, _ in few}


@pytest.mark.parametrize(("missing", "says"), [("bokeh", True), ("matplotlib", False)])
def test_without_one_of_the_libraries_the_page_has_what_the_other_draws(monkeypatch, tmp_path, missing, says):
    _hide(monkeypatch, missing)
    text = write_report([Run("r", {"optim_loss/mean": _curve([2, 1])})], tmp_path).read_text()
    assert text.count("lightning-optim[plot]") == says
    (pictures,) = [list(tmp_path.glob("*.png"))]
    assert [path.name for path in pictures] == (["loss.png"] if says else [])
    assert ("data:image/png;base64" in _page_body(text)) == says
    for path in pictures:
        assert struct.unpack(">II", path.read_bytes()[16:24])[0] > 600


def _page_body(text: str) -> str:
    return re.sub("<script.*?</script>", "", text, flags=re.DOTALL)


def test_without_both_the_extra_is_named(monkeypatch, tmp_path, folders, capsys):
    _hide(monkeypatch, "bokeh", "matplotlib")
    with pytest.raises(SystemExit):
        main(["report", str(folders[0]), "--out", str(tmp_path)])
    assert "lightning-optim[plot]" in capsys.readouterr().err


def _hide(monkeypatch, *packages):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "{file}"], "{file} is a file. Give the name of a folder"),
        (["--out", "{file}/below"], "is a file"),
        (["--level", "val_accuracy=0.9"], "No run has a metric 'val_accuracy'. The metrics of these runs: val_loss"),
        (["--level", "val_loss"], "is not METRIC=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(folders, tmp_path, capsys, arguments, words):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit):
        main(["report", str(folders[0]), *(text.replace("{file}", str(file)) for text in arguments)])
    assert words.replace("{file}", str(file)) in capsys.readouterr().err


def test_a_folder_without_event_files_is_refused_naming_folders_below_that_have_some(folders, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=str(folders[0])):
        read_run(folders[0].parent)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "No event files" in capsys.readouterr().err

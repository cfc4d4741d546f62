"""What a run shows while it goes, on real runs of a few steps: pictures, report, TensorBoard, and all of it resumed."""

import io
import re

import numpy as np
from PIL import Image

from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.artifacts.run import read_metrics
from dinov2cli.cli import watch
from dinov2cli.train.loop import Trainer
from tests.cli.conftest import TINY

RUN = [*TINY, "--set", "eval.every=2", "--set", "checkpoint.every=2"]


def pictures(run):
    return sorted(path.name for path in (run / "pca").glob("*"))


def test_a_run_leaves_pictures_and_a_report_that_shows_them(dinov2, photos, tmp_path, monkeypatch):
    pages = []
    original = watch.RunWatch.write_report

    def written(self):
        original(self)
        pages.append((self._out.path / "report.html").read_text())

    monkeypatch.setattr(watch, "_SHARE", 1e9)  # however long the first page takes, the next is not put off
    monkeypatch.setattr(watch.RunWatch, "write_report", written)
    run = tmp_path / "run"
    done = dinov2("pretrain", f"{photos}?label=folder", "-o", run, *RUN)
    assert done.code == 0, done.err
    assert pictures(run) == [f"step_0000000{s}.png" for s in (2, 4, 6)]
    assert [row["step"] for row in read_metrics(run) if "eval/knn" in row] == [2, 4, 6]
    assert np.asarray(Image.open(run / "crops.png")).ndim == 3
    # Two evaluations under way, and the end.
    assert [re.findall(r"at step (\d) of 6", page) for page in pages] == [["2"], ["4"], []]
    assert [page.count("data:image/png") for page in pages] == [2, 3, 3]
    for part in (
        "First evaluation, step 2.",
        "Newest evaluation, step 6.",
        "<details>",
        "prototypes: 64",
        "Total loss",
    ):
        assert part in pages[-1], part
    assert {"crops.png", "pca/step_00000002.png", "report.html"} <= set(read_manifest(run).files)
    assert "pretrain: step 6/6, loss" in done.err and " GiB, in 00:" in done.err


def test_data_without_labels_get_maps_and_one_word_about_knn(dinov2, photos, tmp_path):
    run = tmp_path / "run"
    done = dinov2("pretrain", photos, "-o", run, *RUN)
    assert done.code == 0, done.err
    assert len(pictures(run)) == 3
    assert not any("eval/knn" in row for row in read_metrics(run))
    said = "has no labels: name their column with ?label=NAME, or use ?label=folder; every eval.every steps gives PCA"
    assert done.err.count(said) == 1 and (run / "log.txt").read_text().count(said) == 1


def test_pictures_can_be_left_out(dinov2, photos, tmp_path):
    run = tmp_path / "run"
    done = dinov2("pretrain", photos, "-o", run, *RUN, "--set", "log.pictures=false")
    assert done.code == 0, done.err
    assert not (run / "crops.png").exists() and not (run / "pca").exists()
    assert "eval.every has nothing to do" in done.err


def test_tensorboard_holds_each_step_once_after_an_interrupt(dinov2, photos, tmp_path, monkeypatch):
    """Killed after the metrics of step 5, with a checkpoint of step 4: step 5 is written twice and counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    arguments = ["pretrain", f"{photos}?label=folder", "-o", run, *RUN, "--set", "log.tensorboard=true"]
    arguments += ["--set", "log.every=1"]
    original = Trainer._report

    def killed(self, *args):
        original(self, *args)
        if self.step == 5:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_report", killed)
        assert "unexpected RuntimeError: killed" in dinov2(*arguments).err
    crops = (run / "crops.png").read_bytes()
    (run / "pca" / "step_00000099.png").write_bytes(b"of a run that got further")
    done = dinov2(*arguments)
    assert done.code == 0, done.err
    assert (run / "crops.png").read_bytes() == crops
    assert pictures(run) == [f"step_0000000{s}.png" for s in (2, 4, 6)]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss/total")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
    metrics = [row["loss/total"] for row in read_metrics(run)]
    np.testing.assert_allclose([event.value for event in scalars], metrics, rtol=1e-5)
    shown = Image.open(io.BytesIO(events.Images("pca")[-1].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(Image.open(run / "pca" / "step_00000006.png")))
    names = set(read_manifest(run).files)
    assert sum(name.startswith("tensorboard/") for name in names) == 2
    again = dinov2(*arguments)
    assert again.code == 0 and "already done" in again.err


def test_tensorboard_that_is_not_installed_is_a_usage_error(dinov2, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    done = dinov2("pretrain", photos, "-o", tmp_path / "run", *TINY, "--set", "log.tensorboard=true")
    assert done.code == 2
    assert "`pip install tensorboard`" in done.err and not (tmp_path / "run").exists()


def test_the_report_is_written_every_minute_and_never_takes_more_than_its_share(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    written = []
    view = object.__new__(watch.RunWatch)
    view._show, view._board = (lambda line, total: None), None
    view._evaluated, view._written, view._cost = False, 0.0, 0.0
    monkeypatch.setattr(watch, "time", clock)

    def write():
        written.append(clock.now)
        view._evaluated, view._written, view._cost = False, clock.now, 5.0

    monkeypatch.setattr(view, "write_report", write, raising=False)
    for second in range(0, 301, 10):
        clock.now = float(second)
        view._evaluated = second in (80, 90)
        view.on_metrics({"step": second}, 1000)
    # After a minute; then a page that takes 5 s is made every 100 s at most, evaluation or not.
    assert written == [60.0, 160.0, 260.0]
    view.on_metrics({"step": 1000}, 1000)
    assert len(written) == 3


def test_dry_run_names_the_files(dinov2, photos, tmp_path):
    done = dinov2(
        "pretrain", photos, "-o", tmp_path / "r", *RUN, "--set", "log.tensorboard=true", "--dry-run", "--json"
    )
    assert {"crops.png", "pca/", "tensorboard/", "report.html"} <= set(done.json["files"])

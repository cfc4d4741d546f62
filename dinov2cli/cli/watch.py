"""What a training run shows while it goes: progress, pictures, online evaluation, the report, TensorBoard."""

import contextlib
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.artifacts.output import Output
from dinov2cli.cli.progress import training_progress
from dinov2cli.cli.talk import Talk
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError

if TYPE_CHECKING:
    from dinov2cli.config import TrainingConfig
    from dinov2cli.data.source import ImageSource

CONFIG_FILE, REPORT_FILE, CROPS_FILE, MAPS_FOLDER, BOARD_FOLDER = (
    "config.yaml",
    "report.html",
    "crops.png",
    "pca",
    "tensorboard",
)
_REFRESH = 60.0  # seconds between two writings of the report, where no evaluation asks for one
_SHARE = 0.05  # of the time at most goes into writing it


class RunWatch:
    """The callbacks that `train` takes, for one run directory; a context manager around the training.

    It shows progress, draws `crops.png` from the first batch, evaluates every `eval.every` steps (k-NN where the source
    has labels, PCA maps of a few images in `pca/`), keeps `report.html` up to date and writes TensorBoard files when
    `log.tensorboard` asks. `patch_sizes` are those of the students' backbones by name, `precision` that of the run,
    `start` is the step that it goes on from.
    """

    def __init__(
        self,
        out: Output,
        talk: Talk,
        config: "TrainingConfig",
        source: "ImageSource",
        *,
        patch_sizes: Mapping[str, int],
        precision: str,
        start: int = 0,
        label: str = "pretrain",
    ) -> None:
        self._out, self._talk, self._label, self._start = out, talk, label, start
        self._patch_sizes = dict(patch_sizes)
        self._pictures = config.log.pictures
        self._wants_board = config.log.tensorboard
        self._board: _Board | None = None
        self._knn, self._maps = self._evaluations(config, source, precision)
        self._evaluated = False
        self._written, self._cost = time.monotonic(), 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RunWatch":
        _forget_maps(self._out.path, self._start)
        if self._wants_board:
            self._board = _Board(self._out.path / BOARD_FOLDER, self._start)
            self._stack.callback(self._board.close)
        self._show = self._stack.enter_context(training_progress(self._talk, self._label, start=self._start))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def callbacks(self, ranks: Ranks = ALONE) -> dict[str, Callable | None]:
        """Keyword arguments for `train`."""
        evaluates = ranks.first(lambda: bool(self._knn or self._maps))
        return {
            "on_first_batch": self.on_first_batch if self._pictures else None,
            "evaluate": self.evaluate if evaluates else None,
            "on_metrics": self.on_metrics,
            "on_message": self._talk.say,
        }

    def on_first_batch(self, global_crops: Any, local_crops: Any, masks: Any) -> None:
        """Draw the crops of the run's first batch; a resumed run keeps the picture it has."""
        from dinov2cli.report.crops import crops_sheet

        file, patch_size = self._out.path / CROPS_FILE, next(iter(self._patch_sizes.values()))
        if not file.is_file():
            self._write_picture(CROPS_FILE, crops_sheet(global_crops, local_crops, masks, patch_size), "crops", 0)

    def evaluate(self, backbone: Any, step: int, name: str = "") -> dict[str, float]:
        """Metrics of a moving average's backbone at `step`, {"knn": …} or nothing; draws the PCA maps on the way.

        `name` is that of the student, where there are several."""
        self._evaluated = True
        maps = self._maps.get(self._patch_sizes[name])
        if maps is not None and (picture := maps(backbone)) is not None:
            folder = f"{MAPS_FOLDER}/{name}" if name else MAPS_FOLDER
            self._write_picture(f"{folder}/step_{step:08d}.png", picture, f"pca/{name}" if name else "pca", step)
        return self._knn(backbone, step) if self._knn is not None else {}

    def on_metrics(self, line: Mapping[str, Any], total: int) -> None:
        """Take one line of metrics: show it, store it for TensorBoard, and bring the report up to date when due."""
        self._show(line, total)
        if self._board is not None:
            self._board.scalars(line)
        # The last line is left to the end of the run, which writes the report anyway.
        pause = max(0.0 if self._evaluated else _REFRESH, self._cost / _SHARE)
        if line["step"] < total and time.monotonic() - self._written >= pause:
            self.write_report()

    def write_report(self) -> None:
        """Write `report.html` as the run stands now."""
        started = time.monotonic()
        self._out.write_text(REPORT_FILE, run_page(self._out.path))
        self._evaluated, self._written = False, time.monotonic()
        self._cost = self._written - started

    def _evaluations(self, config: "TrainingConfig", source: "ImageSource", precision: str) -> tuple[Any, Any]:
        """What runs every `eval.every` steps: k-NN (None where it is not wanted or not possible), and PCA maps by patch
        size ({} where they are not wanted)."""
        from dinov2cli.artifacts.run import Journal
        from dinov2cli.cli.assembly import preprocess_of
        from dinov2cli.evaluation.online import OnlineKnn, has_labels
        from dinov2cli.report.feature_maps import FeatureMaps

        if not config.eval.every:
            return None, {}
        common = {
            "preprocess": preprocess_of(config, config.crops.global_size),
            "seed": config.seed,
            "precision": precision,
        }
        wanted = set(self._patch_sizes.values()) if self._pictures else ()
        maps = {size: FeatureMaps(source, patch_size=size, **common) for size in wanted}
        if has_labels(source):
            return OnlineKnn(source, **common), maps
        instead = "every eval.every steps gives PCA maps only" if maps else "eval.every has nothing to do"
        Journal(self._out.path, self._talk.say).log(
            f"no k-NN during training, for {source.spec} has no labels: name their column with ?label=NAME, or use "
            f"?label=folder; {instead}"
        )
        return None, maps

    def _write_picture(self, name: str, picture: bytes, tag: str, step: int) -> None:
        self._out.write(name, lambda path: _write_bytes(path, picture))
        if self._board is not None:
            self._board.picture(tag, picture, step)


class Follower:
    """What watches in the other processes of a launch: nothing is shown or written there."""

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def callbacks(self, ranks: Ranks) -> dict[str, Callable | None]:
        """Keyword arguments for `train`: it evaluates when the main one does, for the model is put together then."""
        evaluates = ranks.first(lambda: True)
        return {"evaluate": (lambda _backbone, _step, _name: {}) if evaluates else None}

    def write_report(self) -> None:
        """Nothing."""


def run_page(path: Path) -> str:
    """The report of a run directory as HTML text, from the files in it, finished or not."""
    from dinov2cli.artifacts.manifest import recorded_config
    from dinov2cli.artifacts.run import read_findings, read_metrics
    from dinov2cli.cli.distill_report import read_side_by_side
    from dinov2cli.report.run import run_report

    crops, recipe = path / CROPS_FILE, path / CONFIG_FILE
    return run_report(
        read_metrics(path),
        title=path.name,
        messages=read_findings(path),
        crops=crops.read_bytes() if crops.is_file() else None,
        maps=_shown_maps(path),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        distilled=distilled(recorded_config(path) or {}),
        beside=read_side_by_side(path),
    )


def distilled(config: Mapping[str, Any]) -> bool:
    """Whether the settings that a run was begun with (of its manifest) are those of a distillation."""
    return "average" in config


def files_of(config: "TrainingConfig") -> list[str]:
    """Names of what a run with these settings writes, for --dry-run."""
    pictures = [CROPS_FILE, *([f"{MAPS_FOLDER}/"] if config.eval.every else [])] if config.log.pictures else []
    board = [f"{BOARD_FOLDER}/"] if config.log.tensorboard else []
    names = [f"export/{name}/" if name else "export/" for name in config.learners()]
    run = [CONFIG_FILE, "metrics.jsonl", "log.txt", "checkpoints/", *names]
    return [*run, *pictures, *board, REPORT_FILE, "manifest.json"]


def require_tensorboard() -> None:
    """Raise UserError, telling the cure, where the `tensorboard` package is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError(
            "log.tensorboard is true, but the package tensorboard is not installed; install it with "
            "`pip install tensorboard`, or set log.tensorboard=false"
        )


class _Board:
    """TensorBoard files of one process. What an earlier one wrote past step `start` is marked as superseded."""

    def __init__(self, folder: Path, start: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, int(line["step"]))

    def picture(self, tag: str, png: bytes, step: int) -> None:
        import io

        import numpy as np
        from PIL import Image

        self._writer.add_image(tag, np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _map_files(path: Path) -> dict[str, list[tuple[int, Path]]]:
    """(step, file) of every PCA map of a run, by step, for each student by name ("" where one is alone)."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted((path / MAPS_FOLDER).rglob("step_*.png")):
        name = "" if file.parent.name == MAPS_FOLDER and file.parent.parent == path else file.parent.name
        if (step := file.stem.removeprefix("step_")).isdigit():
            found.setdefault(name, []).append((int(step), file))
    return {name: sorted(files) for name, files in found.items()}


def _shown_maps(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    """The first and the newest map of every student."""
    shown = {name: dict([files[0], files[-1]]) for name, files in _map_files(path).items()}
    return {name: [(step, file.read_bytes()) for step, file in files.items()] for name, files in shown.items()}


def _forget_maps(path: Path, step: int) -> None:
    """Remove maps past the step that a run goes on from, as its metrics are: it draws them again where they are due."""
    for files in _map_files(path).values():
        for drawn, file in files:
            if drawn > step:
                file.unlink(missing_ok=True)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)

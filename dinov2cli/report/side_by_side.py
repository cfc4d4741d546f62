"""Teacher and students of a distillation beside each other: the sections of a run's page, and the numbers as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dinov2cli.errors import InputError
from dinov2cli.evaluation.side_by_side import LINEAR_STEPS, NEIGHBOURS, PATCHES, Estimate
from dinov2cli.report.html import Report
from dinov2cli.report.plots import comparison_bars
from dinov2cli.report.results import percent, with_interval

ACCURACIES = {"knn": f"k-NN, k = {NEIGHBOURS}", "linear": "linear probe"}
"""Shares of test images that are answered right."""

_TOKENS = {
    "class_cosine": "class token, through a linear map",
    "class_constant": "class token, mean of the teacher's instead",
    "class_plain": "class token, as it is",
    "patch_cosine": "patch tokens, through a linear map",
    "patch_constant": "patch tokens, mean of the teacher's instead",
    "patch_plain": "patch tokens, as they are",
    "class_cka": "class token, linear CKA",
}
_NAME = 36  # characters of a name of DATA
_INTRODUCTION = (
    "All models see the same images. In brackets the interval that holds the true value with 95 % confidence over the "
    "choice of images; it does not cover the luck of another training run. Differences are of the answers to the same "
    "images, resampled together, so that what is common to both models cancels."
)
_AGREEMENT = (
    "Mean cosine between a student's tokens and the teacher's. The widths may differ, so a linear map from student to "
    "teacher is fitted on one half of the images, and the cosine is that of the other half. Read it beside the row "
    "below it: the cosine that a student gets who always says the teacher's mean token. CKA compares which images are "
    "alike for the two models, without any map: 1 is the same up to a rotation, 0 nothing in common."
)
_MAPS = (
    "One row per image; the three main directions in which each model's patch features differ, as red, green and "
    "blue. Every model has directions of its own, so look at what is set apart, not at the colours."
)


@dataclass(frozen=True)
class ModelFigures:
    """What is known of one model.

    label: "teacher", or the student's name; size: side of its images in pixels; memory: bytes of a forward pass, None
    where it was not measured. figures, changes: by key, the second against the teacher.
    """

    label: str
    model: str
    parameters: int
    embed_dim: int
    depth: int
    patch_size: int
    size: int
    images_per_s: Estimate | None = None
    memory: int | None = None
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    changes: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class SideBySide:
    """The teacher, then its students; batch: images of a forward pass; protocol and notes in sentences."""

    models: Sequence[ModelFigures]
    batch: int
    protocol: Sequence[str]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`; what has no value is null."""
        return _plain(asdict(self))

    @staticmethod
    def from_json(value: Any) -> "SideBySide":
        """Raises InputError for anything but what `to_json` gave."""
        try:
            models = [
                ModelFigures(
                    **{
                        **one,
                        "images_per_s": _estimate(one["images_per_s"]) if one["images_per_s"] else None,
                        "figures": {key: _estimate(found) for key, found in one["figures"].items()},
                        "changes": {key: _estimate(found) for key, found in one["changes"].items()},
                    }
                )
                for one in value["models"]
            ]
            return SideBySide(models, value["batch"], value["protocol"], value["notes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"not a comparison of teacher and students ({type(error).__name__}: {error}); expected what "
                "`dinov2 distill` wrote"
            ) from None

    def metrics(self) -> dict[str, float]:
        """Every number by name, as `teacher/knn`, `student/knn_change`."""
        found: dict[str, float] = {}
        for one in self.models:
            own: dict[str, float | None] = {"parameters": one.parameters, "memory_bytes": one.memory}
            own["images_per_s"] = None if one.images_per_s is None else one.images_per_s.value
            own |= {key: estimate.value for key, estimate in one.figures.items()}
            own |= {f"{key}_change": estimate.value for key, estimate in one.changes.items()}
            found |= {
                f"{one.label}/{key}": value for key, value in own.items() if value is not None and math.isfinite(value)
            }
        return found


def add_side_by_side(report: Report, found: SideBySide, *, maps: str | None = None) -> None:
    """Add the sections to a page; maps: SVG of `pca_maps` with a column for each model."""
    report.section("Teacher and students side by side", _INTRODUCTION)
    report.summary([*_sentences(found), *found.notes])
    _bars(report, found)
    report.table(["", *_labels(found)], _rows(found))
    tokens = [key for key in _TOKENS if any(key in one.figures for one in found.models)]
    if tokens:
        report.section("How far the tokens agree", _AGREEMENT)
        students = [one for one in found.models if one.figures.keys() & _TOKENS.keys()]
        cells = [[_TOKENS[key], *(_cosine(one.figures.get(key)) for one in students)] for key in tokens]
        report.table(["cosine to the teacher", *(one.label for one in students)], cells)
    if maps is not None:
        report.section("What teacher and students see", _MAPS).figure(maps, "Each image, and the map of every model.")
    report.section("How teacher and students were compared").summary(found.protocol)


def protocol(
    models: Sequence[ModelFigures], *, train: tuple[str, int], test: tuple[str, int] | None, batch: int, where: str
) -> list[str]:
    """How it was measured, in sentences.

    train, test: DATA and number of the images that were read. where: precision and device of the forward passes of
    `batch` images, as "in fp32 on 2 CPU threads".
    """
    heads = f"heads trained for {LINEAR_STEPS} steps, the best chosen on a tenth of the training images"
    read = f"{train[1]:,} images drawn from {_short(train[0])}"
    if test is None:
        images = [
            f"Images: {read}, on which the students were trained.",
            f"k-NN: class tokens, k = {NEIGHBOURS}, each image judged by all others.",
            f"Linear probe: one half of the images to train, the other to judge; {heads}.",
        ]
    else:
        images = [
            f"Images: {read} to learn from, {test[1]:,} drawn from {_short(test[0])} to judge on, tokens included.",
            f"k-NN: class tokens, k = {NEIGHBOURS}.",
            f"Linear probe: {heads}.",
        ]
    sizes = ", ".join(f"{one.label} {one.size} px" for one in models)
    speeds = [one.images_per_s for one in models if one.images_per_s is not None]
    return [
        *images,
        f"Each model sees an image at its own size and scaling: {sizes}.",
        f"Tokens: the map is fitted on one half of the images, the cosines are of the other; of an image at most "
        f"{PATCHES} patches, on the student's grid, to which the teacher's are brought by bilinear interpolation.",
        f"Speed: forward passes of {batch} images {where}, without gradients, the models by turns; the median of "
        f"{speeds[0].n if speeds else 0}, in brackets the slowest and the fastest.",
        f"Memory: the weights, and the most that a pass of {batch} images needs beyond them.",
    ]


def _short(spec: str) -> str:
    """DATA without the folders that it lies in: a long path has no place to break a line on a narrow screen."""
    path, mark, options = spec.partition("?")
    name = f"{path.rstrip('/').rpartition('/')[2] or path}{mark}{options}"
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _labels(found: SideBySide) -> list[str]:
    return [one.label for one in found.models]


def _sentences(found: SideBySide) -> list[str]:
    """What changed from the teacher to each student, in words."""
    teacher, sentences = found.models[0], []
    for one in found.models[1:]:
        parts = [f"{percent(one.parameters / teacher.parameters)} of the teacher's parameters"]
        if one.images_per_s and teacher.images_per_s:
            parts.append(f"{one.images_per_s.value / teacher.images_per_s.value:.2f} times its images per second")
        sentences.append(f"{one.label}: {', '.join(parts)}.")
        for key, change in one.changes.items():
            verdict = "beyond chance" if change.low > 0 or change.high < 0 else "within chance"
            sentences.append(
                f"{one.label}, {ACCURACIES[key]}: {percent(one.figures[key].value)} against "
                f"{percent(teacher.figures[key].value)} of the teacher, {_points(change)}, {verdict}."
            )
    return sentences


def _bars(report: Report, found: SideBySide) -> None:
    keys = [key for key in ACCURACIES if all(key in one.figures for one in found.models)]
    if not keys:
        return
    values = {
        key: [(one.figures[key].value, one.figures[key].low, one.figures[key].high) for one in found.models]
        for key in keys
    }
    if len(found.models) == 2:
        names = [ACCURACIES[key] for key in keys]
        series = {one.label: [values[key][i] for key in keys] for i, one in enumerate(found.models)}
        report.figure(comparison_bars(names, series), "Share of images that are answered right.")
        return
    for key in keys:
        report.figure(comparison_bars(_labels(found), {ACCURACIES[key]: values[key]}))


def _rows(found: SideBySide) -> list[list[str]]:
    """The table: a row per figure, a column per model."""
    models, teacher = found.models, found.models[0]
    rows = [["model", *(one.model for one in models)]]
    for key, name in ACCURACIES.items():
        if any(key in one.figures for one in models):
            rows.append([name, *(_share(one.figures.get(key)) for one in models)])
            rows.append(["… against the teacher", *(_points(one.changes.get(key)) for one in models)])
    rows.append(["parameters", *(f"{one.parameters / 1e6:,.2f} M" for one in models)])
    rows.append(["width, blocks, patch", *(f"{one.embed_dim}, {one.depth}, {one.patch_size} px" for one in models)])
    rows.append(["images", *(f"{one.size} px" for one in models)])
    if any(one.images_per_s for one in models):
        rows.append(["images/s, forward", *(_speed(one.images_per_s) for one in models)])
        if teacher.images_per_s:
            base = teacher.images_per_s.value
            times = [f"{one.images_per_s.value / base:.2f}" if one.images_per_s else "" for one in models]
            rows.append(["… times the teacher's", *times])
    if any(one.memory is not None for one in models):
        rows.append([f"memory, forward of {found.batch}", *(_bytes(one.memory) for one in models)])
    return rows


def _share(found: Estimate | None) -> str:
    return "" if found is None else with_interval(found.value, found.low, found.high)


def _points(found: Estimate | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _cosine(found: Estimate | None) -> str:
    if found is None:
        return ""
    return "–" if math.isnan(found.value) else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _speed(found: Estimate | None) -> str:
    return "" if found is None else f"{found.value:,.0f} [{found.low:,.0f}, {found.high:,.0f}]"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _estimate(value: Mapping[str, Any]) -> Estimate:
    found, low, high = (math.nan if value[key] is None else float(value[key]) for key in ("value", "low", "high"))
    return Estimate(found, low, high, int(value["n"]))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Answers class by class: accuracy of each, what it is taken for, and the table of confusions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dinov2cli.report.canvas import new_figure, svg
from dinov2cli.report.palette import LIGHT

_MOST_IN_PICTURE = 40
_NAME_SHOWN = 18


@dataclass(frozen=True)
class ClassAnswers:
    """Of one class: test images, how many of them were right, and the commonest wrong answer with its count."""

    name: str
    images: int
    right: int
    taken_for: str
    times: int


def has_classes(predictions: pa.Table | None) -> bool:
    """Whether a table of predictions holds one class and one answer per image."""
    if predictions is None or not {"label", "prediction"} <= set(predictions.column_names):
        return False
    return pa.types.is_string(predictions.schema.field("label").type) and predictions.num_rows > 0


def class_answers(predictions: pa.Table) -> list[ClassAnswers]:
    """One entry per class of the test set, the worst first."""
    labels, answers = (predictions.column(name).to_pylist() for name in ("label", "prediction"))
    by_class: dict[str, Counter[str]] = {}
    for label, answer in zip(labels, answers, strict=True):
        by_class.setdefault(label, Counter())[answer] += 1
    found = []
    for name, counts in by_class.items():
        wrong = [(-count, other) for other, count in counts.items() if other != name]
        times, taken_for = min(wrong, default=(0, ""))
        found.append(ClassAnswers(name, counts.total(), counts[name], taken_for, -times))
    return sorted(found, key=lambda one: (one.right / one.images, one.name))


def class_table(answers: Mapping[str, Sequence[ClassAnswers]], shown: int) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: the `shown` worst classes of the first model, and how every other model does on them."""
    first, *others = answers
    accuracy = {
        model: {one.name: f"{100 * one.right / one.images:.1f} %" for one in answers[model]} for model in answers
    }
    rows = [
        [
            one.name,
            f"{one.images:,}",
            *(accuracy[model].get(one.name, "") for model in answers),
            f"{one.taken_for} ({one.times})" if one.times else "",
        ]
        for one in answers[first][:shown]
    ]
    columns = ["right"] if not others else [f"right, {model}" for model in answers]
    return ["class", "images", *columns, "most often taken for" + (f" by {first}" if others else "")], rows


def confusion_chart(predictions: pa.Table) -> str | None:
    """The table of confusions as SVG: rows are the true classes, columns the answers, shares of each row.

    None for more classes than can be read.
    """
    labels, answers = (predictions.column(name).to_pylist() for name in ("label", "prediction"))
    names = sorted({*labels, *answers})
    if not 1 < len(names) <= _MOST_IN_PICTURE:
        return None
    number = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, ([number[label] for label in labels], [number[answer] for answer in answers]), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.26 * len(names)
    figure, (axis,) = new_figure(1, 1, side, width=side + 0.6)
    axis.grid(visible=False)
    for row, column in np.argwhere(counts > 0):
        share = shares[row, column]
        colour = LIGHT["accent"] if row == column else LIGHT["bad"]
        # Squares instead of an image of pixels: they keep their edges, and follow the page's theme.
        size = 0.92 * np.sqrt(max(share, 0.004))
        axis.add_patch(_square(column, row, size, colour))
    shown = [name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 1]}…" for name in names]
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_aspect("equal")
    axis.set_xticks(range(len(names)), shown, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), shown, fontsize=8)
    axis.set_xlabel("answer", color=LIGHT["muted"], fontsize=9)
    axis.set_ylabel("truth", color=LIGHT["muted"], fontsize=9)
    return svg(figure)


def _square(x: float, y: float, size: float, colour: str):  # type: ignore[no-untyped-def]  # a matplotlib patch
    from matplotlib.patches import Rectangle

    return Rectangle((x - size / 2, y - size / 2), size, size, color=colour, linewidth=0)

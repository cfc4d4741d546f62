"""Images of a study, for readers who asked to see them: where the group that fares worst is failed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image
from dinov2cli.evaluation.tasks.interface import Panel
from dinov2cli.fairness.analysis import Findings
from dinov2cli.fairness.answers import Answers
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.outcomes import Outcome

if TYPE_CHECKING:
    from dinov2cli.data.source import ImageSource

_IMAGES = 6
_SIZE = 200  # longest side in pixels


def failed_panels(
    source: "ImageSource",
    rows: np.ndarray,
    outcome: Outcome,
    axes: Sequence[Axis],
    findings: Findings,
    answers: Answers,
) -> list[Panel]:
    """For each axis of one column, images of the group with the worst rate of `outcome` where it went wrong, those of
    the surest answers first, with the first answer below; rows [n] are those of the images in the source."""
    wanted = {axis.name: axis for axis in axes if not axis.crosses}
    wrong = outcome.counted & (outcome.values == (1 if outcome.better == "low" else 0))
    panels = []
    for gap in findings.gaps.to_pylist():
        if gap["metric"] != outcome.metric or gap["axis"] not in wanted or gap["worst"] is None:
            continue
        axis = wanted[gap["axis"]]
        there = np.flatnonzero(wrong & (axis.codes == axis.names.index(gap["worst"])))
        there = there[np.argsort(-answers.confidences[there, 0], kind="stable")][:_IMAGES]
        found = [(place, image) for place in there if (image := _small(source, int(rows[place]))) is not None]
        if found:
            labels = [f"taken for {answers.class_names[answers.classes[place, 0]]}" for place, _ in found]
            title = f"{axis.name}: {gap['worst']}, {outcome.metric} failed"
            panels.append(Panel(title, [image for _, image in found], labels))
    return panels


def _small(source: "ImageSource", row: int) -> np.ndarray | None:
    """The image of a row with no side above `_SIZE`, uint8 [H, W, 3]; None if it cannot be read."""
    try:
        pixels = decode_image(source.read(row), name=source.name(row))
    except BadImage:
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((_SIZE, _SIZE))
    return np.asarray(image)

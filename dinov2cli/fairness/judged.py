"""What all studies say of what they found: figures, tables, one row per image, counts, warnings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.tasks.interface import Judged, Panel
from dinov2cli.fairness.analysis import Findings
from dinov2cli.fairness.answers import Answers
from dinov2cli.fairness.axis import Axis
from dinov2cli.fairness.figures import study_figures, texts_of
from dinov2cli.fairness.outcomes import Outcome
from dinov2cli.fairness.pictures import failed_panels

if TYPE_CHECKING:
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.fairness.protocols.base import Subjects


def judged_study(
    trial: "Trial",
    test: Features,
    subjects: "Subjects",
    outcomes: Sequence[Outcome],
    findings: Findings,
    answers: Answers,
    *,
    tables: Mapping[str, pa.Table],
    notes: Sequence[str] = (),
    quoted: int,
    show_images: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Judged:
    """The result of a study; everything is in the rows of `test`, those of the readable images.

    quoted: how many of the outcomes are printed. show_images: also images of failures in the first outcome.
    """
    ids = [trial.test.ids[row] for row in test.index]
    panels: list[Panel] = []
    if show_images:
        panels = failed_panels(trial.test, test.index, outcomes[0], subjects.axes, findings, answers)
    clusters = subjects.clusters
    return Judged(
        figures=study_figures(outcomes, subjects.axes, findings, quoted=quoted),
        units=ids,
        clusters=clusters,
        predictions=_by_image(ids, subjects, outcomes, answers),
        settings={
            "axes": {axis.name: axis.about for axis in subjects.axes},
            "ordered_axes": [axis.name for axis in subjects.axes if axis.ordered],
            "images": len(ids),
            "cluster_unit": subjects.unit,
            "clusters_by": subjects.by,
            "clusters": len(ids) if clusters is None else len(np.unique(clusters)),
            **_counts(subjects),
            **answers.settings,
            **(settings or {}),
        },
        notes=[*subjects.notes, *answers.notes, *notes, *_unknown(subjects.axes)],
        panels=panels,
        tables={"groups": findings.groups, "gaps": findings.gaps, **tables},
    )


def _counts(subjects: "Subjects") -> dict[str, Any]:
    found = subjects.attributes
    return {
        "attributes_file": found.file,
        "attributes_joined_by": found.key,
        "attribute_rows": found.rows,
        "rows_without_image": found.rows_without_image,
        "images_without_row": found.images_without_row,
        "repeated_rows": found.repeated_rows,
    }


def _unknown(axes: Sequence[Axis]) -> list[str]:
    """A warning for every axis of one column where images have no value."""
    counts = {axis.name: int((axis.codes < 0).sum()) for axis in axes if not axis.crosses}
    return [
        f"{count:,} of {len(axes[0].codes):,} images have no known {name}: counted, shown, in no gap"
        for name, count in counts.items()
        if count
    ]


def _by_image(ids: Sequence[str], subjects: "Subjects", outcomes: Sequence[Outcome], answers: Answers) -> pa.Table:
    """One row per image: its groups, the answers that counted, and what was made of them (null where nothing was)."""
    names = np.array([*answers.class_names, None], dtype=object)
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    if subjects.clusters is not None:
        columns["cluster"] = pa.array(subjects.clusters, pa.int64())
    for axis in subjects.axes:
        columns[axis.name] = texts_of(axis)
    columns["answers"] = pa.array([names[row[row >= 0]].tolist() for row in answers.classes], pa.list_(pa.string()))
    columns["confidences"] = pa.array(list(answers.confidences), pa.list_(pa.float32()))
    for outcome in outcomes:
        columns[outcome.metric] = pa.array(outcome.values, pa.float64(), mask=~outcome.counted)
    return pa.table(columns)

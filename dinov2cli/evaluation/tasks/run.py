"""Runs a task on a trial and turns what it finds into result rows with intervals."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dinov2cli.artifacts.results import ResultRow, Scores
from dinov2cli.evaluation.intervals import interval
from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task
from dinov2cli.evaluation.tasks.trial import Trial


@dataclass
class Outcome:
    """What one model came to in one task: a row for each figure, what the figures are made of, and all else."""

    rows: list[ResultRow]
    scores: list[Scores]
    judged: Judged


def run_task(
    task: Task,
    trial: Trial,
    *,
    model: str,
    dataset: str,
    settings: dict[str, Any],
) -> Outcome | None:
    """Run `task`, checked before, on every process of a launch. None on all but the main one.

    model, dataset: what results call them; settings: what else the figures depend on, recorded with each. Raises what
    the task raises, on all.
    """
    started = time.perf_counter()
    collected = trial.ranks.together(lambda: task.collect(trial))
    found: list[Outcome] = []

    def judge() -> None:
        judged = task.judge(trial, collected)
        _warn_of_overlap(trial, judged)
        _note_unlabelled(trial, judged)
        for note in judged.notes:
            trial.warn(note)
        described = {"model": model, "dataset": dataset, "task": task.name}
        limits = {"confidence": trial.confidence, "resamples": trial.resamples, "seed": trial.seed}
        protocol = {**asdict(task), **settings, **limits}
        seconds = time.perf_counter() - started
        rows = [
            _row(figure, number == 0, judged, protocol, seconds=seconds, **described)
            for number, figure in enumerate(judged.figures)
        ]
        scores = [_scores(figure, judged) for figure in judged.figures]
        found.append(Outcome(rows, scores, judged))

    trial.ranks.first(judge)
    return found[0] if found else None


def _scores(figure: Figure, judged: Judged) -> Scores:
    rows = range(len(judged.units)) if figure.rows is None else figure.rows
    clusters = None if judged.clusters is None else [str(judged.clusters[row]) for row in rows]
    return figure.statistic.scores([judged.units[row] for row in rows], clusters)


def _row(figure: Figure, headline: bool, judged: Judged, protocol: dict[str, Any], **described: Any) -> ResultRow:
    limits = {key: protocol[key] for key in ("seed", "resamples", "confidence")}
    clusters = judged.clusters if judged.clusters is None or figure.rows is None else judged.clusters[figure.rows]
    low, high = interval(figure.statistic, clusters=clusters, **limits) if figure.limits is None else figure.limits
    settings = {
        **protocol,
        "unit": figure.unit,
        "lower_is_better": figure.lower_is_better,
        "statistic": figure.statistic.kind,
        "headline": headline,
        **figure.settings,
        "found": judged.settings,
    }
    if judged.notes:
        settings["notes"] = judged.notes
    described["seconds"] = round(described["seconds"], 3)
    return ResultRow(
        metric=figure.metric,
        value=figure.statistic.value(),
        ci_low=low,
        ci_high=high,
        n=figure.statistic.n,
        settings=settings,
        **described,
    )


def _note_unlabelled(trial: Trial, judged: Judged) -> None:
    """Note how many images a task that goes by labels has left out for want of one."""
    if judged.predictions is None or "label" not in judged.predictions.column_names:
        return
    for role, source in (("training", trial.train), ("test", trial.test)):
        labels = None if source is None else source.labels
        missing = 0 if labels is None else int((labels < 0).sum())
        if labels is not None and missing:
            judged.notes.append(f"{missing:,} of {len(labels):,} {role} images have no label and are left out")


def _warn_of_overlap(trial: Trial, judged: Judged) -> None:
    """Note, loudly, how many test images are in the training set too, byte for byte."""
    if trial.train is None or trial.same_images:  # the same set on both sides is what a task knows how to treat
        return
    train, test = (trial.digests.get(source.spec) for source in (trial.train, trial.test))
    if train is None or test is None or not len(test):
        return
    known = set(map(bytes, np.ascontiguousarray(train)))
    shared = sum(bytes(digest) in known for digest in np.ascontiguousarray(test))
    judged.settings["test_images_in_train"] = shared
    if shared:
        judged.notes.append(
            f"{shared} of {len(test)} test images ({shared / len(test):.1%}) are in the training set too: the figures "
            "say in part how well they are remembered; take them out with `dinov2 dedup TRAIN --against TEST`"
        )

"""`dinov2 eval logreg`: logistic regression on frozen features, its strength chosen on held-out training images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.logreg.protocol import LogregResult
    from dinov2cli.evaluation.tasks.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Logreg(Task):
    """Fit a logistic regression on frozen features, its strength chosen on held-out training images."""

    name: ClassVar[str] = "logreg"

    strengths: list[Annotated[float, Gt(0)]] = setting(
        [], "values of C to try (larger: less regularised); none given: 45 from 1e-6 to 1e5", flag="--c"
    )
    metric: Literal["auto", "top1", "mean_per_class", "map"] = setting(
        "auto",
        "what C is chosen by and what is quoted; auto: map for lists of labels, else top1",
        flag="--metric",
    )
    pool: Literal["auto", "cls", "mean", "cls+mean"] = setting(
        "auto", "vector of an image: what the model is used by, its class token, mean of its patches, or both"
    )
    scaling: Literal["none", "unit", "standard"] = setting(
        "none", "features as they are, of length 1, or each with variance 1"
    )
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "share of the training images held out")
    max_iterations: Annotated[int, Ge(1)] = setting(1000, "steps of L-BFGS at most, for each C")

    def check(self, trial: "Trial") -> None:
        """Labels that match and are of the kind that the metric is for, and something to hold out."""
        import numpy as np

        from dinov2cli.errors import UserError
        from dinov2cli.evaluation.linear.grid import split_validation

        assert trial.train is not None
        lists = trial.train.label_lists is not None
        if self.metric != "auto" and (self.metric == "map") != lists:
            found = "lists of labels" if lists else "one label per image"
            expected = "map (or auto)" if lists else "top1, mean_per_class or auto"
            raise UserError(f"--metric {self.metric}: {trial.train.spec} has {found}; use {expected}")
        labels, _, _ = _aligned(trial)
        if not lists:
            split_validation(labels[np.flatnonzero(labels >= 0)], self.validation_fraction, seed=trial.seed)

    def collect(self, trial: "Trial") -> "tuple[Features, Features]":
        """Features of both sets, from every process."""
        assert trial.train is not None
        return trial.features(trial.train), trial.features(trial.test)

    def judge(self, trial: "Trial", collected: "tuple[Features, Features]") -> Judged:
        """Accuracies, or mean average precision, of the regression at the chosen C on the test set."""
        from dinov2cli.evaluation.logreg.protocol import STRENGTHS, logistic_regression

        train, test = collected
        labels, truth, names = _aligned(trial)
        train_rows, test_rows = (_labelled(trial, which, features) for which, features in enumerate(collected))
        strengths = self.strengths or list(STRENGTHS)
        lists = labels.ndim == 2
        with trial.progress("logistic regressions", len(set(strengths)), "values of C") as advance:
            result = logistic_regression(
                train.pool(self.pool)[train_rows],
                labels[train.index[train_rows]],
                test.pool(self.pool)[test_rows],
                n_classes=len(names),
                seed=trial.seed,
                strengths=strengths,
                metric="map" if lists else "top1" if self.metric == "auto" else self.metric,
                validation_fraction=self.validation_fraction,
                scaling=self.scaling,
                max_iterations=self.max_iterations,
                device=trial.device,
                store=trial.store,
                advance=advance,
            )
        units = [trial.test.ids[row] for row in test.index[test_rows]]
        found = truth[test.index[test_rows]]
        figures, predictions, notes = (_of_lists if lists else _of_classes)(result, found, names, units)
        if trial.same_images:
            notes.append(
                "train and test are the same images: the figures say how well they are remembered, not recognised"
            )
        return Judged(figures, units, predictions, self._settings(result, names), result.notes + notes)

    def _settings(self, result: "LogregResult", names: list[str]) -> dict[str, Any]:
        validation = {f"{c:.6g}": float(value) for c, value in zip(result.strengths, result.validation, strict=True)}
        return {
            "C": result.strength,
            "selection": f"{result.metric} on images held out of the training set, then all of them at that C",
            "validation": validation,
            "objective": "C * (sum of losses) + |w|^2 / 2, intercepts free; L-BFGS",
            "pool": self.pool,
            "scaling": self.scaling,
            "classes": len(names),
            "train_images": result.n_train,
            "validation_images": result.n_validation,
            "loss": result.loss,
        }


def _aligned(trial: "Trial") -> "tuple[np.ndarray, np.ndarray, list[str]]":
    """Labels of all rows of both sources in one numbering: int64 [n], -1 for none, or bool [n, C] of lists."""
    from dinov2cli.evaluation.scores import align_label_lists, align_labels

    train, test = trial.train, trial.test
    assert train is not None
    specs = {"train_spec": train.spec, "test_spec": test.spec}
    if train.label_lists is not None:
        return align_label_lists(train.label_lists, test.label_lists, **specs)
    return align_labels(train.labels, train.label_names, test.labels, test.label_names, **specs)


def _labelled(trial: "Trial", which: int, features: "Features") -> "np.ndarray":
    """Rows of the features of the training (0) or test (1) source whose images carry labels."""
    import numpy as np

    source = trial.test if which else trial.train
    assert source is not None
    if source.label_lists is not None:
        return np.flatnonzero(source.label_lists.given[features.index])
    assert source.labels is not None
    return np.flatnonzero(source.labels[features.index] >= 0)


_Found = tuple[list[Figure], "pa.Table", list[str]]


def _of_classes(result: "LogregResult", labels: "np.ndarray", names: list[str], units: list[str]) -> _Found:
    """Figures (the one that was asked for first), table and notes of images with one label each, int64 [n]."""
    import numpy as np
    import pyarrow as pa
    import torch
    from scipy.special import softmax

    from dinov2cli.evaluation import statistics
    from dinov2cli.evaluation.logreg.protocol import measure
    from dinov2cli.evaluation.scores import absent_note, true_class_ranks

    scores = result.scores
    ranks = true_class_ranks(torch.from_numpy(scores), torch.from_numpy(labels)).numpy()
    figures = [Figure("top1", statistics.mean(ranks == 0))]
    if len(names) > 5:
        figures.append(Figure("top5", statistics.mean(ranks < 5)))
    if result.metric == "mean_per_class":
        figures.insert(0, Figure("mean_per_class", measure(scores, labels, "mean_per_class")))
    else:
        figures.append(Figure("mean_per_class", measure(scores, labels, "mean_per_class")))
    answers, words = scores.argmax(axis=1), np.asarray(names)
    table = pa.table(
        {
            "id": pa.array(units, pa.string()),
            "label": pa.array(words[labels], pa.string()),
            "prediction": pa.array(words[answers], pa.string()),
            "correct": pa.array(ranks == 0, pa.bool_()),
            "confidence": pa.array(softmax(scores, axis=1).max(axis=1), pa.float32()),
        }
    )
    return figures, table, absent_note(labels, names)


def _of_lists(result: "LogregResult", truth: "np.ndarray", names: list[str], units: list[str]) -> _Found:
    """Figure, table and notes of images with several labels each, bool [n, C]."""
    import numpy as np
    import pyarrow as pa

    from dinov2cli.evaluation.logreg.protocol import measure
    from dinov2cli.evaluation.scores import absent_note

    said = result.scores > 0
    strings = pa.list_(pa.string())
    table = pa.table(
        {
            "id": pa.array(units, pa.string()),
            "labels": pa.array([[names[c] for c in np.flatnonzero(row)] for row in truth], strings),
            "predictions": pa.array([[names[c] for c in np.flatnonzero(row)] for row in said], strings),
            "correct": pa.array((said == truth).all(axis=1), pa.bool_()),
        }
    )
    notes = absent_note(np.flatnonzero(truth.any(axis=0)), names)
    return [Figure("mAP", measure(result.scores, truth, "map"))], table, notes

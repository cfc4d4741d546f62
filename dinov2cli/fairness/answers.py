"""What a classifier on frozen features answers for every image, right or wrong: its best classes with confidences.

The classifiers are those of `eval linear` and `eval knn`, trained on a set of their own (`answers`) or on the other
folds of the very set that is judged (`cross_answers`). A class may be a name for a person, so all first answers count
and not the best alone (Goyal et al. 2022, arXiv 2202.07603; Dollar Street in DINOv2, arXiv 2304.07193, section 8).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dinov2cli.data.source import ImageSource
from dinov2cli.errors import UserError
from dinov2cli.evaluation.cache import features_key
from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.knn import DEFAULT_TEMPERATURE, clip_ks, exact_neighbours, voted_classes
from dinov2cli.evaluation.linear.grid import EPOCHS, LAST_BLOCKS, LEARNING_RATES
from dinov2cli.evaluation.linear.probe import LinearClassifier, LinearTraining, linear_stage
from dinov2cli.evaluation.linear.training import Inputs
from dinov2cli.evaluation.scores import align_labels, require_finite
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.fairness.folds import cluster_folds, folds_there_are

Classifier = Literal["linear", "knn"]
Int64 = npt.NDArray[np.int64]

_ANSWERED = 8192  # images whose logits of all classes are held at once
_SHOWN = 3
_LINEAR: dict[str, Any] = {
    "learning_rates": LEARNING_RATES,
    "blocks": LAST_BLOCKS,
    "batch_size": 128,
    "epochs": EPOCHS,
    "steps": None,
    "validation_fraction": 0.1,
}


@dataclass(frozen=True)
class Answers:
    """The first answers of a classifier for n images.

    classes: int64 [n, top], best first, numbers in `class_names`; -1 where the classifier has no further answer (it
    knows fewer classes, or k-NN gave no vote to another). confidences: float32 [n, top], 0 there: the softmax over all
    classes it knows, or the share of the votes; they sum to at most 1. class_numbers: the number that each class has in
    the labels of the training set, where that may differ from its place in `class_names`; empty where it does not.
    settings: what was chosen and found, plain values. notes: sentences for the user.
    """

    classes: np.ndarray
    confidences: np.ndarray
    class_names: list[str]
    settings: dict[str, Any]
    notes: list[str]
    class_numbers: tuple[int, ...] = ()

    def first(self, top: int) -> "Answers":
        """With the first `top` answers of every image only."""
        return replace(self, classes=self.classes[:, :top], confidences=self.confidences[:, :top])


@dataclass(frozen=True)
class _Method:
    classifier: Classifier
    top: int
    neighbours: int
    temperature: float
    pool: str
    linear: Mapping[str, Any]


@dataclass(frozen=True)
class _Known:
    """What is learned from: rows of the features of a source, and their labels [len(rows)]."""

    source: ImageSource
    features: Features
    rows: Int64
    labels: Int64


@dataclass(frozen=True)
class _Found:
    classes: Int64
    confidences: npt.NDArray[np.float32]
    settings: dict[str, Any]
    notes: list[str]


def answers(
    trial: Trial,
    train: Features,
    test: Features,
    *,
    classifier: Classifier,
    top: int = 5,
    neighbours: int = 20,
    temperature: float = DEFAULT_TEMPERATURE,
    pool: str = "auto",
    **linear: Any,
) -> Answers:
    """Train on the labelled images of `trial.train` and answer for all of `trial.test`, which needs no labels.

    train, test: features of these two sources. Classes are those that a training image has, in the order of their
    numbers, as in `scores.align_labels`. neighbours, temperature and pool are of k-NN; `linear` are settings of
    `LinearTraining` (learning_rates, blocks, batch_size, epochs, steps, validation_fraction), by default those of
    `eval linear`, whose kept state (`trial.store`) a killed training goes on from. Where both are the same images, k-NN
    leaves each out of its own neighbours. To be called on the main process of a launch.
    Raises InputError for a training set without labels or of one class, UserError for impossible settings, WorkError
    for features that are not finite.
    """
    assert trial.train is not None
    source, method = trial.train, _method(classifier, top, neighbours, temperature, pool, linear)
    spec = {"train_spec": source.spec, "test_spec": source.spec}
    labels, _, names = align_labels(train.labels, train.label_names, train.labels, train.label_names, **spec)
    assert train.labels is not None
    rows = np.flatnonzero(labels >= 0)
    alone = trial.same_images and np.array_equal(train.index, test.index)
    known = _Known(source, train, rows, labels[rows])
    found = _answered(trial, known, test, np.arange(len(test)), trial.test.spec, method, alone=alone)
    notes = found.notes + _few_classes(len(names), top)
    if alone and classifier == "linear":
        notes.insert(0, "train and test are the same images: answers say how well they are remembered, not recognised")
    if alone and classifier == "knn":
        notes.insert(0, "train and test are the same images: each is left out of its own neighbours")
    numbers = tuple(np.unique(train.labels[rows]).tolist())
    settings = {**_common(method, len(names)), **found.settings}
    return Answers(found.classes, found.confidences, names, settings, notes, numbers)


def cross_answers(
    trial: Trial,
    features: Features,
    labels: np.ndarray,
    class_names: Sequence[str],
    clusters: np.ndarray,
    *,
    classifier: Classifier,
    folds: int = 5,
    top: int = 5,
    neighbours: int = 20,
    temperature: float = DEFAULT_TEMPERATURE,
    pool: str = "auto",
    **linear: Any,
) -> Answers:
    """Answers for the images of `trial.test` from classifiers that saw neither them nor an image of their cluster.

    features: of `trial.test`; labels: int64 [n], places in `class_names`, -1 for an image that trains nothing and gets
    an answer all the same; clusters: int64 [n] (`arange` where every image stands for itself). The images are dealt
    into folds of whole clusters (`cluster_folds`, by `trial.seed`), and each fold is answered by a classifier of the
    others. It knows the classes it saw and no others, so a class of one cluster can never be answered where it is the
    truth; this is noted. More folds than clusters with a label become as many as these.
    The rest is as in `answers`; every fold keeps a state of its own. Raises what `answers` raises, and InputError where
    all labelled images are of one cluster or of one class.
    """
    method = _method(classifier, top, neighbours, temperature, pool, linear)
    labels, clusters = np.asarray(labels, np.int64), np.asarray(clusters, np.int64)
    used, notes = folds_there_are(labels, class_names, clusters, folds, trial.test.spec)
    fold = cluster_folds(labels, clusters, used, seed=trial.seed)
    classes = np.full((len(labels), top), -1, np.int64)
    confidences = np.zeros((len(labels), top), np.float32)
    parts: list[_Found] = []
    blind = np.zeros(len(labels), dtype=bool)
    for number in range(used):
        asked, rows = np.flatnonzero(fold == number), np.flatnonzero((fold != number) & (labels >= 0))
        known = _Known(trial.test, features, rows, labels[rows])
        part = _answered(
            trial, known, features, asked, trial.test.spec, method, during=f", fold {number + 1} of {used}"
        )
        classes[asked], confidences[asked] = part.classes, part.confidences
        blind[asked] = (labels[asked] >= 0) & ~np.isin(labels[asked], known.labels)
        parts.append(part)
    notes += dict.fromkeys(note for part in parts for note in part.notes)
    notes += _never_right(labels[blind], class_names) + _few_classes(len(np.unique(labels[labels >= 0])), top)
    settings = {**_common(method, len(class_names)), "folds": used}
    for key in parts[0].settings:
        values = [part.settings[key] for part in parts]
        settings[key] = values[0] if all(value == values[0] for value in values) else values
    return Answers(classes, confidences, list(class_names), settings, notes)


def _method(
    classifier: Classifier, top: int, neighbours: int, temperature: float, pool: str, linear: Mapping[str, Any]
) -> _Method:
    if classifier not in ("linear", "knn"):
        raise UserError(f"classifier {classifier!r} is not known: expected linear or knn")
    if top < 1 or not temperature > 0:
        raise UserError(f"top is {top} and the temperature {temperature}, expected numbers above 0: use 5 and 0.07")
    unknown = set(linear) - set(_LINEAR)
    if unknown:
        raise TypeError(f"no such settings of a linear classifier: {', '.join(sorted(unknown))}")
    return _Method(classifier, top, neighbours, temperature, pool, {**_LINEAR, **linear})


def _common(method: _Method, n_classes: int) -> dict[str, Any]:
    return {"classifier": method.classifier, "top": method.top, "classes": n_classes}


def _answered(
    trial: Trial,
    known: _Known,
    features: Features,
    rows: Int64,
    name: str,
    method: _Method,
    *,
    alone: bool = False,
    during: str = "",
) -> _Found:
    """Answers for these rows of `features` (a set called `name`) by a classifier of the classes in `known.labels`."""
    present, labels = np.unique(known.labels, return_inverse=True)
    known = _Known(known.source, known.features, known.rows, labels)
    if method.classifier == "knn":
        classes, confidences, settings, notes = _by_neighbours(trial, known, features, rows, name, method, alone)
    else:
        classes, confidences, settings, notes = _by_line(trial, known, features, rows, name, method, during)
    return _Found(np.where(classes < 0, -1, present[classes]), confidences, settings, notes)


def _by_neighbours(
    trial: Trial, known: _Known, features: Features, rows: Int64, name: str, method: _Method, alone: bool
) -> tuple[Int64, npt.NDArray[np.float32], dict[str, Any], list[str]]:
    def unit(some: Features, of: Int64, called: str) -> torch.Tensor:
        vectors = torch.as_tensor(some.pool(method.pool)[of]).to(trial.device, torch.float32)
        require_finite(vectors, called)
        return F.normalize(vectors, dim=1)

    (k,), notes = clip_ks([method.neighbours], len(known.rows) - alone)
    references = unit(known.features, known.rows, known.source.spec)
    labels = torch.from_numpy(known.labels).to(trial.device)
    classes = np.full((len(rows), method.top), -1, np.int64)
    confidences = np.zeros((len(rows), method.top), np.float32)
    # Images that are among the known ones themselves are searched against all others.
    inside = np.isin(rows, known.rows) if alone else np.zeros(len(rows), dtype=bool)
    for some in (inside, ~inside):
        if some.any():
            queries = None if some is inside else unit(features, rows[some], name)
            cosines, near = exact_neighbours(queries, references, k)
            classes[some], confidences[some] = voted_classes(
                cosines, labels[near], top=method.top, temperature=method.temperature
            )
    settings = {
        "neighbours": k,
        "similarity": "cosine",
        "temperature": method.temperature,
        "pool": method.pool,
        "train_images": len(known.rows),
        "leave_one_out": alone,
    }
    return classes, confidences, settings, notes


def _by_line(
    trial: Trial, known: _Known, features: Features, rows: Int64, name: str, method: _Method, during: str
) -> tuple[Int64, npt.NDArray[np.float32], dict[str, Any], list[str]]:
    inputs = Inputs.of(*_taken(known.features, known.rows), known.source.spec, trial.device)
    settings = {
        "n_classes": int(known.labels.max()) + 1,
        **method.linear,
        "seed": trial.seed,
        "device": str(trial.device),
    }
    # Labels alone do not tell one fold from another: which rows they belong to does.
    digest = hashlib.sha256(np.ascontiguousarray(known.rows, np.int64).tobytes()).hexdigest()
    key = {**features_key(trial, known.source, None), "augmentation": "none", "rows": digest}
    training = LinearTraining(
        known.labels,
        available_blocks=inputs.blocks,
        dim=inputs.dim,
        has_patches=inputs.patches is not None,
        stage=linear_stage(trial.store, known.labels, key, **settings),
        **settings,
    )
    with trial.progress(f"linear classifiers{during}", training.steps - training.step, "steps") as advance:
        training.run(inputs, advance=advance)
    trained = training.finish(inputs)
    tokens, patches = _taken(features, rows)
    for values in (tokens, patches):
        if values is not None:
            require_finite(torch.as_tensor(values), name)
    classes, confidences = _first(trained.classifier, tokens, patches, method.top, trial.device)
    found = {key: value for key, value in trained.settings().items() if key != "classes"}
    return classes, confidences, found, list(trained.notes)


def _first(
    classifier: LinearClassifier, tokens: np.ndarray, patches: np.ndarray | None, top: int, device: torch.device
) -> tuple[Int64, npt.NDArray[np.float32]]:
    """The `top` classes of every image with their softmax, some thousand images at a time."""
    classes = np.full((len(tokens), top), -1, np.int64)
    confidences = np.zeros((len(tokens), top), np.float32)
    width = min(top, len(classifier.bias))
    for start in range(0, len(tokens), _ANSWERED):
        some = slice(start, start + _ANSWERED)
        logits = classifier.logits(tokens[some], None if patches is None else patches[some], device=device)
        # Chosen by logits, which differ where several confidences are rounded to 0.
        best, which = logits.topk(width, dim=1)
        classes[some, :width] = which.numpy()
        confidences[some, :width] = (best - logits.logsumexp(1, keepdim=True)).exp().numpy()
    return classes, confidences


def _taken(features: Features, rows: Int64) -> tuple[np.ndarray, np.ndarray | None]:
    """Class tokens and averaged patches of these rows; not copied where all rows are asked for."""
    tokens, patches = features.class_tokens, features.averaged_patches
    if len(rows) == len(tokens):
        return tokens, patches
    return tokens[rows], None if patches is None else patches[rows]


def _never_right(labels: Int64, class_names: Sequence[str]) -> list[str]:
    """A note on images whose class no other fold has; labels of these images."""
    if not len(labels):
        return []
    classes = [class_names[label] for label in np.unique(labels)]
    shown = ", ".join(classes[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
    return [
        f"{len(labels):,} images are of classes that no other fold has ({shown}): a class of one cluster cannot be "
        "learned from others, so answers for these images are never right"
    ]


def _few_classes(n_classes: int, top: int) -> list[str]:
    if n_classes > top or top == 1:
        return []
    return [
        f"the classifier knows {n_classes} classes and gives up to {top} answers: that one of them is right says "
        "little or nothing; ask for fewer answers or train on more classes"
    ]

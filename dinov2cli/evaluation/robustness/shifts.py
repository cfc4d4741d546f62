"""How a classifier holds up on other images than it was trained for: shifted sets and common corruptions.

Shifted sets may hold some of the classes only (ImageNet-A, -R) or several right answers for an image (ReaL). The errors
under corruptions are in `robustness_errors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.special

from dinov2cli.errors import InputError
from dinov2cli.evaluation.statistics import Statistic, mean, ratio

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_SHOWN = 5


@dataclass(frozen=True)
class Labels:
    """Labels of a set: image `owner[i]` (0..n-1) has the label `label[i]`, in the set's own numbers; some images have
    none, some several. names: name of each number, where the set has them."""

    n: int
    owner: Ints
    label: Ints
    names: Sequence[str] | None = None

    @staticmethod
    def single(labels: npt.ArrayLike, names: Sequence[str] | None = None) -> "Labels":
        """Of int [n], negative where an image has none."""
        found = np.asarray(labels, dtype=np.int64)
        owner = np.flatnonzero(found >= 0)
        return Labels(len(found), owner, found[owner], names)

    @staticmethod
    def several(lists: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> "Labels":
        """Of a list of numbers for each image, empty where it has none."""
        owner = np.repeat(np.arange(len(lists)), [len(found) for found in lists])
        label = np.array([number for found in lists for number in found], dtype=np.int64)
        return Labels(len(lists), owner[label >= 0], label[label >= 0], names)


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart: class c has the number `numbers[c]` in its training set, and the name `names[c]`
    where that has names."""

    numbers: Ints
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def shown(self, number: int) -> str:
        """How to call class `number`."""
        return str(self.numbers[number]) if self.names is None else self.names[number]


@dataclass(frozen=True)
class Answers:
    """Which classes of a classifier are right for which images of a set.

    owner [m] and right [m]: class `right[i]` is a right answer for image `owner[i]`, one of 0..n-1. present: the
    classes that occur, sorted. unlabelled, unknown: number of images without a label, and of those all of whose labels
    the classifier does not know; unknown_names: these labels.
    """

    n: int
    owner: Ints
    right: Ints
    present: Ints
    unlabelled: int
    unknown: int
    unknown_names: list[str]

    @property
    def judged(self) -> Ints:
        """Images with a right answer, sorted."""
        return np.unique(self.owner)

    def of(self, classes: Ints) -> "Answers":
        """The same with those right answers only that are among `classes`."""
        kept = np.isin(self.right, classes)
        return Answers(self.n, self.owner[kept], self.right[kept], np.intersect1d(self.present, classes), 0, 0, [])

    def hits(self, predictions: Ints) -> Bools:
        """Whether the class predicted for each image [n] is a right answer; bool [n], false where there is none."""
        found = np.zeros(self.n, dtype=bool)
        found[self.owner[predictions[self.owner] == self.right]] = True
        return found


def training_classes(labels: Ints, names: Sequence[str] | None, spec: str) -> tuple[Ints, Classes]:
    """Labels [n] of a training set as 0..C-1 (-1: none), and the C classes. Raises InputError where it has no labels,
    one class, or a label without a name."""
    numbers = np.unique(labels[labels >= 0])
    if len(numbers) < 2:
        raise InputError(f"{spec} has {len(numbers)} labelled classes, a classifier needs two: give a set with more")
    if names is not None and numbers[-1] >= len(names):
        raise InputError(f"{spec} has label {numbers[-1]} but only {len(names)} class names: repair its labels")
    found = np.where(labels >= 0, np.searchsorted(numbers, np.maximum(labels, numbers[0])), -1)
    return found, Classes(numbers, None if names is None else [str(names[number]) for number in numbers])


def match_labels(labels: Labels, classes: Classes, *, spec: str, train_spec: str, skip_unknown: bool) -> Answers:
    """Bring the labels of a set to the classes of a classifier: by name where both have names, else by number.

    Labels that the classifier does not know raise InputError, or with `skip_unknown` are left out and counted. Raises
    InputError too for a set without labels, and for one that shares no class.
    """
    if not len(labels.label):
        raise InputError(
            f"{spec} has no labels and this benchmark needs them: name their column with ?label=COLUMN, "
            "or take them from folders with ?label=folder"
        )
    numbers, inverse = np.unique(labels.label, return_inverse=True)
    if labels.names is not None and classes.names is not None:
        keys = [str(labels.names[number]) if number < len(labels.names) else str(number) for number in numbers]
        known = {name: index for index, name in enumerate(classes.names)}
    else:
        keys = [str(number) for number in numbers]
        known = {str(number): index for index, number in enumerate(classes.numbers.tolist())}
    to_class = np.array([known.get(key, -1) for key in keys], dtype=np.int64)
    unknown = [key for key, found in zip(keys, to_class, strict=True) if found < 0]
    if len(unknown) == len(keys):
        raise InputError(
            f"{spec} has no class in common with {train_spec} (its classes: {_some(unknown)}; known: "
            f"{_some([classes.shown(number) for number in range(len(classes))])}): "
            "give sets whose classes have the same names or numbers"
        )
    if unknown and not skip_unknown:
        raise InputError(
            f"{spec} has {len(unknown)} class{'es' if len(unknown) > 1 else ''} that {train_spec} lacks "
            f"({_some(unknown)}): take them out, or leave them out with --set unknown=skip"
        )
    right = to_class[inverse]
    owner, right = labels.owner[right >= 0], right[right >= 0]
    labelled = len(np.unique(labels.owner))
    return Answers(
        labels.n, owner, right, np.unique(right), labels.n - labelled, labelled - len(np.unique(owner)), unknown
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def predict(logits: npt.NDArray[np.float32], classes: Ints | None = None) -> Ints:
    """The class of the highest of logits [n, C], int64 [n]; among `classes` (sorted) only, where they are given."""
    if classes is None or len(classes) == logits.shape[1]:
        return logits.argmax(axis=1)
    return classes[logits[:, classes].argmax(axis=1)]


@dataclass(frozen=True)
class Seen:
    """What a classifier said of one set: logits float32 [n, C] of the readable images, which are the rows index [n] of
    the set; digests uint8 [n, 32] of their files; names of all images of the set, readable or not."""

    index: Ints
    names: Sequence[str]
    digests: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    answers: Answers

    @cached_property
    def rows(self) -> Ints:
        """Which of the n have a right answer, int64 [m]: they are judged."""
        return np.flatnonzero(np.isin(self.index, self.answers.judged))

    @property
    def ids(self) -> list[str]:
        """Names of those that are judged."""
        return [self.names[image] for image in self.index[self.rows]]

    def of(self, classes: Ints) -> "Seen":
        """The same, judging those images only that have a right answer among `classes`."""
        return Seen(self.index, self.names, self.digests, self.logits, self.answers.of(classes))

    def right(self, among: Ints | None = None) -> Bools:
        """Whether each of `rows` is got right, bool [m], when the classes `among` may be predicted (None: all)."""
        return self.right_of(predict(self.logits, among))

    def right_of(self, predictions: Ints) -> Bools:
        """The same for other predictions than its own, one class for each of the n."""
        by_image = np.full(self.answers.n, -1)
        by_image[self.index] = predictions
        return self.answers.hits(by_image)[self.index[self.rows]]

    def shared_with(self, digests: npt.NDArray[np.uint8] | None) -> int:
        """How many of the images that are judged are among those with these digests [k, 32]."""
        known = set() if digests is None else set(map(bytes, np.ascontiguousarray(digests)))
        return sum(bytes(digest) in known for digest in np.ascontiguousarray(self.digests[self.rows]))

    def table(self, classes: Classes) -> pa.Table:
        """One row per image that is judged: its label (the first of several), the answer and how sure it is."""
        first = np.full(self.answers.n, -1)
        first[self.answers.owner[::-1]] = self.answers.right[::-1]
        names = np.array([classes.shown(number) for number in range(len(classes))], dtype=object)
        logits = self.logits[self.rows]
        return pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "label": pa.array(names[first[self.index[self.rows]]], pa.string()),
                "prediction": pa.array(names[predict(logits)], pa.string()),
                "correct": pa.array(self.right(), pa.bool_()),
                "confidence": pa.array(scipy.special.softmax(logits, axis=1).max(axis=1), pa.float32()),
            }
        )


class Units:
    """The images of a test set and of further sets as one list, each image once, whichever sets it is in.

    So figures of different images stand beside each other in one bootstrap, and those of the same images are paired.
    """

    def __init__(self, names: Sequence[str], digests: npt.NDArray[np.uint8]) -> None:
        """names [n] and sha256 digests uint8 [n, 32] of the images of the test set."""
        self.names = list(names)
        self.test = np.arange(len(self.names))
        self._of_digest: dict[bytes, int] = {}
        for number, digest in enumerate(np.ascontiguousarray(digests)):
            self._of_digest.setdefault(bytes(digest), number)

    def add(self, names: Sequence[str], digests: npt.NDArray[np.uint8]) -> Ints:
        """Add the images of another set; the place of each of them in the list, int64 [n]."""
        found = np.empty(len(names), dtype=np.int64)
        for number, (name, digest) in enumerate(zip(names, np.ascontiguousarray(digests), strict=True)):
            found[number] = place = self._of_digest.setdefault(bytes(digest), len(self.names))
            if place == len(self.names):
                self.names.append(name)
        return found

    def share(self, places: Ints, values: npt.ArrayLike) -> Statistic:
        """Mean of values [n] over the images at `places` [n]."""
        if len(places) == len(self.names) and np.array_equal(places, self.test):
            return mean(values)
        return ratio(*self._sums(places, values))

    def difference(self, places: Ints, values: npt.ArrayLike, others: Ints, other_values: npt.ArrayLike) -> Statistic:
        """Mean of the first values less the mean of the second."""
        sums, counts = self._sums(places, values)
        other_sums, other_counts = self._sums(others, other_values)
        # A ratio averages its columns: twice the first and minus twice the second make their difference.
        return ratio(np.column_stack([2 * sums, -2 * other_sums]), np.column_stack([counts, other_counts]))

    def _sums(self, places: Ints, values: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        n = len(self.names)
        weights = np.asarray(values, dtype=np.float64)
        sums = np.bincount(places, weights=weights, minlength=n).astype(np.float64)
        return sums, np.bincount(places, minlength=n).astype(np.float64)

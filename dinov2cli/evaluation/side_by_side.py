"""Several models measured on the same images: features of all from one reading, k-NN and linear probe in pairs, and
the agreement of their tokens. What the page of a distillation is made from.

Legend: n images, P patches of an image that are compared, D width of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dinov2cli.data.loader import read_ranges, row_ranges
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError
from dinov2cli.evaluation import intervals, statistics
from dinov2cli.evaluation.agreement import agreement, halves, linear_cka
from dinov2cli.evaluation.features import extract, view_of
from dinov2cli.evaluation.finetuning.views import Rows
from dinov2cli.evaluation.knn import knn_classify
from dinov2cli.evaluation.linear.probe import train_linear
from dinov2cli.evaluation.online import has_labels
from dinov2cli.evaluation.scores import align_labels
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

NEIGHBOURS = 20
"""k of the k-NN classifier."""

LINEAR_STEPS = 500
"""Of the linear heads, 128 images each: enough for the few thousand images of a report."""

PATCHES = 32
"""Patches of an image that are compared at most, drawn for each image."""

_BATCH = 64
_FRAMING = 0.02  # by how much the part of an image that two models see may differ, to be compared place by place
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seer:
    """A model that looks at the images in its own way; `grids`: for which its patch tokens are kept."""

    network: VisionTransformer | Encoder
    preprocess: Preprocess
    grids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Looked:
    """What one model made of the images, float32.

    index: int64 [n] rows of the source. pooled [n, D]: the vector it is used by; class_tokens, averaged_patches [n, D]:
    of the last block after the final norm; patches: grid -> [n, P, D], resampled to grid x grid places.
    """

    index: Ints
    pooled: np.ndarray
    class_tokens: np.ndarray
    averaged_patches: np.ndarray
    patches: dict[int, np.ndarray]

    def at(self, index: Ints) -> "Looked":
        """The rows of the source in `index`, rising, all of which are there."""
        rows = np.searchsorted(self.index, index)
        patches = {grid: values[rows] for grid, values in self.patches.items()}
        return Looked(index, self.pooled[rows], self.class_tokens[rows], self.averaged_patches[rows], patches)


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, over n units."""

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: npt.ArrayLike, *, seed: int) -> "Estimate":
        """Mean of one number per image [n]."""
        found = statistics.mean(values)
        return Estimate(found.value(), *intervals.interval(found, seed=seed), len(found))

    @staticmethod
    def change(before: npt.ArrayLike, after: npt.ArrayLike, *, seed: int) -> "Estimate":
        """Mean of after - before [n], a paired bootstrap over the images."""
        found = intervals.difference(statistics.mean(before), statistics.mean(after), seed=seed)
        return Estimate(found.value, found.low, found.high, found.n)


@dataclass(frozen=True)
class Labelled:
    """Which images vote or train and which are judged: rows of the features with labels int64, 0..C-1.

    leave_one_out: k-NN judges every labelled image of the sample by all others; the linear probe learns from one half.
    """

    train_rows: Ints
    train_labels: Ints
    test_rows: Ints
    test_labels: Ints
    classes: int
    leave_one_out: bool
    notes: list[str] = field(default_factory=list)


def framed(teacher: Preprocess, student: Preprocess) -> Preprocess:
    """The teacher's preprocessing, showing the part of an image that the student sees: itself where it does so."""
    same = abs(teacher.crop / teacher.resize - student.crop / student.resize) < _FRAMING
    if same and teacher.square == student.square:
        return teacher
    return replace(teacher, resize=round(teacher.crop * student.resize / student.crop), square=student.square)


def draw(source: ImageSource, images: int, *, seed: int) -> Ints:
    """Rising rows of at most `images` images drawn by seed; where there are labels, of images that have one."""
    labels = source.labels
    candidates = np.arange(len(source)) if labels is None or not has_labels(source) else np.flatnonzero(labels >= 0)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x0A14]))
    return np.sort(rng.permutation(candidates)[:images])


def look(
    seers: Sequence[Seer],
    source: ImageSource,
    rows: Ints,
    *,
    seed: int,
    precision: str,
    workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Looked]:
    """What each model makes of these rows (rising): every image is decoded once for all models of the same view.

    Unreadable images are left out, of all models alike. `advance` is told of images times models.
    Raises InputError where no image can be read, UserError for a size that a network does not take.
    """
    by_view: dict[Any, list[int]] = {}
    for number, seer in enumerate(seers):
        by_view.setdefault(view_of(seer.preprocess), []).append(number)
    parts: list[list[Looked]] = [[] for _ in seers]
    sample = Rows(source, rows)
    for view, numbers in by_view.items():
        for found in read_ranges(sample, row_ranges(0, len(rows), _BATCH), view=view, workers=workers):
            if not len(found.batch):
                continue
            found.batch.index = rows[found.batch.index]
            for number in numbers:
                parts[number].append(_looked(seers[number], found.batch, seed, precision))
                advance(len(found.batch))
    if not all(parts):
        raise InputError(f"{source.spec}: none of {len(rows)} images can be read")
    whole = [_joined(found) for found in parts]
    common = whole[0].index
    for other in whole[1:]:
        common = np.intersect1d(common, other.index)
    return [found.at(common) for found in whole]


def _looked(seer: Seer, batch: Any, seed: int, precision: str) -> Looked:
    (found,) = extract(
        seer.network,
        [batch],
        preprocess=seer.preprocess,
        patches=bool(seer.grids),
        last_blocks=1,
        precision=precision,
    )
    assert found.class_tokens is not None and found.averaged_patches is not None
    patches = {}
    for grid in seer.grids:
        assert found.patches is not None
        resampled = _on_grid(found.patches, grid)
        places = torch.from_numpy(np.stack([_places(int(row), grid, seed) for row in batch.index]))
        index = places[:, :, None].expand(-1, -1, resampled.shape[2])
        patches[grid] = resampled.gather(1, index).numpy()
    tokens = found.class_tokens[:, -1].numpy()
    return Looked(batch.index, found.pooled.numpy(), tokens, found.averaged_patches.numpy(), patches)


def _on_grid(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Patch tokens [n, N, D] of a square grid resampled to [n, grid * grid, D] (bilinear)."""
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise InputError(f"{patches.shape[1]} patch tokens of an image lie on no square grid: they cannot be compared")
    if side == grid:
        return patches
    maps = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def _places(row: int, grid: int, seed: int) -> Ints:
    """Places of a grid at which the tokens of one image are compared."""
    rng = np.random.Generator(np.random.Philox(key=[seed, row]))
    return np.sort(rng.permutation(grid * grid)[:PATCHES])


def _joined(parts: Sequence[Looked]) -> Looked:
    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    patches = {grid: np.concatenate([part.patches[grid] for part in parts]) for grid in parts[0].patches}
    return Looked(all_of("index"), all_of("pooled"), all_of("class_tokens"), all_of("averaged_patches"), patches)


def check_test(source: ImageSource, test: ImageSource) -> None:
    """Raise InputError unless both sets have labels, of classes that belong together."""
    _aligned(source, test)


def _aligned(source: ImageSource, test: ImageSource) -> tuple[Ints, Ints, list[str]]:
    return align_labels(
        source.labels,
        source.label_names,
        test.labels,
        test.label_names,
        train_spec=source.spec,
        test_spec=test.spec,
    )


def labelled_split(source: ImageSource, index: Ints, test: ImageSource | None, test_index: Ints) -> Labelled:
    """What is trained and judged on: images `index` of the source, and images `test_index` of the test set, if any.

    Test images of classes without a training image are left out, with a note. Raises InputError where there are no
    labels, or only one class.
    """
    if test is None:
        if source.labels is None or not has_labels(source):
            raise InputError(f"{source.spec} has no labels; name their column with ?label=NAME, or use ?label=folder")
        rows = np.flatnonzero(source.labels[index] >= 0)
        classes, labels = np.unique(source.labels[index[rows]], return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"the images of {source.spec} that were drawn are of one class: nothing to tell apart")
        return Labelled(rows, labels, rows, labels, len(classes), leave_one_out=True)
    train_labels, test_labels, _ = _aligned(source, test)
    rows = np.flatnonzero(train_labels[index] >= 0)
    classes, labels = np.unique(train_labels[index[rows]], return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"the images of {source.spec} that were drawn are of one class: nothing to tell apart")
    wanted = test_labels[test_index]
    judged = np.flatnonzero(np.isin(wanted, classes))
    missing = int((wanted >= 0).sum()) - len(judged)
    if not len(judged):
        raise InputError(f"no image drawn from {test.spec} has a class of the images drawn from {source.spec}")
    notes = (
        [f"{missing} test images are of classes without a training image in the sample: left out"] if missing else []
    )
    return Labelled(rows, labels, judged, np.searchsorted(classes, wanted[judged]), len(classes), False, notes)


def knn_correct(train: Looked, test: Looked, split: Labelled, *, device: torch.device) -> npt.NDArray[np.bool_]:
    """Which judged images the k-NN classifier with k = 20 gets right, bool [n]."""
    result = knn_classify(
        train.pooled[split.train_rows],
        split.train_labels,
        test.pooled[split.test_rows],
        split.test_labels,
        ks=(NEIGHBOURS,),
        leave_one_out=split.leave_one_out,
        device=device,
    )
    return result.correct()


def linear_correct(
    train: Looked, test: Looked, split: Labelled, *, seed: int, device: torch.device, steps: int = LINEAR_STEPS
) -> npt.NDArray[np.bool_]:
    """Which judged images a linear head on frozen features gets right, bool [n].

    A grid of learning rates, on the class token alone and with averaged patches, chosen on a tenth of the training
    images. Leaving one out means two halves by `seed` here: the second is judged. Raises InputError where nothing can
    be held out to choose the head, or the halves have no class in common.
    """
    learn, judge = np.arange(len(split.train_rows)), np.arange(len(split.test_rows))
    if split.leave_one_out:
        learn, judge = halves(len(learn), seed=seed)
    classes, labels = np.unique(split.train_labels[learn], return_inverse=True)
    judge = judge[np.isin(split.test_labels[judge], classes)]
    if len(classes) < 2 or not len(judge):
        raise InputError("one half of the images holds too few classes for a linear probe")
    rows = split.train_rows[learn]
    trained = train_linear(
        train.class_tokens[rows][:, None],
        train.averaged_patches[rows],
        labels,
        seed=seed,
        device=device,
        blocks=(1,),
        steps=steps,
    )
    rows = split.test_rows[judge]
    logits = trained.classifier.logits(test.class_tokens[rows][:, None], test.averaged_patches[rows], device=device)
    return classes[logits.argmax(dim=1).numpy()] == split.test_labels[judge]


def token_figures(student: Looked, teacher: Looked, grid: int, *, seed: int) -> dict[str, Estimate]:
    """Agreement of the student's tokens with the teacher's, patches on the student's grid.

    Keys: class_cosine and patch_cosine through a linear map, …_constant of the mean token, …_plain without a map where
    the widths are equal, and class_cka. Raises what `agreement` raises.
    """
    found: dict[str, Estimate] = {}
    pairs = {"class": (student.class_tokens, teacher.class_tokens)}
    if grid in student.patches and grid in teacher.patches:
        pairs["patch"] = (student.patches[grid], teacher.patches[grid])
    for name, (own, aim) in pairs.items():
        cosine = agreement(own, aim, seed=seed)
        found[f"{name}_cosine"] = Estimate.of(cosine.mapped, seed=seed)
        found[f"{name}_constant"] = Estimate.of(cosine.constant, seed=seed)
        if cosine.plain is not None:
            found[f"{name}_plain"] = Estimate.of(cosine.plain, seed=seed)
    found["class_cka"] = Estimate(*linear_cka(student.class_tokens, teacher.class_tokens), len(student.index))
    return found

"""Weighted k-NN classification on frozen features (METHOD §8.17): all k of a list from one exact search.

Every neighbour is exact: on the CPU by the flat index of `search`, on an accelerator by blocks of matrix products.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.scores import require_finite, true_class_ranks
from dinov2cli.search.neighbours import top_k

DEFAULT_KS = (10, 20, 100, 200)
DEFAULT_TEMPERATURE = 0.07
# One block of similarities is 256 x 65,536 float32 values: 64 MiB.
_TEST_BLOCK = 256
_TRAIN_BLOCK = 65_536


@dataclass(frozen=True)
class KnnResult:
    """Per-image outcome of the k-NN classifier for every k of `ks` (ascending, clipped to what the train set has)."""

    ks: tuple[int, ...]
    ranks: dict[int, np.ndarray]  # k -> int64 [n]: classes before the true one; n_classes when it got no vote
    predictions: dict[int, np.ndarray]  # k -> int64 [n]
    confidences: dict[int, np.ndarray]  # k -> float32 [n]: share of the votes that the predicted class got
    neighbours: np.ndarray  # int64 [n, max k]: rows of the train set, most similar first
    similarities: np.ndarray  # float32 [n, max k]: cosine
    n_classes: int
    temperature: float
    leave_one_out: bool
    n_train: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def headline_k(self) -> int:
        """The one k to quote: 20 where it was asked for, else the smallest. Fixed, never picked by its test score."""
        return 20 if 20 in self.ks else self.ks[0]

    def correct(self, k: int | None = None, *, top: int = 1) -> np.ndarray:
        """Return right/wrong per test image, bool [n], at this k (default: `headline_k`)."""
        return self.ranks[self.headline_k if k is None else k] < top


@dataclass(frozen=True)
class FewShotResult:
    """Outcome of the k-NN classifier that votes from `shots` training images of each class, over several draws.

    shares: (k, top) -> float64 [n]: in what share of the draws the true class of a test image was among the first
    `top`; spread: (k, top) -> standard deviation of the accuracy from draw to draw (0 for one draw).
    """

    shots: int
    tries: int
    ks: tuple[int, ...]
    shares: dict[tuple[int, int], np.ndarray]
    spread: dict[tuple[int, int], float]
    n_train: int
    notes: list[str] = field(default_factory=list)


def clip_ks(ks: Sequence[int], available: int) -> tuple[tuple[int, ...], list[str]]:
    """Return `ks` ascending, unique and at most `available` (training images a test image may vote from), and notes."""
    if not ks or min(ks) < 1:
        raise UserError(f"k is {list(ks)}, expected one or more whole numbers from 1: use --k 10,20,100,200")
    if available < 1:
        raise InputError("the training set leaves no neighbour to vote: k-NN needs at least one (two, leaving one out)")
    clipped = sorted({min(int(k), available) for k in ks})
    too_big = sorted({int(k) for k in ks if k > available})
    notes = []
    if too_big:
        notes.append(f"k {', '.join(map(str, too_big))} clipped to the {available} training images there are")
    return tuple(clipped), notes


def nearest(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int,
    *,
    leave_one_out: bool = False,
    query_block: int = _TEST_BLOCK,
    reference_block: int = _TRAIN_BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact k nearest rows of `references` [m, d] for `queries` [n, d] by inner product, both on one device.

    The search for accelerators, where Faiss may have no GPU build (it runs on the CPU as well, about a third slower).
    Returns similarities float32 [n, k], descending, and rows int64 [n, k]. Memory beyond the output is one block of
    similarities. With `leave_one_out` the two are the same images row by row and a query never finds its own row.
    """
    n, m = len(queries), len(references)
    found_similarity = torch.empty(n, k, dtype=torch.float32, device=queries.device)
    found_row = torch.empty(n, k, dtype=torch.int64, device=queries.device)
    for start in range(0, n, query_block):
        stop = min(start + query_block, n)
        best: torch.Tensor | None = None
        rows: torch.Tensor | None = None
        for low in range(0, m, reference_block):
            high = min(low + reference_block, m)
            block = queries[start:stop] @ references[low:high].T
            if leave_one_out and max(start, low) < min(stop, high):
                own = torch.arange(max(start, low), min(stop, high), device=block.device)
                block[own - start, own - low] = -torch.inf
            part, index = block.topk(min(k, high - low), dim=1)
            index += low
            if best is None or rows is None:
                best, rows = part, index
            else:
                best, rows = torch.cat([best, part], dim=1), torch.cat([rows, index], dim=1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                rows = rows.gather(1, order)
        assert best is not None and rows is not None
        found_similarity[start:stop], found_row[start:stop] = best, rows
    return found_similarity, found_row


def exact_neighbours(
    queries: torch.Tensor | None, references: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact k nearest rows of `references` [m, d], of unit length, for `queries` [n, d]; both on one device.

    queries None: every row of `references` against all others, never itself. Returns cosines float32 [n, k], most
    similar first, and rows int64 [n, k]. Raises what `search.top_k` raises.
    """
    if references.device.type != "cpu":
        alone = queries is None
        return nearest(references if queries is None else queries, references, k, leave_one_out=alone)
    cosines, rows = top_k(references.numpy(), k, queries=None if queries is None else queries.numpy(), index="flat")
    return torch.from_numpy(cosines), torch.from_numpy(rows)


def voted_classes(
    similarities: torch.Tensor, labels: torch.Tensor, *, top: int, temperature: float = DEFAULT_TEMPERATURE
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that k neighbours vote for, from their cosines and labels [n, k]: int64 [n, top], most votes first.

    Beside them the share of the votes of each, float32 [n, top]: neighbours vote with softmax(cosine / temperature), as
    in `knn_classify`. Among equal shares the lower class number comes first; -1 (share 0) where no further class got a
    vote. Needs memory for a few tables [n, k], whatever the number of classes.
    """
    weights = F.softmax(similarities / temperature, dim=1)
    labels, order = labels.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    # Equal labels lie side by side now: number these runs, lowest class first, and add up each.
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = begins.cumsum(1) - 1
    shares = torch.zeros_like(weights).scatter_add_(1, run, weights)
    classes = torch.full_like(labels, -1).scatter_(1, run, labels)
    shares, order = shares.sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order).masked_fill(shares == 0, -1)
    missing = max(0, top - classes.shape[1])
    classes, shares = F.pad(classes, (0, missing), value=-1), F.pad(shares, (0, missing))
    return classes[:, :top].cpu().numpy(), shares[:, :top].cpu().numpy()


def _vote(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    truth: torch.Tensor,
    ks: tuple[int, ...],
    n_classes: int,
    temperature: float,
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Ranks, predictions, confidences per k from neighbours' similarities and labels [n, max k], and the truth [n]."""
    ranks: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    predictions: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    confidences: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    # Blocks of queries keep the table of class scores near 16 M values whatever the number of classes.
    block = max(1, 16_000_000 // n_classes)
    for start in range(0, len(truth), block):
        stop = min(start + block, len(truth))
        weights = F.softmax(similarities[start:stop] / temperature, dim=1)
        scores = torch.zeros(stop - start, n_classes, device=weights.device)
        used = 0
        for k in ks:
            # Votes of the first k add to those of the smaller k: the sums over prefixes that §8.17 asks for.
            scores.scatter_add_(1, labels[start:stop, used:k], weights[:, used:k])
            used = k
            rank = true_class_ranks(scores, truth[start:stop])
            unseen = scores.gather(1, truth[start:stop, None])[:, 0] == 0
            ranks[k].append(rank.masked_fill(unseen, n_classes))
            votes, winner = scores.max(dim=1)
            predictions[k].append(winner)
            confidences[k].append(votes / scores.sum(dim=1))

    def joined(parts: dict[int, list[torch.Tensor]]) -> dict[int, np.ndarray]:
        return {k: torch.cat(tensors).cpu().numpy() for k, tensors in parts.items()}

    return joined(ranks), joined(predictions), joined(confidences)


def knn_classify(
    train_features: np.ndarray | torch.Tensor,
    train_labels: np.ndarray,
    test_features: np.ndarray | torch.Tensor,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    leave_one_out: bool = False,
    device: str | torch.device = "cpu",
) -> KnnResult:
    """Classify test features [n, d] by the weighted vote of their nearest train features [m, d]; labels are 0..C-1.

    Neighbours are the largest cosines; each votes with softmax(cosine / temperature) taken over the largest k, and
    smaller k sum the first votes only (METHOD §8.17). A true class without any vote counts as missed at every rank.
    `leave_one_out`: train and test are the same images row by row, and no image votes for itself.
    Raises UserError for k < 1 or a temperature that is not positive, WorkError for features that are not finite.
    """
    if not temperature > 0:
        raise UserError(f"the k-NN temperature is {temperature}, expected a positive number: use 0.07")
    started = time.perf_counter()
    train = torch.as_tensor(train_features).to(device=device, dtype=torch.float32)
    test = train if leave_one_out else torch.as_tensor(test_features).to(device=device, dtype=torch.float32)
    used_ks, notes = clip_ks(ks, len(train) - leave_one_out)
    require_finite(train, "the training set")
    require_finite(test, "the test set")
    train_y = torch.as_tensor(np.asarray(train_labels, dtype=np.int64)).to(device)
    test_y = torch.as_tensor(np.asarray(test_labels, dtype=np.int64)).to(device)
    n_classes = int(max(train_y.max(), test_y.max())) + 1
    train = F.normalize(train, dim=1)
    test = train if leave_one_out else F.normalize(test, dim=1)

    similarities, rows = exact_neighbours(None if leave_one_out else test, train, used_ks[-1])
    ranks, predictions, confidences = _vote(similarities, train_y[rows], test_y, used_ks, n_classes, temperature)
    return KnnResult(
        ks=used_ks,
        ranks=ranks,
        predictions=predictions,
        confidences=confidences,
        neighbours=rows.cpu().numpy(),
        similarities=similarities.cpu().numpy(),
        n_classes=n_classes,
        temperature=temperature,
        leave_one_out=leave_one_out,
        n_train=len(train),
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def few_shot_rows(labels: np.ndarray, shots: int, *, seed: int) -> np.ndarray:
    """Rows of `shots` images of each class, drawn without replacement, int64, sorted; labels [n] are 0..C-1.

    A class with fewer images gives all of them.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


def few_shot_knn(
    train_features: np.ndarray | torch.Tensor,
    train_labels: np.ndarray,
    test_features: np.ndarray | torch.Tensor,
    test_labels: np.ndarray,
    *,
    shots: int,
    tries: int,
    seed: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    device: str | torch.device = "cpu",
) -> FewShotResult:
    """As `knn_classify` with `shots` training images of each class only, drawn `tries` times; draw t follows from seed
    and t alone. Raises UserError for fewer than one shot or try, else what `knn_classify` raises.
    """
    if shots < 1 or tries < 1:
        raise UserError(
            f"few-shot k-NN: {shots} shots and {tries} tries, expected whole numbers from 1: use --shots 1,5"
        )
    train = torch.as_tensor(train_features)
    fewest = int(np.unique(train_labels, return_counts=True)[1].min())
    notes = [f"{shots} shots: the smallest class has {fewest} training images, all are used"] if fewest < shots else []
    hits: dict[tuple[int, int], list[np.ndarray]] = {}
    for draw in range(tries):
        rows = few_shot_rows(
            train_labels, shots, seed=int(np.random.SeedSequence([seed, shots, draw]).generate_state(1)[0])
        )
        found = knn_classify(
            train[rows], train_labels[rows], test_features, test_labels, ks=ks, temperature=temperature, device=device
        )
        for k in found.ks:
            for top in (1, 5):
                hits.setdefault((k, top), []).append(found.correct(k, top=top))
    accuracies = {which: [float(draw.mean()) for draw in draws] for which, draws in hits.items()}
    return FewShotResult(
        shots=shots,
        tries=tries,
        ks=found.ks,
        shares={which: np.mean(draws, axis=0) for which, draws in hits.items()},
        spread={which: float(np.std(values, ddof=1)) if tries > 1 else 0.0 for which, values in accuracies.items()},
        n_train=len(rows),
        notes=notes + [f"{shots} shots: {note}" for note in found.notes],
    )

"""The nearest centroid of every row: exact by matrix products, or through an index where there are very many."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import faiss
import numpy as np
import numpy.typing as npt

from dinov2cli.search.threads import Threads
from dinov2cli.search.vectors import Float32, Int64

if TYPE_CHECKING:
    import torch

TILE = 1024
"""Rows whose scores are held at once: the scores stay in the cache, and the product is as fast as it gets."""

WIDTH = 4096
"""Centroids whose scores are held at once."""

EXACT_UP_TO = 32_768
"""Centroids up to which every row is compared with all of them on a CPU: 0.2 ms a row at 384 dimensions."""

Finder = Callable[[Float32], tuple[Float32, Int64]]
"""Rows [n, D] to (score [n], label [n]), the score as of `scores`."""


def nearest(
    x: "torch.Tensor", centroids: "torch.Tensor", bias: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The largest x.c + bias over the centroids, [n] float32, and which one, [n] int64 (the lowest of equal ones).

    x: [n, D], centroids: [K, D], bias: [K], float32 on one device. With bias -|c|^2 / 2 that is the nearest centroid
    (|x|^2 is the same for all of them), without the cancellation of |x|^2 - 2 x.c + |c|^2. Memory: 16 MB.
    """
    import torch

    best = torch.empty(len(x), dtype=torch.float32, device=x.device)
    label = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), TILE):
        tile, here = x[start : start + TILE], slice(start, start + TILE)
        for first in range(0, len(centroids), WIDTH):
            part = slice(first, first + WIDTH)
            value, found = torch.addmm(bias[part], tile, centroids[part].T).max(dim=1)
            if first == 0:
                best[here], label[here] = value, found
            else:
                better = value > best[here]
                best[here][better], label[here][better] = value[better], found[better] + first
    return best, label


def bias_of(centroids: "torch.Tensor", spherical: bool) -> "torch.Tensor":
    """What `nearest` adds to the inner products, [K]: nothing for cosine, -|c|^2 / 2 for distance."""
    import torch

    if spherical:
        return torch.zeros(len(centroids), dtype=torch.float32, device=centroids.device)
    return (-0.5 * centroids.double().square().sum(dim=1)).float()


def finder(
    centroids: Float32, spherical: bool, *, index: str = "auto", device: "torch.device | str | None" = None
) -> tuple[Finder, bool]:
    """What finds the nearest of `centroids` [K, D], and whether it is exact.

    index: `flat` compares with all centroids; `ivf` with those in the nearest 32 of 4 sqrt(K) cells, which at
    100,000 centroids is some 20 times less work; `auto` is `ivf` above 32,768 centroids on a CPU. Deterministic.
    """
    where = str(device or "cpu")
    if index == "ivf" or (index == "auto" and len(centroids) > EXACT_UP_TO and where == "cpu"):
        return _through_cells(centroids, spherical), False
    return _through_all(centroids, spherical, where), True


def _through_all(centroids: Float32, spherical: bool, device: str) -> Finder:
    import torch

    table = torch.from_numpy(centroids).to(device)
    bias = bias_of(table, spherical)
    threads = Threads(device)

    def part(rows: Float32) -> tuple[Float32, Int64]:
        value, label = nearest(torch.from_numpy(rows).to(device), table, bias)
        return value.cpu().numpy(), label.cpu().numpy()

    def find(rows: Float32) -> tuple[Float32, Int64]:
        if threads.count == 1 or len(rows) <= TILE:
            return part(rows)
        parts = list(threads.map(part, [rows[at : at + TILE] for at in range(0, len(rows), TILE)]))
        return np.concatenate([value for value, _ in parts]), np.concatenate([label for _, label in parts])

    return find


def _through_cells(centroids: Float32, spherical: bool) -> Finder:
    k, dim = centroids.shape
    cells = max(1, min(k // 39, 1 << round(float(np.log2(4 * np.sqrt(k))))))
    metric = faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
    index = faiss.index_factory(dim, f"IVF{cells},Flat", metric)
    lists = faiss.extract_index_ivf(index)
    lists.cp.seed = 1
    index.train(centroids)
    index.add(centroids)
    lists.nprobe = min(32, cells)

    def find(rows: Float32) -> tuple[Float32, Int64]:
        value, label = index.search(rows, 1)
        if spherical:
            return value[:, 0], label[:, 0]
        # |x - c|^2 to the score x.c - |c|^2 / 2.
        return 0.5 * (np.einsum("nd,nd->n", rows, rows) - value[:, 0]), label[:, 0]

    return find


def squared_distance(
    rows: Float32, score: Float32, label: Int64, centroids: Float32, spherical: bool
) -> npt.NDArray[np.float32]:
    """|x - c|^2 of every row to its centroid, [n]: from the cosine, or summed over the differences."""
    if spherical:
        # 2 - 2 x.c for vectors of unit length; rounding may leave it a hair below zero.
        return np.maximum(2 - 2 * score, 0)
    import torch

    far = torch.empty(len(rows), dtype=torch.float32)
    x, table, which = torch.from_numpy(rows), torch.from_numpy(centroids), torch.from_numpy(label)
    for start in range(0, len(rows), TILE):
        here = slice(start, start + TILE)
        far[here] = (x[here] - table[which[here]]).square_().sum(dim=1)
    return np.asarray(far.numpy())

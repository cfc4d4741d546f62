"""k-NN of `dinov2 bench eval`: our classifier beside one float32 product and the top-k of it, by turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dinov2cli.bench.knn import labelled_features
from dinov2cli.device import choose_device
from dinov2cli.evaluation.knn import DEFAULT_KS, knn_classify

_QUERIES = 512


def knn_figures(
    *,
    device: str = "auto",
    seed: int = 0,
    tests: int = 10_000,
    references: int = 50_000,
    dim: int = 384,
    rounds: int = 3,
) -> dict[str, Any]:
    """Seconds of the whole classifier (scaling to unit length, search, votes for k = 10, 20, 100, 200), of the plain
    product and `torch.topk` of 200 in blocks of 512 test images, and of the products alone; medians of `rounds`.

    `ratio` is ours over product and top-k, `same_neighbours` the share of the lists that are the same set.
    """
    where = choose_device(device)
    train_x, train_y, test_x, test_y = labelled_features(references, tests, dim, 100, seed)
    unit_train, unit_test = (
        torch.nn.functional.normalize(torch.from_numpy(x), dim=1).to(where) for x in (train_x, test_x)
    )
    k = min(max(DEFAULT_KS), references)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = knn_classify(train_x, train_y, test_x, test_y, device=where)

    def products(then: Callable[[torch.Tensor], Any]) -> list[Any]:
        room = torch.empty(min(_QUERIES, tests), references, device=where)
        parts = unit_test.split(_QUERIES)
        return [then(torch.mm(part, unit_train.T, out=room[: len(part)])) for part in parts]

    def plain() -> None:
        found["plain"] = torch.cat(products(lambda scores: scores.topk(k, dim=1).indices)).cpu().numpy()

    runs: dict[str, Callable[[], Any]] = {"ours": ours, "plain": plain, "product": lambda: products(lambda _: None)}
    seconds = {name: statistics.median(values) for name, values in by_turns(runs, rounds, where).items()}
    near = np.sort(found["ours"].neighbours[:, :k], axis=1) == np.sort(found["plain"], axis=1)
    return {
        "test_images": tests,
        "train_images": references,
        "dim": dim,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "seconds": seconds["ours"],
        "product_and_top_k_seconds": seconds["plain"],
        "product_seconds": seconds["product"],
        "ratio": seconds["ours"] / seconds["plain"],
        "ratio_to_product": seconds["ours"] / seconds["product"],
        "same_neighbours": float(near.mean()),
        "accuracy": float(found["ours"].correct().mean()),
    }


def by_turns(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function, `rounds` times by turns, after one turn that is not counted (`warm`)."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-int(warm), rounds):
        for name, function in runs.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds

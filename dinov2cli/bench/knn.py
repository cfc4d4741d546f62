"""`dinov2 bench knn`: our k-NN classifier beside scikit-learn's exact one, by turns in one process."""

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2cli.device import choose_device
from dinov2cli.evaluation.knn import DEFAULT_KS, DEFAULT_TEMPERATURE, knn_classify

_STATM = Path("/proc/self/statm")


def run(
    *,
    device: str = "auto",
    seed: int = 0,
    train_images: int = 20_000,
    test_images: int = 2_000,
    dim: int = 384,
    classes: int = 100,
    k: int = 20,
    rounds: int = 3,
) -> dict[str, Any]:
    """Time, memory and answers of both classifiers on the same random features with class structure.

    The reference is `KNeighborsClassifier(algorithm="brute", metric="cosine")` with the same weights,
    exp(cosine / 0.07), on the CPU. Both get float32 features and run `rounds` times by turns; medians count. `seconds`
    is ours for one k, `all_k_seconds` ours for 10, 20, 100 and 200 at once; `speedup` = reference over ours,
    `memory_ratio` = extra memory of ours over the reference's (peak resident set above that before the call, sampled
    every millisecond; null where the system does not tell, or on a GPU).
    """
    from sklearn.neighbors import KNeighborsClassifier

    where = choose_device(device)
    train_x, train_y, test_x, test_y = labelled_features(train_images, test_images, dim, classes, seed)

    def ours(ks: tuple[int, ...] = (k,)) -> np.ndarray:
        return knn_classify(train_x, train_y, test_x, test_y, ks=ks, device=where).predictions[min(k, train_images)]

    def reference() -> np.ndarray:
        model = KNeighborsClassifier(
            min(k, train_images),
            algorithm="brute",
            metric="cosine",
            weights=lambda distance: np.exp((1 - distance) / DEFAULT_TEMPERATURE),
        )
        return model.fit(train_x, train_y).predict(test_x)

    every_k = tuple(sorted({*DEFAULT_KS, k}))
    runs: dict[str, Callable[[], np.ndarray]] = {"ours": ours, "all_k": lambda: ours(every_k), "reference": reference}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, list[int]] = {name: [] for name in runs}
    answers: dict[str, np.ndarray] = {}
    for function in runs.values():
        function()  # threads started, libraries loaded, allocations grown
    for _ in range(rounds):
        for name, function in runs.items():
            with PeakMemory() as peak:
                started = time.perf_counter()
                answers[name] = function()
                seconds[name].append(time.perf_counter() - started)
            memory[name].append(peak.bytes)
    own, other = float(np.median(seconds["ours"])), float(np.median(seconds["reference"]))
    bytes_own, bytes_other = (max(memory[name]) for name in ("ours", "reference"))
    told = bytes_own > 0 and bytes_other > 0 and where.type == "cpu"
    return {
        "train_images": train_images,
        "test_images": test_images,
        "dim": dim,
        "k": k,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "seconds": own,
        "all_k_seconds": float(np.median(seconds["all_k"])),
        "reference_seconds": other,
        "images_per_s": test_images / own,
        "speedup": other / own,
        "memory_ratio": bytes_own / bytes_other if told else None,
        "memory_mb": bytes_own / 2**20 if told else None,
        "reference_memory_mb": bytes_other / 2**20 if told else None,
        "accuracy": float((answers["ours"] == test_y).mean()),
        "reference_accuracy": float((answers["reference"] == test_y).mean()),
        "same_answers": float((answers["ours"] == answers["reference"]).mean()),
    }


def labelled_features(
    train: int, test: int, dim: int, classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian clouds around class centres that overlap: features float32 [n, dim] and labels int64 [n], twice."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    inner = min(dim, 24)
    centres = rng.standard_normal((classes, inner), dtype=np.float32)
    lift = rng.standard_normal((inner, dim), dtype=np.float32)
    labels = rng.integers(0, classes, train + test)
    points = centres[labels] + 1.2 * rng.standard_normal((train + test, inner), dtype=np.float32)
    features = points @ lift
    return features[:train], labels[:train], features[train:], labels[train:]


class PeakMemory:
    """Context that finds the largest resident set during its body above that at its start; `bytes` is 0 if untold."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._base = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if _STATM.exists():
            self._base = self._resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @staticmethod
    def _resident() -> int:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, self._resident() - self._base)

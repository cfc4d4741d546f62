"""What happens between two lines of metrics: mean losses, images per second, time spent waiting, skipped steps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dinov2cli.train.learner import StepResult


class Tally:
    """Sums over the steps since the last line, kept on the device so that a GPU never waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.run_of_skips = torch.zeros((), dtype=torch.int64, device=device)
        self.longest_run = torch.zeros((), dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a new line."""
        self._sums: dict[str, Tensor] = {}
        self._good = torch.zeros((), dtype=torch.int64, device=self._device)
        self._steps, self._images = 0, 0
        self._busy = self._waited = 0.0

    def add(self, losses: dict[str, Tensor], skipped: Tensor, images: int) -> None:
        """One step; the losses of a skipped one count for nothing."""
        for name, value in losses.items():
            kept = torch.where(skipped, 0, value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._good = self._good + ~skipped
        self._steps, self._images = self._steps + 1, self._images + images
        self.run_of_skips = torch.where(skipped, self.run_of_skips + 1, 0)
        self.longest_run = torch.maximum(self.longest_run, self.run_of_skips)

    def time(self, busy: float, waited: float) -> None:
        """Seconds one step took, and how many of them went by waiting for its images."""
        self._busy, self._waited = self._busy + busy, self._waited + waited

    def skipped(self) -> int:
        """Skipped steps since the last line."""
        return self._steps - int(self._good)

    def losses(self) -> dict[str, float]:
        """Mean losses over the steps since the last line that were not skipped; NaN without any."""
        good = int(self._good)
        return {name: float(value) / good if good else float("nan") for name, value in self._sums.items()}

    def speed(self) -> dict[str, float]:
        """`images_per_s` and `data_wait` (a share of the time) since the last line in this process."""
        busy = max(self._busy, 1e-9)
        return {"images_per_s": self._images / busy, "data_wait": self._waited / busy}

    def state_dict(self) -> dict:
        """JSON-able state: a checkpoint may fall between two lines."""
        sums = {name: float(value) for name, value in self._sums.items()}
        counts = {"steps": self._steps, "good": int(self._good), "images": self._images}
        times = {"busy": self._busy, "waited": self._waited}
        return {"sums": sums, **counts, **times, "run_of_skips": int(self.run_of_skips)}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self._sums = {name: torch.tensor(value, device=self._device) for name, value in state["sums"].items()}
        self._good = torch.tensor(state["good"], device=self._device)
        self._steps, self._images = state["steps"], state["images"]
        self._busy, self._waited = state["busy"], state["waited"]
        self.run_of_skips = torch.tensor(state["run_of_skips"], device=self._device)


class Tallies:
    """The tallies of several students by name; the time is that of all of them together."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self._by_name = {name: Tally(device) for name in names}

    def __getitem__(self, name: str) -> Tally:
        return self._by_name[name]

    def reset(self) -> None:
        """Begin a new line."""
        for tally in self._by_name.values():
            tally.reset()

    def add(self, results: Mapping[str, StepResult], images: int) -> None:
        """One step of every student."""
        for name, result in results.items():
            self._by_name[name].add(result.losses, result.skipped, images)

    def time(self, busy: float, waited: float) -> None:
        """As `Tally.time`."""
        for tally in self._by_name.values():
            tally.time(busy, waited)

    def speed(self) -> dict[str, float]:
        """As `Tally.speed`."""
        return next(iter(self._by_name.values())).speed()

    def longest_run(self) -> tuple[str, int]:
        """The student with the most skipped steps in a row, and how many they were."""
        runs = {name: int(tally.longest_run) for name, tally in self._by_name.items()}
        worst = max(runs, key=lambda name: runs[name])
        return worst, runs[worst]

"""The progress of a training run in one line: losses, speed, waiting, memory and the time left."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dinov2cli.cli.talk import Talk

Show = Callable[[Mapping[str, Any], int], None]
"""Called with each line of metrics and the total steps as far as they are known now."""

_EVERY = 10.0  # seconds between the lines of a log
_PACED = 20  # metrics lines over which the speed is taken: long enough to be calm, short enough to follow a change
_BAR = 16  # columns of a terminal
_NAMES = {"dino_local": "local", "dino_global": "global"}
_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def training_progress(talk: Talk, label: str, *, start: int = 0) -> Iterator[Show]:
    """Show a run while the block trains it; yields the function that takes each metrics line.

    `start` is the step a resumed run goes on from. On a terminal a bar follows every line; a pipe or a file gets a line
    at most every ten seconds, and the last.
    """
    pace = Pace(start)
    if talk.quiet:
        yield lambda _line, _total: None
    elif talk.console.is_terminal:
        with _bar(talk.console) as bar:
            task = bar.add_task(label, total=None, completed=start, figures="")

            def show(line: Mapping[str, Any], total: int) -> None:
                step = int(line["step"])
                room = talk.console.width - len(f"{label} {step}/{total}  ") - _BAR
                bar.update(task, completed=step, total=total, figures=_fitting(line, pace.text(step, total), room))

            yield show
    else:
        lines = _Lines(talk.say, label, pace)
        yield lines.show
        lines.close()


class Pace:
    """Speed of a run by the clock, evaluations and checkpoints included, and what it means for the time left."""

    def __init__(self, step: int) -> None:
        self._started = time.monotonic()
        self._seen = deque([(self._started, step)], maxlen=_PACED)

    def text(self, step: int, total: int) -> str:
        """ "00:17 left" at this step, "in 02:10" at the last one, nothing before there is a speed to go by."""
        left = self.left(step, total)
        if step >= total:
            return f"in {clock(time.monotonic() - self._started)}"
        return "" if left is None else f"{clock(left)} left"

    def left(self, step: int, total: int) -> float | None:
        """Note that `step` is reached now; seconds left to `total`, None before there is a speed to go by."""
        now = time.monotonic()
        if len(self._seen) == 1 or step > self._seen[-1][1]:
            self._seen.append((now, step))
        # The first stretch also pays for the start of workers and libraries: once there is more, leave it out.
        began, first = self._seen[1] if len(self._seen) > 2 else self._seen[0]
        if step - first < 2 or now <= began:
            return None
        return max(total - step, 0) * (now - began) / (step - first)


class _Lines:
    """Progress for logs."""

    def __init__(self, say: Callable[[str], None], label: str, pace: Pace) -> None:
        self._say, self._label, self._pace = say, label, pace
        self._next, self._untold = 0.0, ""

    def show(self, line: Mapping[str, Any], total: int) -> None:
        step = int(line["step"])
        end = self._pace.text(step, total)
        self._untold = ", ".join([f"{self._label}: step {step:,}/{total:,}", *figures(line), *([end] if end else [])])
        if time.monotonic() >= self._next:
            self._tell()

    def close(self) -> None:
        if self._untold:
            self._tell()

    def _tell(self) -> None:
        self._say(self._untold)
        self._untold, self._next = "", time.monotonic() + _EVERY


def figures(line: Mapping[str, Any], *, terms: bool = True, memory: bool = True) -> list[str]:
    """The figures of a metrics line in words: loss (with its `terms`), skipped steps, images/s, data wait, memory.

    What the line does not hold is left out.
    """
    parts = []
    if line.get("loss/total") is not None:
        each = [
            f"{_NAMES.get(name, name)} {value:.2f}"
            for key, value in line.items()
            if (name := key.removeprefix("loss/")) not in (key, "total") and value is not None
        ]
        parts.append(f"loss {line['loss/total']:.2f}" + (f" ({', '.join(each)})" if terms and each else ""))
    if line.get("skipped"):
        parts.append(f"{line['skipped']:,} skipped")
    if (speed := line.get("images_per_s")) is not None:
        parts.append(f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s")
    if memory:
        if (wait := line.get("data_wait")) is not None:
            parts.append(f"data wait {100 * wait:.0f} %")
        used = line.get("memory_gib") or resident_gib()  # of the GPU where there is one
        parts += [f"{used:.1f} GiB"] if used else []
    return parts


def resident_gib() -> float | None:
    """Memory of this process that is in RAM, in GiB, without its workers; None where the system does not tell."""
    try:
        pages = int(_STATM.read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError, IndexError):
        return None


def clock(seconds: float) -> str:
    """A length of time as 00:17, or 5:00:17 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02d}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _fitting(line: Mapping[str, Any], time_left: str, room: int) -> str:
    """As many figures as a line of `room` characters holds; the time left always."""
    end = [time_left] if time_left else []
    choices = [figures(line), figures(line, terms=False), figures(line, terms=False, memory=False)]
    texts = [", ".join([*parts, *end]) for parts in choices]
    return next((text for text in texts if len(text) <= room), texts[-1])


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, console=console)

"""What the program says: human text on stderr, the result on stdout (the output path when piped, or JSON)."""

import contextlib
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

Advance = Callable[[int], None]


class Talk:
    """The voice of one command. `quiet` leaves only errors; `verbose` lets the core's information through.

    Under a launch the main process alone speaks and gives the result.
    """

    def __init__(self, *, json_output: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        main = int(os.environ.get("RANK", "0")) == 0
        self.silenced = quiet
        quiet = quiet or not main
        self.json_output = json_output
        self.quiet = quiet
        self.gives_result = main
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        _route_logging(self.console, level, verbose)

    def inner(self) -> "Talk":
        """The voice of a step inside a larger command: it speaks, but leaves stdout to the command."""
        inner = copy.copy(self)
        inner.gives_result = False
        return inner

    def say(self, text: str) -> None:
        """Print one line for a human."""
        if not self.quiet:
            self.console.print(escape(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        if not self.quiet:
            self.console.print(f"[yellow]warning:[/] {escape(text)}")

    def result(self, path: Path | str, **fields: Any) -> None:
        """Close a command: say where the output is and give it to the next program in the pipe."""
        if not self.gives_result:
            return
        if self.json_output:
            print(json.dumps({"path": str(path), **fields}, default=str, ensure_ascii=False))  # noqa: T201
        elif not sys.stdout.isatty():
            print(path)  # noqa: T201

    def plan(self, title: str, facts: Mapping[str, Any]) -> None:
        """Print what a command would do, for --dry-run."""
        if not self.gives_result:
            return
        if self.json_output:
            print(json.dumps({"plan": title, **facts}, default=str, ensure_ascii=False))  # noqa: T201
            return
        self.console.print(f"[bold]{escape(title)}[/] (dry run: nothing is written)")
        width = max((len(key) for key in facts), default=0)
        for key, value in facts.items():
            self.console.print(f"  {escape(key.ljust(width))}  {escape(_shown(value))}")

    @contextlib.contextmanager
    def progress(
        self, label: str, total: int | None, unit: str = "images", *, started: float | None = None
    ) -> Iterator[Advance]:
        """Show rate and time left while the block runs; yields a function that is told of finished units.

        `started` is when the work began, on the clock of time.monotonic(), if not now.
        """
        if self.quiet:
            yield lambda _count: None
        elif self.console.is_terminal:
            with _bar(self.console) as bar:
                task = bar.add_task(label, total=total, unit=unit)
                yield lambda count: bar.advance(task, count)
        else:
            lines = _ProgressLines(self.say, label, total, unit, started)
            yield lines.advance
            lines.close()

    @contextlib.contextmanager
    def stages(self, units: Mapping[str, str] | None = None) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """Show the progress of stages one after another; yields what gives a stage, by name, the function that a core
        function tells (units done so far, units in all). `units` names those of stages that do not count images."""
        with contextlib.ExitStack() as shown:

            def stage(label: str) -> Callable[[int, int], None]:
                tell: Callable[[int, int], None] | None = None
                started = time.monotonic()

                def update(done: int, total: int) -> None:
                    nonlocal tell
                    if tell is None:
                        shown.close()  # whatever came before has ended
                        tell = absolute(
                            shown.enter_context(
                                self.progress(label, total, (units or {}).get(label, "images"), started=started)
                            )
                        )
                    tell(done, total)
                    if done >= total:
                        shown.close()

                return update

            yield stage


def absolute(advance: Advance) -> Callable[[int, int], None]:
    """Adapt `advance` to a core function that reports (units done so far, units in all)."""
    seen = 0

    def update(done: int, _total: int) -> None:
        nonlocal seen
        advance(max(done - seen, 0))
        seen = done

    return update


class _ProgressLines:
    """Progress for logs: a line every ten seconds and one at the end."""

    def __init__(
        self, say: Callable[[str], None], label: str, total: int | None, unit: str, started: float | None
    ) -> None:
        self._say, self._label, self._total, self._unit = say, label, total, unit
        self._done, self._told, self._start = 0, 0, time.monotonic() if started is None else started
        self._next = self._start + 10.0

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 10.0
            self._line()

    def close(self) -> None:
        if self._done > self._told:
            self._line()

    def _line(self) -> None:
        self._told = self._done
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / seconds
        text = f"{self._label}: {self._done:,}"
        if self._total is not None:
            text += f"/{self._total:,} {self._unit}, {rate:.1f}/s"
            left = (self._total - self._done) / max(rate, 1e-9)
            text += f", {left:.0f} s left" if left > 0 else f" in {seconds:.1f} s"
        else:
            text += f" {self._unit}, {rate:.1f}/s"
        self._say(text)


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {task.fields['unit']}/s" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


class _ConsoleHandler(logging.Handler):
    """Sends log records through the console, so that they do not break a progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        prefix = f"[{style}]{record.levelname.lower()}:[/] " if style else ""
        self._console.print(prefix + escape(record.getMessage()))


def _route_logging(console: Console, level: int, verbose: bool) -> None:
    logger = logging.getLogger("dinov2cli")
    logger.handlers = [_ConsoleHandler(console)]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:  # libraries warn about their own internals; -v shows them
        import warnings

        warnings.simplefilter("ignore")

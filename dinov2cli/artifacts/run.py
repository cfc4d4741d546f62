"""A training run on disk: `config.yaml`, and what it writes while it goes: `metrics.jsonl` and `log.txt`.

The two text files survive kill -9: a line cut short is dropped when the run goes on.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dinov2cli.errors import WorkError

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"

# "2026-05-01 12:00:00 step 120: what the monitor found"; other lines of the log tell of starts and stops.
_FINDING = re.compile(r"\S+ \S+ (step \d+: .+)")


class Journal:
    """The two text files of a run directory. `say` also receives every log line, for whoever shows progress.

    Under a launch one process `writes`; in the others nothing happens.
    """

    def __init__(self, run: Path, say: Callable[[str], None] | None = None, *, writes: bool = True) -> None:
        self.metrics_path, self.log_path = run / METRICS_FILE, run / LOG_FILE
        self._say, self._writes = say, writes

    def rewind(self, step: int) -> None:
        """Drop metrics past `step`, and a half-written last line: what comes now will write them again."""
        if not self._writes or not self.metrics_path.exists():
            return
        kept = [line for line in _read_lines(self.metrics_path) if line["step"] <= step]
        aside = self.metrics_path.with_name(f".{METRICS_FILE}.partial")
        try:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(aside, self.metrics_path)
        except OSError as error:
            raise _cannot_write(self.metrics_path, error) from error

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Append one line; numbers that are not finite become null, which JSON can hold."""
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        self._append(self.metrics_path, json.dumps(finite))

    def log(self, text: str) -> None:
        """Append one line of prose with the time."""
        self._append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        if self._say and self._writes:
            self._say(text)

    def _append(self, path: Path, line: str) -> None:
        if not self._writes:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> WorkError:
    return WorkError(
        f"cannot write {path}: {(error.strerror or str(error)).lower()}; "
        "make room and run the same command to continue from the last checkpoint"
    )


def read_metrics(run: Path | str) -> list[dict]:
    """Lines of the metrics of a run directory, in order, less a last line cut short by a kill; [] without any."""
    path = Path(run) / METRICS_FILE
    return _read_lines(path) if path.is_file() else []


def read_findings(run: Path | str) -> list[str]:
    """What the monitor said in the log of a run directory, oldest first, as "step 120: …"; [] without any.

    A resumed run may say a thing again; it is listed once.
    """
    path = Path(run) / LOG_FILE
    if not path.is_file():
        return []
    found = map(_FINDING.fullmatch, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return list(dict.fromkeys(match[1] for match in found if match))


def _read_lines(path: Path) -> list[dict]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines

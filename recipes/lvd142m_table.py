"""The table of a curation: how many images each step of `lvd142m.sh` left, and what every curated set brought.

`lvd142m.sh` calls it at its end; `python recipes/lvd142m_table.py OUT STEP…`, the steps being directories in OUT, makes
OUT/table.md again. Standard library only.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any


def manifest(place: Path) -> dict[str, Any]:
    """The manifest of one step; SystemExit when it is not there or not finished."""
    try:
        content: dict[str, Any] = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    if not content.get("complete"):
        raise SystemExit(f"{place}: no finished step there; run lvd142m.sh again, which continues")
    return content


def flow(out: Path, steps: list[str]) -> list[list[str]]:
    """A row for every step: its name, the images that it read and left, the share of those read that went, its time.

    What `curated` left are the chosen images and, where they were asked for, the curated sets themselves.
    """
    rows = [["step", "images in", "images out", "removed", "time"]]
    for name in steps:
        found = manifest(out / name)
        if found["kind"] == "selection":
            read, stayed = (found["extra"]["summary"][key] for key in ("images", "kept"))
        else:
            read, stayed = found["extra"]["images"], found["rows"]
        gone = f"{1 - stayed / read:.1%}" if stayed < read else ""
        rows.append([name, f"{read:,}", f"{found['rows']:,}", gone, str(timedelta(seconds=round(found["seconds"])))])
    return rows


def brought(summary: dict[str, Any]) -> list[list[str]]:
    """The counts of the retrieval as the paper's appendix has them, a row for every curated set; [] without sets."""
    rows: list[list[Any]] = []
    for entry in summary.get("table", []):
        given = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in entry["settings"].items())
        rows.append([Path(entry["dataset"]).name, entry["images"], f"{entry['retrieval']}: {given}"])
        rows[-1] += [entry["retrieved"], entry["final"]]
    for entry in (summary.get("included") or {}).get("table", []):
        rows.append([Path(entry["dataset"]).name, entry["images"], "as it is", "", entry["final"]])
    if not rows:
        return []
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return [["curated set", "images", "retrieval", "retrieved", "final"], *shown]


def markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table, the first row being its head; [] for none."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines[:1], *["| " + " | ".join("---" for _ in rows[0]) + " |" for _ in lines[:1]], *lines[1:]]


def main(out: Path, steps: list[str]) -> None:
    """Write OUT/table.md and print it."""
    last = manifest(out / steps[-1])
    parts = [markdown(flow(out, steps)), markdown(brought(last["extra"].get("summary", {})))]
    kept = f"{last['rows']:,} images in {out / steps[-1]}, each once."
    text = "\n\n".join(["# Curated images", *("\n".join(lines) for lines in parts if lines), kept]) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

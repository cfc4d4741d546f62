"""docs/curation.md and the README show what benchmarks/curation.json holds; as a program this file updates the page."""

import json
import re
from pathlib import Path

from dinov2cli.search.cost import Machines, amount, duration, estimate

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "curation.md"
FIGURES = json.loads((ROOT / "benchmarks" / "curation.json").read_text())
CERTAIN = ("exact", "reencode", "resize", "format", "exif", "flip", "letterbox")


def copies() -> list[str]:
    """Recall by kind of edit for each method."""
    found = FIGURES["copies"]
    methods = found["methods"]
    kinds = list(next(iter(methods.values()))["recall_by_kind"])
    count = found["originals"]
    lines = [
        f"`dinov2 bench copies` on {count} photographs of {found['data_name']}, {found['images']:,} files:",
        "",
        "| copies found | " + " | ".join(f"with {name}" for name in methods) + " |",
        "| --- |" + " --- |" * len(methods),
    ]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(f"{m['recall_by_kind'][kind]:.1%}" for m in methods.values()) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{m['mean_recall']:.1%}**" for m in methods.values()) + " |")
    lines.append("| precision of pairs | " + " | ".join(f"{m['precision']:.2%}" for m in methods.values()) + " |")
    lines.append("| images/s | " + " | ".join(f"{m['images_per_s']:.0f}" for m in methods.values()) + " |")
    return lines


def scale() -> list[str]:
    """Whole runs beside what the dry run said."""
    lines = [
        "Whole runs with `--memory 2GB` on made vectors of 256 numbers (`python benchmarks/curation.py scale`), beside",
        "what `--dry-run` said:",
        "",
        "| run | images | seconds | said | peak memory | pairs found |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in FIGURES["scale"]:
        said = run["predicted"].split(" on ")[0]
        what = "dedup, graph of 64 neighbours" if run["job"] == "dedup" else "curate, 1,000 clusters"
        recall = "" if run["edge_recall"] is None else f"{run['edge_recall']:.4f}"
        peak = f"{run['peak_mb']:,.0f} MB"
        lines.append(f"| {what} | {run['rows']:,} | {run['seconds']:.0f} | {said} | {peak} | {recall} |")
    return lines


def speed() -> list[str]:
    """The benches beside their references."""
    search, means, parts, hashes = (FIGURES[name] for name in ("search", "kmeans", "components", "hash"))
    return [
        "| `dinov2 bench` | ours | reference | speed-up | memory, ours / reference |",
        "| --- | --- | --- | --- | --- |",
        f"| `search` | 64 neighbours of {search['rows']:,} × {search['dim']}: {search['seconds']:.0f} s, recall "
        f"{search['recall']:.3f}, of pairs above 0.8 {search['edge_recall']['0.8']:.4f} | exact Faiss, "
        f"{search['reference_seconds']:.0f} s | {search['speedup']:.1f}× | {search['memory_ratio']:.2f} |",
        f"| `kmeans` | {means['rows']:,} × {means['dim']}, {means['clusters']:,} clusters: {means['seconds']:.1f} s, "
        f"streamed from float16 {means['streamed_seconds']:.1f} s; inertia {means['inertia_ratio']:.3f} of the "
        f"reference's | `faiss.Kmeans` over all rows, {means['reference_seconds']:.1f} s | {means['speedup']:.2f}× | |",
        f"| `components` | {parts['rows']:,} nodes, {parts['edges']:,} edges: {parts['seconds']:.1f} s, "
        f"{parts['peak_mb'] / 1000:.2f} GB | SciPy, {parts['reference_seconds']:.1f} s | {parts['speedup']:.1f}× | "
        f"{parts['memory_ratio']:.2f} |",
        f"| `hash` | {hashes['images_per_s']:.0f} images/s from files, {hashes['memory_mb']:.0f} MB | textbook pHash: "
        f"{hashes['reference_images_per_s']:.0f} images/s | {hashes['speedup']:.1f}× | |",
    ]


def model() -> list[str]:
    """1.2 billion images on clusters and on one machine, by the cost model: nothing of it was run."""
    where = {
        "20 × 8 V100": Machines(gpus=160, kind="V100"),
        "8 H100": Machines(gpus=8, kind="H100"),
        "64 CPU cores": Machines(cores=64),
    }
    costs = {name: estimate(1_200_000_000, 512, machines=machines) for name, machines in where.items()}
    lines = [
        "The same model for 1.2 billion images and vectors of 512 numbers; nothing of this table was run:",
        "",
        "| stage | " + " | ".join(where) + " | disk |",
        "| --- |" + " --- |" * (len(where) + 1),
    ]
    for row in zip(*costs.values(), strict=True):
        lines.append(
            f"| {row[0].stage} | " + " | ".join(duration(c.seconds) for c in row) + f" | {amount(row[0].disk)} |"
        )
    assumed = "; ".join(f"{c.stage}: {c.assumed}" for c in costs["20 × 8 V100"])
    return [*lines, "", f"Assumed for the first column: {assumed}."]


TABLES = {"copies": copies, "scale": scale, "speed": speed, "model": model}


def updated(page: str) -> str:
    """The page with the text between its markers made anew."""
    for name, make in TABLES.items():
        text = "\n".join(make())
        page = re.sub(
            rf"<!-- {name} -->\n(?:.*?<!-- /{name} -->\n)?",
            lambda _, name=name, text=text: f"<!-- {name} -->\n{text}\n<!-- /{name} -->\n",
            page,
            flags=re.S,
        )
    return page


def test_the_page_shows_the_file():
    page = PAGE.read_text()
    assert all(f"<!-- /{name} -->" in page for name in TABLES)
    assert updated(page) == page


def test_the_readme_s_row_is_the_file_s():
    (row,) = re.findall(r"^\| `search` \|.*$", (ROOT / "README.md").read_text(), flags=re.M)
    found = FIGURES["search"]
    assert f"| {found['speedup']:.1f}× | {found['memory_ratio']:.2f} |" in row
    assert f"recall {found['recall']:.3f}" in row


def test_the_quality_that_is_promised_was_measured():
    """Figures of a recorded run, not of this one: a record that falls short must not be published as if it did not."""
    methods = FIGURES["copies"]["methods"]
    assert methods["perceptual"]["mean_recall"] >= 0.62 and methods["perceptual"]["precision"] >= 0.99
    assert all(methods["perceptual"]["recall_by_kind"][kind] > 0.98 for kind in CERTAIN)
    assert methods["geometric"]["mean_recall"] >= 0.80 and methods["geometric"]["precision"] >= 0.98


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))

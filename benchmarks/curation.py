"""Measure what docs/curation.md shows: python benchmarks/curation.py --images DATA [PART …]

Parts: search, kmeans, components, hash, copies, scale; all of them unless named. Each is one `dinov2 bench`, or for
`scale` whole runs of `dinov2 dedup` and `dinov2 curate` on 10,000 to 1,000,000 made vectors of 256 numbers with their
wall time and peak memory, beside what `--dry-run` said. Outcomes go into curation.json beside this file, part by part;
then `python tests/bench/test_curation_page.py` brings the page up to date. An otherwise idle machine, please.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.artifacts.output import Output
from dinov2cli.bench.search import mixture

FILE = Path(__file__).with_suffix(".json")
BENCHES = ("search", "kmeans", "components", "hash", "copies")
ROWS = (10_000, 100_000, 1_000_000)
DIM = 256
MEMORY = "2GB"
THRESHOLD = "0.9"
SHARD = 65_536


def made(folder: Path, rows: int) -> Path:
    """An embeddings directory of `rows` vectors of a seeded mixture, of images that are nowhere."""
    place = folder / f"vectors-{rows}"
    out = Output.open(place, "embeddings", command="benchmarks/curation.py", config={"rows": rows, "dim": DIM})
    writer = EmbeddingsWriter(out, DIM)
    vectors = mixture(rows, DIM, 0)
    for shard, start in enumerate(range(0, rows, SHARD)):
        names = [f"{row:09d}.jpg" for row in range(start, min(start + SHARD, rows))]
        table = {"id": names, "image_path": names, "sha256": [f"{int(name[:9]):064x}" for name in names]}
        sides = {"width": [500] * len(names), "height": [375] * len(names)}
        writer.write_shard(shard, vectors[start : start + SHARD], pa.table({**table, **sides}))
    writer.finish(rows)
    return place


def ran(command: list[str]) -> tuple[dict, float, float]:
    """The JSON that a command prints, its seconds, and its peak memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "dinov2cli", *command, "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"dinov2 {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return json.loads(text), time.perf_counter() - started, usage.ru_maxrss / 1024


def scale() -> list[dict]:
    """Whole runs of dedup and of curation over 1,000 clusters, smallest first."""
    found = []
    with tempfile.TemporaryDirectory(prefix="curation-") as name:
        folder = Path(name)
        jobs = {
            "dedup": ["--threshold", THRESHOLD, "--memory", MEMORY],
            "curate": [
                "--target-size",
                "1000",
                "--set",
                "levels=[1000]",
                "--set",
                "resample_steps=0",
                "--memory",
                MEMORY,
            ],
        }
        for rows in ROWS:
            place = made(folder, rows)
            for job, options in jobs.items():
                out = folder / "out"
                plan, _, _ = ran([job, str(place), "-o", str(out), *options, "--dry-run"])
                result, seconds, peak = ran([job, str(place), "-o", str(out), *options, "-q"])
                manifest = json.loads((out / "manifest.json").read_text())
                searches = manifest["extra"].get("search") or []
                found.append({
                    "job": job, "rows": rows, "seconds": seconds, "peak_mb": peak, "kept": result["kept"],
                    "predicted": plan["cost"], "edge_recall": searches[0]["edge_recall"] if searches else None,
                    "nprobe": searches[0]["nprobe"] if searches else None,
                    "disk_mb": sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) / 1e6,
                })  # fmt: skip
                print(json.dumps(found[-1]), flush=True)  # noqa: T201
                shutil.rmtree(out)
            shutil.rmtree(place)
    return found


def main() -> None:
    """Run the parts asked for and keep their outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="DATA for copies; default: made from the demo's photographs")
    parser.add_argument("parts", nargs="*", metavar="PART")
    asked = parser.parse_args()
    unknown = set(asked.parts) - {*BENCHES, "scale"}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}")
    figures = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for part in asked.parts or [*BENCHES, "scale"]:
        if part == "scale":
            figures[part] = scale()
        else:
            data = [asked.images] if asked.images and part == "copies" else []
            figures[part], _, _ = ran(["bench", part, *data])
            if data:  # its place on this machine is nobody's business
                figures[part]["data"] = "/".join(Path(asked.images).parts[-2:])
            figures[part]["data_name"] = Path(asked.images).parent.name if data else "made for it"
        FILE.write_text(json.dumps(figures, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()

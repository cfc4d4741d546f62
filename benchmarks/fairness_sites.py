"""Measure what docs/fairness.md shows of a real model: python benchmarks/fairness_sites.py --data FOLDER -o OUT MODEL…

FOLDER holds train.parquet and val.parquet with columns `image` and `label`. The test images are dealt at random to
photographers of eight images, these to five sites and two cameras: two attributes that have nothing to do with the
pictures. Then a fault is planted: the lens of one site is out of focus. `dinov2 fairness audit` looks at both sets,
with and without the fault, and what it finds goes into fairness_sites.json beside this file; then the page is brought
up to date by `python tests/bench/test_fairness_page.py`. A minute on two cores besides the features.
"""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image

from dinov2cli.data.source import open_source

FILE = Path(__file__).with_suffix(".json")
SITES = ("north", "east", "south", "west", "harbour")
FAULTY = "harbour"
CAMERAS = ("first", "second")
PER_PHOTOGRAPHER = 8
SHRUNK = 20  # the fault: so many times smaller and enlarged again
KEPT = ("model", "axis", "metric", "best", "worst", "best_value", "worst_value", "gap", "gap_low", "gap_high", "drop")
KEPT += ("p_corrected", "significant")


def main() -> None:
    """Make both sets, audit the models on them, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and val.parquet")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--file", type=Path, default=FILE, help="where to write")
    given = parser.parse_args()
    record = {}
    for name, shrunk in (("sound", 1), ("fault", SHRUNK)):
        folder = given.out / name
        images = written(given.data / "val.parquet", folder, shrunk)
        results = given.out / f"audit-{name}"
        audit(given.models, given.data / "train.parquet", folder, results)
        gaps = pq.read_table(results / "gaps.parquet", columns=list(KEPT)).to_pylist()
        record[name] = {
            "images": images,
            "gaps": [gap for gap in gaps if gap["metric"] == "accuracy"],
            "model_gaps": pq.read_table(results / "model_gaps.parquet").to_pylist() if len(given.models) > 1 else [],
        }
    record["data"], record["shrunk"] = given.data.name, SHRUNK
    given.file.write_text(json.dumps(record, indent=1) + "\n")


def written(file: Path, folder: Path, shrunk: int, *, seed: int = 0) -> int:
    """Write the images and attributes.csv to a folder, once; how many there are."""
    source = open_source(f"{file}?label=label")
    assert source.labels is not None
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=seed))
    photographer = rng.permutation(len(source)) // PER_PHOTOGRAPHER
    sites = rng.integers(0, len(SITES), photographer.max() + 1)
    cameras = rng.integers(0, len(CAMERAS), photographer.max() + 1)
    rows = []
    for row, label in enumerate(source.labels.tolist()):
        name, site = f"{row:05d}.jpg", SITES[sites[photographer[row]]]
        path = folder / "images" / name
        if not path.exists():
            image = Image.open(io.BytesIO(source.read(row))).convert("RGB")
            if site == FAULTY and shrunk > 1:
                small = image.resize((max(1, image.width // shrunk), max(1, image.height // shrunk)))
                image = small.resize(image.size, Image.Resampling.BICUBIC)
            image.save(path, quality=95)
        names = source.label_names
        rows.append(
            {
                "file": name,
                "object": str(label) if names is None else names[label],
                "site": site,
                "camera": CAMERAS[cameras[photographer[row]]],
                "photographer": f"p{photographer[row]:03d}",
            }
        )
    pa_csv.write_csv(pa.Table.from_pylist(rows), folder / "attributes.csv")
    return len(rows)


def audit(models: list[str], train: Path, folder: Path, out: Path) -> None:
    """`dinov2 fairness audit` on one of the sets."""
    command = [sys.executable, "-m", "dinov2cli", "fairness", "audit", *models, "--train", f"{train}?label=label"]
    command += ["--data", str(folder / "images"), "--attributes", str(folder / "attributes.csv")]
    command += ["--label", "object", "--by", "site,camera,site*camera", "--cluster", "photographer", "-o", str(out)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

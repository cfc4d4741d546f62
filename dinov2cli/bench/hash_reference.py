"""A textbook pHash, and each side's memory in a process of its own: what `bench hash` measures beside ours.

Imports nothing heavy: what these processes hold is what is measured.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dct


def textbook_hash(path: str) -> bytes:
    """64 bits: full decode, scaled to 32 x 32, grey, DCT, its 8 x 8 lowest frequencies compared with their median."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS).convert("L")
    rows = dct(np.asarray(small, dtype=np.float64), axis=0)
    low = dct(rows, axis=1)[:8, :8]
    return np.packbits(low > np.median(low)).tobytes()


def pool(workers: int) -> Pool:
    """Processes for `textbook_hash`, started anew, so that they hold nothing of this one."""
    return get_context("spawn").Pool(workers)


def memory(side: str, folder: Path, workers: int) -> int:
    """Largest resident set, in bytes, of a fresh process that hashes the folder's files, its workers' added to it.

    side: 'ours' or 'reference'. Raises RuntimeError when the process fails; 0 where the system does not tell.
    """
    command = [sys.executable, "-m", "dinov2cli.bench.hash_reference", side, str(folder), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-300:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


class FolderFiles:
    """The files of a folder as a source of images."""

    def __init__(self, folder: Path) -> None:
        self.ids = sorted(file.name for file in folder.iterdir())
        self.paths = [str(folder / name) for name in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, row: int, /) -> bytes:
        """The bytes of one file."""
        return Path(self.paths[row]).read_bytes()

    def origin(self, row: int, /) -> tuple[str, int]:
        """Where it lies."""
        return self.paths[row], 0


def _peak(process: str = "self") -> int:
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        return 0
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]


def _worker_peak(_: int) -> tuple[int, int]:
    import os

    return os.getpid(), _peak()


def _main(arguments: Sequence[str]) -> None:
    side, folder, workers = arguments[0], Path(arguments[1]), int(arguments[2])
    files = FolderFiles(folder)
    if side == "ours":
        from dinov2cli.curation.fingerprints import fingerprint_images

        fingerprint_images(files, workers=workers)
        total = _peak()
    else:
        with pool(workers) as processes:
            processes.map(textbook_hash, files.paths, chunksize=16)
            total = _peak() + sum(dict(processes.map(_worker_peak, range(8 * workers), chunksize=1)).values())
    print(json.dumps(total))  # noqa: T201


if __name__ == "__main__":
    _main(sys.argv[1:])

"""Starts a command in several processes, as `torchrun` does; also scripts for what lies below it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(
    *arguments: str,
    processes: int,
    module: str = "dinov2cli",
    env: dict[str, str] | None = None,
    timeout: float = 300,
    cwd: Path = ROOT,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` (or a script, for `module` '') in gloo processes of one thread each."""
    target = ["-m", module] if module else []
    alone = [sys.executable, *target, *arguments]
    together = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *target,
        *arguments,
    ]
    return subprocess.run(
        alone if processes == 1 else together,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        input=input,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | (env or {}),
    )

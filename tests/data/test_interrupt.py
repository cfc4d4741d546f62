"""Ctrl-C while workers start: Python drops an exception that comes while the hooks of a fork run."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov2cli.data.ring import forks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal
from dinov2cli.data.workers import Pool


class Reader:
    def name(self, item):
        return str(item)

    def __call__(self, task, hand):
        return task


os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    list(Pool(Reader(), 1, ahead=1).run(range(3)))
except KeyboardInterrupt:
    print("interrupted", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not forks(), reason="workers are not forked here")
def test_an_interrupt_during_a_fork_is_not_lost():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "interrupted\n", done.stderr
    assert "Exception ignored" not in done.stderr

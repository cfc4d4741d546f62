"""A teacher, made once for all tests, and options that make a step of distillation take milliseconds."""

from pathlib import Path

from dinov2cli.cli.main import run
from tests.cli.conftest import TINY

SMALL = [
    *("--config", "distill-tiny-cpu", "--device", "cpu", "--workers", "0"),
    *("--set", "crops.local_number=2", "--set", "heads.hidden=32", "--set", "heads.bottleneck=16"),
    *("--set", "data.batch_size=8", "--set", "train.steps=4", "--set", "log.every=1", "--set", "report.images=0"),
    *("--set", "train.precision=fp32"),
    # As in the recipe, of which an architecture that is asked for leaves these behind.
    *("--set", "model.embed_dim=64", "--set", "model.depth=3", "--set", "model.num_heads=1"),
]
_MADE: dict[Path, Path] = {}


def teacher_run(photos: Path, factory) -> Path:
    """A finished run of `dinov2 pretrain` on `photos`, with its checkpoint; nobody changes it."""
    if photos not in _MADE:
        path = factory.mktemp("teacher") / "run"
        assert run(["pretrain", str(photos), "-o", str(path), *TINY, "--quiet"]) == 0
        _MADE[photos] = path
    return _MADE[photos]

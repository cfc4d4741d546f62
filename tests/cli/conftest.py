"""A small folder of real photographs (tiles of the demo set, as files), and a way to run the program here."""

import json

import pytest

from dinov2cli.cli.main import run
from dinov2cli.data.source import open_source

# Small enough that a training step takes milliseconds; real in everything else.
TINY = [
    *("--config", "tiny-cpu", "--device", "cpu", "--workers", "0"),
    *("--set", "crops.global_size=32", "--set", "crops.local_size=16", "--set", "crops.local_number=2"),
    *("--set", "heads.prototypes=64", "--set", "heads.hidden=32", "--set", "heads.bottleneck=16"),
    *("--set", "data.batch_size=8", "--set", "train.steps=6", "--set", "log.every=2", "--set", "eval.every=0"),
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with one sub-folder per photograph and 72 tiles in all, some of them copies of others."""
    source = open_source("demo:photos?count=72")
    folder = tmp_path_factory.mktemp("photos")
    for row, name in enumerate(source.ids):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(row))
    return folder


class Finished:
    """How a command ended: exit code, what it printed to stdout and to stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def dinov2(capsys):
    """Run `dinov2 ARGS` in this process."""

    def call(*arguments) -> Finished:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return call

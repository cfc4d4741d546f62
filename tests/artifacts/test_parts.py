"""Finished blocks of a stage on disk: whole or not at all, and never those of other settings."""

import numpy as np
import pytest

from dinov2cli.artifacts.parts import Parts
from dinov2cli.search.blocks import kept, over_blocks

BLOCK = {"row": np.arange(5), "name": np.array(["a", "bc"]), "score": np.float16([0.5, 0.25])}


def test_a_block_comes_back_as_it_was(tmp_path):
    stage = Parts(tmp_path).stage("edges", {"k": 64})
    stage.save(4096, BLOCK)
    found = Parts(tmp_path).stage("edges", {"k": 64}).load(4096)
    assert set(found) == set(BLOCK)
    for name, array in BLOCK.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert stage.starts() == [4096]
    assert not list(tmp_path.rglob(".aside-*"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_truncated_block_counts_as_never_finished(tmp_path, share):
    stage = Parts(tmp_path).stage("edges", {})
    stage.save(0, BLOCK)
    (file,) = stage.path.glob("*.npz")
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    assert stage.load(0) is None


def test_a_damaged_block_counts_as_never_finished(tmp_path):
    stage = Parts(tmp_path).stage("edges", {})
    stage.save(0, {"row": np.zeros(1000, np.int64)})
    (file,) = stage.path.glob("*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert stage.load(0) is None


def test_parts_of_other_settings_are_not_taken(tmp_path):
    parts = Parts(tmp_path)
    parts.stage("edges", {"threshold": 0.6}).save(0, BLOCK)
    assert parts.stage("edges", {"threshold": 0.7}).load(0) is None
    assert parts.stage("hashes", {"threshold": 0.6}).load(0) is None
    parts.remove()
    assert not (tmp_path / "parts").exists()


def test_only_blocks_that_are_missing_are_worked_on(tmp_path):
    stage = Parts(tmp_path).stage("squares", {})
    worked = []

    def square(start):
        worked.append(start)
        return {"value": np.arange(start, start + 2) ** 2}

    first = [b["value"].tolist() for b in over_blocks(kept(square, stage), 6, 2)]
    (stage.path / f"{2:012d}.npz").unlink()
    again = [b["value"].tolist() for b in over_blocks(kept(square, stage), 6, 2)]
    assert first == again == [[0, 1], [4, 9], [16, 25]]
    assert worked == [0, 2, 4, 2]

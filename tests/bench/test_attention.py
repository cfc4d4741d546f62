"""The attention bench: a wrong kernel is refused, another's failure is told, the floor is what must move."""

import pytest
import torch

from dinov2cli.bench import attention as bench
from dinov2cli.errors import WorkError
from dinov2cli.kernels.dispatch import SETTING


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    torch.set_num_threads(1)
    monkeypatch.setattr(bench, "CPU_SHAPES", (bench.Shape("small", ((2, 17), (3, 5)), 2),))


def test_every_implementation_is_checked_and_timed():
    figures = bench.run("cpu", rounds=2)
    (shape,) = figures["shapes"]
    names = [row["name"] for row in shape["rows"]]
    assert names[0] == "ours" and {"sdpa", "torch"} <= set(names)
    assert all(row["both_us"] > 0 and 0 < row["of_floor"] < 1 for row in shape["rows"])
    assert figures["speedup"] == shape["speedup"] > 0
    assert figures["errors"]["ours"]["errors"]["dq"] <= 6e-3
    text = "\n".join(bench.lines(figures))
    assert "small (floor" in text and "relative errors against float64" in text


def test_the_floor_counts_each_byte_once():
    shape = bench.Shape("any", ((2, 17), (3, 5)), 6)
    row = 6 * 64 * 2  # bytes of one token of q
    assert shape.bytes(backward=False) == (34 + 15) * 4 * row
    assert shape.bytes(backward=True) == (34 + 15) * 8 * row


@pytest.mark.parametrize("wrong", [lambda out: out * 1.01, lambda out: out + torch.nan])
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch):
    right = bench.attention
    monkeypatch.setattr(bench, "attention", lambda qkv, groups: wrong(right(qkv, groups)))
    with pytest.raises(WorkError, match="ours is wrong: forward is off by"):
        bench.run("cpu", rounds=2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), AssertionError("no such shape")])
def test_what_another_cannot_do_is_told(error, monkeypatch):
    def refuses(qkv, groups):
        raise error

    monkeypatch.setattr(bench, "implementations", lambda device: {"other": refuses})
    figures = bench.run("cpu", rounds=2)
    assert str(error) in figures["errors"]["other"]["failed"]
    assert str(error) in figures["shapes"][0]["rows"][1]["failed"]
    assert figures["speedup"] is None
    assert "does not run: " in "\n".join(bench.lines(figures))

"""`dinov2 kernels` as a user runs it."""

from pathlib import Path

import pytest

from dinov2cli.kernels import build, compiler

OPERATORS = ["attention", "sinkhorn", "cross-entropy", "stochastic depth"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A cache with nothing in it."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv("DINOV2_KERNELS", raising=False)


def test_info_says_what_runs_and_why(dinov2, empty, monkeypatch):
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    done = dinov2("kernels", "info", "--device", "cpu")
    assert done.code == 0 and done.out == "", done.err
    lines = {
        line.split("  ")[1] if line.startswith("  ") else line.split(" ")[0]: line for line in done.err.splitlines()
    }
    assert "no cuda: the CUDA kernels need an NVIDIA GPU" in lines["attention"] and " sdpa " in lines["attention"]
    assert set(OPERATORS) <= set(lines) and "not found" in lines["nvcc"] and "torch" in lines


def test_info_as_json(dinov2, empty, monkeypatch):
    monkeypatch.setenv("DINOV2_KERNELS", "torch")
    found = dinov2("kernels", "info", "--device", "cpu", "--json").json
    assert [row["operator"] for row in found["operators"]] == OPERATORS
    assert {row["backend"] for row in found["operators"]} == {"torch"} and found["operators"][0]["forced"]
    assert found["built"] == [] and {"library", "cache", "nvcc", "torch", "triton", "xformers"} <= set(found)


def test_info_with_a_back_end_that_is_not_there(dinov2, empty, monkeypatch):
    monkeypatch.setenv("DINOV2_KERNELS", "cuda")
    done = dinov2("kernels", "info", "--device", "cpu")
    assert done.code == 2 and "DINOV2_KERNELS=cuda" in done.err


def test_build_without_nvcc_says_what_to_install(dinov2, empty, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    done = dinov2("kernels", "build", "--arch", "sm_80")
    assert done.code == 2 and "found no nvcc" in done.err and "pip install nvidia-cuda-nvcc" in done.err


@pytest.mark.parametrize("arch", ["hopper", "sm_90a,80", ","])
def test_build_for_what_is_no_architecture(dinov2, empty, arch):
    done = dinov2("kernels", "build", "--arch", arch)
    assert done.code == 2 and "--arch" in done.err and "sm_80" in done.err


@pytest.mark.skipif(compiler.find_nvcc() is None, reason=f"no nvcc: {compiler.HINT}")
def test_build_gives_the_path_and_shows_what_the_kernels_take(dinov2):
    """In the cache that the tests of the build share: one of them compiles, for all."""
    done = dinov2("kernels", "build", "--arch", "sm_80,sm_90a")
    assert done.code == 0, done.err
    assert Path(done.out.strip()).is_file()
    assert "spilled bytes" in done.err and "forward<" in done.err and "sm_90a" in done.err
    found = dinov2("kernels", "build", "--arch", "sm_80,sm_90a", "--json").json
    assert found["path"] == done.out.strip() and found["archs"] == ["sm_80", "sm_90a"] and not found["fresh"]
    assert {"kernel", "arch", "registers", "spill", "stack", "shared"} == set(found["resources"][0])
    built = dinov2("kernels", "info", "--device", "cpu", "--json").json["built"]
    assert found["path"] in [one["path"] for one in built]

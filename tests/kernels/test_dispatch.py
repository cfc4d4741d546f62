"""Which back end an operator gets: the order, the reasons, and that what is asked for and not there is an error."""

import pytest
import torch

from dinov2cli.errors import UserError
from dinov2cli.kernels import build, dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv(dispatch.SETTING, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def lacking(monkeypatch, *backends):
    monkeypatch.setattr(dispatch, "missing", lambda name, _: f"lacks {name}" if name in backends else None)


def test_the_first_that_is_there_wins_and_the_rest_say_why(monkeypatch):
    lacking(monkeypatch)
    assert dispatch.choose("attention", GPU) == dispatch.Choice("attention", "cuda", "the first choice")
    dispatch._choose.cache_clear()
    lacking(monkeypatch, "cuda", "xformers")
    choice = dispatch.choose("attention", GPU)
    assert choice.backend == "sdpa" and choice.reason == "no cuda: lacks cuda; no xformers: lacks xformers"
    assert dispatch.choose("sinkhorn", GPU).backend == "triton"


@pytest.mark.parametrize("setting", ["cuda", "triton", "xformers"])
@pytest.mark.parametrize("operator", list(dispatch.OPERATORS))
def test_what_is_forced_and_not_there_is_an_error(setting, operator, monkeypatch):
    """Also for operators that the back end does not have: a run that asked for it must not go on without."""
    monkeypatch.setenv(dispatch.SETTING, setting)
    with pytest.raises(UserError, match=f"DINOV2_KERNELS={setting}: .*; unset it"):
        dispatch.choose(operator, CPU)


def test_what_is_forced_serves_what_it_has_and_what_comes_after_it_the_rest(monkeypatch):
    lacking(monkeypatch)
    expected = {
        "cuda": ["cuda", "triton", "triton", "triton"],
        "triton": ["xformers", "triton", "triton", "triton"],
        "xformers": ["xformers", "torch", "torch", "torch"],
        "sdpa": ["sdpa", "torch", "torch", "torch"],
        "torch": ["torch", "torch", "torch", "torch"],
    }
    for setting, backends in expected.items():
        monkeypatch.setenv(dispatch.SETTING, setting)
        chosen = dispatch.choices(GPU)
        assert [choice.backend for choice in chosen] == backends
        assert all(choice.forced for choice in chosen)


def test_an_unknown_word(monkeypatch):
    monkeypatch.setenv(dispatch.SETTING, "cudnn")
    with pytest.raises(UserError, match="DINOV2_KERNELS: found 'cudnn'; expected auto, cuda, triton"):
        dispatch.choose("attention", CPU)


def test_a_cpu_lacks_all_but_torch():
    assert [choice.backend for choice in dispatch.choices(CPU)] == ["sdpa", "torch", "torch", "torch"]
    assert "need an NVIDIA GPU, this is cpu" in dispatch.choose("attention", CPU).reason


def test_a_gpu_asks_the_library(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda device: f"nothing built for {device}")
    assert dispatch.missing("cuda", GPU) == "nothing built for cuda:0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton starts where there is a GPU")
def test_a_triton_that_is_installed_but_does_not_start_is_passed_over(monkeypatch):
    """As on a machine without a C compiler: found when the choice is made, not in the middle of a step."""
    pytest.importorskip("triton")
    monkeypatch.delenv(dispatch.SETTING, raising=False)
    assert "Triton does not start: " in (dispatch.missing("triton", torch.device("cuda")) or "")
    assert dispatch.choose("sinkhorn", torch.device("cuda")).backend == "torch"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("auto", "torch's own, for our kernels need a GPU"),
        ("torch", "attention, sinkhorn, cross-entropy, stochastic depth by torch (DINOV2_KERNELS=torch)"),
        ("sdpa", "attention by sdpa (DINOV2_KERNELS=sdpa); sinkhorn by torch (sdpa has no sinkhorn)"),
    ],
)
def test_one_line_says_what_runs(setting, said, monkeypatch):
    monkeypatch.setenv(dispatch.SETTING, setting)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.summary(torch.device("cpu")).startswith(said)

"""`doctor`: each check says what it found, and the verdict follows from them."""

import pytest
import torch

from dinov2cli.bench import machine
from dinov2cli.bench.machine import Finding, examine, verdict


@pytest.fixture(scope="module")
def findings():
    torch.set_num_threads(1)
    return {finding.name: finding for finding in examine("cpu", "demo:photos?count=40")}


def test_everything_is_looked_at(findings):
    names = ("python", "torch", "kernels", "decoder", "faiss", "extras", "machine", "open files", "disk", "input")
    assert tuple(findings) == names
    assert torch.__version__ in findings["torch"].found
    assert "images/s" in findings["input"].found and "tiny takes" in findings["input"].found
    assert all(bool(finding.advice) == (finding.state != "ok") for finding in findings.values())


def test_a_missing_jpeg_decoder_is_advised(monkeypatch):
    monkeypatch.setattr(machine, "turbo", lambda: None)
    found = machine._decoder()
    assert found.state == "advice" and "pip install 'dinov2cli[fast]'" in found.advice


def test_few_open_files_are_advised(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 256))
    found = {finding.name: finding for finding in machine._resources()}["open files"]
    assert (found.found, found.state, found.advice) == (
        "256 allowed",
        "advice",
        "many shards want more: ulimit -n 4096",
    )


def test_a_model_that_waits_is_told_of(monkeypatch):
    monkeypatch.setattr(machine, "loader_rate", lambda *_, **__: (1.0, 0.1))
    monkeypatch.setattr(machine, "stage_times", lambda *_, **__: (500.0, 500.0))
    found = machine._feeding(torch.device("cpu"), "demo:photos?count=40", None)
    assert found.state == "advice" and "workers would keep up" in found.advice and "dinov2 pack" in found.advice


def test_a_torch_that_cannot_compute_is_a_problem(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(machine.torch, "ones", broken)
    found = machine._torch(torch.device("cpu"))
    assert found.state == "problem" and found.found.endswith("no kernel image is available")
    assert verdict([found]) == ("not ready: see torch above", False)


def test_verdicts():
    fine, advised = Finding("a", "x"), Finding("b", "y", "advice", "do z")
    assert verdict([fine]) == ("ready", True)
    assert verdict([fine, advised]) == ("ready; more can be had from b", True)


def test_a_back_end_that_is_not_there_is_a_problem_and_no_step_is_timed(monkeypatch):
    monkeypatch.setenv("DINOV2_KERNELS", "cuda")
    findings = {finding.name: finding for finding in machine.examine("cpu")}
    assert findings["kernels"].state == "problem"
    assert "need an NVIDIA GPU" in findings["kernels"].found
    assert "input" not in findings
    text, ready = machine.verdict(list(findings.values()))
    assert not ready and "kernels" in text

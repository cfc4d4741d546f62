"""The bench of the losses gives the figures it promises, and times nothing that is wrong."""

import json
import os

import pytest
import torch

from dinov2cli.bench import losses
from dinov2cli.errors import WorkError

SMALL = losses.Case("small", images=3, prototypes=96, masked=11, n_local=2)


def test_figures_are_there():
    figures = losses.run(device="cpu", rounds=1, cases=(SMALL,))
    json.dumps(figures)
    (case,) = figures["cases"]
    assert list(case["parts"]) == ["sinkhorn", "forward", "backward"]
    assert all(set(rows) == {"ours", "textbook"} for rows in case["parts"].values())
    assert all(rows[name]["us"] > 0 for part, rows in case["parts"].items() for name in rows if part != "backward")
    assert case["speedup"]["textbook"] > 0
    assert "did not run" in figures["note"]
    assert 0 < figures["errors"]["gradient"] < losses.BOUNDS["gradient"]
    text = "\n".join(losses.lines(figures))
    assert "small" in text and "textbook" in text and "did not run" in text


def test_the_textbook_has_the_same_loss_and_gradient():
    drawn = losses.make_logits(SMALL, torch.device("cpu"), 0)
    found = []
    for sinkhorn, loss in (
        (losses.our_targets, losses.our_loss),
        (losses._textbook_sinkhorn, losses.textbook_loss(losses.textbook.cross_entropy)),
    ):
        student = [t.clone().requires_grad_() for t in (drawn.student_class, drawn.student_patch)]
        made = losses.Logits(SMALL, drawn.teacher_class, drawn.teacher_patch, *student)
        value = loss(made, sinkhorn(drawn.teacher_class), sinkhorn(drawn.teacher_patch))
        value.backward()
        found.append((value.detach(), *(leaf.grad for leaf in student)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_what_is_wrong_is_not_timed(error, monkeypatch):
    monkeypatch.setattr(losses, "checked", lambda *_: {"targets": 1e-7, "loss": 1e-7, "gradient": error})
    with pytest.raises(WorkError, match="gradient is off by"):
        losses.run(device="cpu", cases=(SMALL,))


def test_the_setting_comes_back(monkeypatch):
    monkeypatch.delenv("DINOV2_KERNELS", raising=False)
    with losses.backend("torch"):
        assert os.environ["DINOV2_KERNELS"] == "torch"
    assert "DINOV2_KERNELS" not in os.environ
    monkeypatch.setenv("DINOV2_KERNELS", "auto")
    with losses.backend("torch"), losses.backend(None):
        assert os.environ["DINOV2_KERNELS"] == "torch"
    assert os.environ["DINOV2_KERNELS"] == "auto"


def test_bytes_of_a_step():
    """Sinkhorn reads 2 bytes six times; forward 4 for the student's logit and 2 for a teacher's beside it."""
    moved = losses.moved_bytes(losses.Case("", images=1, prototypes=10, masked=0, n_local=8))
    assert moved == {"sinkhorn": 240, "forward": 400 + 80, "backward": 800 + 80}

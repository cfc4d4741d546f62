"""Sinkhorn targets and softmax-centring against float64 references, and what must never change them."""

import pytest
import torch
from losses_reference import sinkhorn

from dinov2cli.losses import cross_entropy
from dinov2cli.losses import sinkhorn as module
from dinov2cli.losses.center import SoftmaxCenter
from dinov2cli.losses.sinkhorn import sinkhorn_scalings, sinkhorn_targets


def logits(rows: int, columns: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(24, 7), (9, 130), (1, 16), (64, 64)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_the_published_loop(rows, columns, iterations):
    x = logits(rows, columns, 0.3)
    expected = sinkhorn(x, 0.07, iterations)
    torch.testing.assert_close(
        sinkhorn_targets(x, 0.07, iterations=iterations).double(), expected, rtol=2e-5, atol=1e-9
    )
    exact = sinkhorn_targets(x.double(), 0.07, iterations=iterations)
    torch.testing.assert_close(exact, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_large_logits_stay_finite_and_right(scale, temperature):
    """The plain exponential overflows float32 from 88.7 * 0.04 = 3.5 on; here 1000 is no trouble."""
    x = logits(32, 48, scale)
    x[3] -= 5 * scale  # a row far below the others: its exponentials vanish next to theirs
    x[:, 5] -= 5 * scale  # a prototype nobody is near
    targets = sinkhorn_targets(x, temperature)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.double(), sinkhorn(x, temperature), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(32), rtol=1e-5, atol=0)


def test_constant_added_to_all_logits_changes_nothing():
    x = logits(16, 20)
    torch.testing.assert_close(sinkhorn_targets(x + 100, 0.04), sinkhorn_targets(x, 0.04), rtol=1e-3, atol=1e-6)


def test_prototypes_are_used_evenly_after_many_iterations():
    used = sinkhorn_targets(logits(40, 10, 0.2), 0.1, iterations=200).sum(0)
    torch.testing.assert_close(used, torch.full((10,), 4.0), rtol=1e-4, atol=0)


def test_row_permutation_permutes_targets():
    x = logits(20, 33)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sinkhorn_targets(x[order], 0.05), sinkhorn_targets(x, 0.05)[order], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan"), float("inf")])
def test_padding_rows_never_enter(garbage):
    x = logits(12, 17)
    padded = torch.full((20, 17), garbage)
    valid = torch.zeros(20, dtype=torch.bool)
    valid[torch.tensor([0, 2, 3, 5, 6, 8, 9, 10, 13, 15, 18, 19])] = True
    padded[valid] = x
    targets = sinkhorn_targets(padded, 0.05, valid=valid)
    torch.testing.assert_close(targets[valid], sinkhorn_targets(x, 0.05), rtol=1e-5, atol=1e-9)
    assert (targets[~valid] == 0).all()


def test_batches_without_rows():
    assert sinkhorn_targets(torch.empty(0, 5), 0.05).shape == (0, 5)
    targets = sinkhorn_targets(torch.full((3, 5), float("nan")), 0.05, valid=torch.zeros(3, dtype=torch.bool))
    assert (targets == 0).all()


def test_chunks_give_the_same(monkeypatch):
    x = logits(37, 11)
    whole = sinkhorn_scalings(x, 0.05)
    assert module.chunks_of(x) == [(0, 37)]
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 50)
    assert len(module.chunks_of(x)) == 10
    pieces = sinkhorn_scalings(x, 0.05)
    torch.testing.assert_close(pieces.materialize(), whole.materialize(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(pieces.rows(5, 9), whole.materialize()[5:9], rtol=1e-5, atol=1e-9)


def test_half_precision_logits_are_worked_on_in_float32():
    x = logits(16, 20).half()
    targets = sinkhorn_targets(x, 0.04)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), sinkhorn(x, 0.04), rtol=2e-5, atol=1e-9)


def test_autocast_does_not_touch_it():
    x = logits(16, 20)
    plain = sinkhorn_targets(x, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_targets(x, 0.04), plain)


def test_targets_carry_no_gradient():
    x = logits(4, 5).requires_grad_()
    assert not sinkhorn_targets(x, 0.05).requires_grad


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \[M, K\]"):
        sinkhorn_targets(torch.zeros(2, 3, 4), 0.05)
    with pytest.raises(ValueError, match="iterations >= 1"):
        sinkhorn_targets(torch.zeros(3, 4), 0.05, iterations=0)
    with pytest.raises(ValueError, match="temperature > 0"):
        sinkhorn_targets(torch.zeros(3, 4), 0.0)


class TestSoftmaxCenter:
    def test_uses_only_earlier_batches(self):
        center = SoftmaxCenter(6)
        batches = [logits(9, 6, seed=seed) for seed in range(4)]
        expected = torch.zeros(6, dtype=torch.float64)
        for batch in batches:
            targets = center(batch, 0.05).materialize()
            reference = torch.softmax((batch.double() - expected) / 0.05, dim=-1)
            torch.testing.assert_close(targets.double(), reference, rtol=2e-5, atol=1e-9)
            expected = 0.9 * expected + 0.1 * batch.double().mean(0)
        torch.testing.assert_close(center.center.double(), expected, rtol=1e-5, atol=1e-7)

    def test_targets_keep_their_center_when_it_moves_on(self):
        center = SoftmaxCenter(6)
        targets = center(logits(9, 6), 0.05)
        before = targets.materialize()
        center(logits(9, 6, seed=1), 0.05)
        assert torch.equal(targets.materialize(), before)

    def test_padding_rows_never_enter(self):
        x = logits(8, 6)
        padded = torch.cat([x, torch.full((3, 6), float("nan"))])
        valid = torch.arange(11) < 8
        plain, masked = SoftmaxCenter(6), SoftmaxCenter(6)
        expected = plain(x, 0.05).materialize()
        targets = masked(padded, 0.05, valid=valid).materialize()
        assert torch.equal(targets[:8], expected)
        assert (targets[8:] == 0).all()
        assert torch.equal(masked.center, plain.center)

    def test_empty_batch_leaves_the_center(self):
        center = SoftmaxCenter(6)
        center(logits(9, 6), 0.05)
        before = center.center.clone()
        center(torch.empty(0, 6), 0.05)
        assert before.abs().sum() > 0
        assert torch.equal(center.center, before)

    def test_state_dict_carries_it(self):
        center, restored = SoftmaxCenter(6), SoftmaxCenter(6)
        center(logits(9, 6), 0.05)
        restored.load_state_dict(center.state_dict())
        x = logits(9, 6, seed=2)
        assert torch.equal(restored(x, 0.05).materialize(), center(x, 0.05).materialize())

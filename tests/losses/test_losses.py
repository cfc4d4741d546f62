"""DINO, iBOT and KoLeo against float64 references written from the equations: values 1e-5, gradients 1e-4 relative."""

import math

import losses_reference as reference
import pytest
import torch

from dinov2cli.losses import cross_entropy as module
from dinov2cli.losses.cross_entropy import crops_cross_entropy, soft_cross_entropy
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.losses.sinkhorn import sinkhorn_scalings, sinkhorn_targets


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(*shape: int, seed: int = 9) -> torch.Tensor:
    return (normal(*shape, seed=seed) * 2).softmax(-1)


def assert_matches(function, expected_function, *inputs: torch.Tensor, value: float = 1e-5, grad: float = 1e-4) -> None:
    """`function` in float32 against `expected_function` in float64; gradients by the size of the largest entry."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact_leaves = [x.double().requires_grad_() for x in inputs]
    result, expected = function(*leaves), expected_function(*exact_leaves)
    torch.testing.assert_close(result.double(), expected, rtol=value, atol=0)
    result.backward()
    expected.backward()
    for leaf, exact in zip(leaves, exact_leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=grad, atol=grad * exact.grad.abs().max().item())


class TestSoftCrossEntropy:
    def test_gradcheck(self):
        x = normal(4, 7).double().requires_grad_()
        q = targets(4, 7).double()
        assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, q, 0.3), (x,))

    def test_gradcheck_with_targets_computed_on_demand_in_chunks(self, monkeypatch):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 14)
        x = normal(5, 7).double().requires_grad_()
        q = sinkhorn_scalings(normal(5, 7, seed=1).double(), 0.3)
        assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, q, 0.3), (x,))

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    def test_value_and_gradient(self, scale):
        q = targets(6, 50)
        assert_matches(
            lambda s: soft_cross_entropy(s, q, 0.1).sum(),
            lambda s: reference.cross_entropy(s, q.double(), 0.1).sum(),
            normal(6, 50, scale=scale),
        )

    def test_sum_of_targets_is_sum_of_losses(self):
        s, q1, q2 = normal(6, 50), targets(6, 50), targets(6, 50, seed=3)
        together = soft_cross_entropy(s, q1 + q2, 0.1)
        apart = soft_cross_entropy(s, q1, 0.1) + soft_cross_entropy(s, q2, 0.1)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)

    def test_rows_without_target_are_zero_even_if_nan(self):
        s, q = normal(3, 5), targets(3, 5)
        s[1], q[1] = float("nan"), 0
        s.requires_grad_()
        loss = soft_cross_entropy(s, q, 0.1)
        loss.sum().backward()
        assert loss[1] == 0
        assert (s.grad[1] == 0).all()
        assert (s.grad[0] != 0).all()

    def test_bfloat16_logits_give_float32_loss_and_bfloat16_gradient(self):
        s = normal(6, 50).bfloat16().requires_grad_()
        q = targets(6, 50)
        loss = soft_cross_entropy(s, q, 0.1)
        loss.sum().backward()
        assert loss.dtype == torch.float32
        assert s.grad.dtype == torch.bfloat16
        torch.testing.assert_close(
            loss.double(), reference.cross_entropy(s.double(), q.double(), 0.1).detach(), rtol=1e-5, atol=0
        )

    def test_targets_that_are_not_numbers_are_not_passed_over(self):
        """Else a teacher gone wrong would show as a loss of 0, and the step would be taken."""
        wrong = targets(3, 6)
        wrong[1, 2] = float("nan")
        loss = soft_cross_entropy(normal(3, 6), wrong, 0.1)
        assert loss.isnan().tolist() == [False, True, False]

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"must both be \[M, K\]"):
            soft_cross_entropy(normal(3, 5), targets(3, 6), 0.1)


class TestDino:
    @pytest.mark.parametrize(("n_global", "n_local"), [(2, 8), (2, 0), (2, 1), (3, 4)])
    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_equals_the_sum_over_pairs(self, n_global, n_local, scale):
        teacher = targets(n_global, 5, 40)
        student = normal(n_global + n_local, 5, 40, scale=scale)

        def ours(s):
            return sum(dino_loss(s, teacher, n_global=n_global))

        def exact(s):
            local = s[n_global:] if n_local else None
            return sum(reference.dino(s[:n_global], local, teacher.double()))

        assert_matches(ours, exact, student)

    def test_parts_carry_16_and_2_of_18(self):
        """With identical crops everywhere each pair has the same cross-entropy c: parts 16/18 c and 2/18 c."""
        s, q = normal(5, 40), targets(5, 40)
        c = reference.cross_entropy(s, q, 0.1).mean().item()
        loss = dino_loss(s.expand(10, 5, 40), q.expand(2, 5, 40))
        assert loss.dino_local.item() == pytest.approx(16 / 18 * c, rel=1e-5)
        assert loss.dino_global.item() == pytest.approx(2 / 18 * c, rel=1e-5)
        alone = dino_loss(s.expand(2, 5, 40), q.expand(2, 5, 40))  # no locals: their count is 1, not 0
        assert alone.dino_local.item() == 0
        assert alone.dino_global.item() == pytest.approx(2 / 3 * c, rel=1e-5)

    def test_same_view_pairs_are_left_out(self):
        """Global crop 0 never meets teacher 0: changing that teacher alone changes only crop 1's gradient."""
        student, grads = normal(2, 4, 30), []
        for seed in (1, 2):
            teacher = targets(2, 4, 30)
            teacher[0] = targets(4, 30, seed=seed)
            leaf = student.clone().requires_grad_()
            dino_loss(leaf, teacher).dino_global.backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0][0], grads[1][0])
        assert not torch.allclose(grads[0][1], grads[1][1])

    def test_permuting_the_batch_changes_nothing(self):
        s, t = normal(6, 6, 30), targets(2, 6, 30)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        for a, b in zip(dino_loss(s, t), dino_loss(s[:, order], t[:, order]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"\[G >= 2, B, K\]"):
            dino_loss(normal(1, 4, 30), targets(1, 4, 30), n_global=1)
        with pytest.raises(ValueError, match="with G = 3"):
            dino_loss(normal(2, 4, 30), targets(3, 4, 30), n_global=3)
        with pytest.raises(ValueError, match="teacher crops below 2"):
            crops_cross_entropy(normal(1, 4, 30), targets(8, 30), 0.1, [[2]])

    def test_targets_on_demand_in_pieces_equal_whole_ones(self, monkeypatch):
        teacher = sinkhorn_scalings(normal(2 * 5, 40), 0.05)
        student = normal(5, 5, 40, seed=2)
        whole = dino_loss(student, teacher.materialize().unflatten(0, (2, 5)))
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 80)
        for a, b in zip(dino_loss(student, teacher), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)

    def test_autocast_does_not_reach_the_loss(self):
        g, t = normal(2, 5, 40), targets(2, 5, 40)
        with torch.autocast("cpu", torch.bfloat16):
            inside = dino_loss(g, t).dino_global
        assert torch.equal(inside, dino_loss(g, t).dino_global)


class TestIbot:
    images = (0, 0, 0, 2, 3, 3, 3, 3, 3, 0)  # image of each masked token, of 6 crops of which 3 are masked

    def weights(self) -> torch.Tensor:
        return torch.tensor([1 / self.images.count(i) for i in self.images])

    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_equals_the_mean_per_image_over_all_crops(self, scale):
        q = targets(10, 40)
        assert_matches(
            lambda s: ibot_loss(s, q, self.weights(), 6),
            lambda s: reference.ibot(s, q.double(), list(self.images), 6),
            normal(10, 40, scale=scale),
        )

    def test_lazy_and_written_out_targets_agree(self):
        teacher = normal(10, 40, seed=4)
        exact = reference.sinkhorn(teacher, 0.07)
        assert_matches(
            lambda s: ibot_loss(s, sinkhorn_scalings(teacher, 0.07), self.weights(), 6),
            lambda s: reference.ibot(s, exact, list(self.images), 6),
            normal(10, 40),
        )

    @pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
    @pytest.mark.parametrize("lazy", [True, False])
    def test_padding_rows_add_nothing(self, garbage, lazy):
        student, teacher = normal(10, 40), normal(10, 40, seed=4)
        valid = torch.arange(13) < 10

        def padded(x):
            return torch.cat([x, torch.full((3, 40), garbage)])

        leaf, padded_leaf = student.clone().requires_grad_(), padded(student).requires_grad_()
        make = sinkhorn_scalings if lazy else sinkhorn_targets
        plain = ibot_loss(leaf, make(teacher, 0.07), self.weights(), 6)
        weights = torch.cat([self.weights(), torch.zeros(3)])
        loss = ibot_loss(padded_leaf, make(padded(teacher), 0.07, valid=valid), weights, 6)
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        plain.backward()
        loss.backward()
        torch.testing.assert_close(padded_leaf.grad[:10], leaf.grad, rtol=1e-5, atol=1e-9)
        assert (padded_leaf.grad[10:] == 0).all()

    def test_permuting_rows_changes_nothing(self):
        s, q, w = normal(10, 40), targets(10, 40), self.weights()
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ibot_loss(s[order], q[order], w[order], 6), ibot_loss(s, q, w, 6), rtol=1e-5, atol=0)

    def test_no_masked_token_gives_zero_with_a_gradient(self):
        s = torch.empty(0, 40, requires_grad=True)
        loss = ibot_loss(s, torch.empty(0, 40), torch.empty(0), 6)
        loss.backward()
        assert loss == 0

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="one entry per row"):
            ibot_loss(normal(3, 5), targets(3, 5), torch.ones(4), 2)


class TestKoleo:
    @pytest.mark.parametrize(("batch", "dim"), [(2, 3), (8, 16), (33, 5)])
    @pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
    def test_equals_the_equation(self, batch, dim, scale):
        assert_matches(koleo_loss, reference.koleo, normal(batch, dim, scale=scale))

    def test_crops_are_summed_and_kept_apart(self):
        x = normal(2, 8, 16)
        x[1, 0] = x[0, 0]  # a neighbour at distance 0, but in the other crop
        torch.testing.assert_close(koleo_loss(x), koleo_loss(x[0]) + koleo_loss(x[1]))
        assert_matches(koleo_loss, lambda y: reference.koleo(y[0]) + reference.koleo(y[1]), x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_identical_features_give_finite_loss_and_no_gradient(self, dtype):
        x = torch.ones(4, 8, dtype=dtype, requires_grad=True)
        loss = koleo_loss(x)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-6)
        assert (x.grad == 0).all()

    def test_one_duplicate_pair_leaves_the_others_gradient(self):
        x = normal(6, 8)
        x[1] = x[0]
        x.requires_grad_()
        koleo_loss(x).backward()
        assert torch.isfinite(x.grad).all()
        assert (x.grad[2:].abs().sum(1) > 0).all()

    def test_batch_of_one_gives_zero_and_no_gradient(self):
        x = normal(1, 8).requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        assert loss == 0
        assert (x.grad == 0).all()

    def test_zero_vectors_are_finite(self):
        x = torch.zeros(3, 8, requires_grad=True)
        loss = koleo_loss(x)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()

    @pytest.mark.parametrize("garbage", [0.0, float("nan")])
    def test_padding_rows_never_enter(self, garbage):
        x = normal(6, 8)
        x[2] = 1 + 0.01 * x[2]  # next to what stands in for padding, which must not be its neighbour
        padded = torch.cat([x, torch.full((3, 8), garbage)]).requires_grad_()
        leaf = x.clone().requires_grad_()
        plain, loss = koleo_loss(leaf), koleo_loss(padded, valid=torch.arange(9) < 6)
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        plain.backward()
        loss.backward()
        torch.testing.assert_close(padded.grad[:6], leaf.grad)
        assert (padded.grad[6:] == 0).all()

    def test_nan_is_not_hidden(self):
        x = normal(6, 8)
        x[2, 3] = float("nan")
        assert torch.isnan(koleo_loss(x))

    def test_permuting_and_scaling_rows_changes_nothing(self):
        x = normal(9, 8)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        lengths = torch.rand(9, 1, generator=torch.Generator().manual_seed(1)) + 0.1
        torch.testing.assert_close(koleo_loss(x[order] * lengths), koleo_loss(x), rtol=1e-5, atol=1e-6)

    def test_autocast_does_not_touch_it(self):
        x = 1 + 0.05 * normal(30, 8)  # so close together that bfloat16 cannot tell who is nearest
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = koleo_loss(x)
        assert torch.equal(inside, koleo_loss(x))

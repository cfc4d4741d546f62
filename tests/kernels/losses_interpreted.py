"""The Triton kernels of the losses on a CPU, in Triton's interpreter, against float64. Run by test_losses_triton.py."""

import gc
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef

from dinov2cli.kernels import losses as kernels
from dinov2cli.kernels.dispatch import choose
from dinov2cli.losses import fused_cross_entropy as fused
from dinov2cli.losses.cross_entropy import crops_cross_entropy, soft_cross_entropy
from dinov2cli.losses.sinkhorn import SinkhornTargets, sinkhorn_scalings
from dinov2cli.models.heads import Prototypes

sys.path += [str(Path(__file__).parents[1] / room) for room in ("losses", "train")]
import losses_reference as reference

TEACHER_T, STUDENT_T = 0.07, 0.1
UNITS = (math.log2(math.e) / TEACHER_T, math.log2(math.e) / STUDENT_T)
EVERY = [[0, 1]] * 3
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and inf of padding rows, in numpy


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def scaled(rows: int, columns: int, seed: int = 9) -> SinkhornTargets:
    return sinkhorn_scalings(normal(rows, columns, seed=seed, scale=0.3, dtype=torch.float16), TEACHER_T)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_the_kernels_are_what_runs():
    for operator in ("sinkhorn", "cross-entropy"):
        assert choose(operator, torch.device("cpu")).backend == "triton"


class TestSinkhorn:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "columns"), [(1, 16), (9, 1030), (130, 4500)])
    def test_equals_the_published_loop(self, rows, columns, dtype):
        x = normal(rows, columns, scale=0.3, dtype=dtype)
        targets = sinkhorn_scalings(x, TEACHER_T).materialize()
        torch.testing.assert_close(targets.double(), reference.sinkhorn(x, TEACHER_T), rtol=2e-5, atol=1e-9)

    @pytest.mark.parametrize("iterations", [1, 8])
    def test_any_number_of_iterations(self, iterations):
        x = normal(24, 60, scale=0.3)
        targets = sinkhorn_scalings(x, TEACHER_T, iterations=iterations).materialize()
        torch.testing.assert_close(targets.double(), reference.sinkhorn(x, TEACHER_T, iterations), rtol=2e-5, atol=1e-9)

    @pytest.mark.parametrize("scale", [50.0, 1000.0])
    def test_large_logits(self, scale):
        x = normal(70, 600, scale=scale)
        x[3] -= 5 * scale  # a row and a prototype whose exponentials vanish next to the others'
        x[:, 5] -= 5 * scale
        targets = sinkhorn_scalings(x, 0.04).materialize()
        torch.testing.assert_close(targets.double(), reference.sinkhorn(x, 0.04), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(targets.sum(1), torch.ones(70), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
    def test_padding_rows(self, garbage):
        x, valid = normal(140, 50, scale=0.3), torch.arange(140) % 3 != 1
        padded = torch.where(valid[:, None], x, garbage)
        targets = sinkhorn_scalings(padded, TEACHER_T, valid=valid).materialize()
        expected = reference.sinkhorn(x[valid], TEACHER_T)
        torch.testing.assert_close(targets[valid].double(), expected, rtol=2e-5, atol=1e-9)
        assert (targets[~valid] == 0).all()

    def test_no_rows(self):
        assert sinkhorn_scalings(torch.empty(0, 40), 0.05).materialize().shape == (0, 40)

    def test_a_row_that_is_not_finite_shows(self):
        x = normal(10, 40)
        x[2, 3] = float("nan")
        assert not sinkhorn_scalings(x, TEACHER_T).materialize().isfinite().all()

    def test_strided_logits(self):
        x = normal(20, 90, scale=0.3)
        expected = reference.sinkhorn(x[:, :40], TEACHER_T)
        for view in (x[:, :40], x.t().contiguous().t()[:, :40]):
            torch.testing.assert_close(
                sinkhorn_scalings(view, TEACHER_T).materialize().double(), expected, rtol=2e-5, atol=1e-9
            )


class TestCrossEntropy:
    @pytest.mark.parametrize(
        ("crops", "images", "columns", "globals_", "teachers"),
        [
            (1, 1, 16, 1, [[0]]),
            (1, 19, 2100, 1, [[0]]),
            (2, 5, 1030, 2, [[1], [0]]),
            (8, 5, 1030, 2, [[0, 1]] * 8),
            (4, 3, 50, 3, [[1, 2], [0, 2], [0, 2], [1]]),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("dense", [False, True])
    def test_loss_and_gradient(self, crops, images, columns, globals_, teachers, dtype, dense):
        targets = scaled(globals_ * images, columns)
        matrix = targets.materialize()
        given = matrix if dense else targets
        student, upstream = normal(crops, images, columns, dtype=dtype), normal(crops, images, seed=4).abs()
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        loss = crops_cross_entropy(leaf, given, STUDENT_T, teachers)
        sums = torch.stack([matrix.double().unflatten(0, (globals_, images))[list(t)].sum(0) for t in teachers])
        expected = reference.cross_entropy(exact, sums, STUDENT_T)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        (loss * upstream).sum().backward()
        (expected * upstream).sum().backward()
        assert leaf.grad.dtype == dtype
        # The interpreter cuts bfloat16 off where a GPU rounds.
        bounds = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
        assert relative(leaf.grad, exact.grad) < bounds[dtype]

    def test_logits_and_gradients_that_do_not_lie_row_after_row(self):
        wide, every = normal(10, 90, seed=3, dtype=torch.float16), normal(4, 5, 60)
        targets = sinkhorn_scalings(wide[:, :40], TEACHER_T)
        assert not targets.logits.is_contiguous()
        student = every[::2, :, :40]
        given = SinkhornTargets(wide[:, :40].contiguous(), *list(vars(targets).values())[1:])
        upstream = normal(5, 2, seed=5).t()
        found = []
        for logits, teacher in ((student, targets), (student.contiguous(), given)):
            leaf = logits.detach().requires_grad_()
            loss = crops_cross_entropy(leaf, teacher, STUDENT_T, [[0, 1], [1]])
            loss.backward(upstream if logits is student else upstream.contiguous())
            found.append((loss.detach(), leaf.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])

    def test_a_teacher_that_is_not_a_number_is_not_passed_over(self):
        matrix = scaled(3, 40).materialize()
        matrix[1, 2] = float("nan")
        leaf = normal(3, 40).requires_grad_()
        loss = soft_cross_entropy(leaf, matrix, STUDENT_T)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, False]
        assert leaf.grad.isnan().any(1).tolist() == [False, True, False]

    def test_large_logits(self):
        targets, student = scaled(6, 500), normal(6, 500, scale=50.0)
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        loss = soft_cross_entropy(leaf, targets, STUDENT_T)
        expected = reference.cross_entropy(exact, targets.materialize().double(), STUDENT_T)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        loss.sum().backward()
        expected.sum().backward()
        assert relative(leaf.grad, exact.grad) < 2e-4

    @pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_padding_rows_have_loss_and_gradient_zero(self, garbage, overwrite):
        valid = torch.arange(20) % 4 != 2
        x = torch.where(valid[:, None], normal(20, 70, scale=0.3), garbage)
        targets = sinkhorn_scalings(x, TEACHER_T, valid=valid)
        leaf = torch.where(valid[:, None], normal(20, 70, seed=1), garbage).requires_grad_()
        loss = soft_cross_entropy(leaf * 1 if overwrite else leaf, targets, STUDENT_T)
        loss.sum().backward()
        assert (loss[~valid] == 0).all() and (loss[valid] > 0).all()
        assert (leaf.grad[~valid] == 0).all() and leaf.grad.isfinite().all()

    def test_a_target_that_nothing_covers_falls_back(self):
        student = normal(2, 5, 30)
        assert fused.fused_cross_entropy(student, object(), 0.1, [[0], [0]]) is None
        assert fused.fused_cross_entropy(student, scaled(5, 30), 0.1, [[0, 0], [0]]) is None
        assert fused.fused_cross_entropy(student.double(), scaled(5, 30), 0.1, [[0], [0]]) is None

    def test_the_same_input_gives_the_same_bits(self):
        student = normal(3, 7, 3000)
        first, second = (crops_cross_entropy(student, scaled(14, 3000), STUDENT_T, EVERY) for _ in range(2))
        assert torch.equal(first, second)


class TestGradientInPlace:
    """Logits are made by an operation (here: times one), as a head makes them."""

    def split_loss(self, logits: torch.Tensor, targets: SinkhornTargets) -> torch.Tensor:
        """One tensor of logits, two parts of which have a loss each."""
        first, second = logits.split([10, 15])
        alone, every = [[1], [0]], [[0, 1]] * 3
        near = crops_cross_entropy(first.unflatten(0, (2, 5)), targets, STUDENT_T, alone)
        far = crops_cross_entropy(second.unflatten(0, (3, 5)), targets, STUDENT_T, every)
        return (near.sum() + far.sum()) / (2 + 6) / 5  # the 2 + 3 * 2 pairs of 5 images: the DINO loss

    def test_it_lies_where_the_logits_lay(self):
        leaf, targets, seen = normal(9, 60).requires_grad_(), scaled(9, 60), []
        logits = leaf * 1
        logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
        soft_cross_entropy(logits, targets, STUDENT_T).sum().backward()
        assert seen == [logits.data_ptr()]
        assert torch.equal(logits, leaf.grad)

    def test_leaves_keep_their_values(self):
        leaf, targets = normal(9, 60).requires_grad_(), scaled(9, 60)
        for _ in range(2):
            leaf.grad = None
            soft_cross_entropy(leaf, targets, STUDENT_T).sum().backward()
            assert torch.equal(leaf, normal(9, 60))
        expanded = normal(1, 60).requires_grad_()
        soft_cross_entropy((expanded * 1).expand(9, 60), targets, STUDENT_T).sum().backward()
        rows = normal(1, 60).repeat(9, 1).requires_grad_()
        soft_cross_entropy(rows, targets, STUDENT_T).sum().backward()
        torch.testing.assert_close(expanded.grad[0], rows.grad.sum(0))

    def test_two_losses_of_parts_of_one_tensor(self):
        targets, prototypes = scaled(10, 300), Prototypes(16, 300)
        torch.nn.init.normal_(prototypes.weight_v, generator=torch.Generator().manual_seed(3))
        tokens = torch.nn.functional.normalize(normal(25, 16), dim=-1).requires_grad_()
        loss = self.split_loss(prototypes(tokens), targets)
        loss.backward()
        exact = Prototypes(16, 300).double()
        exact.load_state_dict(prototypes.state_dict())
        exact_tokens = tokens.detach().double().requires_grad_()
        logits = exact(exact_tokens)
        parts = logits[:10].unflatten(0, (2, 5)), logits[10:].unflatten(0, (3, 5))
        expected = sum(reference.dino(*parts, targets.materialize().double().unflatten(0, (2, 5)), STUDENT_T))
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for ours, theirs in zip((tokens, *prototypes.parameters()), (exact_tokens, *exact.parameters()), strict=True):
            assert relative(ours.grad, theirs.grad) < 1e-5

    def test_a_loss_that_is_kept_does_not_keep_the_logits(self):
        logits = normal(25, 40).requires_grad_() * 1
        memory = StorageWeakRef(logits.untyped_storage())
        loss = self.split_loss(logits, scaled(10, 40))
        del logits
        gc.collect()
        assert not memory.expired()
        loss.backward()
        gc.collect()  # the interpreter keeps a kernel's arguments until then
        assert memory.expired()
        assert loss > 0

    def test_a_second_backward_pass_is_refused(self):
        loss = self.split_loss(normal(25, 40).requires_grad_() * 1, scaled(10, 40))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="hold the gradient of a loss"):
            loss.backward()

    def test_a_second_loss_of_the_same_logits_is_refused(self):
        logits, targets = normal(25, 40).requires_grad_() * 1, scaled(25, 40)
        both = soft_cross_entropy(logits, targets, STUDENT_T).sum() + soft_cross_entropy(
            logits[:9], targets.rows(0, 9), 1
        )
        with pytest.raises(RuntimeError, match="hold the gradient of a loss"):
            both.sum().backward()
        with pytest.raises(RuntimeError, match="hold the gradient of a loss"):
            soft_cross_entropy(logits, targets, STUDENT_T)

    def test_changed_logits_are_refused(self):
        logits = normal(25, 40).requires_grad_() * 1
        loss = self.split_loss(logits, scaled(10, 40))
        with torch.no_grad():
            logits[20] += 1
        with pytest.raises(RuntimeError, match="were changed after its forward pass"):
            loss.backward()

    def test_another_user_of_the_logits_notices(self):
        logits = normal(25, 40).requires_grad_() * 1
        other = (logits * logits).sum()  # made first, so differentiated last
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (other + self.split_loss(logits, scaled(10, 40))).backward()

    def test_nothing_is_written_without_gradients(self):
        with torch.no_grad():
            logits = normal(25, 40) * 1
            self.split_loss(logits, scaled(10, 40))
        assert torch.equal(logits, normal(25, 40))


class TestOperators:
    def test_opcheck(self):
        x, valid = normal(12, 40, dtype=torch.float16), torch.arange(12) < 9
        targets = sinkhorn_scalings(x, TEACHER_T, valid=valid)
        shift, row_shift, scale, row_scale = targets.factors()
        opcheck(kernels.columns_first, (x, valid, UNITS[0]))
        opcheck(kernels.columns_first, (x, None, UNITS[0]))
        opcheck(kernels.rows_first, (x, shift, scale, UNITS[0]))
        opcheck(kernels.columns_sum, (x, shift, row_shift, row_scale, UNITS[0]))
        opcheck(kernels.rows_sum, (x, shift, row_shift, scale, UNITS[0]))
        student, factors = normal(3, 6, 40), list(targets.factors())
        rest = (*UNITS, [3, 3, 1])
        opcheck(kernels.soft_cross_entropy, (student.clone().requires_grad_(), x, factors, *rest))
        _, lse, mass = kernels.soft_cross_entropy(student, x, factors, *rest)
        arguments = (student, x, factors, [lse, mass], torch.ones(3, 6), *rest)
        opcheck(kernels.soft_cross_entropy_grad, arguments)
        opcheck(kernels.soft_cross_entropy_grad_, arguments)

    def test_compiled_as_one_graph(self):
        x, student = normal(12, 40, dtype=torch.float16), normal(3, 6, 40)
        factors = list(sinkhorn_scalings(x, TEACHER_T).factors())

        def loss(s: torch.Tensor) -> torch.Tensor:
            top, total = kernels.columns_first(x, None, UNITS[0])
            part = kernels.soft_cross_entropy(s * 2, x, factors, *UNITS, [3, 3, 1])[0]
            return part.sum() + top.sum() + total.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((loss, compiled), leaves, strict=True):
            function(leaf).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_steps_of_training_give_the_losses_of_plain_torch(monkeypatch):
    from test_ssl import make_batch, make_model

    from dinov2cli.train.ssl import Objective, ssl_losses

    def losses(backend: str) -> list[float]:
        monkeypatch.setenv("DINOV2_KERNELS", backend)
        model, found = make_model(), []
        optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-3)
        for _ in range(5):
            step = ssl_losses(model, Objective(), teacher_temperature=0.05, **make_batch())
            optimizer.zero_grad()
            step.total.backward()
            optimizer.step()
            found.append(float(step.total.detach()))
        return found

    ours, theirs = losses("triton"), losses("torch")
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert len({round(value, 4) for value in ours}) == 5

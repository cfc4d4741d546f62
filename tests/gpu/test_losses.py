"""The kernels of the losses on a GPU, at the widths of training: against float64, in graphs, and in memory."""

import math

import pytest
import torch
from torch import Tensor

from dinov2cli.kernels import losses as kernels
from dinov2cli.kernels.dispatch import choose
from dinov2cli.losses.cross_entropy import crops_cross_entropy, soft_cross_entropy
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.sinkhorn import SinkhornTargets, sinkhorn_scalings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TEACHER_T, STUDENT_T = 0.05, 0.1


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("DINOV2_KERNELS", "auto")
    if not all(choose(name, torch.device("cuda")).backend == "triton" for name in ("sinkhorn", "cross-entropy")):
        pytest.skip("needs Triton")


def normal(*shape: int, seed: int = 0, scale: float = 1 / 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, device="cuda", generator=generator)).to(dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def exact_targets(x: Tensor, temperature: float = TEACHER_T, valid: Tensor | None = None) -> Tensor:
    """Float64 logits always take plain torch."""
    return sinkhorn_scalings(x.double(), temperature, valid=valid).materialize()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (128, 65536), (700, 131072), (2000, 1000)])
def test_sinkhorn(rows, columns, dtype):
    x = normal(rows, columns, dtype=dtype)
    targets = sinkhorn_scalings(x, TEACHER_T)
    assert relative(targets.materialize(), exact_targets(x)) < 2e-5
    again = sinkhorn_scalings(x, TEACHER_T)
    for first, second in zip(targets.factors(), again.factors(), strict=True):
        assert torch.equal(first, second)


def test_sinkhorn_of_large_logits_and_padding_rows():
    valid = torch.arange(300, device="cuda") % 3 != 1
    x = normal(300, 20000, scale=50)
    padded = torch.where(valid[:, None], x, float("nan"))
    targets = sinkhorn_scalings(padded, 0.04, valid=valid).materialize()
    torch.testing.assert_close(targets[valid].double(), exact_targets(x[valid], 0.04), rtol=1e-3, atol=1e-5)
    assert (targets[~valid] == 0).all()
    assert sinkhorn_scalings(padded[:0], 0.04).materialize().shape == (0, 20000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("crops", "images", "columns", "globals_", "teachers"),
    [
        (1, 200, 65536, 1, [[0]]),
        (1, 33, 131072, 1, [[0]]),
        (2, 20, 65536, 2, [[1], [0]]),
        (8, 20, 65536, 2, [[0, 1]] * 8),
        (3, 7, 1001, 3, [[1, 2], [0, 2], [0, 1]]),
    ],
)
def test_loss_and_gradient(crops, images, columns, globals_, teachers, dtype):
    """Both ways of writing the gradient: over the logits, and beside them where they are a leaf."""
    targets = sinkhorn_scalings(normal(globals_ * images, columns, seed=1, dtype=torch.float16), TEACHER_T)
    student, upstream = normal(crops, images, columns, dtype=dtype), torch.rand(crops, images, device="cuda")
    exact = student.double().requires_grad_()
    expected = crops_cross_entropy(exact, targets, STUDENT_T, teachers)
    (expected * upstream).sum().backward()
    bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]
    for overwrite in (False, True):
        leaf = student.clone().requires_grad_()
        loss = crops_cross_entropy(leaf * 1 if overwrite else leaf, targets, STUDENT_T, teachers)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        (loss * upstream).sum().backward()
        assert relative(leaf.grad, exact.grad) < bound


def test_padding_rows_have_loss_and_gradient_zero():
    valid = torch.arange(100, device="cuda") % 4 != 2
    x = torch.where(valid[:, None], normal(100, 5000, dtype=torch.float16), float("nan"))
    targets = sinkhorn_scalings(x, TEACHER_T, valid=valid)
    leaf = torch.where(valid[:, None], normal(100, 5000, seed=1), float("nan")).requires_grad_()
    loss = soft_cross_entropy(leaf * 1, targets, STUDENT_T)
    loss.sum().backward()
    assert (loss[~valid] == 0).all() and (leaf.grad[~valid] == 0).all()
    assert leaf.grad.isfinite().all()


def test_the_gradient_takes_no_memory():
    targets = sinkhorn_scalings(normal(500, 65536, dtype=torch.float16), TEACHER_T)
    leaf = normal(1).requires_grad_()
    logits = normal(500, 65536) * leaf
    seen: list[Tensor] = []
    logits.register_hook(lambda grad: seen.append(grad))
    loss = soft_cross_entropy(logits, targets, STUDENT_T).sum()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert len(seen) == 1
    size, held = logits.nbytes, torch.cuda.memory_allocated()
    seen.clear()
    del grad, logits
    assert held - torch.cuda.memory_allocated() >= size  # a loss that is kept does not keep the logits
    assert loss > 0


def test_the_loss_of_all_crops():
    teacher = normal(2 * 9, 5000, dtype=torch.float16, seed=1)

    def gradient(dtype: torch.dtype, targets: SinkhornTargets) -> Tensor:
        leaf = normal(5 * 9, 5000).to(dtype).requires_grad_()
        sum(dino_loss((leaf * 1).unflatten(0, (5, 9)), targets)).backward()
        return leaf.grad

    exact = gradient(torch.float64, sinkhorn_scalings(teacher.double(), TEACHER_T))
    assert relative(gradient(torch.float32, sinkhorn_scalings(teacher, TEACHER_T)), exact) < 2e-5


def test_more_than_2_to_the_31_logits():
    """Row offsets beyond 32 bits: the last rows are what they are alone."""
    rows, columns = 2**31 // 131072 + 64, 131072
    last = normal(64, columns, dtype=torch.float16)
    teacher = torch.zeros(rows, columns, dtype=torch.float16, device="cuda")
    teacher[-64:] = last
    vectors = [torch.zeros(n, device="cuda") for n in (columns, rows)]
    found = kernels.rows_sum(teacher, vectors[0], vectors[1], torch.ones(columns, device="cuda"), 1.0)
    torch.testing.assert_close(found[-64:], last.double().exp2().sum(1).float(), rtol=1e-5, atol=0)
    weights = torch.zeros(rows, device="cuda")
    weights[-64:] = 1
    found = kernels.columns_sum(teacher, vectors[0], vectors[1], weights, 1.0)
    torch.testing.assert_close(found, last.double().exp2().sum(0).float(), rtol=1e-5, atol=0)


def test_captured_in_a_graph():
    """Nothing waits for the GPU, and a replay works on new logits."""
    teacher, student = normal(64, 8192, dtype=torch.float16), normal(64, 8192)

    def step() -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = soft_cross_entropy(leaf, sinkhorn_scalings(teacher, TEACHER_T), STUDENT_T).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    teacher.copy_(normal(64, 8192, seed=5))
    student.copy_(normal(64, 8192, seed=6))
    graph.replay()
    found = [value.clone() for value in captured]
    for ours, again in zip(found, step(), strict=True):
        assert torch.equal(ours, again)


def test_compiled_as_one_graph():
    from dinov2cli.kernels import losses as kernels

    teacher, student = normal(24, 4096, dtype=torch.float16), normal(3, 12, 4096)
    factors = list(sinkhorn_scalings(teacher, TEACHER_T).factors())
    units = (math.log2(math.e) / TEACHER_T, math.log2(math.e) / STUDENT_T)

    def loss(s: Tensor) -> Tensor:
        return kernels.soft_cross_entropy(s * 2, teacher, factors, *units, [3, 3, 1])[0].sum()

    leaves = [student.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((loss, torch.compile(loss, fullgraph=True)), leaves, strict=True):
        function(leaf).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)

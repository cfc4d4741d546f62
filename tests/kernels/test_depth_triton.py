"""The operators of stochastic depth: in torch, in Triton's interpreter, and compiled for GPUs that are not here."""

from pathlib import Path

import depth_cases as cases
import pytest
import torch
from aot import resources, run_interpreted

from dinov2cli.kernels import depth

TYPES = {
    **dict.fromkeys(["x", "out", "grad", "grad_x"], "*fp32"),
    **dict.fromkeys(["y", "update", "grad_update", "grad_y"], "*bf16"),
    "normal": "*fp16",
    **dict.fromkeys(["weight", "bias", "gamma", "rstd", "partial", "partial_weight", "partial_bias"], "*fp32"),
    **dict.fromkeys(["tokens", "rows"], "i32"),
    **dict.fromkeys(["eps", "scale"], "fp32"),
    "index": "*i64",
    "slots": "*i32",
}


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_torch_equals_float64_autograd(shape):
    out, grad = cases.worst(cases.make(*cases.SHAPES[shape]))
    assert out < 5e-7 and grad < 2e-6


def test_interpreted_kernels_equal_float64_autograd():
    pytest.importorskip("triton")
    run_interpreted(Path(__file__).with_name("depth_interpreted.py"))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [384, 1024, 1536])
def test_kernels_compile_without_spills(width, arch):
    pytest.importorskip("triton")
    from dinov2cli.kernels import depth_triton

    shape = depth_triton.shape_of(width)
    most = {"gather_norm_grad_kernel": 512 // depth_triton.GATHER_PROGRAMS}
    most["scatter_add_grad_kernel"] = 512 // depth_triton.SCATTER_PROGRAMS
    for name in ("gather_norm_kernel", "scatter_add_kernel", *most):
        kernel = getattr(depth_triton, name)
        fixed = {"D": width, "BLOCK": shape.block, "ROWS": shape.rows, "GAIN": True}
        fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names}
        types = {key: TYPES[key] for key in kernel.arg_names if key not in fixed}
        aligned = [key for key, kind in types.items() if kind.startswith("*") and key not in ("index", "slots")]
        taken = resources(kernel, types, fixed, arch, num_warps=shape.warps, aligned=aligned)
        assert taken.spill_bytes == 0
        # 65,536 registers of a multiprocessor, 128 threads of a program: or fewer programs than planned run at once.
        assert taken.registers <= most.get(name, 128), name


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
def test_operators_pass_opcheck(gain):
    case = cases.make([(4, 3), (5, 2)], [2, 3], 16, gain=gain)
    first = (case.x, case.kept, case.groups, case.weight, case.bias, cases.EPS, case.dtype)
    torch.library.opcheck(depth.gather_norm_op, first)
    y, link, slots, normal, rstd = (t.detach() for t in depth.gather_norm_op(*first))
    update = y.clone().requires_grad_()
    rest = (case.kept, case.groups, case.gamma, case.scale)
    torch.library.opcheck(depth.scatter_add_op, (case.x.detach(), link.requires_grad_(), slots, update, *rest))
    with torch.no_grad():
        weights = (case.weight.detach(), case.bias.detach())
        back = (case.grad, y, normal, rstd, slots, case.kept, case.groups, *weights)
        torch.library.opcheck(depth.gather_norm_grad_op, back)
        torch.library.opcheck(depth.scatter_add_grad_op, (case.grad, y if gain else None, *rest, torch.float32))


def test_operators_compile_as_one_graph():
    case = cases.make(*cases.SHAPES["two groups"])
    plain = cases.found(case)

    def total():
        y, link, slots = depth.gather_norm(case.x, case.kept, case.groups, case.weight, case.bias, 1e-6, case.dtype)
        update = torch.tanh(y @ case.inner)
        return depth.scatter_add(case.x, link, slots, update, case.kept, case.groups, case.gamma, case.scale)

    out = torch.compile(total, backend="aot_eager", fullgraph=True)()
    assert torch.equal(out, plain[0])
    for found, expected in zip(torch.autograd.grad(out, case.inputs, case.grad), plain[1], strict=True):
        assert torch.equal(found, expected)

"""The Triton kernels of the losses: in the interpreter against float64, and compiled for GPUs that are not here."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from aot import resources, run_interpreted  # noqa: E402

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

STRIDES = ("stride", "crop_stride", "row_stride", "grad_crop_stride", "grad_row_stride", "teacher_stride")
INTEGERS = ("rows", "columns", "run", "parts", "length", "batch", "crops", "count", *STRIDES)
MOST_REGISTERS = 168  # of a thread: three programs of four warps on a multiprocessor


def compiled(kernel, tile: dict, arch: int, constants: dict | None = None, **types: str):
    """Resources of a kernel in its tile; `types` of arguments that are neither float32 vectors nor sizes."""
    constants = {**tile, **(constants or {})}
    options = {"num_warps": constants.pop("num_warps", 4), "maxnreg": constants.pop("maxnreg", None)}
    signature = {}
    for name in (name for name in kernel.arg_names if name not in constants):
        if name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = types.get(name, "fp32" if name in ("scale", "inverse") else "*fp32")
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or name == "columns" or name in STRIDES]
    return resources(kernel, signature, constants, arch, aligned=aligned, **options)


def assert_fits(found, most: int = MOST_REGISTERS, spills: int = 0) -> None:
    assert found.spill_bytes <= spills, found
    assert 0 < found.registers <= most, found
    assert found.shared_bytes <= 40 << 10, found
    # A run of columns given in columns, not in tiles, once hid from the compiler that it is aligned.
    assert found.two_byte_accesses == 0, found


def test_against_float64_in_the_interpreter():
    run_interpreted(HERE / "losses_interpreted.py")


def test_the_tests_of_the_losses_hold_with_kernels():
    """Two processes with gloo among them: a group of ranks, one of them without rows."""
    run_interpreted(HERE.parent / "losses")


def test_plain_torch_is_what_runs_on_a_cpu():
    from dinov2cli.kernels.dispatch import choose

    for operator in ("sinkhorn", "cross-entropy"):
        assert choose(operator, torch.device("cpu")).backend == "torch"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["*fp16", "*bf16", "*fp32"])
def test_sinkhorn_kernels_compile_without_spills(kind, arch):
    from dinov2cli.kernels import sinkhorn_triton as kernels

    columns = functools.partial(compiled, tile=kernels.COLUMN_TILE, arch=arch, logits=kind)
    rows = functools.partial(compiled, tile=kernels.ROW_TILE, arch=arch, logits=kind)
    for has_valid in (False, True):
        assert_fits(columns(kernels.columns_first_kernel, constants={"HAS_VALID": has_valid}, valid="*u8"))
    assert_fits(columns(kernels.columns_sum_kernel))
    # One register of an outer loop; training has fp16 logits here, and none.
    assert_fits(rows(kernels.rows_first_kernel), spills=0 if kind == "*fp16" else 8)
    assert_fits(rows(kernels.rows_sum_kernel))
    if kind == "*fp16":
        assert_fits(compiled(kernels.combine_kernel, {"BP": 16, "BN": kernels.COMBINED // 16}, arch))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("student", "teacher", "teachers", "dense"),
    [
        ("*fp32", "*fp16", 1, False),  # masked patches, and a global crop beside the first teacher crop
        ("*fp32", "*fp16", 2, False),  # beside the second
        ("*fp32", "*fp16", 3, False),  # local crops
        ("*bf16", "*fp16", 3, False),
        ("*fp32", "*fp32", 1, False),  # a run in float32
        ("*fp32", "*fp32", 3, True),
    ],
)
def test_cross_entropy_kernels_compile_without_spills(student, teacher, teachers, dense, arch):
    from dinov2cli.kernels import cross_entropy_triton as kernels

    constants = {"TEACHERS": teachers, "GLOBALS": teachers.bit_length(), "DENSE": dense}
    if teachers != 3:
        constants["count"] = 1  # Triton makes a constant of an argument that is 1
    types = {"student": student, "grad": student, "teacher": teacher}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        # With Triton 3.6 the dense kind spills two registers.
        assert_fits(compiled(kernel, kernels.TILE, arch, constants, **types), most=128, spills=8 if dense else 0)
    if student == "*fp32":
        assert_fits(compiled(kernels.combine_kernel, {}, arch, {"TILES": 128, "BT": 128, "BN": 32}))

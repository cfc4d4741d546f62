"""The operators of ops.cpp, from the Python that calls them down to the kernels' own source, run on the CPU."""

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler (c++, g++ or $CXX)")

CHECKS = """
import sys
import torch
from dinov2cli.kernels import attention_op
from dinov2cli.kernels.attention_op import _backward_cuda, _forward_cuda
from dinov2cli.kernels.attention_reference import reference_backward, reference_forward

torch.ops.load_library(sys.argv[1])
attention_op._load = lambda device: None
ops = torch.ops.dinov2_kernels


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def numbers(dtype, bound):
    # 17 rows of 2 heads: the second run's sums do not start at a multiple of 16 bytes.
    runs = [(1, 17), (1, 83), (1, 5)]
    groups = [1, 17, 0, 99, 1, 83, 1, 5]
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(105, 3 * 128 + 64, generator=generator).to(dtype)
    qkv = wide[:, :384].unflatten(1, (3, 2, 64))
    grad = torch.randn(128, 105, generator=generator).to(dtype).t()
    assert not qkv.is_contiguous() and not grad.is_contiguous()
    exact, sums = reference_forward(qkv.float(), runs, 0.125)
    for variant in (0, 1):
        out, lse = _forward_cuda(qkv, groups, 0.125, variant)
        assert error(out, exact) < bound and (lse - sums).abs().max() < 1e-3
        gradient = _backward_cuda(grad, qkv, out, lse, groups, 0.125, variant)
        expected = reference_backward(grad.float().contiguous(), qkv.float(), exact, sums, runs, 0.125)
        for part in range(3):
            assert error(gradient[:, part], expected[:, part]) < 1.2 * bound


numbers(torch.bfloat16, 5e-3)
numbers(torch.float16, 1e-3)
empty = torch.empty(0, 3, 2, 64, dtype=torch.bfloat16)
assert [x.shape[0] for x in _forward_cuda(empty, [0, 50], 0.125)] == [0, 0]

qkv = torch.zeros(10, 3, 2, 64, dtype=torch.bfloat16)
out, lse = torch.zeros(10, 128, dtype=torch.bfloat16), torch.zeros(10, 2)
wrong = {
    "type": (qkv.float(), out, lse, [1, 10, 0]),
    "width": (qkv[..., :32], out, lse, [1, 10, 0]),
    "turned": (qkv.transpose(0, 2).contiguous().transpose(0, 2), out, lse, [1, 10, 0]),
    "crooked": (torch.zeros(3841, dtype=torch.bfloat16)[1:].view(10, 3, 2, 64), out, lse, [1, 10, 0]),
    "odd": (torch.zeros(10, 388, dtype=torch.bfloat16)[:, :384].unflatten(1, (3, 2, 64)), out, lse, [1, 10, 0]),
    "overlapping": (qkv[:1].expand(10, 3, 2, 64), out, lse, [1, 10, 0]),
    "out": (qkv, out[:9], lse, [1, 10, 0]),
    "out across": (qkv, out.t().contiguous().t(), lse, [1, 10, 0]),
    "lse": (qkv, out, lse.double(), [1, 10, 0]),
    "pairs": (qkv, out, lse, [1, 10]),
    "sum": (qkv, out, lse, [1, 9, 0]),
    "long": (qkv, out, lse, [1, 273, 0]),
    "negative": (qkv, out, lse, [-1, 10, 0]),
    "variant": (qkv, out, lse, [1, 10, 99]),
}
for name, arguments in wrong.items():
    try:
        ops.attention_forward(*arguments, 0.125)
    except RuntimeError as failure:
        print(name, "|", str(failure).removeprefix("dinov2_kernels::attention_forward: "))
"""

REFUSED = {
    "type": "expected qkv in bfloat16 or float16",
    "width": "found qkv of shape [10, 3, 2, 32]; expected [tokens, 3, heads, 64]",
    "turned": "expected each row of qkv [3, heads, 64] contiguous",
    "crooked": "expected rows of qkv at multiples of 16 bytes that do not overlap",
    "odd": "expected rows of qkv at multiples of 16 bytes that do not overlap",
    "overlapping": "expected rows of qkv at multiples of 16 bytes that do not overlap",
    "out": "found out of shape [9, 128], which does not fit qkv",
    "out across": "expected out contiguous and at a multiple of 16 bytes",
    "lse": "found lse in a type other than expected",
    "pairs": "expected groups of samples, tokens and variant",
    "sum": "found groups of 9 tokens and qkv of 10",
    "long": "found samples of 273 tokens; expected 1 to 272",
    "negative": "found -1 samples",
    "variant": "",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """ops.cpp linked with the emulation in place of the GPU."""
    path = tmp_path_factory.mktemp("operators") / "operators.so"
    torch_home = Path(torch.__path__[0])
    sources = [ROOT / "kernels" / name for name in ("csrc/ops.cpp", "emulation/library.cpp")]
    command = [emulated.compiler(), "-O1", "-std=c++17", "-w", "-DDK_EMU", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-shared", "-fPIC", "-isystem", str(torch_home / "include"), *map(str, sources), "-o", str(path)]
    done = subprocess.run([*command, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def test_packs_go_through_the_whole_stack_and_what_does_not_fit_is_refused(library):
    done = subprocess.run([sys.executable, "-c", CHECKS, str(library)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    told = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert told.keys() == REFUSED.keys()
    for name, text in REFUSED.items():
        assert told[name] == text or (not text and told[name]), name

"""The CUDA attention kernels on the CPU: their source compiled for the host (kernels/emulation), called on tensors.

Also the float64 reference and the error measure of the tests. Not a test file.
"""

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
DTYPES = (torch.bfloat16, torch.float16)
SCALE = 0.125
INVALID_VALUE = 1
GUARD = 64
"""Elements before and behind each output that must stay as they were."""


class KernelFaultError(Exception):
    """A launch that did not succeed: what dk_error_string says, and the code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} (code {code})")
        self.code = code


@dataclass(frozen=True)
class Problem:
    """Packed sequences of equal length: qkv [sequences * tokens, 3, heads, 64], any row stride, and the gradient of the
    output [sequences * tokens, heads, 64]."""

    qkv: torch.Tensor
    grad_out: torch.Tensor
    tokens: int

    @property
    def sequences(self) -> int:
        return self.qkv.shape[0] // self.tokens

    @property
    def heads(self) -> int:
        return self.qkv.shape[2]


@dataclass(frozen=True)
class Result:
    """out [T, heads, 64]; lse [T, heads], base 2; grad_qkv [T, 3, heads, 64]."""

    out: torch.Tensor
    lse: torch.Tensor
    grad_qkv: torch.Tensor

    def parts(self) -> dict[str, torch.Tensor]:
        """What errors are measured on."""
        return {"out": self.out} | {name: self.grad_qkv[:, i] for i, name in enumerate(("dq", "dk", "dv"))}

    def equals(self, other: "Result") -> bool:
        """Bit for bit."""
        pairs = zip((self.out, self.lse, self.grad_qkv), (other.out, other.lse, other.grad_qkv), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def compiler() -> str | None:
    """The host's C++ compiler: $CXX, c++ or g++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None)


def build(directory: Path, *changes: tuple[str, str, str]) -> "Emulation":
    """Compile the kernels into `directory` and load them.

    `changes` are (file under kernels/, text, replacement): bugs to plant in a copy of the source. The text must be
    there, or the bug would not be either. Raises AssertionError if it is not, or if the compiler fails.
    """
    source = directory / "kernels"
    for folder in ("csrc", "emulation"):
        shutil.copytree(KERNELS / folder, source / folder)
    for name, text, replacement in changes:
        before = (source / name).read_text()
        assert before.count(text) == 1, f"{name}: found {before.count(text)} times, expected once: {text}"
        (source / name).write_text(before.replace(text, replacement))
    library = directory / "emulated.so"
    program = compiler()
    assert program is not None, "no C++ compiler"
    command = [program, "-O1", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-DDK_EMU", "-shared", "-fPIC"]
    command += [str(source / "emulation" / "library.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return Emulation(ctypes.CDLL(str(library)))


class Emulation:
    """The launchers of a compiled emulation, on tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.dk_error_string.restype = ctypes.c_char_p
        library.dk_emulation_seed.argtypes = [ctypes.c_uint]
        pointer, stride = ctypes.c_void_p, ctypes.c_long
        shape: list[Any] = [*[ctypes.c_int] * 4, ctypes.c_float, ctypes.c_int, pointer]
        library.dk_attention_forward.argtypes = [pointer, stride, pointer, pointer, *shape]
        library.dk_attention_backward.argtypes = [pointer, stride, pointer, pointer, pointer, pointer, *shape]

    def max_tokens(self) -> int:
        return self._library.dk_attention_max_tokens()

    def run(self, problem: Problem, seed: int = 0, forward: int = 0, backward: int = 0) -> Result:
        """Both passes, in the order of threads that `seed` gives, with these variants of the kernels.

        Outputs start as NaN. Raises KernelFaultError, and AssertionError if anything beside the outputs was written.
        """
        self._library.dk_emulation_seed(seed)
        out, lse = self.forward(problem, forward)
        return Result(out, lse, self.backward(problem, out, lse, backward))

    def forward(self, problem: Problem, variant: int = 0, scale: float = SCALE) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the forward kernel; raises as `run`."""
        out, lse = (
            poisoned(problem.grad_out.shape, problem.qkv.dtype),
            poisoned(problem.grad_out.shape[:2], torch.float32),
        )
        qkv = problem.qkv
        self._check(
            self._library.dk_attention_forward(
                qkv.data_ptr(), qkv.stride(0), out.data_ptr(), lse.data_ptr(), *_shape(problem), scale, variant, None
            ),
            (out, lse),
        )
        return out, lse

    def backward(
        self, problem: Problem, out: torch.Tensor, lse: torch.Tensor, variant: int = 0, scale: float = SCALE
    ) -> torch.Tensor:
        """grad_qkv of the backward kernel; raises as `run`."""
        grad_qkv = poisoned(problem.qkv.shape, problem.qkv.dtype)
        inputs = (out.data_ptr(), problem.grad_out.data_ptr(), lse.data_ptr(), grad_qkv.data_ptr())
        self._check(
            self._library.dk_attention_backward(
                problem.qkv.data_ptr(), problem.qkv.stride(0), *inputs, *_shape(problem), scale, variant, None
            ),
            (grad_qkv,),
        )
        return grad_qkv

    def _check(self, code: int, outputs: Sequence[torch.Tensor]) -> None:
        if code != 0:
            raise KernelFaultError(code, self._library.dk_error_string(code).decode())
        for x in outputs:
            everything = torch.as_strided(x, (x.numel() + 2 * GUARD,), (1,), x.storage_offset() - GUARD)
            guards = torch.cat((everything[:GUARD], everything[-GUARD:]))
            assert guards.isnan().all(), "written before or behind an output"


def _shape(problem: Problem) -> tuple[int, int, int, int]:
    return problem.sequences, problem.tokens, problem.heads, DTYPES.index(problem.qkv.dtype)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN with GUARD more of them on each side."""
    size = math.prod(shape)
    return torch.full((size + 2 * GUARD,), math.nan, dtype=dtype)[GUARD : GUARD + size].view(*shape)


def problem(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    sequences: int = 1,
    heads: int = 2,
    peaked: float = 1.0,
    extra_stride: int = 0,
    seed: int = 0,
) -> Problem:
    """Normal random numbers; q and k times `peaked`; rows of qkv `extra_stride` elements further apart, NaN between."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    rows, width = sequences * tokens, 3 * heads * 64
    storage = torch.full((rows, width + extra_stride), math.nan, dtype=dtype)
    qkv = storage[:, :width].unflatten(1, (3, heads, 64))
    qkv.copy_(torch.randn(rows, 3, heads, 64, generator=generator))
    qkv[:, :2] *= peaked
    return Problem(qkv, torch.randn(rows, heads, 64, generator=generator).to(dtype), tokens)


def negative(given: Problem) -> Problem:
    """The same with all scores -512: far below those of padding, which are 0."""
    qkv = given.qkv.clone()
    qkv[:, 0], qkv[:, 1] = 8, -8
    return replace(given, qkv=qkv)


def expected(problem: Problem, dtype: torch.dtype = torch.float64) -> Result:
    """The same by plain torch, matmul and softmax and autograd, all of it in `dtype`."""
    qkv = problem.qkv.detach().to(dtype).contiguous().requires_grad_()
    q, k, v = qkv.unflatten(0, (-1, problem.tokens)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * SCALE
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    out.backward(problem.grad_out.to(dtype))
    lse = scores.detach().logsumexp(-1).transpose(1, 2).flatten(0, 1) / math.log(2)
    assert qkv.grad is not None
    return Result(out.detach(), lse, qkv.grad)


def errors(result: Result, truth: Result, floor: float = 0.01) -> dict[str, float]:
    """||result - truth|| / ||truth|| of the output and the three gradients.

    A gradient that vanishes (one token, or all tokens alike) is measured against `floor` times the three together.
    """
    measured = {}
    for name, part in truth.parts().items():
        size = part.norm()
        if name != "out":
            size = torch.maximum(size, floor * truth.grad_qkv.norm())
        measured[name] = ((result.parts()[name].double() - part).norm() / size).item()
    return measured

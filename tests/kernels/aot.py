"""Compile Triton kernels ahead of time for GPUs that are not here, and run tests of them in Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so a process has either interpreted or compiled kernels: tests of
the first kind go into a child process (`run_interpreted`), `resources` needs the second kind. Not a test file.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TOO_OLD = "only 0-dimensional arrays can be converted to Python scalars"  # Triton 3.6 with NumPy 2.4


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and bytes of stack (spills) per thread, shared memory, and the
    instructions that read or write two bytes of global memory: with 16-bit data a sign that the compiler did not see
    that addresses are aligned."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    two_byte_accesses: int = 0


def resources(
    kernel_fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Sequence[str] | None = None,
    maxnreg: int | None = None,
) -> Resources:
    """Compile `kernel_fn` (a @triton.jit function) for compute capability `arch` (80, 90) and read what it takes.

    `signature` gives the type of each argument ("*fp16", "i32", "fp32"), in any order; those in `constexprs` may be
    left out. `aligned` names the arguments that are multiples of 16, as the launcher finds out by itself on a GPU:
    by default all pointers. `maxnreg` is the launch option that limits the registers of a thread. Raises
    AssertionError if Triton interprets in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled"
    names = kernel_fn.arg_names
    unknown = set(signature) - set(names) | set(constexprs) - set(names)
    missing = set(names) - set(signature) - set(constexprs)
    assert not unknown and not missing, f"{kernel_fn.__name__}: unknown arguments {unknown}, missing {missing}"
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    if aligned is None:
        aligned = [name for name, kind in types.items() if kind.startswith("*")]
    source = ASTSource(
        kernel_fn,
        types,
        dict(constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    narrow = len(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*\.[bfu]16\b", compiled.asm["ptx"]))
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, narrow)


def run_interpreted(path: Path | str, *arguments: str, timeout: float = 300, **environment: str) -> str:
    """Run the tests in file `path` in a child process whose Triton kernels are interpreted on the CPU; its output.

    The file should not be called test_*.py, or it is collected twice. Raises AssertionError with the output if a test
    failed or none ran; skips the calling test where Triton's interpreter is too old for this NumPy.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(path), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0 and _TOO_OLD in done.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy: loop bounds are arrays of one element")
    assert done.returncode == 0, done.stdout
    return done.stdout


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")

"""Building the CUDA kernels: they compile for every GPU we name, load into torch, are built once, or say why not."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dinov2cli.errors import UserError, WorkError
from dinov2cli.kernels import build, compiler
from dinov2cli.kernels.attention_op import MAX_TOKENS, SHORT_TOKENS, VARIANTS

RECORD = build.SOURCES / "resources.json"
needs_nvcc = pytest.mark.skipif(compiler.find_nvcc() is None, reason=f"no nvcc: {compiler.HINT}")

TINY = """
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
extern "C" void launch(float* x) { twice<<<1, 32>>>(x); }
"""


@pytest.fixture(scope="session")
def built():
    """The library of the default cache, for all architectures that we build to carry elsewhere."""
    return build.build(build.ARCHS)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Sources that compile in two seconds, and a cache of their own."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "tiny.cu").write_text(TINY)
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU of the compute capability one asks for."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        monkeypatch.setattr(build, "_usable", {})

    return pretend


def in_a_fresh_process(code, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@needs_nvcc
def test_no_kernel_spills_more_than_recorded(built):
    recorded = json.loads(RECORD.read_text())
    assert {entry.arch for entry in built.resources} == set(build.ARCHS)
    assert {entry.kernel for entry in built.resources} == set(recorded["kernels"]), (
        "record again: `python tests/kernels/test_build.py`"
    )
    if built.nvcc != recorded["nvcc"]:
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, this is {built.nvcc}")
    for entry in built.resources:
        assert entry.spill <= recorded["kernels"][entry.kernel][entry.arch]["spill_bytes"], entry


@needs_nvcc
def test_the_library_loads_into_torch_and_refuses_tensors_of_the_cpu(built):
    done = in_a_fresh_process(
        """
        import sys, torch
        from dinov2cli.kernels import build
        path = build.find_library("sm_90a", None).path
        build.load(path)
        build.load(path)
        assert build.loaded() == path.resolve()
        qkv = torch.zeros(2, 3, 1, 64, dtype=torch.bfloat16)
        for name, rest in (("forward", (qkv, qkv)), ("backward", (qkv,) * 4)):
            try:
                getattr(torch.ops.dinov2_kernels, f"attention_{name}")(qkv, *rest, [1, 2, 0], 0.125)
            except RuntimeError as error:
                print(error)
        """
    )
    assert done.stdout.splitlines() == [
        f"dinov2_kernels::attention_{name}: found qkv outside a GPU; expected a CUDA tensor"
        for name in ("forward", "backward")
    ], done.stderr


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch kernels on memory of the host")
def test_the_launchers_have_the_variants_and_lengths_that_python_names(built):
    """An unknown variant is an invalid value (1); a known one gets as far as finding no GPU."""
    library = ctypes.CDLL(str(built.path))
    library.dk_error_string.restype = ctypes.c_char_p
    assert library.dk_attention_max_tokens() == MAX_TOKENS
    room = torch.zeros(1 << 16, dtype=torch.float64)
    at, scale = ctypes.c_void_p((room.data_ptr() + 15) // 16 * 16), ctypes.c_float(0.125)

    def code(direction, tokens, variant):
        sizes = (1, tokens, 1, 0, scale, variant, None)
        if direction == "forward":
            return library.dk_attention_forward(at, ctypes.c_long(192), at, at, *sizes)
        return library.dk_attention_backward(at, ctypes.c_long(192), at, at, at, at, *sizes)

    for direction, (short, long) in VARIANTS.items():
        for tokens, known in ((SHORT_TOKENS, short), (SHORT_TOKENS + 1, long)):
            valid = [variant for variant in range(12) if code(direction, tokens, variant) != 1]
            assert valid == list(known), (direction, tokens)
        assert code(direction, MAX_TOKENS + 1, 0) == 1
        assert library.dk_error_string(code(direction, 50, 0))


@needs_nvcc
def test_what_is_built_is_found_again(tiny, monkeypatch):
    first = build.build(("sm_80",), sources=tiny)
    assert first.fresh and first.path.is_file() and (first.path.parent / "build.log").is_file()
    monkeypatch.setattr(build, "compile_library", lambda *_: pytest.fail("compiled again"))
    again = build.build(("sm_80", "sm_80"), sources=tiny)
    assert not again.fresh
    assert (again.path, again.resources, again.seconds) == (first.path, first.resources, first.seconds)
    assert [entry.kernel for entry in again.resources] == ["twice"] and again.resources[0].registers > 0
    nvcc = compiler.find_nvcc()
    for arch in ("sm_80", "compute_80"):
        assert build.find_library(arch, nvcc, tiny).path == build.find_library(arch, None, tiny).path == first.path
    assert build.find_library("sm_90a", nvcc, tiny) is None
    monkeypatch.undo()


def test_a_change_of_sources_options_compiler_or_architecture_is_another_library(tiny, monkeypatch):
    nvcc = compiler.Nvcc("/nvcc", "V1.2.3")
    keys = [build._key(nvcc, ("sm_80",), tiny), build._key(nvcc, ("sm_90a",), tiny)]
    keys.append(build._key(compiler.Nvcc("/nvcc", "V1.2.4"), ("sm_80",), tiny))
    (tiny / "resources.json").write_text("{}")
    assert build._key(nvcc, ("sm_80",), tiny) == keys[0]
    (tiny / "new.cuh").write_text("// nothing")
    keys.append(build._key(nvcc, ("sm_80",), tiny))
    monkeypatch.setattr(build, "CUDA_FLAGS", (*compiler.CUDA_FLAGS, "-G"))
    keys.append(build._key(nvcc, ("sm_80",), tiny))
    assert len(set(keys)) == len(keys)


@needs_nvcc
def test_an_error_of_the_compiler_is_told_in_one_line(tiny):
    (tiny / "wrong.cu").write_text("int twice(int x) { return y; }\n")
    with pytest.raises(WorkError) as caught:
        build.build(("sm_80",), sources=tiny)
    text = str(caught.value)
    assert text.startswith("wrong.cu: ") and 'identifier "y" is undefined' in text and "\n" not in text
    log = Path(text.rsplit("see ", 1)[1])
    assert "nvcc" in log.read_text() and "tiny.cu" in log.read_text()
    assert sorted(path.suffix for path in build.cache_folder().iterdir()) == [".failed", ".lock", ".log"]


@needs_nvcc
def test_two_processes_build_once(tiny):
    code = f"""
        from pathlib import Path
        from dinov2cli.kernels import build
        print(build.build(("sm_80",), sources=Path({str(tiny)!r})).fresh)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(one.communicate()[0].strip() for one in both) == ["False", "True"]


def test_those_who_waited_for_a_failed_build_fail_with_it(tiny, monkeypatch):
    """Eight ranks must not try in turn what failed for the first."""
    nvcc = compiler.Nvcc("/nvcc", "V1.2.3")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    failed = (build.cache_folder() / build._key(nvcc, ("sm_80",), tiny)).with_suffix(".failed")
    failed.parent.mkdir(parents=True)
    failed.write_text("tiny.cu: no luck")
    os.utime(failed, (time.time() + 60,) * 2)
    with pytest.raises(WorkError, match="no luck"):
        build.build(("sm_80",), sources=tiny)


@needs_nvcc
def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(WorkError, match=r"cannot write to .*; set DINOV2_KERNEL_CACHE"):
        build.build(("sm_80",), sources=tiny)


def test_nothing_can_be_built_without_nvcc(tiny, gpu, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.delenv(build.LIBRARY, raising=False)
    with pytest.raises(UserError, match="pip install nvidia-cuda-nvcc"):
        build.build(("sm_80",), sources=tiny)
    gpu(9, 0)
    why = build.missing(torch.device("cuda", 0))
    assert "no nvcc" in why and "dinov2 kernels build" in why


def test_a_gpu_that_is_too_old(gpu):
    gpu(7, 5)
    assert "compute capability 8.0, this one has 7.5" in build.missing(torch.device("cuda", 0))


def test_a_library_that_does_not_load_here(tmp_path, gpu, monkeypatch):
    gpu(8, 0)
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    monkeypatch.setenv(build.LIBRARY, str(wrong))
    why = build.missing(torch.device("cuda", 0))
    assert str(wrong) in why and "do not run here" in why and "\n" not in why
    monkeypatch.setenv(build.LIBRARY, str(tmp_path / "none.so"))
    monkeypatch.setattr(build, "_usable", {})
    with pytest.raises(UserError, match="no such file"):
        build.missing(torch.device("cuda", 0))


def test_a_failed_build_is_why_the_kernels_are_missing(tiny, gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.delenv(build.LIBRARY, raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: compiler.Nvcc("/nvcc", "V1.2.3"))

    def fail(*_):
        raise WorkError("x.cu: wrong; see x.log")

    monkeypatch.setattr(build, "compile_library", fail)
    assert build.missing(torch.device("cuda", 0)) == "no CUDA kernels: x.cu: wrong; see x.log"


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((13, 0), "compute_80")],
)
def test_each_gpu_gets_code_that_it_runs(capability, arch, monkeypatch):
    monkeypatch.setattr(compiler, "_known", lambda _: frozenset({"sm_80", "sm_90", "sm_100"}))
    assert compiler.native_arch(capability, compiler.Nvcc("/nvcc", "V1.2.3")) == arch


def test_code_flags():
    assert compiler.code_flags(("sm_80", "sm_90a", "compute_80")) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    with pytest.raises(ValueError, match="found 'hopper'"):
        compiler.check_archs(["sm_80", "hopper"])


def test_nvcc_is_found_where_it_may_be(tmp_path, monkeypatch):
    def make(folder):
        (tmp_path / folder).mkdir(parents=True)
        path = tmp_path / folder / "nvcc"
        path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        path.chmod(0o755)
        return str(path)

    for name in (compiler.NVCC, "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/bin:/usr/bin" if shutil.which("nvcc", path="/bin:/usr/bin") is None else "/nowhere")
    monkeypatch.setattr(compiler, "USUAL", str(tmp_path / "none"))
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    assert compiler.find_nvcc() is None
    wheel = make("site/nvidia/cu13/bin")
    assert compiler.find_nvcc() == compiler.Nvcc(wheel, "V13.0.88")
    home = make("home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert compiler.find_nvcc().path == home
    path = make("path")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/bin:/usr/bin")
    assert compiler.find_nvcc().path == path
    monkeypatch.setenv(compiler.NVCC, wheel)
    assert compiler.find_nvcc().path == wheel
    monkeypatch.setenv(compiler.NVCC, str(tmp_path / "none"))
    with pytest.raises(UserError, match="does not run as nvcc"):
        compiler.find_nvcc()


def test_what_ptxas_says_about_a_kernel():
    text = """
ptxas info    : 77 bytes gmem
ptxas info    : Compiling entry function '_ZN2dk7forwardINS_4Bf16ELi8ELb1EEEvNS_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN2dk7forwardINS_4Bf16ELi8ELb1EEEvNS_6ParamsE
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem, 608 bytes cmem[0]
ptxas info    : Compile time = 90.1 ms
"""
    (found,) = compiler._resources(text)
    name = "forward<Bf16, 8, true>" if shutil.which("c++filt") else "_ZN2dk7forwardINS_4Bf16ELi8ELb1EEEvNS_6ParamsE"
    assert found == compiler.Resources(name, "sm_90a", registers=128, spill=48, stack=24, shared=512)


def record():
    """Write what the kernels take now to resources.json: run this file with Python after a change that is worth it."""
    found = build.build(build.ARCHS)
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for entry in found.resources:
        figures = {"registers": entry.registers, "spill_bytes": entry.spill}
        kernels.setdefault(entry.kernel, {})[entry.arch] = figures
    lines = [f"  {json.dumps(name)}: {json.dumps(archs)}" for name, archs in kernels.items()]
    body = ",\n".join(lines)
    RECORD.write_text(f'{{\n "nvcc": {json.dumps(found.nvcc)},\n "kernels": {{\n{body}\n }}\n}}\n')


if __name__ == "__main__":
    record()

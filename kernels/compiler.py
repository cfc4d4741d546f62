"""The CUDA compiler: where it is, how our sources are compiled and linked, and what ptxas says about each kernel.

Only what nvcc, the host compiler and torch's headers need; nothing here looks at a GPU. The `.cu` files include no
torch header (with them a file takes 90 s and 3 GB instead of seconds). The one file that does, ops.cpp, uses torch's
stable ABI, so that a library built under one torch (2.10 or later, with or without CUDA) loads in the others.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dinov2cli.errors import UserError, WorkError

NVCC = "DINOV2_NVCC"
USUAL = "/usr/local/cuda/bin/nvcc"
HINT = "install the CUDA toolkit or `pip install nvidia-cuda-nvcc`, or name it in DINOV2_NVCC"
TORCH_ABI = "0x020a000000000000"  # torch 2.10, the oldest whose stable ABI has what ops.cpp uses
CUDA_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
HOST_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_ABI}")

_ARCH = re.compile(r"sm_\d{2,3}[af]?|compute_\d{2,3}")


@dataclass(frozen=True)
class Nvcc:
    """An nvcc: its path, and its version as it prints it ('V13.0.88')."""

    path: str
    version: str

    @property
    def root(self) -> Path:
        """The toolkit that it lies in."""
        return Path(self.path).resolve().parent.parent


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture, as ptxas reports it: registers of a thread, the rest in bytes.

    `shared` is only what is known when compiling; what a launch asks for comes on top.
    """

    kernel: str
    arch: str
    registers: int
    spill: int
    stack: int
    shared: int


def find_nvcc() -> Nvcc | None:
    """The nvcc named by DINOV2_NVCC, or on PATH, in CUDA_HOME, CUDA_PATH or /usr/local/cuda, or from its wheel.

    Raises UserError if DINOV2_NVCC names one that does not answer.
    """
    named = os.environ.get(NVCC)
    if named:
        found = _answers(shutil.which(named) or named)
        if found is None:
            raise UserError(f"{NVCC}={named}: does not run as nvcc; {HINT}")
        return found
    return next(filter(None, map(_answers, _candidates())), None)


def native_arch(capability: tuple[int, int], nvcc: Nvcc) -> str:
    """What to compile for a GPU of this compute capability, 8.0 or later.

    All of 8.x run sm_80 code; 9.0 its own features (sm_90a). A newer one gets its own code where nvcc knows it, else
    PTX of 8.0, which the driver translates when the library is loaded.
    """
    major, minor = capability
    if major == 8:
        return "sm_80"
    if capability == (9, 0):
        return "sm_90a"
    own = f"sm_{major}{minor}"
    return own if own in _known(nvcc.path) else "compute_80"


def check_archs(archs: Sequence[str]) -> tuple[str, ...]:
    """The architectures without doubles, in order. Raises ValueError for a word that is not sm_XX or compute_XX."""
    for arch in archs:
        if not _ARCH.fullmatch(arch):
            raise ValueError(f"architecture: found {arch!r}; expected sm_80, sm_90a or alike, or compute_80 for PTX")
    return tuple(dict.fromkeys(archs))


def code_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's options for these architectures. sm_80 brings its PTX along, for GPUs newer than the library."""
    flags = []
    for arch in archs:
        virtual = "compute_" + arch.split("_")[1]
        code = f"[{arch},{virtual}]" if arch == "sm_80" else arch
        flags.append(f"-gencode=arch={virtual},code={code}")
    return flags


def compile_library(nvcc: Nvcc, sources: Path, archs: Sequence[str], folder: Path, name: str) -> list[Resources]:
    """Compile every .cu and .cpp of `sources` into folder/name, with what the compilers said in folder/build.log.

    Returns what each kernel takes. Raises WorkError with the compiler's first error line.
    """
    host = host_compiler()
    jobs = {path.name: _cuda_command(nvcc, host, path, archs, folder) for path in sorted(sources.glob("*.cu"))}
    jobs |= {path.name: _host_command(host, path, folder) for path in sorted(sources.glob("*.cpp"))}
    log = folder / "build.log"
    with ThreadPoolExecutor(min(len(jobs) or 1, os.cpu_count() or 1)) as pool:
        told = list(pool.map(_run, jobs.values()))
    link = _link_command(nvcc, host, [folder / f"{file}.o" for file in jobs], folder / name)
    said = [_told(command, *result) for command, result in zip(jobs.values(), told, strict=True)]
    log.write_text("\n".join(said), encoding="utf-8")
    for file, (code, text) in zip(jobs, told, strict=True):
        _check(file, code, text, log)
    code, text = _run(link)
    log.write_text("\n".join([*said, _told(link, code, text)]), encoding="utf-8")
    _check("linking", code, text, log)
    for file in jobs:
        (folder / f"{file}.o").unlink()
    return sorted(_resources("\n".join(text for _, text in told)), key=lambda r: (r.kernel, r.arch))


def host_compiler() -> str:
    """The C++ compiler: CXX or g++. Raises WorkError if there is none."""
    named = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    found = shutil.which(named[0])
    if found is None:
        raise WorkError(f"no C++ compiler: found no {named[0]} on PATH; install g++")
    return found


def _candidates() -> Iterator[str]:
    on_path = shutil.which("nvcc")
    if on_path:
        yield on_path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield str(Path(os.environ[variable]) / "bin" / "nvcc")
    yield USUAL
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        # cu13 holds all of CUDA 13; the wheels of CUDA 12 have a folder each, which nvcc does not find by itself.
        yield from map(str, sorted(Path(site).glob("nvidia/cu[0-9]*/bin/nvcc"), reverse=True))


@cache
def _answers(path: str) -> Nvcc | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"\bV\d+\.\d+\.\d+", done.stdout)
    return Nvcc(path, version.group()) if done.returncode == 0 and version else None


@cache
def _known(nvcc: str) -> frozenset[str]:
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    return frozenset(done.stdout.split())


def _cuda_command(nvcc: Nvcc, host: str, source: Path, archs: Sequence[str], folder: Path) -> list[str]:
    output = ["-c", str(source), "-o", str(folder / f"{source.name}.o")]
    return [nvcc.path, "-ccbin", host, *CUDA_FLAGS, *code_flags(archs), *output]


def _host_command(host: str, source: Path, folder: Path) -> list[str]:
    include = [flag for path in _torch() for flag in ("-isystem", str(path / "include"))]
    return [host, *HOST_FLAGS, *include, "-c", str(source), "-o", str(folder / f"{source.name}.o")]


def _link_command(nvcc: Nvcc, host: str, objects: list[Path], library: Path) -> list[str]:
    # The wheels keep the static runtime in lib, where nvcc does not look. Its symbols stay inside: torch has its own.
    paths = [f"-L{nvcc.root / 'lib'}", *(f"-L{path / 'lib'}" for path in _torch())]
    hide = ["-Xlinker", "--exclude-libs", "-Xlinker", "libcudart_static.a"]
    libraries = ["-ltorch_cpu", "-lc10"]
    start = [nvcc.path, "-ccbin", host, "-shared", "-cudart", "static", *hide, "-o", str(library)]
    return [*start, *map(str, objects), *paths, *libraries]


def _torch() -> list[Path]:
    import torch

    return [Path(path) for path in torch.__path__]


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def _told(command: list[str], code: int, text: str) -> str:
    return f"$ {shlex.join(command)}\n{text}exit {code}\n"


def _check(what: str, code: int, text: str, log: Path) -> None:
    if code == 0:
        return
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\b(error|fatal|undefined|cannot)\b", line, re.I)), None)
    raise WorkError(f"{what}: {first or (lines[-1] if lines else f'the compiler ended with {code}')}; see {log}")


def _resources(text: str) -> Iterator[Resources]:
    """ptxas tells three things about each kernel, on lines of their own: its name, its stack, its registers."""
    kernel, arch, stack, spill = "", "", 0, 0
    names = _readable(re.findall(r"Compiling entry function '([^']+)'", text))
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            kernel, arch, stack, spill = names[entry[1]], entry[2], 0, 0
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spill = int(frame[1]), int(frame[2]) + int(frame[3])
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            yield Resources(kernel, arch, int(used[1]), spill, stack, int(shared[1]) if shared else 0)
            kernel = ""


def _readable(names: list[str]) -> dict[str, str]:
    """Kernel names as they are written: `forward<64, 4>` for _Z7forwardILi64ELi4EEvv; unchanged without c++filt."""
    filter_ = shutil.which("c++filt")
    if filter_ is None or not names:
        return {name: name for name in names}
    done = subprocess.run([filter_, *names], capture_output=True, text=True)
    plain = [_short(line) for line in done.stdout.splitlines()]
    return dict(zip(names, plain, strict=True)) if len(plain) == len(names) else {name: name for name in names}


def _short(name: str) -> str:
    """A demangled name without return type, namespaces, parameters and casts of template arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void ")
    name = re.sub(r"\((?:int|bool|unsigned int|long|unsigned long)\)(?=-?\d)", "", name)
    depth = 0
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name

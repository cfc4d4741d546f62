"""Our CUDA kernels as one shared library: built once per machine, kept in a cache, loaded into torch.

A library is kept by the hash of its sources, the compilers' options, nvcc's version and the architectures, so that a
change of any of them builds another one. Where nvcc and a GPU are, the first use builds it for that GPU (`missing`);
`dinov2 kernels build` does so ahead, also on a machine without a GPU. DINOV2_KERNEL_LIBRARY names a library that was
built elsewhere: it needs glibc 2.34 or later and torch 2.10 or later, and no compiler.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock

from dinov2cli.errors import DinoError, UserError, WorkError
from dinov2cli.kernels.compiler import (
    CUDA_FLAGS,
    HINT,
    HOST_FLAGS,
    NVCC,
    Nvcc,
    Resources,
    check_archs,
    compile_library,
    find_nvcc,
    native_arch,
)

LIBRARY = "DINOV2_KERNEL_LIBRARY"
CACHE = "DINOV2_KERNEL_CACHE"
SOURCES = Path(__file__).resolve().parent / "csrc"
ARCHS = ("sm_80", "sm_90a")
"""What is built to be carried elsewhere: A100 and all of 8.x, H100 and H200, and PTX of 8.0 for what comes later."""

_NAME = "dinov2_kernels.so"
_FACTS = "build.json"
_log = logging.getLogger(__name__)
_loaded: Path | None = None
_usable: dict[int | None, str | None] = {}


@dataclass(frozen=True)
class Built:
    """A library in the cache: where it is, for which architectures, with which nvcc, the seconds it took to build and
    what each kernel takes. `fresh` if it was built just now."""

    path: Path
    archs: tuple[str, ...]
    nvcc: str
    seconds: float
    resources: tuple[Resources, ...]
    fresh: bool = False


def build(archs: Sequence[str] = ARCHS, *, force: bool = False, sources: Path = SOURCES) -> Built:
    """The library for these architectures, built unless the cache has it; `force` builds it in any case.

    Safe to call from several processes at once: one builds, the others wait and take what it built, or its error.
    Raises UserError without nvcc, WorkError if the compilation fails (its first error and where the whole log is).
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError(f"kernels build: found no nvcc; {HINT}")
    archs = check_archs(archs)
    folder = cache_folder() / _key(nvcc, archs, sources)
    built = _read(folder)
    if built is not None and not force:
        return built
    try:
        return _build_once(folder, nvcc, archs, sources, force)
    except OSError as error:
        raise WorkError(f"kernels build: cannot write to {cache_folder()}: {error}; set {CACHE}") from error


def cache_folder() -> Path:
    """Where libraries are kept: DINOV2_KERNEL_CACHE, or dinov2/kernels in the user's cache."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dinov2" / "kernels"


def find_library(arch: str, nvcc: Nvcc | None, sources: Path = SOURCES) -> Built | None:
    """A library of the cache that serves `arch`: of these sources, and of this nvcc where there is one.

    Without an nvcc any that was built from the same sources will do: it came from another machine that shares the
    cache.
    """
    for built in current(sources):
        serves = (*built.archs, *(("compute_80",) if "sm_80" in built.archs else ()))
        if arch in serves and (nvcc is None or built.path.parent.name == _key(nvcc, built.archs, sources)):
            return built
    return None


def current(sources: Path = SOURCES) -> list[Built]:
    """The libraries in the cache that were built from these sources, newest first."""
    digest = _digest(sources)
    found = []
    for facts in sorted(cache_folder().glob(f"*/{_FACTS}"), key=_written, reverse=True):
        built = _read(facts.parent)
        if built is not None and json.loads(facts.read_text(encoding="utf-8"))["sources"] == digest:
            found.append(built)
    return found


def library(device: torch.device) -> Path:
    """The library for the GPU `device`: DINOV2_KERNEL_LIBRARY, or from the cache, or built now.

    Raises UserError if DINOV2_KERNEL_LIBRARY is not there or nothing can be built, WorkError if building fails.
    """
    carried = _carried()
    if carried is not None:
        return carried
    capability = torch.cuda.get_device_capability(device)
    nvcc = find_nvcc()
    found = _in_cache(capability, nvcc)
    if found is not None:
        return found.path
    if nvcc is None:
        raise UserError(f"they are not built and there is no nvcc; {HINT}; then `dinov2 kernels build`")
    arch = native_arch(capability, nvcc)
    # A warning, for the command stands still meanwhile and nobody asked it to.
    _log.warning("building the CUDA kernels for %s, once: about half a minute", arch)
    built = build((arch,))
    _log.info("built the CUDA kernels in %.0f s: %s", built.seconds, built.path)
    return built.path


def load(path: Path) -> None:
    """Register the operators dinov2_kernels::* of a library with torch, once per process. Raises OSError."""
    global _loaded
    path = path.resolve()
    if _loaded == path:
        return
    if _loaded is not None:
        raise OSError(f"{path}: the kernels of {_loaded} are loaded already")
    torch.ops.load_library(str(path))
    _loaded = path


def loaded() -> Path | None:
    """The library whose operators are registered, if any is."""
    return _loaded


def missing(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on `device`, a GPU; None if they can. Builds and loads them on first use.

    Raises UserError if DINOV2_KERNEL_LIBRARY or DINOV2_NVCC names what is not there.
    """
    if device.index in _usable:  # asked at every call of the operator
        return _usable[device.index]
    if not torch.cuda.is_available():
        return f"there is no NVIDIA GPU to run the CUDA kernels on, asked for {device}"
    if torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU, this torch is for AMD's"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _usable:
        _usable[index] = _missing(torch.device("cuda", index))
    return _usable[index]


def _missing(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the CUDA kernels need a GPU of compute capability 8.0, this one has {major}.{minor}"
    try:
        path = library(device)
    except (WorkError, UserError, OSError, RuntimeError) as error:  # the last two: no home, a cache nobody may read
        if isinstance(error, UserError) and (os.environ.get(LIBRARY) or os.environ.get(NVCC)):
            raise
        return f"no CUDA kernels: {error}"
    try:
        load(path)
        _try_out(device)
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        return f"the CUDA kernels of {path} do not run here: {str(cause).splitlines()[0]}"
    return None


def _try_out(device: torch.device) -> None:
    """Launch each kernel family once: a driver too old, no code for this GPU, too little shared memory show here."""
    for tokens in (50, 257, 272):
        qkv = torch.zeros(tokens, 3, 1, 64, dtype=torch.bfloat16, device=device)
        out, grad = qkv.new_empty(tokens, 64), torch.empty_like(qkv)
        lse = qkv.new_empty(tokens, 1, dtype=torch.float32)
        torch.ops.dinov2_kernels.attention_forward(qkv, out, lse, [1, tokens, 0], 0.125)
        torch.ops.dinov2_kernels.attention_backward(qkv, out, out, lse, grad, [1, tokens, 0], 0.125)
    torch.cuda.synchronize(device)  # or what goes wrong on the GPU would be told of something later


def _carried() -> Path | None:
    named = os.environ.get(LIBRARY)
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(f"{LIBRARY}={named}: no such file; expected a library of `dinov2 kernels build`")
    return path


def _in_cache(capability: tuple[int, int], nvcc: Nvcc | None) -> Built | None:
    if nvcc is not None:
        return find_library(native_arch(capability, nvcc), nvcc)
    arch = {8: "sm_80", 9: "sm_90a"}.get(capability[0], f"sm_{capability[0]}{capability[1]}")
    return find_library(arch, None) or find_library("compute_80", None)


def _build_once(folder: Path, nvcc: Nvcc, archs: tuple[str, ...], sources: Path, force: bool) -> Built:
    """Build, or take what another process built, or failed to build, since this one asked."""
    asked = time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        built = _read(folder)
        if built is not None and (not force or _written(folder / _FACTS) > asked):
            return built
        failure = folder.with_suffix(".failed")
        if _written(failure) > asked:
            raise WorkError(failure.read_text(encoding="utf-8"))
        return _build_into(folder, nvcc, archs, sources, failure)


def _build_into(folder: Path, nvcc: Nvcc, archs: tuple[str, ...], sources: Path, failure: Path) -> Built:
    """Build beside `folder` and put it there whole, so that nobody ever loads half a library."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    log = folder.with_suffix(".log")
    started = time.monotonic()
    try:
        resources = compile_library(nvcc, sources, archs, aside, _NAME)
        seconds = time.monotonic() - started
        built = Built(folder / _NAME, archs, nvcc.version, seconds, tuple(resources), fresh=True)
        facts = {"sources": _digest(sources), "archs": archs, "nvcc": nvcc.version, "seconds": seconds}
        table = [asdict(entry) for entry in resources]
        (aside / _FACTS).write_text(json.dumps({**facts, "resources": table}, indent=1), encoding="utf-8")
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except DinoError as error:
        if (aside / "build.log").exists():
            os.replace(aside / "build.log", log)
        told = str(error).replace(str(aside / "build.log"), str(log))
        failure.write_text(told, encoding="utf-8")
        raise WorkError(told) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    failure.unlink(missing_ok=True)
    return built


def _read(folder: Path) -> Built | None:
    """What is kept in a folder of the cache; None if it is not there or not whole."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        resources = tuple(Resources(**entry) for entry in facts["resources"])
        built = Built(folder / _NAME, tuple(facts["archs"]), facts["nvcc"], facts["seconds"], resources)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if built.path.is_file() else None


def _key(nvcc: Nvcc, archs: Sequence[str], sources: Path) -> str:
    what = "\0".join([_digest(sources), nvcc.version, *archs])
    return f"{hashlib.sha256(what.encode()).hexdigest()[:16]}-{'+'.join(archs)}"


def _digest(sources: Path) -> str:
    """Hash of the sources and of the options they are compiled with."""
    state = hashlib.sha256("\0".join([*CUDA_FLAGS, *HOST_FLAGS]).encode())
    for path in sorted(sources.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            state.update(f"\0{path.name}\0".encode())
            state.update(path.read_bytes())
    return state.hexdigest()[:32]


def _written(path: Path) -> float:
    """When a file was last written, seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

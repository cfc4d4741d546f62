"""Which implementation of an operator runs where: decided once per device, with the reason in words.

Operators have several implementations, tried in this order: our CUDA kernels, our Triton kernels, xFormers, torch's
fused attention (SDPA), plain torch. The environment variable DINOV2_KERNELS names one of them instead of `auto`: then
every operator that it implements runs on it, the others on what comes after it in the order, and if it is not there
that is an error, never a silent fallback.
"""

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

from dinov2cli.errors import UserError

SETTING = "DINOV2_KERNELS"
BACKENDS = ("cuda", "triton", "xformers", "sdpa", "torch")
OPERATORS: dict[str, tuple[str, ...]] = {
    "attention": ("cuda", "xformers", "sdpa", "torch"),
    "sinkhorn": ("triton", "torch"),
    "cross-entropy": ("triton", "torch"),
    "stochastic depth": ("triton", "torch"),
}
"""The back ends that implement each operator, the first one that is there wins."""


@dataclass(frozen=True)
class Choice:
    """The back end an operator runs on, and why; `forced` where the user named it."""

    operator: str
    backend: str
    reason: str
    forced: bool = False


def wanted() -> str:
    """What DINOV2_KERNELS asks for: 'auto' or a name of BACKENDS. Raises UserError for another word."""
    name = os.environ.get(SETTING, "").strip().lower() or "auto"
    if name not in ("auto", *BACKENDS):
        raise UserError(f"{SETTING}: found {name!r}; expected auto, {', '.join(BACKENDS)}")
    return name


def choose(operator: str, device: torch.device) -> Choice:
    """The back end of `operator` (a key of OPERATORS) on `device`.

    Raises UserError where DINOV2_KERNELS asks for a back end that is not there, whether or not it has this operator.
    """
    return _choose(operator, device.type, device.index, wanted(), interpreted())


def choices(device: torch.device) -> list[Choice]:
    """`choose` for every operator, in the order of OPERATORS."""
    return [choose(operator, device) for operator in OPERATORS]


def summary(device: torch.device) -> str:
    """One line: what every operator runs on, with the reason where that is not its first choice."""
    chosen = choices(device)
    if device.type == "cpu" and not any(choice.forced for choice in chosen) and not interpreted():
        return "torch's own, for our kernels need a GPU"
    together: dict[str, list[str]] = {}
    for choice in chosen:
        expected = choice.backend == OPERATORS[choice.operator][0] and not choice.forced
        what = choice.backend if expected else f"{choice.backend} ({choice.reason})"
        together.setdefault(what, []).append(choice.operator)
    return "; ".join(f"{', '.join(operators)} by {what}" for what, operators in together.items())


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`, None if it can. May build the CUDA kernels, which takes a minute once."""
    if backend == "cuda":
        return _cuda_missing(device)
    if backend == "triton":
        return _triton_missing(device)
    if backend == "xformers":
        return _xformers_missing(device)
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _choose(
    operator: str,
    kind: str,
    index: int | None,
    setting: str,
    interpreter: bool,  # noqa: ARG001 - what is missing depends on it
) -> Choice:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    candidates = OPERATORS[operator]
    if setting == "auto":
        return _first(operator, candidates, device)
    why = missing(setting, device)
    if why is not None:
        raise UserError(f"{SETTING}={setting}: {why}; unset it or set {SETTING}=auto to take what is there")
    if setting in candidates:
        return Choice(operator, setting, f"{SETTING}={setting}", forced=True)
    after = BACKENDS.index(setting)
    chosen = _first(operator, tuple(name for name in candidates if BACKENDS.index(name) > after), device)
    return Choice(operator, chosen.backend, f"{setting} has no {operator}", forced=True)


def _first(operator: str, candidates: tuple[str, ...], device: torch.device) -> Choice:
    """The first back end that is there, with what the ones before it lack."""
    lacks: list[str] = []
    for backend in candidates:
        why = missing(backend, device)
        if why is None:
            return Choice(operator, backend, "; ".join(lacks) or "the first choice")
        lacks.append(f"no {backend}: {why}")
    raise AssertionError(f"{operator}: plain torch is always there")


def _cuda_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the CUDA kernels need an NVIDIA GPU, this is {device}"
    from dinov2cli.kernels import build

    return build.missing(device)


def _triton_missing(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'dinov2cli[gpu]')"
    if device.type == "cuda":
        return "the Triton kernels are made for NVIDIA GPUs" if torch.version.hip else _triton_unable()
    if device.type == "cpu" and interpreted():
        return None
    return f"Triton kernels need a GPU, this is {device} (TRITON_INTERPRET=1 runs them on a CPU, slowly, to test them)"


@cache
def _triton_unable() -> str | None:
    """Why Triton, which is installed, does not start: it compiles a helper for the driver before its first kernel."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return f"Triton does not start: {said}; it needs a C compiler, Python's headers and libcuda"
    return None


def _xformers_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"xFormers attention needs a GPU, this is {device}"
    if importlib.util.find_spec("xformers") is None:
        return "xFormers is not installed (pip install 'dinov2cli[gpu]')"
    return None

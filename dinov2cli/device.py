"""Where and in which precision to compute: resolved once, with the reason in words."""

from contextlib import AbstractContextManager, nullcontext

import torch

from dinov2cli.errors import UserError

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """'cpu', 'cuda', 'cuda:1' or 'auto' (the first GPU, else the CPU).

    `local_rank`: this process's number on its machine under a launch; 'cuda' and 'auto' then deal the GPUs out.
    Raises UserError for another name or where torch sees no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None and torch.cuda.device_count() > 0:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit()):
        index = int(name[5:]) if ":" in name else 0
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
                "expected one with that number; use --device auto or --device cpu"
            )
        return torch.device(name)
    raise UserError(f"--device {name}: no such device; expected auto, cpu, cuda or cuda:N")


def choose_precision(name: str, device: torch.device, *, training: bool = False) -> tuple[str, str]:
    """Resolve 'auto' to (precision, reason); raises UserError for an unknown name or fp16 on the CPU.

    A GPU with bf16 units computes in bf16. A CPU with them does so in training only (five times the matmul rate was
    measured), for features are kept and compared across machines.
    """
    if name != "auto" and name not in PRECISIONS:
        raise UserError(f"precision: found {name!r}; expected auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 on a CPU is slow and unstable; use fp32 or bf16 there")
    if name != "auto":
        return name, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name(device)} computes in bf16"
        return "fp32", "this GPU has no bf16 units"
    if training and cpu_has_bf16():
        return "bf16", "this CPU computes in bf16"
    return "fp32", "CPU"


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware; without, bf16 is emulated and slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context for the forward pass: 16-bit autocast, or nothing in fp32. UserError for an unknown precision."""
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}; expected {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

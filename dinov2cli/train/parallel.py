"""Device, precision and ranks of a training run. The one file of the package that may import accelerate.

This version trains in one process; `Parallel` already carries the rank, world size and process group that the losses,
the loader and the checkpoint ask for, so that more ranks change this file and not its callers.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from dinov2cli.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parallel:
    """Where and how a run computes. `reason` says in words why the precision was chosen."""

    device: torch.device
    precision: str
    reason: str
    rank: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def autocast(self) -> AbstractContextManager:
        """Context for the forward pass: 16-bit autocast, or nothing in fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; passes everything through for bf16 and fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs, JSON and the export."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """'cpu', 'cuda', 'cuda:1' or 'auto' (the first GPU, else the CPU).

    Raises UserError for another name or where torch sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """Resolve 'auto' to (precision, reason); raises UserError for an unknown name or fp16 on the CPU."""
    if name not in PRECISIONS:
        raise UserError(f"train.precision: found {name!r}; expected one of {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise UserError("train.precision: fp16 on a CPU is slow and unstable; use fp32 or bf16 there")
    if name != "auto":
        return name, "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{torch.cuda.get_device_name(device)} computes in bf16"
    return "fp32", "CPU" if device.type == "cpu" else "this GPU has no bf16 units"


def setup(device: str = "auto", precision: str = "auto") -> Parallel:
    """Choose device and precision for this process.

    Raises UserError for what the machine does not have, and where a launcher started more than one process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"pretrain: found {world_size} processes from the launcher; this version trains in one; "
            "start it without accelerate launch or torchrun"
        )
    chosen = choose_device(device)
    name, reason = choose_precision(precision, chosen)
    if chosen.type == "cuda":
        # Prototype logits stay outside 16-bit autocast (see ssl.py); TF32 keeps that matmul on the tensor cores.
        torch.set_float32_matmul_precision("high")
    return Parallel(device=chosen, precision=name, reason=reason)

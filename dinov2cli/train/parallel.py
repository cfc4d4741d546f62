"""Device, precision and ranks of a training run. The one file of the package that may import accelerate.

This version trains in one process; `Parallel` already carries the rank, world size and process group that the losses,
the loader and the checkpoint ask for, so that more ranks change this file and not its callers.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dinov2cli.device import autocast, choose_device, choose_precision
from dinov2cli.errors import UserError


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
        return autocast(self.device, self.precision)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; passes everything through for bf16 and fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


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
    name, reason = choose_precision(precision, chosen, training=True)
    if chosen.type == "cuda":
        # Prototype logits stay outside 16-bit autocast (models/heads.py); TF32 keeps that matmul on the tensor cores.
        torch.set_float32_matmul_precision("high")
    return Parallel(device=chosen, precision=name, reason=reason)

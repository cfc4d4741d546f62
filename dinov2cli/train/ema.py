"""The teacher as an exponential moving average of the student (DINOv2 §4; DESIGN §7)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dinov2cli.train.sharding import local


def pair_parameters(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Teacher and student parameters in one order, matched by name.

    Raises ValueError if the two modules do not hold the same names.
    """
    student_by_name = dict(student.named_parameters())
    teacher_by_name = dict(teacher.named_parameters())
    if student_by_name.keys() != teacher_by_name.keys():
        differing = sorted(student_by_name.keys() ^ teacher_by_name.keys())
        raise ValueError(f"teacher and student do not hold the same parameters; differing: {differing[:5]}")
    return list(teacher_by_name.values()), [student_by_name[name] for name in teacher_by_name]


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, one fused call per list.

    lerp reads each tensor once. Of FSDP2's shards each rank averages its own, which needs no exchange, for teacher and
    student are sharded alike. Momentum 1 leaves the teacher bitwise unchanged.
    """
    torch._foreach_lerp_([local(t) for t in teacher], [local(s) for s in student], 1.0 - momentum)

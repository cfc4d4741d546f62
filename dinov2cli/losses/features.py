"""Feature regression: a student's tokens against those of a frozen teacher, row by row, without prototypes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.losses.cross_entropy import compute_dtype

FeatureKind = Literal["cosine", "smooth_l1"]
FEATURE_KINDS: tuple[FeatureKind, ...] = ("cosine", "smooth_l1")
_EPS = 1e-6  # of the variance of a teacher's token, as in the models' layer norm


def feature_loss(student: Tensor, teacher: Tensor, kind: FeatureKind = "cosine") -> Tensor:
    """Mean over the rows of the distance between `student` [M, D] and `teacher` [M, D] tokens: a scalar, 0 if M = 0.

    - `cosine`: 1 - cos(student, teacher), in [0, 2]; lengths do not count.
    - `smooth_l1`: smooth L1 with its bend at 1 (Girshick 2015, arXiv 1504.08083, equation 3), mean over D, to the
      teacher's token standardised over its D values (layer norm without weights, as the targets of data2vec, arXiv
      2202.03555, section 3.3): the size of the loss does not depend on how large this teacher's features are. The
      student's tokens, which come out of a linear layer, are taken as they are.

    Computed in float32 (float64 for float64 tokens), also under autocast. The teacher receives no gradient. Raises
    ValueError for another kind or shapes that differ.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must both be [M, D]")
    with torch.autocast(device_type=student.device.type, enabled=False):
        dtype = compute_dtype(student)
        found, wanted = student.to(dtype), teacher.detach().to(dtype)
        if kind == "cosine":
            rows = 1 - F.cosine_similarity(found, wanted, dim=-1)
        elif kind == "smooth_l1":
            wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=_EPS)
            rows = F.smooth_l1_loss(found, wanted, reduction="none").mean(-1)
        else:
            raise ValueError(f"kind {kind!r}, expected one of {', '.join(FEATURE_KINDS)}")
        return rows.sum() / max(len(rows), 1)

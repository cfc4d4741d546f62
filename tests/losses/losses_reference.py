"""The losses written straight from their equations in float64, slow and plain. Not a test file."""

import math

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The published loop on the whole matrix (prototypes x samples), in the log domain so that nothing overflows."""
    q = (logits.double() / temperature).T
    q = q - q.flatten().logsumexp(0)
    prototypes, samples = q.shape
    for _ in range(iterations):
        q = q - q.logsumexp(1, keepdim=True) - math.log(prototypes)
        q = q - q.logsumexp(0, keepdim=True) - math.log(samples)
    return (q + math.log(samples)).exp().T


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-sum_k q_k log p_k per row."""
    return -(target * torch.log_softmax(logits / temperature, dim=-1)).sum(-1)


def dino(student_global: Tensor, student_local: Tensor | None, teacher: Tensor, temperature: float = 0.1):
    """Sum over pairs of different views, each pair weighing one over their number."""
    crops = len(teacher)
    locals_ = [] if student_local is None else list(student_local)
    pairs = crops * (crops - 1) + max(len(locals_) * crops, 1)
    zero = torch.zeros((), dtype=torch.float64)
    local_loss = sum((cross_entropy(s, t, temperature).mean() for s in locals_ for t in teacher), zero)
    global_loss = sum(
        (
            cross_entropy(student_global[i], teacher[j], temperature).mean()
            for i in range(crops)
            for j in range(crops)
            if i != j
        ),
        zero,
    )
    return local_loss / pairs, global_loss / pairs


def ibot(student: Tensor, teacher: Tensor, image: list[int], n_crops: int, temperature: float = 0.1) -> Tensor:
    """Mean over the masked tokens of each image, summed, over all crops. `image[m]` is the image of token m."""
    total = torch.zeros((), dtype=torch.float64)
    for number in set(image):
        rows = [m for m, i in enumerate(image) if i == number]
        total = total + cross_entropy(student[rows], teacher[rows], temperature).mean()
    return total / n_crops


def koleo(tokens: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean_i log(min_{j != i} |x_i - x_j| + eps) on the unit sphere."""
    x = tokens / tokens.norm(dim=-1, keepdim=True)
    terms = []
    for i in range(len(x)):
        distances = torch.stack([(x[i] - x[j]).norm() for j in range(len(x)) if j != i])
        terms.append(-torch.log(distances.min() + eps))
    return torch.stack(terms).mean()

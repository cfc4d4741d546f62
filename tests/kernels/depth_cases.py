"""Inputs of the stochastic-depth operators, and their results in float64 by autograd, for several tests."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dinov2cli.kernels import depth

EPS = 1e-6


@dataclass
class Case:
    """A pack of groups (B, N), the samples kept of each, and everything else that the operators take."""

    groups: list[int]
    kept: list[torch.Tensor]
    scale: list[float]
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    gamma: torch.Tensor | None
    inner: torch.Tensor  # the branch is tanh(y @ inner)
    grad: torch.Tensor
    dtype: torch.dtype

    @property
    def inputs(self):
        """What has a gradient."""
        return [t for t in (self.x, self.weight, self.bias, self.gamma) if t is not None]


def make(groups, counts, width, dtype=torch.float32, x_dtype=None, gain=True, device="cpu", seed=0):
    """Random inputs with `counts` samples kept of each group (B, N); x is of `x_dtype`, the branch of `dtype`."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape, of=torch.float32, centre=0.0, spread=1.0):
        return (centre + spread * torch.randn(*shape, generator=random)).to(device, of)

    tokens = sum(b * n for b, n in groups)
    case = Case(
        groups=[number for group in groups for number in group],
        kept=[torch.randperm(b, generator=random)[:k].to(device) for (b, _), k in zip(groups, counts, strict=True)],
        scale=[b / max(k, 1) for (b, _), k in zip(groups, counts, strict=True)],
        x=draw(tokens, width, of=x_dtype or dtype, centre=0.3, spread=2.0),
        weight=draw(width, centre=1.0, spread=0.3),
        bias=draw(width, spread=0.3),
        gamma=draw(width, centre=0.5, spread=0.3) if gain else None,
        inner=draw(width, width, of=dtype, spread=width**-0.5),
        grad=draw(tokens, width, of=x_dtype or dtype),
        dtype=dtype,
    )
    for tensor in case.inputs:
        tensor.requires_grad_()
    return case


def found(case):
    """(sum, gradients of case.inputs) by the operators."""
    y, link, slots = depth.gather_norm(case.x, case.kept, case.groups, case.weight, case.bias, EPS, case.dtype)
    update = torch.tanh(y @ case.inner)
    out = depth.scatter_add(case.x, link, slots, update, case.kept, case.groups, case.gamma, case.scale)
    return out.detach(), torch.autograd.grad(out, case.inputs, case.grad)


def expected(case):
    """The same in float64: every sample on its own, what autograd makes of it."""
    wide = [tensor.detach().double().requires_grad_() for tensor in case.inputs]
    x, weight, bias, gamma = wide if case.gamma is not None else (*wide, torch.ones(()))
    out, first = [], 0
    for b, n, index, scale in zip(case.groups[::2], case.groups[1::2], case.kept, case.scale, strict=True):
        for sample in range(b):
            tokens = x[first : first + n]
            if sample in index.tolist():
                y = F.layer_norm(tokens, tokens.shape[1:], weight, bias, EPS)
                tokens = tokens + scale * gamma * torch.tanh(y @ case.inner.double())
            out.append(tokens)
            first += n
    total = torch.cat(out)
    return total.detach(), torch.autograd.grad(
        total, wide, case.grad.double(), allow_unused=True, materialize_grads=True
    )


def worst(case):
    """(error of the sum, largest error of a gradient), relative to the float64 ones."""
    (out, grads), (true_out, true_grads) = found(case), expected(case)
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in case.inputs]
    return error(out, true_out), max(map(error, grads, true_grads))


def error(value, true):
    """||value - true|| / ||true||, infinite where something is not finite."""
    norm = true.norm().clamp_min(1e-30)
    return float(torch.nan_to_num((value.double() - true).norm() / norm, nan=float("inf")))


# Groups (B, N), kept of each, width: two crop sizes, widths no power of two, one sample, a group of which none is kept.
SHAPES = {
    "two groups": ([(5, 7), (9, 3)], [3, 5], 64),
    "width 384": ([(3, 5), (4, 2)], [2, 2], 384),
    "width 1000": ([(3, 2)], [2], 1000),
    "width 1536": ([(2, 2)], [1], 1536),
    "one token": ([(3, 1), (2, 1)], [2, 1], 48),
    "one sample": ([(1, 3)], [1], 48),
    "none of a group": ([(4, 3), (2, 2)], [2, 0], 48),
    "none at all": ([(2, 3)], [0], 48),
}

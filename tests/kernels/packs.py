"""Packs of samples for the tests of attention, and attention by its definition."""

import math

import torch

PACK = [(2, 17), (1, 17), (3, 5)]


def make(groups, *, heads=2, width=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(b * n for b, n in groups)
    qkv = torch.randn(tokens, 3, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(), torch.randn(tokens, heads * width, generator=generator, dtype=torch.float64).to(dtype)


def textbook(qkv, groups):
    """Sample after sample, by the definition."""
    outputs = []
    for sample in qkv.split([n for b, n in groups for _ in range(b)]):
        q, k, v = (x.transpose(0, 1) for x in sample.unbind(1))
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def both(function, qkv, grad):
    """Output and gradient of qkv."""
    out = function(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]

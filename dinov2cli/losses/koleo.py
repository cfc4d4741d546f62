"""KoLeo regulariser (Sablayrolles et al., arXiv 1806.03198, equation 5): spreads the class tokens of a batch."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.losses.collectives import gather_rows, reduce_sum
from dinov2cli.losses.cross_entropy import compute_dtype


def koleo_loss(
    tokens: Tensor,
    *,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """-mean(log(distance to the nearest other token + eps)) of L2-normalised class tokens, in float32: a scalar.

    `tokens` are [B, D] of one global crop, taken before the head; [G, B, D] gives the SUM over crops, each with its own
    neighbours (DINOv2 weighs that sum by 0.1). `valid` (bool [B]) leaves padding rows out. By default neighbours are
    searched in this process's batch, as in the paper; with `group` among all ranks' tokens (same B on each).

    Two guards. Without a second valid token there is no neighbour: the loss is 0 and so are the gradients. Where
    tokens coincide the distance has no direction: its gradient is 0 there and the loss -log(eps) = 18.4, not infinity.
    """
    if tokens.ndim == 3:
        return torch.stack([koleo_loss(crop, valid=valid, group=group, eps=eps) for crop in tokens]).sum()
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        x = F.normalize(_without_padding(tokens, valid).to(compute_dtype(tokens)), dim=-1, eps=eps)
        everyone = gather_rows(x, group)
        usable = torch.ones(len(x), dtype=torch.bool, device=x.device) if valid is None else valid
        everyone_usable = gather_rows(usable.to(x.dtype), group) > 0
        own = torch.arange(len(x), device=x.device) + (0 if group is None else dist.get_rank(group) * len(x))
        with torch.no_grad():
            similarity = x @ everyone.T
            similarity[torch.arange(len(x), device=x.device), own] = -torch.inf
            similarity.masked_fill_(~everyone_usable, -torch.inf)
            best, neighbour = similarity.max(dim=1)
            has_neighbour = usable & (best != -torch.inf)
        squared = (x - everyone[neighbour]).square().sum(-1)
        apart = squared != 0  # sqrt has no gradient at 0: keep those rows out of it, not only out of the sum
        distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
        total = torch.where(has_neighbour, -torch.log(distance + eps), 0).sum()
        return total / _mean_count(usable, group).clamp(min=1)


def _without_padding(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Padding rows replaced by ones, so that NaN in them reaches neither values nor gradients."""
    return tokens if valid is None else torch.where(valid[:, None], tokens, 1)


def _mean_count(usable: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Valid rows per rank: with it the mean of the ranks' losses is the loss of the whole batch."""
    count = usable.sum().to(torch.float32)
    return count if group is None else reduce_sum(count, group) / dist.get_world_size(group)

"""Features turned into their own principal directions, where a logistic regression is the same but easy to solve.

Moving the origin moves the intercepts only, and a rotation changes neither scores nor the length of the weights: the
problem has the same solution, its directions are uncorrelated, and those in which no image differs can be left out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 8192
# A standard deviation below this share of the mean is the rounding error of a constant float32 feature.
_CONSTANT = 1e-7


@dataclass(frozen=True)
class Basis:
    """mean: float64 [D], divisor: float64 [D] of the standard deviations (ones, if not standardised), rotation:
    float64 [D, R]. `unit` vectors are divided by their length before all else."""

    mean: Tensor
    divisor: Tensor
    rotation: Tensor
    unit: bool

    def apply(self, features: np.ndarray, *, dtype: torch.dtype) -> Tensor:
        """Features [n, D] in this basis and a last column of ones, [n, R + 1] on the basis's device."""
        found = torch.ones(len(features), self.rotation.shape[1] + 1, dtype=dtype, device=self.mean.device)
        for start in range(0, len(features), _BLOCK):
            rows = _rows(features, start, self.mean.device, self.unit)
            # Rounded only after the rotation: a direction of little spread would drown in the errors of a large one.
            found[start : start + _BLOCK, :-1] = ((rows - self.mean) / self.divisor @ self.rotation).to(dtype)
        return found

    def weights(self, found: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients float64 [K, D] and intercepts [K] for the features themselves, of weights [R + 1, K]."""
        slopes = self.rotation @ found[:-1].double() / self.divisor[:, None]
        return slopes.T.cpu().numpy(), (found[-1].double() - self.mean @ slopes).cpu().numpy()


def make_basis(features: np.ndarray, *, scaling: str, device: torch.device) -> Basis:
    """The principal directions of features [n, D], float32.

    scaling: `none`, `unit` (vectors of length 1), or `standard` (every feature with variance 1; a constant one is left
    as it is). Unlike a rotation, the last two change what the penalty means.
    """
    unit = scaling == "unit"
    dim = features.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    for start in range(0, len(features), _BLOCK):
        total += _rows(features, start, device, unit).sum(0)
    mean = total / len(features)
    products = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for start in range(0, len(features), _BLOCK):
        rows = _rows(features, start, device, unit) - mean
        products.addmm_(rows.T, rows)
    divisor = torch.ones_like(mean)
    if scaling == "standard":
        spread = (products.diagonal() / len(features)).sqrt()
        divisor = torch.where(spread > _CONSTANT * mean.abs(), spread, divisor)
        products = products / divisor / divisor[:, None]
    _, directions = torch.linalg.eigh(products)
    # n images span n directions at most; these are ascending.
    return Basis(mean, divisor, directions[:, -min(dim, len(features)) :].contiguous(), unit)


def _rows(features: np.ndarray, start: int, device: torch.device, unit: bool) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(features[start : start + _BLOCK])).to(device).double()
    return torch.nn.functional.normalize(rows, dim=1) if unit else rows

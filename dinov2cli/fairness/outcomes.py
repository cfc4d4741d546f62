"""What is measured of every image, to be told apart by groups: right or wrong, a label given or not, a precision."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Better = Literal["high", "low", "neither"]


@dataclass(frozen=True)
class Outcome:
    """One number within 0..1 of every image, mostly 0 or 1; its mean over a group is the group's rate.

    values: float64 [n]; counted: bool [n], the images that have a say. better: whether a high rate is good, a low one,
    or neither. axis: where it is measured on the axis of this name only. expected: float64 [n], what chance gives.
    Raises ValueError for arrays of other shapes and for counted values outside 0..1.
    """

    metric: str
    values: npt.NDArray[np.float64]
    counted: npt.NDArray[np.bool_]
    better: Better = "high"
    axis: str | None = None
    expected: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        shapes = {one.shape for one in (self.values, self.counted, self.expected) if one is not None}
        if len(shapes) != 1 or self.values.ndim != 1:
            raise ValueError(f"{self.metric}: one number for each image is needed, got arrays of shapes {shapes}")
        said = self.values[self.counted]
        if not ((said >= 0) & (said <= 1)).all():
            raise ValueError(f"{self.metric}: values must lie within 0..1, got {said.min()} to {said.max()}")

    @property
    def binary(self) -> bool:
        """Whether it is a matter of yes and no."""
        return bool(np.isin(self.values[self.counted], (0.0, 1.0)).all())

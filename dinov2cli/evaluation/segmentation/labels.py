"""Class numbers of masks: what is ignored, which numbers exist, and the colours in which reports show them."""

import colorsys
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from dinov2cli.data.dense import Target
from dinov2cli.errors import InputError

IGNORED = -1
"""Class number of pixels that neither train nor count."""

MAX_CLASSES = 4096
"""More are instance numbers or colours taken for classes."""

_WRONG = -2
_GREY = (128, 128, 128)
Classes = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Labelling:
    """What the numbers in mask files mean.

    ignore: numbers, as stored, of pixels that do not count. reduce_zero_label: 0 is no class and is ignored, 1 becomes
    class 0 (ADE20K). classes: how many there are; None: not known yet, any number below MAX_CLASSES will do.
    """

    ignore: tuple[int, ...] = (255,)
    reduce_zero_label: bool = False
    classes: int | None = None

    def read(self, target: Target, name: str) -> Classes:
        """Classes int16 [H, W], IGNORED where a pixel does not count. Raises InputError for a number out of range."""
        if target.dtype.kind == "f":
            values = target.astype(np.float64)
            if not np.array_equal(values, np.round(values)):  # NaN equals nothing
                raise InputError(f"{name}: its mask holds fractions or NaN, expected whole class numbers")
            target = values.clip(-(2**40), 2**40).astype(np.int64)
        if target.dtype in (np.uint8, np.uint16):
            found: Classes = _table(self, 256**target.dtype.itemsize)[target]
        else:
            stored, where = np.unique(target, return_inverse=True)
            found = self._numbers(stored.astype(np.int64))[where].reshape(target.shape)
        if (found == _WRONG).any():
            raise InputError(self._complaint(int(target[found == _WRONG][0]), name))
        return found

    def _numbers(self, stored: npt.NDArray[np.int64]) -> Classes:
        numbers = stored - 1 if self.reduce_zero_label else stored
        fits = (numbers >= 0) & (numbers < (self.classes or MAX_CLASSES))
        ignored = np.isin(stored, self.ignore) | (self.reduce_zero_label & (stored == 0))
        return np.where(ignored, IGNORED, np.where(fits, numbers, _WRONG)).astype(np.int16)

    def _complaint(self, value: int, name: str) -> str:
        first, number = int(self.reduce_zero_label), self.classes or MAX_CLASSES
        ignored = ", ".join(map(str, self.ignore)) or "none"
        of = f"of the {number} classes" if self.classes else "(more would be instances or colours, not classes)"
        return (
            f"{name}: its mask holds {value}, expected {first} to {first + number - 1} {of} or an ignored number "
            f"({ignored}); repair it, or --set ignore / classes"
        )


@cache
def _table(labelling: Labelling, size: int) -> Classes:
    return labelling._numbers(np.arange(size))


def coloured(classes: Classes) -> npt.NDArray[np.uint8]:
    """A picture [H, W, 3] of classes [H, W], always in the same colours; ignored pixels are grey."""
    return _palette(int(max(classes.max(initial=0), 0)) + 1)[classes]  # IGNORED, -1, is the last row


@cache
def _palette(number: int) -> npt.NDArray[np.uint8]:
    """Colours [number + 1, 3], grey last. Hues go round by the golden section, so that neighbours differ."""
    turn = (5**0.5 - 1) / 2
    colours = [
        colorsys.hsv_to_rgb(index * turn % 1, (0.85, 0.55, 0.7)[index % 3], (0.95, 0.75, 0.5)[index // 3 % 3])
        for index in range(number)
    ]
    return np.array([*(np.array(colours) * 255).round(), _GREY], dtype=np.uint8)

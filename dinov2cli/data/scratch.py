"""Memory that serves image after image."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 64 << 20
"""What one image needs beyond this is given back after it."""


class Scratch:
    """Memory that is used again: fresh memory costs a page fault per 4 KiB, often more than the work done in it.

    What one huge image needs is not kept.
    """

    def __init__(self) -> None:
        import torch  # here, for hashing a folder of images needs none of it

        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, *shape: int) -> "Tensor":
        """uint8 of this shape; what was taken before is overwritten."""
        import torch

        number = math.prod(shape)
        if number > KEPT_BYTES:
            return torch.empty(shape, dtype=torch.uint8)
        if self._bytes.numel() < number:
            self._bytes = torch.empty(number + number // 4, dtype=torch.uint8)
        return self._bytes[:number].view(shape)

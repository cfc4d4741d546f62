"""Real photographs for the tests of corruptions."""

from functools import lru_cache

import numpy as np
import skimage.data
import torch

from dinov2cli.data.decode import resize_center_crop

torch.set_num_threads(1)


@lru_cache
def photos(side: int) -> tuple[np.ndarray, ...]:
    """Four photographs, uint8 [side, side, 3] each."""
    found = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.cat())
    return tuple(
        np.ascontiguousarray(resize_center_crop(np.ascontiguousarray(photo), side, side).numpy().transpose(1, 2, 0))
        for photo in found
    )

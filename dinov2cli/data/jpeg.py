"""JPEG pixels through libjpeg-turbo's own interface, where the optional package simplejpeg is installed.

The same library as Pillow's with the same settings, so the same pixels bit for bit; what is saved is Pillow's own
storage and the copies out of it: a third of the time of a small image, half of a large one's.
"""

import os
from functools import cache
from typing import Any

import numpy as np

_FORMATS = ("JPEG", "MPO")  # MPO: what cameras write when they add a second picture behind the first
_MODES = ("RGB", "L")


@cache
def turbo() -> Any | None:
    """The module simplejpeg, or None where it is not installed or DINOV2_JPEG=pillow says not to use it."""
    if os.environ.get("DINOV2_JPEG", "auto") == "pillow":
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def turbo_pixels(
    data: bytes, form: str | None, mode: str, size: tuple[int, int], shrink: int = 1, room: Any = None
) -> np.ndarray | None:
    """Pixels of a JPEG file as stored, uint8 [H, W, 3], or None where Pillow should be asked instead.

    Args:
        data: the whole file.
        form, mode, size: what Pillow found in its header; size is (width, height).
        shrink: 1, 2, 4 or 8: decode to sides divided by it, rounded up, in the DCT domain.
        room: gives memory of so many bytes to write into; without, it is new.
    """
    module = turbo()
    if module is None or form not in _FORMATS or mode not in _MODES:
        return None
    width, height = (-(-side // shrink) for side in size)
    least = {"min_height": height, "min_width": width} if shrink > 1 else {}
    try:
        buffer = None if room is None else room(size[0] * size[1] * 3)
        pixels = module.decode_jpeg(data, colorspace="RGB", buffer=buffer, **least)
    except ValueError:  # anything unusual, damage too: Pillow decides what is a picture and says what is wrong
        return None
    return pixels if pixels.shape == (height, width, 3) else None

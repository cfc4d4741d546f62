"""Colour operations on batches of images, float32 [n, 3, H, W] in 0..255, with one factor per image.

Every operation rounds once per element, or sums whole numbers, so that an image's result does not depend, to the bit,
on the batch it is in; see `data/augment.py`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.errors import UserError

BLUR_KERNEL = 9
_LEAST_CHROMA = 1e-30
"""Stands in for a chroma of zero, where the numerator is zero too."""
LUMA = (19595, 38470, 7471)
"""ITU-R 601-2 luma in 1/65536, as Pillow's convert("L")."""


def grayscale(x: Tensor) -> Tensor:
    """Grey value of float [n, 3, H, W] in 0..255, rounded to whole levels: [n, 1, H, W]."""
    red, green, blue = (x[:, channel : channel + 1] * (weight / 65536) for channel, weight in enumerate(LUMA))
    return red.add_(green).add_(blue).add_(0.5).floor_()


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend float [n, 3, H, W] in 0..255 with black: 0 gives black, 1 the image."""
    return (x * _column(factor)).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey level, rounded as in Pillow: 0 gives that grey, 1 the image."""
    levels = grayscale(x).to(torch.int32)  # whole numbers: their sum does not depend on its order
    pixels = levels.shape[2] * levels.shape[3]
    total = levels.sum(dim=(1, 2, 3), dtype=torch.int64)
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor").to(x.dtype)
    return _blend(x, _column(mean), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's grey values: 0 gives the grey image, 1 the image."""
    return _blend(x, grayscale(x), factor)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of float [n, 3, H, W] in 0..255 by `turns` (1 = full circle); value and saturation stay."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Which channel is the largest, as factors of 0 and 1 (`torch.where` takes twenty times as long on a CPU). Where two
    # are, it does not matter which of their sectors counts.
    is_red, is_green = _is(value, red), _is(value, green)
    is_green.mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    hue = (green - blue).mul_(is_red).add_((blue - red).mul_(is_green)).add_((red - green).mul_(is_blue))
    hue.div_(chroma.clamp_min(_LEAST_CHROMA)).add_(is_green.mul_(2)).add_(is_blue.mul_(4))  # in sixths of the circle
    hue.add_((turns * 6)[:, None, None])
    out = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        # distance round the circle from this channel's darkest hue: 0..4 rises and falls, above 4 is 0
        k = hue + offset
        k.sub_((k * (1 / 6)).floor_().mul_(6))
        share = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.sub(value, share.mul_(chroma), out=out[:, channel])
    return out.clamp_(0, 255)


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Invert all values of at least `threshold`, of 0..255."""
    bright = torch.empty_like(x)
    torch.ge(x, threshold, out=bright)
    return (255 - x).mul_(bright).add_((1 - bright).mul_(x))


def _is(x: Tensor, other: Tensor) -> Tensor:
    """1 where two tensors are equal, else 0, in their own type."""
    return torch.eq(x, other, out=torch.empty_like(x))


def blur_weights(sigma: np.ndarray) -> np.ndarray:
    """Half of a Gaussian kernel of 9 taps for each sigma [n]: float32 [n, 5], centre last; both halves sum to one."""
    distance = np.arange(BLUR_KERNEL // 2, -1, -1)
    weights = np.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return (weights / (2 * weights.sum(1) - weights[:, -1])[:, None]).astype(np.float32)


def gaussian_blur(x: Tensor, weights: Tensor) -> Tensor:
    """Blur float [n, 3, H, W] along both axes with `blur_weights` [n, 5], reflecting at the borders.

    Written as shifted sums: a grouped convolution may choose its algorithm, and so its rounding, by the batch's shape.
    Raises UserError for images of less than 5 pixels, which cannot be reflected by 4.
    """
    reach = BLUR_KERNEL // 2
    if min(x.shape[-2:]) <= reach:
        raise UserError(
            f"crops of {x.shape[-2]}x{x.shape[-1]} pixels cannot be blurred, expected at least {reach + 1} pixels; "
            "raise crops.local_size and crops.global_size"
        )
    for dim, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        size = x.shape[dim]
        padded = F.pad(x, padding, mode="reflect")
        total = padded.narrow(dim, reach, size) * _column(weights[:, reach])
        pair = torch.empty_like(total)
        for tap in range(reach):
            torch.add(padded.narrow(dim, tap, size), padded.narrow(dim, BLUR_KERNEL - 1 - tap, size), out=pair)
            total.add_(pair.mul_(_column(weights[:, tap])))
        x = total
    return x


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x - other).mul_(_column(factor)).add_(other).clamp_(0, 255)


def _column(values: Tensor) -> Tensor:
    """[n] as [n, 1, 1, 1]."""
    return values[:, None, None, None]

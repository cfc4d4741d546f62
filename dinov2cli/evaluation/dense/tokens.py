"""Patch tokens of whole images as maps, and how images of any size are shown to a frozen model.

What segmentation and depth share, before any head. Images are padded on all sides to multiples of the patch (zeros
after normalisation, the odd pixel right and below, as the released code pads); predictions are made for the padded
image and the padding is then cut away, so that every pixel keeps its place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.data.dense import fitted_size, resize_image
from dinov2cli.device import autocast
from dinov2cli.errors import UserError
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.vit import VisionTransformer

Tokens: TypeAlias = VisionTransformer | Encoder
Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part of [..., H, W] inside."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Sight:
    """How an image of any size is shown to a model.

    shorter: pixels that its shorter side is brought to, aspect kept (None: as it is), the longer one at most `longest`.
    window, stride: side and step in pixels of the windows that go through the model one by one; an image, or a side
    of it, that is smaller than the window goes as it is. scale: a further factor on the size (tests at several).
    """

    shorter: int | None
    window: int
    stride: int
    longest: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.window:
            raise UserError(
                f"stride {self.stride}: expected 1 to {self.window}, the side of a window, else pixels go unseen"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which an image of that size is seen."""
        if self.shorter is not None:
            height, width = fitted_size(height, width, self.shorter, self.longest)
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def resized(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] at that size."""
        return resize_image(image, *self.size(int(image.shape[1]), int(image.shape[2])))

    def windows(self, height: int, width: int) -> list[Window]:
        """The windows of a resized image, row by row, all of one size; the last of a row is moved back inside."""
        high, wide = min(self.window, height), min(self.window, width)
        return [
            Window(top, left, high, wide)
            for top in _starts(height, high, self.stride)
            for left in _starts(width, wide, self.stride)
        ]


def _starts(length: int, window: int, stride: int) -> list[int]:
    number = -(-(length - window) // stride) + 1
    return [min(step * stride, length - window) for step in range(number)]


def padding(height: int, width: int, patch_size: int) -> tuple[int, int, int, int]:
    """Pixels to add (left, right, top, bottom) so that both sides are multiples of the patch."""
    wide, high = -width % patch_size, -height % patch_size
    return wide // 2, wide - wide // 2, high // 2, high - high // 2


@dataclass(frozen=True)
class TokenMaps:
    """maps: [B, L * D, h, w] of L blocks, first block first; cls: [B, L * D], their class tokens in the same order."""

    maps: Tensor
    cls: Tensor


def last_blocks(encoder: Tokens, number: int) -> list[int]:
    """The last `number` blocks, or all of a model with fewer."""
    return list(range(max(0, encoder.depth - number), encoder.depth))


def tokens_of(
    encoder: Tokens, images: Tensor, blocks: Sequence[int], *, precision: str = "fp32", norm: bool = True
) -> TokenMaps:
    """Patch tokens of normalised images [B, 3, H, W] after the named blocks (and, with `norm`, the final norm).

    Sides need not be multiples of the patch, see `padding`: h = ceil(H / patch). Float32, on the images' device.
    """
    size = encoder.patch_size
    padded = F.pad(images, padding(images.shape[2], images.shape[3], size))
    rows, columns = padded.shape[2] // size, padded.shape[3] // size
    with torch.no_grad(), autocast(images.device, precision):
        seen = encoder.intermediate(padded, list(blocks), norm=norm)
    maps = [patches.float().transpose(1, 2).unflatten(2, (rows, columns)) for patches, _ in seen]
    return TokenMaps(torch.cat(maps, dim=1), torch.cat([cls.float() for _, cls in seen], dim=1))


def token_maps(
    encoder: Tokens, images: Tensor, blocks: Sequence[int], *, precision: str = "fp32", norm: bool = True
) -> Tensor:
    """`tokens_of` without the class tokens: [B, len(blocks) * D, h, w]."""
    return tokens_of(encoder, images, blocks, precision=precision, norm=norm).maps


def upsampled(maps: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Maps [B, K, h, w], a value per patch, as [B, K, height, width]: bilinear over the padded image, padding cut."""
    left, right, top, bottom = padding(height, width, patch_size)
    full = F.interpolate(maps, (height + top + bottom, width + left + right), mode="bilinear", align_corners=False)
    return full[..., top : top + height, left : left + width]


def sampled(maps: Tensor, height: int, width: int, patch_size: int, step: int) -> Tensor:
    """Every `step`-th row and column of `upsampled`, beginning at step // 2, without computing the others.

    Float32 [B, K, ceil((height - step // 2) / step), likewise]: bilinear weights are two small matrices.
    """
    left, right, top, bottom = padding(height, width, patch_size)
    tall = _weights(maps.shape[2], height + top + bottom, range(top + step // 2, top + height, step))
    wide = _weights(maps.shape[3], width + left + right, range(left + step // 2, left + width, step))
    return tall.to(maps) @ (maps @ wide.T.to(maps))


def _weights(cells: int, pixels: int, chosen: range) -> Tensor:
    """Weight of every cell for the chosen ones of `pixels` that lie over them, float32 [len(chosen), cells]."""
    at = ((torch.tensor(chosen, dtype=torch.float64) + 0.5) * (cells / pixels) - 0.5).clamp(0, cells - 1)
    low = at.floor().long().clamp(max=max(cells - 2, 0))
    share = (at - low).float()[:, None]
    high = (low + 1).clamp(max=cells - 1)
    one = F.one_hot(low, cells).float() * (1 - share)
    return one + F.one_hot(high, cells).float() * share


def seen_windows(
    encoder: Tokens,
    images: Sequence[Tensor],
    sight: Sight,
    blocks: Sequence[int],
    *,
    normalize: Normalize,
    device: torch.device,
    batch_size: int,
    precision: str,
    norm: bool = True,
) -> list[TokenMaps]:
    """For each of several resized images (uint8 [3, H, W]) the tokens of its windows; maps [windows, L * D, h, w].

    Windows of one size go through the model together, of whatever images, `batch_size` at a time.
    """
    places = [(number, window) for number, image in enumerate(images) for window in sight.windows(*image.shape[1:])]
    found: list[list[TokenMaps]] = [[] for _ in images]
    for batch in _of_one_size(places, batch_size):
        pixels = torch.stack([window.of(images[number]) for number, window in batch]).to(device)
        tokens = tokens_of(encoder, normalize(pixels), blocks, precision=precision, norm=norm)
        for index, (number, _) in enumerate(batch):
            found[number].append(TokenMaps(tokens.maps[index : index + 1], tokens.cls[index : index + 1]))
    return [
        TokenMaps(torch.cat([part.maps for part in parts]), torch.cat([part.cls for part in parts])) for parts in found
    ]


def _of_one_size(places: Sequence[tuple[int, Window]], batch_size: int) -> Iterator[Sequence[tuple[int, Window]]]:
    by_size: dict[tuple[int, int], list[tuple[int, Window]]] = {}
    for place in places:
        by_size.setdefault((place[1].height, place[1].width), []).append(place)
    for alike in by_size.values():
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def slide(
    answers: Callable[[Sequence[Window]], Tensor], size: tuple[int, int], sight: Sight, *, batch_size: int
) -> Tensor:
    """Answers for a whole image [K, H, W], averaged where windows overlap.

    answers(windows) gives [n, K, window height, window width] for up to `batch_size` windows.
    """
    windows = sight.windows(*size)
    total, count = None, None
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        for window, answer in zip(some, answers(some), strict=True):
            if total is None or count is None:
                total, count = answer.new_zeros((len(answer), *size)), answer.new_zeros(size)
            window.of(total).add_(answer)
            window.of(count).add_(1)
    assert total is not None and count is not None
    return total / count

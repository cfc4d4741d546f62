"""Colour augmentation of uint8 crops, batched on the device: jitter, grayscale, blur, solarise, normalise.

What happens to a crop depends on its pixels and on (seed, epoch, sample, crop number) only, bit for bit: never on
the batch around it, nor on worker, rank or chunk. Two things make it so:

- parameters come from a counter-based hash of those four numbers, computed for a whole batch at once on the host;
- on the device every step is a plain elementwise operation that rounds once, or a sum of whole numbers. Nothing whose
  result may depend on the batch's shape (convolution, matrix product, float reduction, fused multiply-add) is used.

Values stay in 0..255 between the steps and follow Pillow, on which the released augmentation runs: rounded grey values,
contrast around the rounded mean grey, clamping after each operation. They are not truncated to whole levels in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blur_weights,
    gaussian_blur,
    grayscale,
    shift_hue,
    solarize,
)
from dinov2cli.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Blur = Literal["nominal", "released"]
BLUR_RATES: dict[str, tuple[float, float, float]] = {"nominal": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5)}
"""Share of blurred crops among global-1, global-2 and local. The authors' code asks for the nominal rates but blurs
with probability 1 - p, so the published weights were trained at the complementary, "released", rates."""

CHUNK_ELEMENTS = 1 << 19
"""Values worked on at a time on a CPU, where scratch memory should stay in cache; GPUs take the batch whole."""

_DRAWS = 13
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Parameters:
    """What will be done to each of n crops. Host arrays of length n (order: [n, 4])."""

    jitter: np.ndarray  # bool: colour jitter applied
    brightness: np.ndarray  # factors, float32
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # shift in turns, float32
    order: np.ndarray  # int64 [n, 4]: operations 0-3 (brightness, contrast, saturation, hue) in order of application
    gray: np.ndarray  # bool
    blur: np.ndarray  # bool
    sigma: np.ndarray  # blur radius in pixels, float64
    solarize: np.ndarray  # bool

    def slice(self, start: int, stop: int) -> "Parameters":
        """Parameters of crops `start` to `stop`."""
        return Parameters(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


def uniforms(seed: int, epoch: np.ndarray, sample: np.ndarray, crop: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that belong to (seed, epoch, sample, crop): float64 [n, draws].

    The four numbers are absorbed one by one through the finaliser of SplitMix64 (Steele, Lea, Flood 2014), whose
    output stream, started there, gives the draws.
    """
    state: np.ndarray = np.full(len(sample), seed & ((1 << 64) - 1), dtype=np.uint64)
    for word in (epoch, sample, crop):
        state = np.bitwise_xor(_mix(state + _GOLDEN), np.asarray(word).astype(np.int64).view(np.uint64))
    steps = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(_mix(state)[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Augment:
    """DINOv2's colour augmentation (arXiv 2304.07193, appendix; after BYOL) for a batch of multi-crops.

    `jitter` are the strengths of brightness, contrast, saturation (factors in 1 - a .. 1 + a) and hue (shift in -a .. a
    turns); `blur` picks the rates of `BLUR_RATES`; `blur_sigma` is the range of radii in pixels; solarising concerns
    global-2 only. Raises UserError for values out of range.
    """

    def __init__(
        self,
        *,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_probability: float = 0.8,
        gray_probability: float = 0.2,
        blur: Blur = "nominal",
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize_probability: float = 0.2,
        solarize_threshold: float = 128.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if blur not in BLUR_RATES:
            raise UserError(f"blur: {blur!r} found, expected 'nominal' or 'released'; correct this key")
        for name, probability in (
            ("jitter_probability", jitter_probability),
            ("gray_probability", gray_probability),
            ("solarize_probability", solarize_probability),
        ):
            if not 0 <= probability <= 1:
                raise UserError(f"{name}: {probability} found, expected a number from 0 to 1; correct this key")
        if min(jitter) < 0 or jitter[3] > 0.5:
            raise UserError(
                f"jitter: {tuple(jitter)} found, expected four numbers of at least 0, hue at most 0.5; correct this key"
            )
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise UserError(f"blur_sigma: {tuple(blur_sigma)} found, expected 0 < low <= high; correct this key")
        self.jitter = jitter
        self.jitter_probability = jitter_probability
        self.gray_probability = gray_probability
        self.blur_rates = np.array(BLUR_RATES[blur])
        self.blur_sigma = blur_sigma
        self.solarize_probability = solarize_probability
        self.solarize_threshold = solarize_threshold
        # (x / 255 - mean) / std as x * scale + shift
        self._scale = [1 / (255 * s) for s in std]
        self._shift = [-m / s for m, s in zip(mean, std, strict=True)]

    def __call__(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        *,
        seed: int,
        epoch: Tensor | np.ndarray,
        sample: Tensor | np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Augment uint8 [2, B, 3, S, S] and [L, B, 3, s, s] on their device: normalised float32 of the same shapes.

        `epoch` and `sample` (int64 [B], on the host) name each image, as the loader gives them.
        """
        out, first = [], 0
        for crops in (global_crops, local_crops):
            number, batch = crops.shape[:2]
            crop = np.repeat(np.arange(first, first + number), batch)
            parameters = self.parameters(
                seed, np.tile(np.asarray(epoch), number), np.tile(np.asarray(sample), number), crop
            )
            out.append(self.apply(crops.flatten(0, 1), parameters).view(crops.shape))
            first += number
        return out[0], out[1]

    def parameters(self, seed: int, epoch: np.ndarray, sample: np.ndarray, crop: np.ndarray) -> Parameters:
        """Draw the parameters of n crops, each named by epoch, sample and crop number (0, 1 global; 2 and on local)."""
        u = uniforms(seed, epoch, sample, crop, _DRAWS)
        view = np.minimum(crop, 2)

        def factor(column: int, strength: float) -> np.ndarray:
            low = max(0.0, 1 - strength)
            return (low + u[:, column] * (1 + strength - low)).astype(np.float32)

        return Parameters(
            jitter=u[:, 0] < self.jitter_probability,
            brightness=factor(1, self.jitter[0]),
            contrast=factor(2, self.jitter[1]),
            saturation=factor(3, self.jitter[2]),
            hue=((2 * u[:, 4] - 1) * self.jitter[3]).astype(np.float32),
            order=np.argsort(u[:, 5:9], axis=1, kind="stable"),
            gray=u[:, 9] < self.gray_probability,
            blur=u[:, 10] < self.blur_rates[view],
            sigma=self.blur_sigma[0] + u[:, 11] * (self.blur_sigma[1] - self.blur_sigma[0]),
            solarize=(u[:, 12] < self.solarize_probability) & (crop == 1),
        )

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Apply drawn parameters to uint8 [n, 3, S, S]: normalised float32 [n, 3, S, S] on the same device."""
        out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        number = len(images)
        step = number if images.is_cuda else max(1, CHUNK_ELEMENTS // max(1, images[:1].numel()))
        for start in range(0, number, max(1, step)):
            stop = min(start + step, number)
            chunk = out[start:stop].copy_(images[start:stop])
            self._apply_chunk(chunk, parameters.slice(start, stop))
        return out

    def _apply_chunk(self, x: Tensor, p: Parameters) -> None:
        """All steps, in place on float32 [n, 3, S, S] in 0..255."""
        operations: list[tuple[Callable[[Tensor, Tensor], Tensor], np.ndarray]] = [
            (adjust_brightness, p.brightness),
            (adjust_contrast, p.contrast),
            (adjust_saturation, p.saturation),
            (shift_hue, p.hue),
        ]
        for position in range(4):
            for number, (operation, factors) in enumerate(operations):
                self._on(x, p.jitter & (p.order[:, position] == number), operation, factors)
        self._on(x, p.gray, lambda rows, _: grayscale(rows).expand_as(rows))
        self._on(x, p.blur, gaussian_blur, blur_weights(p.sigma))
        self._on(x, p.solarize, lambda rows, _: solarize(rows, self.solarize_threshold))
        for channel in range(3):
            x[:, channel].mul_(self._scale[channel]).add_(self._shift[channel])

    @staticmethod
    def _on(
        x: Tensor, chosen: np.ndarray, operation: Callable[[Tensor, Tensor], Tensor], factors: np.ndarray | None = None
    ) -> None:
        """Replace the chosen images of `x` by `operation(images, their factors)`."""
        rows = np.flatnonzero(chosen)
        if len(rows) == 0:
            return
        values = torch.from_numpy((chosen if factors is None else factors)[rows])
        if x.is_cuda:
            index = torch.from_numpy(rows).to(x.device, non_blocking=True)
            picked, values = x.index_select(0, index), values.to(x.device, non_blocking=True)
            x.index_copy_(0, index, operation(picked, values))
            return
        # On a CPU a chunk is a few images: views and plain copies of them take a third of the time of indexing.
        picked = x[rows[0] : rows[0] + 1] if len(rows) == 1 else x.index_select(0, torch.from_numpy(rows))
        for row, image in zip(rows.tolist(), operation(picked, values), strict=True):
            x[row].copy_(image)

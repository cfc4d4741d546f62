"""The all-Pillow pipeline that the input path is measured against: one image, one operation after another.

What a training script without a tensor pipeline does, with the boxes, flips and colour parameters that ours draws, so
that both make the same crops (the tests compare them) and only the speed differs.
"""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinov2cli.data.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, Parameters
from dinov2cli.data.crops import Cut, MultiCrop

_MEAN, _STD = (np.array(values, dtype=np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def pillow_crops(data: bytes, crop: MultiCrop, *, seed: int, epoch: int, sample: int) -> list[Image.Image]:
    """Decode and cut one image: two global crops, then the local ones."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    cuts = crop.draw(image.height, image.width, seed, epoch, sample)
    return [_cut(image, cut, crop.global_size if i < 2 else crop.local_size) for i, cut in enumerate(cuts)]


def pillow_sample(
    data: bytes, crop: MultiCrop, augment: Augment, *, seed: int, epoch: int, sample: int
) -> list[np.ndarray]:
    """All of it for one image: normalised float32 [3, size, size] for each crop, two global ones first."""
    crops = pillow_crops(data, crop, seed=seed, epoch=epoch, sample=sample)
    number = len(crops)
    names = np.full(number, epoch), np.full(number, sample), np.arange(number)
    parameters = augment.parameters(seed, *names)
    return [normalised(colour(image, parameters, i)) for i, image in enumerate(crops)]


def _cut(image: Image.Image, cut: Cut, size: int) -> Image.Image:
    top, left, height, width = cut.box
    box = (left, top, left + width, top + height)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(crop) if cut.flip else crop


def colour(image: Image.Image, parameters: Parameters, row: int) -> Image.Image:
    """The colour operations drawn for one crop, in their order."""
    if parameters.jitter[row]:
        for operation in parameters.order[row]:
            if operation == 3:
                image = _turn_hue(image, float(parameters.hue[row]))
            else:
                enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
                factors = (parameters.brightness, parameters.contrast, parameters.saturation)[operation]
                image = enhancer(image).enhance(float(factors[row]))
    if parameters.gray[row]:
        image = ImageOps.grayscale(image).convert("RGB")
    if parameters.blur[row]:
        image = image.filter(ImageFilter.GaussianBlur(float(parameters.sigma[row])))
    return ImageOps.solarize(image, 128) if parameters.solarize[row] else image


def normalised(image: Image.Image) -> np.ndarray:
    """float32 [3, H, W] with ImageNet's mean and deviation taken out."""
    planes = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
    return (planes / 255 - _MEAN) / _STD


def _turn_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = Image.fromarray(np.asarray(hue) + np.uint8(int(turns * 255) % 256))
    return Image.merge("HSV", (shifted, saturation, value)).convert("RGB")

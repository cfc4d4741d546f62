"""What a backbone expects of its images: resize, centre crop, mean and standard deviation."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.vit import patch_advice

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Interpolations by Pillow's numbers, which preprocessor_config.json stores."""


@dataclass(frozen=True)
class Preprocess:
    """Shorter side to `resize` pixels by `interpolation`, centre crop of `crop` pixels, then (x / 255 - mean) / std.

    With `square` both sides are brought to `resize` pixels instead, whatever the aspect; nothing is cut off where
    `crop` is the same.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    square: bool = False

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 crops [B, C, h, w] to the float32 the backbone takes, on the same device."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std

    def with_crop(self, crop: int, patch_size: int) -> "Preprocess":
        """The same with another crop, the resize following in proportion. UserError if the patch does not divide it."""
        if crop < patch_size or crop % patch_size:
            raise UserError(f"image size {crop} {patch_advice(crop, patch_size)}")
        return self.scaled(crop)

    def scaled(self, crop: int) -> "Preprocess":
        """The same with a crop of so many pixels, the resize following in proportion."""
        return replace(self, crop=crop, resize=max(crop, round(self.resize * crop / self.crop)))

    def fitted(self, patch_size: int) -> "Preprocess":
        """The same with the crop rounded down to a multiple of the patch, for stored sizes nobody chose."""
        return replace(self, crop=max(self.crop // patch_size, 1) * patch_size)


def default_preprocess(img_size: int, patch_size: int) -> Preprocess:
    """Resize 256, crop 224 and ImageNet statistics; for a model trained on smaller images its own size, in proportion.

    Models trained at more than 224 pixels are also used at 224, as in the paper's evaluation.
    """
    fitted = Preprocess().fitted(patch_size)
    return fitted.with_crop(img_size, patch_size) if img_size < fitted.crop else fitted


def read_preprocess(file: Path) -> Preprocess:
    """Read a preprocessor_config.json (BitImageProcessor and its kin). Raises InputError if it cannot be understood."""
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        crop = _side(raw.get("crop_size", 224))
        resize = _side(raw.get("size", 256)) if raw.get("do_resize", True) else crop
        if not raw.get("do_center_crop", True):
            crop = resize
        normalize = raw.get("do_normalize", True)
        return Preprocess(
            resize=resize,
            crop=crop,
            mean=tuple(raw.get("image_mean", IMAGENET_MEAN)) if normalize else (0.0,) * 3,
            std=tuple(raw.get("image_std", IMAGENET_STD)) if normalize else (1.0,) * 3,
            interpolation=RESAMPLE[raw.get("resample", 3)],
            square=isinstance(raw.get("size"), dict) and "shortest_edge" not in raw["size"],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as a preprocessor ({type(error).__name__}: {error})") from None


def preprocessor_config(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessor_config.json that transformers' AutoImageProcessor reads."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize},
        "resample": {name: number for number, name in RESAMPLE.items()}[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.crop, "width": preprocess.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _side(value: Any) -> int:
    """One side in pixels out of 224, {"height": 224, "width": 224} or {"shortest_edge": 256}."""
    if isinstance(value, dict):
        return int(value["shortest_edge"] if "shortest_edge" in value else value["height"])
    return int(value[0] if isinstance(value, list) else value)

"""What a model directory of transformers expects of its images, read through transformers' own image processor."""

import contextlib
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dinov2cli.errors import InputError
from dinov2cli.models.files import read_json
from dinov2cli.models.preprocess import RESAMPLE, Preprocess

log = logging.getLogger(__name__)

_FILES = ("preprocessor_config.json", "processor_config.json")
_CONVNEXT_WARPS = 384
"""From this many pixels on ConvNeXt squeezes the whole image into the square instead of cutting its border off."""


def preprocess_of(path: Path, config: Any, native: int | None) -> Preprocess:
    """The preprocessing that `preprocessor_config.json` in `path` asks for; without one, the usual of its family at the
    model's own size.

    config: of the whole model, native: side of the images its vision part was made for, if known.
    Raises InputError for a processor that cannot be understood, as one that makes images of another shape.
    """
    stored = [path / name for name in _FILES if (path / name).is_file()]
    try:
        if stored:
            return read_processor(_stored_in(path, stored[0]))
        found = _usual(config, native)
    except Exception as error:  # whatever a class of transformers, or a strange value in the file, may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: its image processor cannot be read ({reason}); expected what AutoImageProcessor saves"
        ) from None
    log.warning("%s has no preprocessor_config.json: taken are %d px and what is usual in its family", path, found.crop)
    return found


def read_processor(processor: Any) -> Preprocess:
    """The same as an image processor of transformers does, for square results. ValueError for what it does beyond."""

    def value(name: str, default: Any) -> Any:
        found = getattr(processor, name, None)
        return default if found is None else found

    if hasattr(processor, "max_num_patches"):  # SigLIP 2 of any aspect: as many patches, in a square
        resize, square = math.isqrt(processor.max_num_patches) * int(processor.patch_size), True
    else:
        resize, square = _resized(value("size", {}))
    crop = resize
    if value("do_center_crop", False):
        crop = _resized(value("crop_size", {}))[0]
    if not value("do_resize", True):
        resize, square = crop, False
    if hasattr(processor, "crop_pct"):
        crop, square = resize, resize >= _CONVNEXT_WARPS
        resize = resize if square else int(resize / processor.crop_pct)
    if crop > resize:
        raise ValueError(f"crop of {crop} pixels out of {resize}")
    mean, std = _scaled(value)
    return Preprocess(resize, crop, mean, std, RESAMPLE[int(value("resample", 3))], square)


def _stored_in(path: Path, file: Path) -> Any:
    """The image processor of a directory, or its numbers where its class needs a package that is not installed."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except ImportError:
        numbers = read_json(file)
        return SimpleNamespace(**numbers.get("image_processor", numbers))


def _usual(config: Any, native: int | None) -> Preprocess:
    """What is usual in a model's family, at its own size."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    whole = config.model_type.removesuffix("_vision_model")
    kinds: list[Any] = [type(config)] + ([CONFIG_MAPPING[whole]] if whole in CONFIG_MAPPING else [])
    found = Preprocess()
    for kind in kinds:
        if kind in IMAGE_PROCESSOR_MAPPING:
            classes: Any = IMAGE_PROCESSOR_MAPPING[kind]
            made = next(c for c in (classes.values() if isinstance(classes, dict) else classes) if c is not None)
            with contextlib.suppress(ImportError):
                processor = made()
                # ConvNeXt's depends on the size in another way than in proportion.
                by_size = {"size": {"shortest_edge": native or found.crop}} if hasattr(processor, "crop_pct") else {}
                found = read_processor(made(**by_size))
                break
    return found if native is None else found.scaled(native)


def _resized(size: Any) -> tuple[int, bool]:
    """(side in pixels, whether aspect is given up) of the sizes that transformers writes."""
    sides = {key: size[key] for key in ("shortest_edge", "height", "width") if size.get(key)}
    if "shortest_edge" in sides:
        return int(sides["shortest_edge"]), False
    if sides.get("height") != sides.get("width") or not sides:
        raise ValueError(f"a square or a shortest edge is expected, found size {dict(size)}")
    return int(sides["height"]), True


def _scaled(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255 that say the same as a processor's rescaling and normalising."""
    normalize = value("do_normalize", True)
    mean = list(value("image_mean", (0.0,) * 3)) if normalize else [0.0] * 3
    std = list(value("image_std", (1.0,) * 3)) if normalize else [1.0] * 3
    factor = 255 * (float(value("rescale_factor", 1 / 255)) if value("do_rescale", True) else 1.0)
    shift = 1.0 if value("rescale_offset", False) and value("do_rescale", True) else 0.0
    if normalize and value("include_top", False):  # EfficientNet divides a second time
        std = [s * s for s in std]
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"three channels are expected, found image_mean {mean}")
    return tuple((m + shift) / factor for m in mean), tuple(s / factor for s in std)

"""Models that give one vector per image and no tokens, from files the user names: `sscd:FILE`, `onnx:FILE`.

Both take `?size=PIXELS` after the file. Images are resized to a square of that side without keeping their aspect, so
that no border is lost (a copy may hide there) and batches have one size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from dinov2cli.artifacts.output import file_sha256
from dinov2cli.errors import InputError, UserError
from dinov2cli.models.preprocess import Preprocess

SCHEMES: tuple[Literal["sscd", "onnx"], ...] = ("sscd", "onnx")
SSCD_SIZE = 320
"""Pixels of the square; the published alternative, a shorter side of 288, has no one size for a batch."""
SMALLEST = 32


class Descriptor(nn.Module):
    """A network from normalised images [B, 3, S, S] to vectors [B, embed_dim].

    `device` says where it computes. `size` is the S it was opened for.
    """

    _place: Tensor

    def __init__(self, embed_dim: int, size: int) -> None:
        super().__init__()
        self.embed_dim, self.size = embed_dim, size
        self.register_buffer("_place", torch.zeros(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the network computes: `.to` moves it."""
        return self._place.device


@dataclass(frozen=True)
class DescriptorSpec:
    """What `sscd:FILE?size=288` says, taken apart. `path` is as typed, less `~`."""

    scheme: Literal["sscd", "onnx"]
    path: Path
    size: int | None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.path}" + (f"?size={self.size}" if self.size is not None else "")


@dataclass(frozen=True)
class OpenedDescriptor:
    """A descriptor in eval mode on the CPU, and what goes with it (see `load.LoadedModel`)."""

    network: Descriptor
    name: str
    preprocess: Preprocess
    fingerprint: dict[str, Any]
    copy_detection: bool


def parse_descriptor(spec: str) -> DescriptorSpec | None:
    """Take a MODEL apart; None for one that names no descriptor. UserError for an option it does not have."""
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in SCHEMES:
        return None
    size: int | None = None
    # A question mark may be part of a file's name.
    if "?" in rest and not Path(rest).expanduser().exists():
        rest, _, options = rest.rpartition("?")
        for key, value in parse_qsl(options, keep_blank_values=True) or [(options, "")]:
            if key != "size" or not value.isdecimal() or int(value) < SMALLEST:
                found = f"{key}={value}" if value else key
                raise UserError(
                    f"model {spec!r}: found {found!r} after the question mark; expected size=PIXELS, {SMALLEST} or more"
                )
            size = int(value)
    if not rest:
        raise UserError(f"model {spec!r} names no file; expected {scheme}:FILE")
    return DescriptorSpec("sscd" if scheme == "sscd" else "onnx", Path(rest).expanduser(), size)


def canonical_descriptor(spec: str) -> str | None:
    """Return the MODEL of a descriptor with the file's path made absolute; None for a MODEL of another kind."""
    parsed = parse_descriptor(spec)
    return None if parsed is None else str(DescriptorSpec(parsed.scheme, parsed.path.resolve(), parsed.size))


def open_descriptor(spec: DescriptorSpec, *, img_size: int | None = None) -> OpenedDescriptor:
    """Open the file of a descriptor.

    `img_size` (pixels) is what `--image-size` says; else the spec's own size, else the model's.
    Only `sscd:` counts as a copy-detection model: nothing in an ONNX file says what its network was trained for.
    Raises InputError for a file that is missing or holds something else, UserError for a size that does not fit.
    """
    if not spec.path.is_file():
        found = "a directory" if spec.path.is_dir() else "nothing"
        raise InputError(f"model {str(spec)!r}: found {found} at {spec.path}; expected a file")
    if img_size is not None and spec.size not in (None, img_size):
        raise UserError(f"model {str(spec)!r}: found --image-size {img_size} beside ?size={spec.size}; give only one")
    size = img_size if img_size is not None else spec.size
    if size is not None and size < SMALLEST:
        raise UserError(f"image size {size} is too small for a descriptor: use at least {SMALLEST}")
    network = _network(spec, size)
    fingerprint = {"file": str(spec.path.resolve()), "sha256": file_sha256(spec.path), "size": network.size}
    preprocess = Preprocess(resize=network.size, crop=network.size, interpolation="bilinear", square=True)
    name = spec.path.name.split(".")[0] or spec.path.name
    return OpenedDescriptor(network.eval(), name, preprocess, fingerprint, spec.scheme == "sscd")


def _network(spec: DescriptorSpec, size: int | None) -> Descriptor:
    # Imported here: both build on the class above.
    if spec.scheme == "onnx":
        from dinov2cli.models.onnx_descriptor import OnnxDescriptor

        return OnnxDescriptor(spec.path, size=size)
    from dinov2cli.models.sscd import open_sscd

    return open_sscd(spec.path, size=SSCD_SIZE if size is None else size)


def check_vectors(vectors: object, images: int, source: Path) -> Tensor:
    """What a foreign network made of a batch of so many images, if that is one finite vector each; else InputError."""
    if isinstance(vectors, list | tuple) and len(vectors) == 1:
        vectors = vectors[0]
    found = f"shape {list(vectors.shape)}" if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != images or vectors.shape[1] == 0:
        raise InputError(f"{source}: {images} images gave {found}; expected one vector per image, [{images}, D]")
    if not torch.isfinite(vectors).all():
        raise InputError(f"{source}: the network gives NaN or infinite vectors; expected finite ones: fetch it again")
    return vectors

"""Parts of the input path timed one by one: what `bench data` compares and `doctor` judges a machine by."""

import contextlib
import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dinov2cli.data.augment import Augment
from dinov2cli.data.bad import BadImage
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.decode import Decoder, decode_image, open_image
from dinov2cli.data.scratch import Scratch
from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import DataSpec
from dinov2cli.errors import InputError
from dinov2cli.models.registry import architecture

BATCH = 32
_FULL, _LOCAL, _TINY = 224, 98, 128


@dataclass(frozen=True)
class Sample:
    """Image files of a source, and what reading one costs."""

    files: list[bytes]
    read_seconds: float
    pixels: float  # median


class InMemory(ImageSource):
    """Image files held in memory as a source."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__(DataSpec("demo", "photos"), "memory")
        self._held = files

    def __len__(self) -> int:
        return len(self._held)

    def read(self, row: int, role: str = "image") -> bytes:
        del role
        return self._held[row]

    @property
    def ids(self) -> list[str]:
        return [f"{row}" for row in range(len(self))]

    @property
    def paths(self) -> list[str]:
        return self.ids

    def content_hash(self) -> str:
        return ""


def crops_of(arch: str) -> MultiCrop:
    """The crops that a model is trained on: 224 and 98 pixels, in whole patches; 32 and 16 of the CPU's tiny one.

    Raises UserError for an unknown name.
    """
    shape = architecture(arch)
    patch = shape["patch_size"]
    if shape["embed_dim"] <= _TINY:
        return MultiCrop(max(32 // patch, 1) * patch, max(16 // patch, 1) * patch, 4)
    return MultiCrop(_FULL // patch * patch, _LOCAL // patch * patch)


def crop_bytes(crop: MultiCrop) -> int:
    """Bytes of the uint8 crops of one image."""
    return 3 * (2 * crop.global_size**2 + crop.local_number * crop.local_size**2)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as loader workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stage_times(files: list[bytes], crop: MultiCrop, seed: int, *, scaled: bool = False) -> tuple[float, float]:
    """Milliseconds per image of decoding and of cutting, as a loader's worker does them."""
    decoder, scratch = Decoder(), Scratch()
    kinds = ((2, crop.global_size), (crop.local_number, crop.local_size))
    into = [torch.empty((number, size, size, 3), dtype=torch.uint8) for number, size in kinds]
    decode = cut = 0.0
    for number, data in enumerate(files):
        started = time.perf_counter()
        opened = open_image(data, name="image")
        displayed = opened.height, opened.width
        cuts = crop.draw(*displayed, seed, 0, number)
        shrink = crop.shrink(cuts) if scaled else 1
        pixels = decoder.stored(opened, shrink)
        decoded = time.perf_counter()
        crop.cut(pixels, cuts, displayed, into, scratch, opened.orientation, shrink)
        decode, cut = decode + decoded - started, cut + time.perf_counter() - decoded
    return 1e3 * decode / len(files), 1e3 * cut / len(files)


def colour_time(crop: MultiCrop, device: torch.device, seed: int, rounds: int) -> float:
    """Milliseconds per image of colour, blur, solarise and normalise on a device."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ((2, crop.global_size), (crop.local_number, crop.local_size))
    crops = [
        torch.randint(0, 256, (number, BATCH, size, size, 3), dtype=torch.uint8, generator=generator)
        .to(device)
        .permute(0, 1, 4, 2, 3)
        for number, size in kinds
    ]
    augment, names = Augment(), np.arange(BATCH)
    best = math.inf
    for turn in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        augment(crops[0], crops[1], seed=seed, epoch=names * 0, sample=names + turn * BATCH)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 1e3 * best / BATCH


def loader_rate(loader: CropLoader, device: torch.device, seconds: float) -> tuple[float, float]:
    """(images/s, milliseconds of this process' own time per image) once the batches made ahead are used up."""
    batches = iter(loader)
    with contextlib.closing(batches):  # type: ignore[type-var]
        for _ in range(4):
            next(batches)
        count, started, own = 0, time.perf_counter(), time.thread_time()
        while (passed := time.perf_counter() - started) < seconds or count == 0:
            batch = next(batches)
            if device.type == "cuda":
                moved = [batch[name].to(device) for name in ("global_crops", "local_crops")]
                del moved
            count += BATCH
            passed = time.perf_counter() - started
        return count / passed, 1e3 * (time.thread_time() - own) / count


def sample_of(source: ImageSource, images: int, megapixels: float | None) -> Sample:
    """Files spread over the source, those that can be read; raises InputError where none can."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))).astype(int)).tolist()
    files: list[bytes] = []
    seconds = 0.0
    sizes = []
    for row in rows:
        try:
            source.read(row)  # sources that make or fetch images do so once
            started = time.perf_counter()
            data = source.read(row)
            seconds += time.perf_counter() - started
            pixels = decode_image(data, name=source.name(row))
        except BadImage:
            continue
        if megapixels is not None:
            data = _enlarged(pixels, megapixels)
        files.append(data)
        opened = open_image(data, name="image")
        sizes.append(opened.height * opened.width)
    if not files:
        raise InputError(f"{source.spec}: none of the {len(rows)} images looked at can be read; give another set")
    return Sample(files, seconds / len(files), float(np.median(sizes)))


def _enlarged(pixels_HWC: np.ndarray, megapixels: float) -> bytes:
    """The same picture as a camera's JPEG of that many megapixels."""
    height, width = pixels_HWC.shape[:2]
    scale = math.sqrt(megapixels * 1e6 / (height * width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

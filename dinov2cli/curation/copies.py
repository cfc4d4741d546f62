"""Sets of altered copies with known truth, made from real photographs: to measure duplicate removal, and to set it.

    labelled_set(originals, *, seed, kinds, others, synthetic, templates) -> Iterator[LabelledFile]
        LabelledFile: name, data (bytes of an image file), group, kind
    sampled_set(source, *, originals, others, seed, ...) -> the same from a random sample of an image source
    write_set(files, folder) -> Truth: names, groups, kinds, row by row in the order of names
    altered_file(image, kind, *, seed, template) -> bytes of one copy
    altered_copy(image, kind, *, seed, template) -> its pixels
    KINDS, DISTRACTORS: all names of kinds

Every original gives one file of kind "original" and one of each kind of edit (see `edits`), all of one group. Files
that belong to no other file, each a group of its own, are the distractors: other photographs as they are ("photo")
and inside the very pages, overlays and frames that copies were put into ("photo-screenshot", ...), pages of made-up
text that share a title ("text-page"), nearly empty pictures ("flat") and noise ("static"). What is made of a picture
depends on its pixels, the kind and the seed, not on the order or the number of pictures.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2cli.curation.edits import EDITS, TEMPLATES, Uint8, encode
from dinov2cli.curation.pages import flat, static, text_page
from dinov2cli.data.bad import BadImage
from dinov2cli.data.decode import decode_image
from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError, UserError

ORIGINAL = "original"
KINDS: tuple[str, ...] = tuple(EDITS)
_PHOTO = "photo"
_PLACED = tuple(f"{_PHOTO}-{name}" for name in TEMPLATES)
_SYNTHETIC = ("text-page", "flat", "static")
DISTRACTORS: tuple[str, ...] = (_PHOTO, *_PLACED, *_SYNTHETIC)
_TEXT_PAGES = 3
"""Text pages share one of so many titles and layouts."""

_ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}


class LabelledFile(NamedTuple):
    """name: unique file name with its ending; data: the file; group: what it belongs to; kind: how it was made."""

    name: str
    data: bytes
    group: str
    kind: str


@dataclass(frozen=True)
class Truth:
    """names, groups, kinds of the files of a written set, in the order of their names (that of `open_source`)."""

    names: list[str]
    groups: list[str]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Rows:
    """Some rows (int64 [n]) of a source of images."""

    source: ImageSource
    rows: npt.NDArray[np.int64]

    def pictures(self) -> Iterator[tuple[Uint8, bytes]]:
        """Pixels and file of each row; rows that cannot be read are left out."""
        for row in self.rows.tolist():
            try:
                file = self.source.read(row)
                yield decode_image(file, name=self.source.name(row)), file
            except BadImage:
                continue


Pictures = Iterable[Uint8] | ImageSource | Rows
"""Images [H, W, 3] uint8, a source of images, or some rows of one."""


def labelled_set(
    originals: Pictures,
    *,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    others: Pictures = (),
    synthetic: int = 10,
    templates: int = 8,
) -> Iterator[LabelledFile]:
    """Copies of every original and the distractors, one file after another, holding one picture at a time.

    Args:
        originals: images [H, W, 3] uint8, or a source, whose files are then taken as they are. Images with the same
            pixels count once; files that cannot be read are left out.
        seed: not negative.
        kinds: which edits to make.
        others: photographs that are used as distractors only, a quarter of them as they are, the rest in templates.
        synthetic: how many pages of text, flat pictures and noise to add, each.
        templates: how many different pages (overlays, frames) there are; with n originals each is used n / templates
            times, and these copies resemble one another without being copies of each other.

    Raises:
        UserError: an unknown kind, a negative seed, or templates < 1.
    """
    unknown = [kind for kind in kinds if kind not in EDITS]
    if unknown or seed < 0 or templates < 1:
        raise UserError(
            f"altered copies: found kinds {unknown or list(kinds)}, seed {seed}, templates {templates}; expected kinds "
            f"of {', '.join(KINDS)}, a seed of at least 0 and at least one template"
        )
    return _labelled(originals, seed, kinds, others, synthetic, templates)


def _labelled(
    originals: Pictures,
    seed: int,
    kinds: Sequence[str],
    others: Pictures,
    synthetic: int,
    templates: int,
) -> Iterator[LabelledFile]:
    seen: set[str] = set()
    for image, file, group in _pictures(originals, seen):
        yield _file(file, group, ORIGINAL)
        for kind in kinds:
            template = int(group, 16) % templates
            data = file if kind == "exact" else altered_file(image, kind, seed=seed, template=template)
            yield _file(data, group, kind)
    for image, file, group in _pictures(others, seen):
        role = (_PHOTO, *_PLACED)[zlib.crc32(group.encode()) % (1 + len(_PLACED))]
        if role != _PHOTO:
            kind = role.removeprefix(f"{_PHOTO}-")
            file = altered_file(image, kind, seed=seed, template=int(group, 16) % templates)
        yield _file(file, group, role)
    for number in range(synthetic):
        for kind in _SYNTHETIC:
            data = encode(_drawn(kind, number, seed), quality=90)
            yield _file(data, f"{kind}-{number:04d}", kind)


def sampled_set(
    source: ImageSource,
    *,
    originals: int = 300,
    others: int = 100,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    synthetic: int = 10,
    templates: int = 8,
) -> Iterator[LabelledFile]:
    """`labelled_set` of a random sample of a source; with too few images three quarters of them are the originals.

    Raises InputError for a source of fewer than 2 images.
    """
    if len(source) < 2:
        raise InputError(f"{source.spec}: found {len(source)} images; expected at least 2 to make copies of")
    rows = np.random.Generator(np.random.Philox(key=[seed, 0xC0B1])).permutation(len(source))
    first = min(originals, max(1, 3 * len(source) // 4))
    return labelled_set(
        Rows(source, rows[:first]),
        others=Rows(source, rows[first : first + others]),
        seed=seed,
        kinds=kinds,
        synthetic=synthetic,
        templates=templates,
    )


def write_set(files: Iterable[LabelledFile], folder: Path) -> Truth:
    """Write the files into a folder, which is made, and say what they are; `open_source(str(folder))` has their order.

    Raises FileExistsError where a name is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for file in files:
        with (folder / file.name).open("xb") as stream:
            stream.write(file.data)
        found.append((file.name, file.group, file.kind))
    found.sort()
    return Truth([name for name, _, _ in found], [group for _, group, _ in found], [kind for _, _, kind in found])


def altered_file(image: Uint8, kind: str, *, seed: int = 0, template: int | None = None) -> bytes:
    """The file of one altered copy of an image [H, W, 3]; the same for the same pixels, kind, seed and template.

    template: the number of the page, overlay or frame; None draws one for this image alone.
    """
    rng = _generator(seed, _group(image), kind)
    if kind not in TEMPLATES or template is None:
        return EDITS[kind](image, rng)
    picture = TEMPLATES[kind](Image.fromarray(image), _generator(seed, f"template {template}", kind), rng)
    return encode(picture, quality=int(rng.integers(75, 96)))


def altered_copy(image: Uint8, kind: str = "chain", *, seed: int = 0, template: int | None = None) -> Uint8:
    """The pixels [h, w, 3] of `altered_file`, as a reader sees them (EXIF orientation applied)."""
    return decode_image(altered_file(image, kind, seed=seed, template=template), name=kind)


def original_file(image: Uint8) -> bytes:
    """The file that stands for an original of which only the pixels [H, W, 3] are known: JPEG of quality 95."""
    return encode(Image.fromarray(image))


def _pictures(images: Pictures, seen: set[str]) -> Iterator[tuple[Uint8, bytes, str]]:
    """(pixels, file, group) of each picture that was not `seen` before."""
    if isinstance(images, ImageSource):
        images = Rows(images, np.arange(len(images)))
    read = images.pictures() if isinstance(images, Rows) else ((image, original_file(image)) for image in images)
    for image, file in read:
        group = _group(image)
        if group not in seen:
            seen.add(group)
            yield image, file, group


def _group(image: Uint8) -> str:
    """Twelve hex digits that stand for the pixels."""
    digest = hashlib.sha256(np.asarray(image.shape, np.int64).tobytes())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:12]


def _file(data: bytes, group: str, kind: str) -> LabelledFile:
    return LabelledFile(f"{group}-{kind}.{_ENDINGS.get(data[:2], 'img')}", data, group, kind)


def _generator(seed: int, name: str, kind: str) -> np.random.Generator:
    """A stream of its own for every picture and kind of edit."""
    words = [seed, zlib.crc32(name.encode()), len(name), zlib.crc32(kind.encode()), 0xC0B1E5]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def _drawn(kind: str, number: int, seed: int) -> Image.Image:
    rng = _generator(seed, str(number), kind)
    if kind == "text-page":
        return text_page(_generator(seed, f"template {number % _TEXT_PAGES}", kind), rng)
    return Image.fromarray((flat if kind == "flat" else static)(rng))

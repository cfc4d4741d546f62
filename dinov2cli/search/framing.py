"""Where a picture lies within an image: inside bars or a frame of one colour, or on a page with other things."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Uint8 = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are not inside."""

_TOLERANCE = 14
"""Grey levels by which a pixel may differ from the paper or the bar that it belongs to: what JPEG adds."""

_BAR_TOLERANCE = 5
"""The same for bars alone, which are of exactly one colour, unlike the plain ground of a photograph."""

_EXACT_TOLERANCE = 3
_SAME = 0.015
_POINTS = 32
_SPREAD = np.arange(_POINTS)
_PLAIN_POINTS = 0.94
_PAPER_EDGE = 0.6
_BLANK = 0.97
_RINGS = 3
_RINGING = 0.65
_KEEP = (0.2, 0.985)
_PAPER = 0.15
_FULL = 0.7
_MIN_SHARE = 0.06
_MIN_SIDE = 12
_MAX_ASPECT = 5.0
_PLAIN = 0.6
_MOST = 3
_PARTS = 2


def edges(image: Uint8) -> Uint8:
    """The outermost lines of an image [H, W, 3], 32 points of each: top, bottom, left, right, [4, 32, 3]."""
    height, width = image.shape[:2]
    x, y = (_SPREAD * (side - 1) // (_POINTS - 1) for side in (width, height))
    return np.stack([image[0, x], image[-1, x], image[y, 0], image[y, -1]])


def may_be_framed(lines: Uint8) -> npt.NDArray[np.bool_]:
    """Which images, by their `edges` [N, 4, 32, 3], are worth a search for a picture inside.

    Two opposite edges of one colour, one edge without any shade in it, or one colour along most of all four: few
    photographs pass, most of them with a sky or a ground of pure white.
    """
    values = lines.astype(np.int16)
    colour = np.median(values, axis=2)
    off = np.abs(values - colour[:, :, None]).max(axis=3)
    plain = (off <= _TOLERANCE).mean(axis=2) >= _PLAIN_POINTS
    alike = np.abs(colour[:, 0::2] - colour[:, 1::2]).max(axis=2) <= _TOLERANCE
    pairs = (plain[:, 0::2] & plain[:, 1::2] & alike).any(axis=1)
    exact = (off <= _EXACT_TOLERANCE).all(axis=2).any(axis=1)
    around = values.reshape(len(values), -1, 3)
    near = np.abs(around - np.median(around, axis=1, keepdims=True)).max(axis=2) <= _TOLERANCE
    return np.asarray(pairs | exact | (near.mean(axis=1) >= _PAPER_EDGE))


def pictures_within(image: Uint8) -> list[Box]:
    """Boxes of at most three pictures inside an image [H, W, 3]: what its bars or frame surround, with and without the
    picture's own plain margin, and what lies on a page."""
    height, width = image.shape[:2]
    if min(height, width) < _MIN_SIDE:
        return []
    found: list[Box] = []
    for box in (trim_border(image), trim_border(image, _BAR_TOLERANCE), *_on_page(image)):
        if box is not None and all(_differ(box, other, max(height, width)) for other in found):
            found.append(box)
    return found[:_MOST]


def _differ(a: Box, b: Box, side: int) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) > _SAME * side


def trim_border(image: Uint8, tolerance: int = _TOLERANCE) -> Box | None:
    """The box of an image [H, W, 3] without the lines of one colour at its sides, None where there are none.

    Every side is looked at by itself: lines count as border while 97 % of their pixels are within `tolerance` levels of
    the median of the outermost one. A trim that would leave more than 98.5 % or less than a fifth of the image is not
    taken for a border.
    """
    height, width = image.shape[:2]
    top, bottom = _blank_lines(image, tolerance), height - _blank_lines(image[::-1], tolerance)
    if top >= bottom:
        return None
    middle = image[top:bottom].swapaxes(0, 1)
    left, right = _blank_lines(middle, tolerance), width - _blank_lines(middle[::-1], tolerance)
    if left >= right:
        return None
    low, high = _KEEP
    share = (bottom - top) * (right - left) / (height * width)
    return (left, top, right, bottom) if low <= share <= high else None


def _blank_lines(image: Uint8, tolerance: int) -> int:
    """How many of the first rows of an image are of one colour, that of the first."""
    colour = np.median(image[0], axis=0).astype(np.int16)
    done, step = 0, 4
    while done < len(image):  # most sides have no border: only the first rows are looked at
        blank = 1 - _off(image[done : done + step], colour, tolerance).mean(axis=1)
        if (blank < _BLANK).any():
            done += int(np.argmax(blank < _BLANK))
            break
        done, step = done + step, 2 * step
    # The picture's edge rings in the border's last lines where JPEG has a block across it.
    if not done:
        return 0
    rings = 1 - _off(image[done : done + _RINGS], colour, tolerance).mean(axis=1) >= _RINGING
    return done + int(np.argmin([*rings, False]))


def _off(image: Uint8, colour: npt.NDArray[np.int16], tolerance: int = _TOLERANCE) -> npt.NDArray[np.bool_]:
    """Which pixels [H, W] differ from a colour [3] in some channel. Channel by channel: reducing three is slow."""
    low, high = np.clip(colour - tolerance, 0, 255), np.clip(colour + tolerance, 0, 255)
    found = np.zeros(image.shape[:2], dtype=bool)
    for channel in range(3):
        values = image[..., channel]
        found |= (values < low[channel]) | (values > high[channel])
    return found


def _on_page(image: Uint8) -> list[Box]:
    """Boxes of the solid rectangles on a page: largest connected parts that are not of the colour of the paper."""
    paper = _paper(image)
    if paper is None:
        return []
    ink = _off(image, paper)
    label, count = ndimage.label(ink[::2, ::2])  # a quarter of the work; the edges are looked at again below
    if not count:
        return []
    areas = np.bincount(label.ravel(), minlength=count + 1)
    boxes = []
    slices = ndimage.find_objects(label)
    for part in np.argsort(-areas[1:], kind="stable")[:_PARTS] + 1:
        coarse = slices[part - 1]
        height, width = (line.stop - line.start for line in coarse)
        if areas[part] < _FULL * height * width or height * width < _MIN_SHARE * label.size:
            continue
        window = (slice(max(2 * line.start - 2, 0), 2 * line.stop + 2) for line in coarse)
        rows, columns = _without_rings(ink, *_largest(ink, *window))
        height, width = rows.stop - rows.start, columns.stop - columns.start
        solid = max(_MIN_SIDE, max(height, width) / _MAX_ASPECT) <= min(height, width)
        if solid and height * width <= _KEEP[1] * ink.size and not _mostly_plain(image[rows, columns]):
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return boxes


def _largest(ink: npt.NDArray[np.bool_], rows: slice, columns: slice) -> tuple[slice, slice]:
    """The box of the largest connected part within a window."""
    label, _ = ndimage.label(ink[rows, columns])
    found = ndimage.find_objects(label)[int(np.argmax(np.bincount(label.ravel())[1:]))]
    y, x = found
    return slice(rows.start + y.start, rows.start + y.stop), slice(columns.start + x.start, columns.start + x.stop)


def _without_rings(ink: npt.NDArray[np.bool_], rows: slice, columns: slice) -> tuple[slice, slice]:
    """The same without the outermost lines that are mostly paper: JPEG smears the edge of a picture over its block."""
    part = ink[rows, columns]
    ends = []
    for share, span in ((part.mean(axis=1), rows), (part.mean(axis=0), columns)):
        span = slice(span.start, span.start + len(share))
        full = share >= 1 - _RINGING
        first, last = (int(np.argmax([*line[:_RINGS], True])) for line in (full, full[::-1]))
        ends.append(slice(span.start + first, max(span.stop - last, span.start + first + 1)))
    return ends[0], ends[1]


def _paper(image: Uint8) -> npt.NDArray[np.int16] | None:
    """The colour [3] that fills much of an image, if there is one."""
    some = image[::2, ::2]
    code = _coarse(some)
    counts = np.bincount(code.ravel(), minlength=4096)
    most = int(np.argmax(counts))
    if counts[most] < _PAPER * code.size:
        return None
    return np.median(some[code == most][::7], axis=0).astype(np.int16)


def _mostly_plain(image: Uint8) -> bool:
    """Whether most of it has one colour, as buttons and title bars."""
    code = _coarse(image)
    return bool(np.bincount(code.ravel()).max() > _PLAIN * code.size)


def _coarse(image: Uint8) -> npt.NDArray[np.int32]:
    """Colours [H, W] in 16 steps a channel, as one number of 0 .. 4095."""
    high = (image >> 4).astype(np.int32)
    return np.asarray((high[..., 0] << 8) | (high[..., 1] << 4) | high[..., 2])

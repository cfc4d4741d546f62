"""The annotations of Casual Conversations (version 1) as a table, and its videos found by the names of their frames.

Hazirbas et al., "Towards Measuring Fairness in AI: the Casual Conversations Dataset" (2021): age and gender as people
told them, apparent skin type (Fitzpatrick) and dark recordings as annotators saw them. The file itself is given only to
who signs its agreement; its layout here is as several public programs that read it describe it:
`{"1140": {"label": {"age": "34", "gender": "Female", "skin-type": "3"},
"files": ["CasualConversationsA/1140/1140_00.MP4", …], "dark_files": [those of them recorded in the dark]}, …}`,
with "N/A" for what was not told.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2cli.data.source import ImageSource
from dinov2cli.errors import InputError
from dinov2cli.fairness.attribute_keys import Match, normal_name

_FORM = (
    'expected Casual Conversations (version 1), {"subject": {"label": {"age": …, "gender": …, "skin-type": …}, '
    '"files": [videos], "dark_files": [videos]}}; other annotations as .csv, .tsv or .parquet'
)
_ENDS = re.compile(r"[ ._-]+[^ ._-]*$")


def read_casual_conversations(file: Path) -> pa.Table:
    """One row per video, all strings: subject, age, gender, skin_type (and further labels of a subject), lighting
    ('dark' or 'bright'; null where the file has no lists of dark videos), video.

    Raises:
        InputError: no such file, not JSON, or of another form.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({type(error).__name__}); {_FORM}") from None
    if not isinstance(raw, dict) or not raw:
        found = f"a list of {len(raw)}" if isinstance(raw, list) else f"{'an empty' if raw == {} else 'a'} JSON value"
        raise InputError(f"{file}: {found}; {_FORM}")
    rows = [row for subject, entry in raw.items() for row in _videos(file, subject, entry)]
    if not rows:
        raise InputError(f"{file}: none of its {len(raw)} subjects has a video; {_FORM}")
    names = list(dict.fromkeys(["subject", "age", "gender", "skin_type", *(name for row in rows for name in row)]))
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def _videos(file: Path, subject: str, entry: Any) -> list[dict[str, str | None]]:
    fields = _plain_names(entry)
    label = _plain_names(fields.get("label"))
    videos, dark = fields.get("files"), fields.get("dark_files")
    if not label or not _are_names(videos) or not (dark is None or _are_names(dark)):
        raise InputError(f"{file}: subject '{subject}' has no label, or no list of files; {_FORM}")
    told = {name: None if value is None else str(value) for name, value in label.items()}
    in_dark = set(dark or ())
    rows = []
    for video in dict.fromkeys([*(videos or ()), *(dark or ())]):
        lighting = None if dark is None else "dark" if video in in_dark else "bright"
        rows.append({**told, "subject": subject, "lighting": lighting, "video": video})
    return rows


def _plain_names(entry: Any) -> dict[str, Any]:
    """Keys spelled one way: 'skin-type' and 'skin_type', 'dark-files' and 'dark_files'."""
    return {key.replace("-", "_"): value for key, value in entry.items()} if isinstance(entry, dict) else {}


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def match_videos(table: pa.Table, source: ImageSource, *, key: str | None, file: str) -> Match:
    """The row of the video that each image is a frame of.

    `CasualConversationsA/1140/1140_00.MP4` has the frames `…/1140_00/frame_0003.jpg` (a folder called as the video) and
    `1140_00_12.png`, `1140_00.jpg` (a file whose name begins as the video's and goes on after a space, dot, hyphen or
    underscore; the longest such name is taken). Where several videos are called so, the folders above must tell them
    apart.

    Raises:
        InputError: another `key` than 'video' is asked for, or no image is a frame of any video.
    """
    if key not in (None, "video"):
        raise InputError(f"{file}: its frames are found by the names of their videos, not by '{key}'; leave --id out")
    videos = [PurePosixPath(normal_name(video)) for video in table.column("video").to_pylist()]
    called: dict[str, list[int]] = defaultdict(list)
    for row, video in enumerate(videos):
        called[video.stem].append(row)
    rows = np.array([_video_of(name, called, videos) for name in source.ids], dtype=np.int64)
    if not (rows >= 0).any():
        paths = source.paths
        rows = np.array([_video_of(name, called, videos) for name in paths], dtype=np.int64)
    if not (rows >= 0).any():
        image = source.ids[0] if len(source) else "none"
        raise InputError(
            f"{file}: no image of {source.spec} is called as a frame of one of its {len(videos)} videos: an image is "
            f"called '{image}', a video {videos[0]}; expected frames as {videos[0].stem}/0001.jpg or "
            f"{videos[0].stem}_0001.jpg"
        )
    return Match(rows, "name of the video in the name of the frame", [], [])


def _video_of(name: str, called: dict[str, list[int]], videos: Sequence[PurePosixPath]) -> int:
    frame = PurePosixPath(normal_name(name))
    beginning = frame.name
    while beginning and beginning not in called:
        shorter = _ENDS.sub("", beginning)
        beginning = shorter if shorter != beginning else ""
    word = beginning or next((folder for folder in reversed(frame.parts[:-1]) if folder in called), "")
    rows = called.get(word, [])
    if len(rows) > 1:
        folders = set(frame.parts)
        rows = [row for row in rows if folders.issuperset(videos[row].parts[:-1])]
    return rows[0] if len(rows) == 1 else -1

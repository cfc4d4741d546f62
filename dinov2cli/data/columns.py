"""Which columns of a table hold pixels, and columns as labels."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2cli.data.source import PIXEL_ROLES, LabelLists
from dinov2cli.data.spec import suggestion
from dinov2cli.errors import InputError

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values", "bytes")


def choose_columns(features: Any, options: dict[str, str], location: str) -> dict[str, str]:
    """Column name of every pixel role that is present: {'image': …, 'mask': …, 'depth': …}.

    Raises:
        InputError: no image column, or one named in the spec is absent or holds no images.
    """
    roles: dict[str, str] = {}
    for role in PIXEL_ROLES:
        asked = options.get(role)
        if asked is None:
            if role != "image" and role in features and is_pixels(features[role]):
                roles[role] = role
            continue
        if asked not in features:
            raise InputError(
                f"{location}: no column '{asked}' for {role}{suggestion(asked, list(features))}; "
                f"its columns are {', '.join(features)}"
            )
        if not (is_pixels(features[asked]) or _is_value(features[asked], "string", "large_string")):
            raise InputError(f"{location}: column '{asked}' holds {_describe(features[asked])}, not images")
        roles[role] = asked
    if "image" not in roles:
        taken = set(roles.values())
        candidates = [name for name, feature in features.items() if is_pixels(feature) and name not in taken]
        if not candidates:
            columns = ", ".join(f"{name} ({_describe(feature)})" for name, feature in features.items())
            raise InputError(f"{location}: no image column among {columns}; name it with ?image=COLUMN")
        roles["image"] = next((name for name in _IMAGE_NAMES if name in candidates), candidates[0])
    return roles


def integer_labels(column: pa.ChunkedArray, names: list[str] | None, where: str) -> tuple[np.ndarray, list[str] | None]:
    """A column as int64 labels, -1 for null; strings are numbered in alphabetical order.

    Raises:
        InputError: neither whole numbers nor strings.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        values = column.to_pylist()
        names = sorted({value for value in values if value is not None})
        number = {value: index for index, value in enumerate(names)}
        return np.array([number.get(value, -1) for value in values], dtype=np.int64), names
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return pc.fill_null(column.cast(pa.int64()), -1).to_numpy().astype(np.int64), names
    if pa.types.is_floating(kind):
        values = pc.fill_null(column, -1).to_numpy()
        if np.array_equal(values, np.round(values)):
            return values.astype(np.int64), names
    raise InputError(
        f"{where}: labels are of type {kind}, expected whole numbers or strings; name another with ?label="
    )


def is_lists(kind: pa.DataType) -> bool:
    """Whether cells of a type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_labels(column: pa.ChunkedArray, names: list[str] | None, where: str) -> LabelLists:
    """A column of lists as several labels per row; strings are numbered in alphabetical order, a null is no labels.

    Raises:
        InputError: neither lists of whole numbers from 0 nor lists of strings.
    """
    kind = column.type.value_type
    lists = column.to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = sorted({value for some in lists for value in some or () if value is not None})
        number = {value: index for index, value in enumerate(names)}
        lists = [None if some is None else [number.get(value, -1) for value in some] for some in lists]
    elif not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(
            f"{where}: labels are lists of {kind}, expected lists of whole numbers or strings; "
            "name another with ?label="
        )
    for row, some in enumerate(lists):
        if some is not None and any(label is None or label < 0 for label in some):
            raise InputError(
                f"{where}, row {row}: the list {_as_given(column, row)} holds an empty or negative label; "
                "expected whole numbers from 0 or strings: leave out what is not there"
            )
    return LabelLists([None if some is None else sorted(set(some)) for some in lists], names)


def _as_given(column: pa.ChunkedArray, row: int) -> str:
    return str(column[row].as_py())[:80]


def is_pixels(feature: Any) -> bool:
    """Whether a feature of `datasets` can hold image files: Image, a struct of bytes and path, or plain binary."""
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return _is_value(feature, "binary", "large_binary")


def _is_value(feature: Any, *kinds: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in kinds


def _describe(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__.lower()

"""Files of attributes as Arrow tables: CSV, TSV and Parquet."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dinov2cli.errors import InputError

_SEPARATED = (".csv", ".tsv", ".tab", ".csv.gz", ".tsv.gz")
_PARQUET = (".parquet", ".pq")
_EXPECTED = "a table with a row per image as .csv, .tsv or .parquet, or the .json of Casual Conversations"
_INDEX = "__index_level_0__"  # what pandas calls an index without a name in a Parquet file
UNNAMED = "unnamed"
"""What a column without a name is called here: the row numbers that pandas writes first."""


def read_table(file: Path) -> pa.Table:
    """Every column of a file that has a row per image: of CSV and TSV all as strings (empty text stays empty text), of
    Parquet as typed, without columns of bytes.

    CSV and TSV are UTF-8 with or without a byte order mark, perhaps gzipped; the separator is the one of comma,
    semicolon and tab that the first line has most of. A column without a name becomes 'unnamed'.

    Raises:
        InputError: no such file, not one of these kinds, damaged, without rows, or with two columns of one name.
    """
    name = file.name.lower()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise InputError(f"{file}: {what}; expected {_EXPECTED}")
    if not name.endswith((*_SEPARATED, *_PARQUET)):
        cure = "; save it as CSV" if name.endswith((".xlsx", ".xls", ".ods")) else ""
        raise InputError(f"{file}: not a table of attributes; expected {_EXPECTED}{cure}")
    try:
        table = _parquet(file) if name.endswith(_PARQUET) else _separated(file)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{file}: cannot be read as a table ({_first_line(error)}); expected {_EXPECTED}") from None
    if not table.num_rows:
        raise InputError(f"{file}: a table without rows; expected one row per image")
    return table


def _parquet(file: Path) -> pa.Table:
    schema = pq.read_schema(file)
    _check_names(file, schema.names)
    names = [field.name for field in schema if not _holds_bytes(field.type)]
    table = pq.read_table(file, columns=names).replace_schema_metadata(None)
    return table.rename_columns([UNNAMED if name in ("", _INDEX) else name for name in names])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _separated(file: Path) -> pa.Table:
    with pa.input_stream(str(file), compression="detect") as stream:
        start = stream.read(1 << 20)
    # A character cut in two at the end of the piece is no error; one in the first line is.
    first = start.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    separator = max("\t,;" if ".t" in file.name.lower() else ",;\t", key=_outside_quotes(first).count)
    names = next(csv.reader([first], delimiter=separator), [])
    _check_names(file, names)
    table = pacsv.read_csv(
        str(file),
        parse_options=pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        ),
    )
    return table.rename_columns([name.strip() or UNNAMED for name in table.column_names])


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


def _check_names(file: Path, names: Sequence[str]) -> None:
    twice = [name for name, times in Counter(name.strip() or UNNAMED for name in names).items() if times > 1]
    if twice:
        raise InputError(f"{file}: two columns are called '{twice[0]}'; give every column a name of its own")


def _first_line(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return "it is not UTF-8; save it as UTF-8"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""Images that are nothing but names."""

import numpy as np
import pyarrow as pa

from dinov2cli.data.source import ImageSource
from dinov2cli.data.spec import DataSpec
from dinov2cli.fairness.attributes import Attributes


class NamedImages(ImageSource):
    """Ids as given, below /pictures; columns as given."""

    def __init__(self, names, columns=None, root="/pictures"):
        super().__init__(DataSpec("folder", root), "folder")
        self._names, self._columns = list(names), columns

    def __len__(self):
        return len(self._names)

    def read(self, row, role="image"):
        raise AssertionError("nothing here reads pixels")

    @property
    def ids(self):
        return self._names

    @property
    def paths(self):
        return [f"{self.spec}/{name}" for name in self._names]

    @property
    def columns(self):
        return super().columns if self._columns is None else pa.table(self._columns)

    def content_hash(self):
        return ""


def attributes(**columns):
    """Attributes beside images a0, a1, … as they come from the columns of a source."""
    table = pa.table(columns)
    count = table.num_rows
    return Attributes(table, np.ones(count, bool), [f"a{row}" for row in range(count)], "f.csv", "row by row", count)

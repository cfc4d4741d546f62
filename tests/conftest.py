"""What every test has: a logger of the package as it was before, whatever command the last one ran in this process; and
a cache for features that is not the user's."""

import atexit
import logging
import os
import shutil
import tempfile

import pytest

_CACHE = tempfile.mkdtemp(prefix="dinov2-test-cache-")
os.environ["DINOV2_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

_LOGGER = logging.getLogger("dinov2cli")
_BEFORE = _LOGGER.handlers[:], _LOGGER.level, _LOGGER.propagate


@pytest.fixture(autouse=True)
def _package_logger():
    # Before the test too: a fixture of a whole module may have run a command since the last one.
    _LOGGER.handlers[:], _LOGGER.level, _LOGGER.propagate = _BEFORE
    yield
    _LOGGER.handlers[:], _LOGGER.level, _LOGGER.propagate = _BEFORE

"""What every test has: a logger of the package as it was before, whatever command the last one ran in this process."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _package_logger():
    logger = logging.getLogger("dinov2cli")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before

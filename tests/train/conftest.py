"""The tiny run, loaded from its file so that tests and subprocesses share it."""

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dinov2cli_tests_tiny_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    # torch.distributed.checkpoint logs hundreds of debug lines, which would bury a failure.
    for name in [name for name in logging.root.manager.loggerDict if name.endswith("dcp_logger")]:
        logging.getLogger(name).setLevel(logging.INFO)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

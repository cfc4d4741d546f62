"""Every test here finds float32 products in full precision: training sets TF32 for the whole process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)

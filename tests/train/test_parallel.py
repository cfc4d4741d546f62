"""Choice of device and precision, and the texts for what a machine does not have."""

import pytest
import torch

from dinov2cli.errors import UserError
from dinov2cli.train.parallel import choose_device, choose_precision, setup

CPU = torch.device("cpu")


def test_cpu_computes_in_float32_unless_asked():
    assert choose_precision("auto", CPU) == ("fp32", "CPU")
    assert setup("cpu", "bf16").precision == "bf16"
    with setup("cpu", "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not setup("cpu").grad_scaler().is_enabled()


@pytest.mark.parametrize(
    ("name", "text"),
    [("tpu", "--device tpu: no such device; expected auto, cpu"), ("cuda:99", r"--device cuda:99: torch .* sees \d+")],
)
def test_a_device_that_is_not_there(name, text):
    with pytest.raises(UserError, match=text):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("int8", r"train\.precision: found 'int8'; expected one of auto"), ("fp16", r"train\.precision: fp16 on a CPU")],
)
def test_a_precision_that_cannot_be(name, text):
    with pytest.raises(UserError, match=text):
        choose_precision(name, CPU)


def test_more_than_one_process_is_refused_not_ignored(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="found 2 processes from the launcher; this version trains in one"):
        setup("cpu")

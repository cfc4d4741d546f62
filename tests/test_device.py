"""Choice of device and precision, and the texts for what a machine does not have."""

import pytest
import torch

from dinov2cli import device
from dinov2cli.device import choose_device, choose_precision
from dinov2cli.errors import UserError
from dinov2cli.train.parallel import setup

CPU = torch.device("cpu")


def test_cpu_keeps_features_in_float32_and_trains_in_what_it_is_fast_in(monkeypatch):
    assert choose_precision("auto", CPU) == ("fp32", "CPU")
    for has, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "cpu_has_bf16", lambda has=has: has)
        assert choose_precision("auto", CPU)[0] == "fp32"
        assert choose_precision("auto", CPU, training=True)[0] == precision
        assert setup("cpu").precision == precision
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
    [("int8", r"precision: found 'int8'; expected auto, fp32"), ("fp16", r"precision: fp16 on a CPU")],
)
def test_a_precision_that_cannot_be(name, text):
    with pytest.raises(UserError, match=text):
        choose_precision(name, CPU)


def test_the_processes_of_a_launch_share_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", local_rank=rank).index for rank in range(3)] == [0, 1, 0]
    assert choose_device("cuda", local_rank=1) == torch.device("cuda:1") == choose_device("cuda:1", local_rank=0)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu", local_rank=1) == CPU

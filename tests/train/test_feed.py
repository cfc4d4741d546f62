"""Batches on their way to the device."""

import pytest
import torch

from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.source import open_source
from dinov2cli.train.feed import on_device

CROP = MultiCrop(global_size=32, local_size=16, local_number=2)


def loader(**options) -> CropLoader:
    return CropLoader(open_source("demo:digits"), crop=CROP, batch_size=8, seed=1, workers=2, **options)


def test_on_a_cpu_batches_pass_as_they_are():
    made = [{"global_crops": torch.zeros(1)}, {"global_crops": torch.ones(1)}]
    assert all(a is b for a, b in zip(on_device(iter(made), torch.device("cpu")), made, strict=True))


def test_closing_it_closes_the_loader():
    closed = []

    def batches():
        try:
            yield {"global_crops": torch.zeros(1)}
            yield {"global_crops": torch.zeros(1)}
        finally:
            closed.append(True)

    moving = on_device(batches(), torch.device("cpu"))
    next(moving)
    moving.close()
    assert closed == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pin", [False, True])
def test_the_loader_never_writes_over_what_is_still_being_copied(pin):
    """The GPU is kept busy for far longer than the host takes to ask for the next batches."""
    device = torch.device("cuda")
    expected = [
        {name: value.clone() for name, value in batch.items()} for _, batch in zip(range(20), loader(), strict=False)
    ]
    found = []
    for _, batch in zip(range(20), on_device(iter(loader(pin=pin)), device), strict=False):
        torch.cuda._sleep(20_000_000)
        assert batch["global_crops"].device.type == "cuda"
        found.append({name: value.clone() for name, value in batch.items()})
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in theirs)

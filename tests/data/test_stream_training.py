import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dinov2cli.data import remote
from dinov2cli.data.bad import BadImages
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.order import block_order
from dinov2cli.data.source import open_source
from dinov2cli.data.stream import StreamSource
from dinov2cli.errors import WorkError

CROP = MultiCrop(global_size=16, local_size=8, local_number=2)


@pytest.fixture
def shards(tmp_path, encode):
    """Two files of 11 images in row groups of 3."""
    for part in range(2):
        images = [{"bytes": encode(20 * part + row), "path": None} for row in range(11)]
        pq.write_table(pa.table({"image": images}), tmp_path / f"{part}.parquet", row_group_size=3)
    return tmp_path


def stream(path: object, options: str = "stream=4") -> StreamSource:
    source = open_source(f"{path}?{options}")
    assert isinstance(source, StreamSource)
    return source


def taken(loader: CropLoader, n: int) -> list[dict[str, torch.Tensor]]:
    batches = iter(loader)
    return [{name: value.clone() for name, value in next(batches).items()} for _ in range(n)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def loader_of(source, **more) -> CropLoader:
    options = {"crop": CROP, "bad": BadImages(max_fraction=1), "batch_size": 4, "seed": 1, "workers": 0, **more}
    return CropLoader(source, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_over_a_stream_is_the_tail_of_an_uninterrupted_run(shards, workers):
    whole = taken(loader_of(stream(shards)), 9)
    first = loader_of(stream(shards), workers=workers)
    assert same(taken(first, 4), whole[:4])
    again = loader_of(stream(shards), workers=2 - workers)
    again.load_state_dict(first.state_dict())
    assert same(taken(again, 5), whole[4:])
    for rank in range(2):
        part = loader_of(stream(shards), workers=workers, batch_size=2, rank=rank, world_size=2)
        part.load_state_dict({"position": 16})
        rows = slice(2 * rank, 2 * rank + 2)
        for ours, all_ranks in zip(taken(part, 5), whole[4:], strict=True):
            assert torch.equal(ours["index"], all_ranks["index"][rows])
            assert torch.equal(ours["global_crops"], all_ranks["global_crops"][:, rows])
            assert torch.equal(ours["local_crops"], all_ranks["local_crops"][:, rows])


def test_a_stream_is_visited_window_by_window(shards):
    source = stream(shards, "stream=4")
    batches = taken(loader_of(source, batch_size=11, window=2), 4)
    index = torch.cat([batch["index"] for batch in batches]).tolist()
    assert index == [row for epoch in (0, 1) for row in block_order(1, epoch, source.blocks, 2).tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_crops_as_from_the_copy_where_the_order_is_exact(shards, workers):
    whole = taken(loader_of(open_source(str(shards))), 7)
    assert same(taken(loader_of(stream(shards, "stream=3"), shuffle="exact", workers=workers), 7), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_breaks_off_stops_the_run_with_its_reason(shards, workers, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", ())
    loader = loader_of(stream(shards), workers=workers)
    batches = iter(loader)
    for path in shards.glob("*.parquet"):
        path.unlink()
    with pytest.raises(WorkError) as caught:
        next(batches)
    assert re.fullmatch(r"/.*\.parquet: cannot be read \(.*give the same command again", str(caught.value))
    assert loader.state_dict() == {"position": 0}

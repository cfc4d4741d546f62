import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2cli.data.bad import BadImages
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader, iterate_images, row_ranges
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError

CROP = MultiCrop(global_size=16, local_size=8, local_number=2)


@pytest.fixture
def numbered(tmp_path, encode):
    """numbered(n, bad=…): folder of n small images; those in `bad` hold no image."""

    def make(n: int, bad: tuple[int, ...] = ()) -> Path:
        root = tmp_path / f"numbered-{n}-{len(bad)}"
        root.mkdir()
        for number in range(n):
            (root / f"{number:04d}.png").write_bytes(
                b"junk" if number in bad else encode(number, size=(20 + number % 5, 18))
            )
        return root

    return make


def take(loader: CropLoader, n: int) -> list[dict[str, torch.Tensor]]:
    """Copies of n batches: what the loader gives holds until the next one is asked for."""
    return [{name: value.clone() for name, value in batch.items()} for _, batch in zip(range(n), loader, strict=False)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def loader_of(root, workers=0, seed=1, batch_size=4, **more) -> CropLoader:
    more = {"crop": CROP, "bad": BadImages(max_fraction=1), **more}
    return CropLoader(open_source(str(root)), batch_size=batch_size, seed=seed, workers=workers, **more)


# --- iterate_images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_in_order_with_sizes_and_digests(numbered, workers):
    root = numbered(11, bad=(3, 4, 5))
    bad = BadImages(max_fraction=1)
    source = open_source(str(root))
    batches = list(iterate_images(source, resize=16, crop=16, batch_size=2, workers=workers, bad=bad))
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [2], [6, 7], [8, 9], [10]]  # 4 and 5: no empty batch
    assert bad.names == ["0003.png", "0004.png", "0005.png"]
    assert all(batch.images.shape == (len(batch), 3, 16, 16) and batch.images.dtype == torch.uint8 for batch in batches)
    assert np.concatenate([b.width for b in batches]).tolist() == [20 + n % 5 for n in (0, 1, 2, 6, 7, 8, 9, 10)]
    assert {int(h) for b in batches for h in b.height} == {18}
    assert batches[0].sha256[1] == hashlib.sha256((root / "0001.png").read_bytes()).hexdigest()


def test_a_slow_consumer_gets_what_was_read(numbered):
    """Workers have long finished what is given out: their memory must not be written again before it was taken."""
    source = open_source(str(numbered(12)))
    options = {"resize": 16, "crop": 16, "batch_size": 1, "bad": BadImages()}
    expected = [batch.images for batch in iterate_images(source, workers=0, **options)]
    for batch, images in zip(iterate_images(source, workers=2, **options), expected, strict=True):
        time.sleep(0.05)
        assert torch.equal(batch.images, images)


def test_part_of_the_rows(numbered):
    source = open_source(str(numbered(9)))
    options = {"resize": 16, "crop": 16, "workers": 0, "bad": BadImages()}
    whole = torch.cat([b.images for b in iterate_images(source, batch_size=4, **options)])
    part = list(iterate_images(source, batch_size=3, start=2, stop=7, **options))
    assert np.concatenate([b.index for b in part]).tolist() == [2, 3, 4, 5, 6]
    assert torch.equal(torch.cat([b.images for b in part]), whole[2:7])
    assert list(iterate_images(source, batch_size=3, start=9, **options)) == []


# --- bad images ---------------------------------------------------------------------------------------------------


def test_too_many_bad_images_stop_the_run(numbered):
    source = open_source(str(numbered(40, bad=tuple(range(20, 31)))))
    with pytest.raises(InputError) as caught:
        list(iterate_images(source, resize=8, crop=8, batch_size=4, workers=0, bad=BadImages()))
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "11 of 40 images cannot be read, the limit is 1.0%: 0020.png (not an image that can be read); "
        "0021.png (not an image that can be read); 0022.png (not an image that can be read); "
        "repair or remove them, or raise max_bad_fraction with --set (data.max_bad_fraction for pretrain)"
    )


def test_policy_counts_each_image_once_against_the_whole_set(caplog):
    bad = BadImages(max_fraction=0.01, min_count=10)
    with caplog.at_level(logging.WARNING):
        for number in range(11):
            bad.add(f"{number}.png", "truncated file")
            bad.add(f"{number}.png", "truncated file")
    assert bad.count == 11 and len(caplog.records) == 11
    assert caplog.messages[0] == "skipped unreadable image 0.png: truncated file"
    bad.check(1100)  # exactly 1 %
    with pytest.raises(InputError):
        bad.check(1099)
    few = BadImages(max_fraction=0.0)
    for number in range(10):
        few.add(str(number), "x")
    few.check(1000)  # not more than ten files


def test_a_set_without_one_good_image_stops_too(numbered):
    root = numbered(3, bad=(0, 1, 2))
    text = r"none of the 3 images can be read: 0000\.png \(not an image that can be read\);"
    with pytest.raises(InputError, match=text):
        list(iterate_images(open_source(str(root)), resize=8, crop=8, batch_size=4, workers=0, bad=BadImages()))
    with pytest.raises(InputError, match=r"images in a row cannot be read|none of the 3 images can be read"):
        take(loader_of(root), 1)


# --- CropLoader ---------------------------------------------------------------------------------------------------


def test_shapes_and_epochs(numbered):
    loader = loader_of(numbered(10))
    batches = take(loader, 5)  # two epochs of ten
    assert batches[0]["global_crops"].shape == (2, 4, 3, 16, 16) and batches[0]["global_crops"].dtype == torch.uint8
    assert batches[0]["local_crops"].shape == (2, 4, 3, 8, 8)
    index, epoch = (torch.cat([b[name] for b in batches]) for name in ("index", "epoch"))
    assert epoch.tolist() == [0] * 10 + [1] * 10 and index.dtype == epoch.dtype == torch.int64
    assert sorted(index[:10].tolist()) == sorted(index[10:].tolist()) == list(range(10))
    assert index[:10].tolist() != index[10:].tolist() and index[:10].tolist() != list(range(10))
    assert loader.state_dict() == {"position": 20}


def test_workers_change_nothing(numbered):
    root = numbered(10, bad=(2, 7))
    plain, forked = (take(loader_of(root, workers=workers), 6) for workers in (0, 2))
    assert same(plain, forked)
    assert not same(plain, take(loader_of(root, seed=2), 6))


def test_spawned_workers_change_nothing(numbered, monkeypatch):
    root = numbered(6)
    plain = take(loader_of(root), 2)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert same(plain, take(loader_of(root, workers=1), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_the_tail_of_an_uninterrupted_run(numbered, workers):
    root = numbered(7)
    whole = take(loader_of(root), 8)
    first = loader_of(root, workers=workers)
    assert same(take(first, 3), whole[:3])
    again = loader_of(root, workers=2 - workers)
    again.load_state_dict(first.state_dict())
    assert same(take(again, 5), whole[3:])
    assert same(take(loader_of(root, start_step=3), 5), whole[3:])
    assert same(take(first, 5), whole[3:])  # the same object goes on as well


def test_a_set_smaller_than_the_batch_and_no_local_crops(numbered):
    loader = loader_of(numbered(3), batch_size=8, crop=MultiCrop(global_size=16, local_size=8, local_number=0))
    batch = take(loader, 1)[0]
    assert batch["local_crops"].shape == (0, 8, 3, 8, 8)
    assert batch["epoch"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch["index"][:3].tolist()) == [0, 1, 2]
    first, second = (batch["global_crops"][0, torch.where(batch["index"] == 0)[0][k]] for k in (0, 1))
    assert not torch.equal(first, second)  # the same image is cropped anew in the next epoch


def test_bad_images_are_replaced_counted_and_do_not_move_the_others(numbered, tmp_path, encode):
    root = numbered(12, bad=(5,))
    loader = loader_of(root)
    damaged = take(loader, 6)
    assert loader.bad.names == ["0005.png"]
    (root / "0005.png").write_bytes(encode(5, size=(20, 18)))
    whole = take(loader_of(root), 6)
    wanted, used = (torch.cat([b["index"] for b in run]) for run in (whole, damaged))
    crops = [torch.cat([b["global_crops"] for b in run], dim=1) for run in (whole, damaged)]
    at = wanted == 5
    assert at.sum() == 2 and (used[at] != 5).all()
    assert torch.equal(used[~at], wanted[~at]) and torch.equal(crops[0][:, ~at], crops[1][:, ~at])
    for place in torch.where(at)[0]:  # the stand-in is not cropped as on its own turn
        twins = torch.where(used == used[place])[0]
        assert all(torch.equal(crops[1][:, place], crops[1][:, twin]) is (twin == place).item() for twin in twins)


def test_ranks_share_a_batch(numbered):
    root = numbered(10)
    whole = take(loader_of(root, batch_size=4), 5)
    halves = [take(loader_of(root, batch_size=2, rank=rank, world_size=2), 5) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for name, dim in (("global_crops", 1), ("local_crops", 1), ("index", 0), ("epoch", 0)):
            assert torch.equal(batch[name], torch.cat([half[step][name] for half in halves], dim=dim))


def test_the_global_random_state_is_left_alone(numbered):
    root = numbered(6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(loader_of(root), 2)
    take(loader_of(root, workers=1), 1)
    assert torch.equal(torch.rand(3), expected)


def test_batches_of_a_shard_are_the_same_wherever_a_run_starts():
    whole = row_ranges(0, 23, 4, within=10)
    assert whole == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20), (20, 23)]
    assert row_ranges(10, 23, 4, within=10) == whole[3:]
    assert row_ranges(30, 23, 4, within=10) == []
    assert row_ranges(2, 9, 3) == [(2, 5), (5, 8), (8, 9)]
    assert row_ranges(0, 0, 3) == []


SCRIPT = """
import signal, sys, time
import torch
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.source import open_source

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("saved"))
torch.ones(512, 512) @ torch.ones(512, 512)  # an OpenMP pool before the fork
loader = CropLoader(open_source(sys.argv[1]), crop=MultiCrop(16, 8, 2), batch_size=4, seed=0, workers=2)
try:
    after = 0
    for step, batch in enumerate(loader):
        if step == 3:
            print("running", flush=True)
        time.sleep(0.02)
        after += bool(asked)
        if after == 20:  # a last few steps and a checkpoint: the workers must still be there
            print(asked[0], flush=True)
            break
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "stopped"), (signal.SIGTERM, "saved")])
def test_a_signal_to_all_processes_is_left_to_the_main_one(numbered, number, said):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(numbered(6))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.2)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (f"{said}\n", "", 0)

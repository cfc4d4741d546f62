"""Stored maps, batches and the training of a head: stopped and resumed, alone and on two ranks."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.bad import BadImages
from dinov2cli.data.dense import read_pair
from dinov2cli.data.source import open_source
from dinov2cli.distributed import ALONE, join, leave
from dinov2cli.errors import InputError, WorkError
from dinov2cli.evaluation.dense.batches import Augmentation, ReadBatches, StoredBatches, drawn
from dinov2cli.evaluation.dense.maps import BLOCK, Seeing, expected_bytes, map_set
from dinov2cli.evaluation.dense.norm import SyncedBatchNorm
from dinov2cli.evaluation.dense.tokens import Sight
from dinov2cli.evaluation.dense.training import digest_of, group_of, train_head
from dinov2cli.models.vit import VisionTransformer
from tests.evaluation.dense_sets import colour_set
from tests.evaluation.test_dense_norm import check_two_ranks, on_a_rank
from tests.launch import launch


def seeing_of(sight=None, **changes):
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():  # large enough that the tokens of images differ
        nn.init.normal_(parameter, std=0.4, generator=generator)
    options = {"encoder": vit, "normalize": lambda pixels: pixels.float() / 255 - 0.5, "blocks": (1,)}
    options |= {"sight": sight or Sight(None, 16, 12), "device": torch.device("cpu"), "mirrored": True}
    return Seeing(**options | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colour_set(tmp_path_factory.mktemp("set") / "x.parquet", 20, sizes=((24, 32), (16, 40)))


# --- Maps ---------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_windows_and_of_the_mirror_image(data):
    source, seeing = open_source(data), seeing_of()
    found = map_set(source, seeing, bad=BadImages())
    assert found.rows.tolist() == list(range(20)) and found.sizes[:2].tolist() == [[24, 32], [16, 40]]
    for row in (0, 1, 17):
        image = read_pair(source, row, "mask").image
        for view, pixels in enumerate((image, image.flip(2))):
            (alone,) = seeing.of([pixels])
            assert found.maps[row].dtype == torch.half
            assert torch.allclose(found.maps[row][view].float(), alone.maps, atol=4e-3, rtol=2e-3)
            assert torch.allclose(found.cls[row][view].float(), alone.cls, atol=4e-3, rtol=2e-3)
    assert bytes(found.digests[3]) == hashlib.sha256(source.read(3)).digest()
    held = sum(2 * (found.maps[row].numel() + found.cls[row].numel()) for row in found.maps)
    assert abs(expected_bytes(source, seeing) / held - 1) < 0.35  # of the first image's size


def test_maps_are_kept_block_by_block(data, tmp_path, monkeypatch):
    source, seeing = open_source(data), seeing_of()
    stage = Parts(tmp_path).stage("maps", seeing.key())
    first = map_set(source, seeing, bad=BadImages(), stage=stage)
    assert stage.starts() == [0, BLOCK]
    monkeypatch.setattr(Seeing, "of", lambda *_: pytest.fail("computed again"))
    again = map_set(source, seeing, bad=BadImages(), stage=stage)
    for row, maps in first.maps.items():
        assert torch.equal(maps, again.maps[row]) and torch.equal(first.cls[row], again.cls[row])
    assert np.array_equal(first.digests, again.digests)


def test_unreadable_images_have_no_maps(tmp_path, monkeypatch):
    source = open_source(colour_set(tmp_path / "x.parquet", 20))
    read = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, row, role="image": b"none" if row == 2 else read(self, row, role)
    )
    stage, bad = Parts(tmp_path).stage("maps", {}), BadImages()
    for _ in range(2):  # computed, and read again
        found = map_set(source, seeing_of(), bad=bad, stage=stage)
        assert 2 not in found.rows and len(found.rows) == 19 and bad.count == 1
    few = found.only(np.array([0, 5]))
    assert few.rows.tolist() == [0, 5] == sorted(few.maps)


# --- Batches ------------------------------------------------------------------------------------------------------


def test_every_example_is_drawn_once_an_epoch():
    places = [place for step in range(12) for place in drawn(15, 5, step, 0)]
    for epoch in range(4):
        assert sorted(example for example, when in places if when == epoch) == list(range(15))
    assert [p for p, _ in places[:15]] != [p for p, _ in places[15:30]]
    assert drawn(3, 7, 0, 0)[6][1] == 2  # sets smaller than a batch go round


def test_stored_windows_carry_their_targets(data):
    source, seeing = open_source(data), seeing_of()
    found = map_set(source, seeing, bad=BadImages())
    # A target that tells row and column of every pixel, so that any confusion of windows or views shows.
    targets = {
        row: (torch.arange(h)[:, None] * 100 + torch.arange(w)).to(torch.int32) + 10_000 * row
        for row, (h, w) in zip(found.rows.tolist(), found.sizes.tolist(), strict=True)
    }
    batches = StoredBatches(found, targets, seeing.sight, batch_size=16, seed=1)
    assert len(batches) == 10 * len(seeing.sight.windows(24, 32)) + 10 * len(seeing.sight.windows(16, 40))
    views = set()
    for step in range(6):
        (part,) = batches(step)
        for maps, target in zip(part.tokens.maps, part.targets, strict=True):
            row, mirrored = int(target[0, 0]) // 10_000, bool(target[0, 0] > target[0, 1])
            plain = target.flip(1) if mirrored else target
            top, left = divmod(int(plain[0, 0]) % 10_000, 100)
            height, width = found.sizes[row]
            left = width - 16 - left if mirrored else left
            places = [(w.top, w.left) for w in seeing.sight.windows(height, width)]
            assert torch.equal(maps, found.maps[row][int(mirrored), places.index((top, left))])
            views.add(mirrored)
    assert views == {False, True}


def test_read_batches_are_the_same_however_they_are_read(data):
    source, seeing = open_source(data), seeing_of()

    def prepared(target, name):
        return torch.from_numpy(target.astype(np.int16))

    def made(workers, augmentation):
        rows = np.arange(20)
        return ReadBatches(
            source, "mask", rows, seeing.sight, prepared,
            augmentation=augmentation, batch_size=6, seed=0, workers=workers,
        )  # fmt: skip

    first, second = made(0, Augmentation())(3), made(3, Augmentation())(3)
    assert [part.targets.tolist() for part in first] == [part.targets.tolist() for part in second]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    (whole,) = made(0, Augmentation((1.0, 1.0), 0.0))(0)
    tokens, targets = whole.seen(seeing)
    assert tokens.maps.shape == (6, 8, 4, 4) and targets.shape == (6, 16, 16)
    # Colours say what class a pixel is of: image and target were moved alike.
    channel = whole.images.float().argmax(1)
    assert (channel == whole.targets).float().mean() > 0.99


# --- Training -----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.norm = SyncedBatchNorm(8, group=group)
        self.linear = nn.Linear(8, 3)
        nn.init.normal_(self.linear.weight, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(self.norm(x))


def trained(steps=12, *, ranks=ALONE, stage=None, optimizer=torch.optim.AdamW, stop=None, batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(100, 8, generator=generator), torch.randint(0, 3, (100,), generator=generator)
    head = Head(group_of(ranks))

    def batch_of(step):
        if step == stop:
            raise InputError("stopped")
        chosen = [example for example, _ in drawn(100, batch, step, 0) if example % ranks.world_size == ranks.rank]
        return x[chosen], y[chosen]

    def loss_of(examples):
        logits = head(examples[0])
        return nn.functional.cross_entropy(logits, examples[1], reduction="sum"), torch.tensor(len(examples[1]))

    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    made = optimizer(head.parameters(), lr=0.05, weight_decay=0.01, **options)
    result = train_head(
        head,
        made,
        batch_of,
        loss_of,
        steps=steps,
        rate=lambda step: 1 - step / steps,
        ranks=ranks,
        stage=stage,
        every=5,
    )
    return head, result


def test_training_is_the_plain_loop():
    head, result = trained()
    reference = Head()
    reference.norm = nn.BatchNorm1d(8)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 8, generator=generator), torch.randint(0, 3, (100,), generator=generator)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.01)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 12)
        chosen = [example for example, _ in drawn(100, 8, step, 0)]
        loss = nn.functional.cross_entropy(reference(x[chosen]), y[chosen])
        assert abs(float(loss.detach()) - result.losses[step]) < 1e-5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in reference.state_dict().items():
        assert torch.allclose(head.state_dict()[name].float(), value.float(), atol=1e-5), name


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("stop", [3, 7, 11])
def test_a_stopped_training_goes_on_bitwise(tmp_path, optimizer, stop):
    whole, wanted = trained(optimizer=optimizer)
    stage = Parts(tmp_path).stage("head", {})
    with pytest.raises(InputError, match="stopped"):
        trained(optimizer=optimizer, stage=stage, stop=stop)
    assert len(stage.starts()) == stop // 5
    head, result = trained(optimizer=optimizer, stage=stage)
    assert digest_of(head) == digest_of(whole) and np.array_equal(result.losses, wanted.losses)
    finished, again = trained(optimizer=optimizer, stage=stage, stop=0)  # nothing is left to do
    assert digest_of(finished) == digest_of(whole) and np.array_equal(again.losses, wanted.losses)


def test_a_loss_that_is_no_number_stops_the_training():
    head = Head()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    with pytest.raises(WorkError, match=r"the loss of the head is nan at step 0; lower the learning rate"):
        train_head(
            head,
            optimizer,
            lambda step: None,
            lambda batch: (head.linear.weight.sum() * torch.nan, torch.tensor(1)),
            steps=3,
            rate=lambda step: 1.0,
        )


def test_two_ranks_train_one_head(tmp_path, data):
    """The same batches, dealt out unevenly (now and then none to a rank): equal up to the order of float32 sums."""
    done = launch(__file__, str(tmp_path), data, processes=2, module="")
    assert done.returncode == 0, done.stderr[-2000:]
    check_two_ranks(tmp_path)
    alone, single = trained(30, batch=3)
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, value in alone.state_dict().items():
            assert np.allclose(found[name], value.numpy(), atol=2e-4), name
        assert np.allclose(found["losses"], single.losses, atol=1e-4)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    for name in alone.state_dict():
        assert np.array_equal(first[name], second[name]), name  # the ranks agree with each other bit by bit
    assert first["rows"].tolist() == second["rows"].tolist() == list(range(20))
    assert sorted([*first["held"], *second["held"]]) == list(range(20)) and len(first["held"]) == BLOCK
    assert "stopped" in str(first["error"]) and "stopped" in str(second["error"])


def main(folder: Path, data: str) -> None:
    """A training in this process of a launch, and its share of maps."""
    ranks = join("cpu")
    on_a_rank(folder, ranks.rank)
    head, result = trained(30, ranks=ranks, batch=3)
    maps = map_set(open_source(data), seeing_of(), bad=BadImages(), ranks=ranks)
    try:
        trained(30, ranks=ranks, batch=3, stop=4 if ranks.rank else None)
    except InputError as error:
        message = str(error)
    found = {name: value.numpy() for name, value in head.state_dict().items()}
    found |= {"losses": result.losses, "rows": maps.rows, "held": np.array(sorted(maps.maps)), "error": message}
    np.savez(folder / f"{ranks.rank}.npz", **found)
    leave()
    os._exit(0)  # Python's own exit may abort while threads of a process group end


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])


def test_maps_of_other_views_are_not_taken_for_each_other():
    """They lie in a cache that commands share: with mirror images there are twice as many."""
    plain = seeing_of().key()
    for changes in ({"mirrored": not plain["mirrored"]}, {"norm": not plain["norm"]}, {"blocks": (0,)}):
        assert seeing_of(**changes).key() != plain, changes

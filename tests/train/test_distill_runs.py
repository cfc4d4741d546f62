"""What a run of distillation must keep: each student to itself, resume to the bit, the teacher as it was, the cache."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.checkpoint import latest_checkpoint
from dinov2cli.train.distill import DistillObjective
from dinov2cli.train.distillation import to_16_bit
from dinov2cli.train.teacher_cache import TokenCache
from tests.train.distill_run import STUDENTS, WIDTH, run, student, teacher


def stored(folder: Path) -> dict[str, bytes]:
    """All tensors of the newest checkpoint, bit for bit."""
    found = {}
    for file in sorted(latest_checkpoint(folder / "checkpoints").rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                found[f"{file.parent.name}/{name}"] = tensors.get_tensor(name).numpy().tobytes()
    return found


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("heads", [True, False], ids=["run", "learned"])
def test_students_together_are_bitwise_what_each_is_alone(tmp_path, heads):
    common = {"steps": 4, "heads": heads, "drop_path": 0.2, "objective": {"ibot_share": 0.5, "gram_weight": 1.0}}
    run(tmp_path / "both", students=("small", "coarse"), **common)
    both = stored(tmp_path / "both")
    last = lines(tmp_path / "both")[-1]
    for name in STUDENTS:
        run(tmp_path / name, students=(name,), **common)
        alone = stored(tmp_path / name)
        assert alone
        assert alone == {key: value for key, value in both.items() if f"/{name}." in key}
        own = lines(tmp_path / name)[-1]
        assert {key: last[key] for key in last if key.startswith(f"{name}/")} == {
            key: own[key] for key in own if key.startswith(f"{name}/")
        }
    assert last["loss/total"] == pytest.approx(np.mean([last[f"{name}/loss/total"] for name in STUDENTS]))


def test_students_of_one_grid_share_the_targets_of_the_teacher_s_heads(tmp_path, monkeypatch):
    looked_at, asked = teacher(), []
    logits = looked_at.logits
    monkeypatch.setattr(looked_at, "logits", lambda *a: asked.append(1) or logits(*a))
    run(tmp_path / "both", steps=3, students=("small", "other"), loaded=looked_at, settings={"accumulate": 2})
    assert len(asked) == 3 * 2  # once for every part of a batch
    for name in ("small", "other"):
        run(tmp_path / name, steps=3, students=(name,), settings={"accumulate": 2})
        both = stored(tmp_path / "both")
        assert stored(tmp_path / name) == {key: value for key, value in both.items() if f"/{name}." in key}


@pytest.mark.parametrize("students", [("",), ("small", "coarse")])
def test_a_run_that_was_cut_goes_on_bitwise(tmp_path, students):
    common = {"students": students, "second": (3,), "centering": "softmax", "settings": {"accumulate": 2}}
    whole = run(tmp_path / "whole", steps=5, keep=0, **common)

    class Cut(Exception):
        pass

    def cut(line, _total):
        if line["step"] == 6:  # between the checkpoint of step 4 and the end, in the second phase
            raise Cut

    with pytest.raises(Cut):
        run(tmp_path / "cut", steps=5, keep=0, on_metrics=cut, **common)
    run(tmp_path / "cut", steps=5, keep=0, **common)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    clock = ("seconds", "images_per_s", "data_wait")
    curves = [
        [{k: v for k, v in line.items() if k not in clock} for line in lines(tmp_path / n)] for n in ("cut", "whole")
    ]
    assert curves[0] == curves[1]
    assert whole.averages.keys() == set(students)
    assert all(
        isinstance(one, VisionTransformer) and one.grid * one.patch_size == 48 for one in whole.averages.values()
    )


def test_the_teacher_stays_as_it_was_and_the_average_follows_the_student(tmp_path):
    looked_at = teacher()
    before = copy.deepcopy(looked_at.state_dict())
    result = run(tmp_path, steps=8, loaded=looked_at)
    assert all(torch.equal(value, before[name]) for name, value in looked_at.state_dict().items())
    start = student(DistillObjective()).teacher.backbone.state_dict()
    moved = [not torch.equal(value, start[name]) for name, value in result.averages[""].state_dict().items()]
    assert sum(moved) > len(moved) // 2
    assert not any(
        "network" in key.split("/")[1].split(".")[1] for key in stored(tmp_path) if key.startswith("student/")
    )


def test_a_bad_step_of_one_student_leaves_the_other_alone(tmp_path):
    """Weights that are not finite skip the steps of one student; the other is bitwise what it is by itself."""

    def poison(model):
        model.student.backbone.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan

    good = DistillObjective(koleo_weight=1.0)
    from dinov2cli.train import loop

    models = {name: student(good, **STUDENTS[name]) for name in STUDENTS}
    poison(models["coarse"])
    original = loop.Trainer.__init__

    def with_these(self, folder, **arguments):
        original(self, folder, **(arguments | {"models": models}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "__init__", with_these)
        run(tmp_path / "both", steps=3, students=("small", "coarse"), max_bad_steps=10)
    run(tmp_path / "small", steps=3, students=("small",))
    both = stored(tmp_path / "both")
    assert stored(tmp_path / "small") == {key: value for key, value in both.items() if "/small." in key}
    assert [line["coarse/skipped"] for line in lines(tmp_path / "both")] == [1, 1, 1]
    assert "coarse: 1 of the last steps skipped" in (tmp_path / "both" / "log.txt").read_text()


def test_16_bit_matrices_give_what_autocast_makes_of_32_bit_ones():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, kept = teacher(), teacher()
        to_16_bit(kept.network, "bf16")
        held = {p.dtype for p in kept.network.parameters()}
        assert held == {torch.float32, torch.bfloat16}
        for ours, theirs in zip(kept.tokens(images, 4), plain.tokens(images, 4), strict=True):
            assert torch.equal(ours, theirs)


class Repeating:
    """A loader whose images come in `views` views, as `data.views` has it."""

    def __init__(self, loader, views):
        self.loader, self.views = loader, views
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        for batch in self.loader:
            yield batch | {"epoch": batch["epoch"] % self.views}


def test_cached_tokens_train_as_computed_ones_do(tmp_path):
    """The teacher is asked once for every view; a second run asks it nothing and ends bitwise the same."""
    from dinov2cli.data.crops import MultiCrop
    from dinov2cli.data.loader import CropLoader
    from dinov2cli.data.source import open_source

    source = open_source("demo:digits?count=24")
    looked_at, asked = teacher(), []
    forward = looked_at.network.forward_crops
    looked_at.network.forward_crops = lambda images: asked.append(len(images[0])) or forward(images)

    def distil(name, kept=True):
        asked.clear()
        shape = {"images": len(source), "views": 1, "crops": 2, "tokens": 17, "width": WIDTH}
        cache = TokenCache(tmp_path / "cache", **shape, key={"a": 1})
        crop = MultiCrop(global_size=32, local_size=16, local_number=2)
        loader = CropLoader(source, crop=crop, batch_size=8, seed=1, workers=0)
        keep = {
            "distillation": {"cache": cache if kept else None},
            "loader": Repeating(loader, 1),
            "settings": {"accumulate": 2},
        }
        run(tmp_path / name, steps=9, loaded=looked_at, **keep)
        return sum(asked)

    assert distil("first") <= 2 * len(source)
    assert distil("second") == 0
    assert stored(tmp_path / "first") == stored(tmp_path / "second")
    distil("computed", kept=False)
    for one, other in zip(lines(tmp_path / "first")[:3], lines(tmp_path / "computed")[:3], strict=True):
        assert one["loss/total"] == pytest.approx(other["loss/total"], rel=2e-3)  # float16's rounding


def test_students_under_softmax_centring_have_centres_of_their_own(tmp_path):
    run(tmp_path, steps=2, students=("small", "coarse"), centering="softmax")
    kept = stored(tmp_path)
    for name in STUDENTS:
        assert np.abs(np.frombuffer(kept[f"teacher/{name}.dino_center.center"], np.float32)).sum() > 0
    assert len({kept[f"teacher/{name}.dino_center.center"] for name in STUDENTS}) == 1  # they saw the same logits


def test_nothing_is_hidden_from_the_first_batch_s_picture(tmp_path):
    shown = []
    run(tmp_path, steps=1, on_first_batch=lambda *seen: shown.append(seen[2]))
    assert shown[0].shape == (16, 16) and not shown[0].any()

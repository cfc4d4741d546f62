"""The loop of fine-tuning: one result however it is dealt out, stopped or continued; and its views of the images."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.bad import BadImages
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import ALONE, Ranks, join, leave
from dinov2cli.errors import UserError, WorkError
from dinov2cli.evaluation.finetuning.loop import FineTuning, Recipe, fitting_batch, pass_size
from dinov2cli.evaluation.finetuning.mixing import Mixing
from dinov2cli.evaluation.finetuning.model import build_classifier
from dinov2cli.evaluation.finetuning.scores import answer
from dinov2cli.evaluation.finetuning.views import Look, Rows, Views, digests
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer
from tests.launch import ROOT, launch

CPU = torch.device("cpu")
PREPROCESS = Preprocess(16, 16, (0.5,) * 3, (0.5,) * 3)
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


class Squares(ImageSource):
    """Noisy squares of a colour, which is their class; `broken` rows are no images."""

    def __init__(self, number: int = 48, broken: tuple[int, ...] = ()) -> None:
        self.spec, self.kind, self._options, self.number, self.broken = "squares", "made", {}, number, broken

    def __len__(self) -> int:
        return self.number

    def read(self, row: int, role: str = "image") -> bytes:
        if row in self.broken:
            return b"no image"
        rng = np.random.default_rng(int(row))
        pixels = COLOURS[row % 3] + rng.normal(0, 50, (20, 24, 3))
        with io.BytesIO() as file:
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
            return file.getvalue()

    @property
    def ids(self) -> list[str]:
        return [f"{row}.png" for row in range(self.number)]

    paths = ids

    def _own_labels(self):
        return np.arange(self.number) % 3, ["red", "green", "blue"]

    def content_hash(self) -> str:
        return f"squares{self.number}"


def network(**changes) -> VisionTransformer:
    numbers = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "layerscale": None}
    return VisionTransformer(**(numbers | changes), generator=torch.Generator().manual_seed(0)).eval()


def tuning(source: ImageSource | None = None, *, ranks: Ranks = ALONE, most: int = 64, **changes) -> FineTuning:
    source = Squares() if source is None else source
    settings = {"batch": 12, "epochs": 3, "lr": 2e-3, "layer_decay": 0.8, "ema": 0.9}
    mean = PREPROCESS.mean
    recipe = Recipe(Look(16, 0.3, mean=mean, std=mean), Mixing(0.8, 1.0), **(settings | changes))
    generator = torch.Generator().manual_seed(1)
    model = build_classifier(network(), 3, image_size=16, drop_path=0.4, device=CPU, generator=generator)
    labels = source.labels
    assert labels is not None
    return FineTuning(model, source, labels, recipe, seed=3, most=most, ranks=ranks)


def numbers(run: FineTuning) -> dict[str, np.ndarray]:
    """All that a run comes to."""
    groups = {"weights": run.weights, "averages": run.averages}
    found = {f"{kind} {name}": t.detach().numpy().copy() for kind, group in groups.items() for name, t in group.items()}
    return found | {"losses": np.array(run.course.losses)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest difference between two runs."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    run = tuning()
    run.run()
    return numbers(run)


def test_the_same_again_to_the_last_bit(whole):
    run = tuning()
    torch.manual_seed(77)  # whatever state torch's common generator is in
    state = torch.get_rng_state()
    run.run()
    assert same(numbers(run), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_of_any_size_come_to_the_same(whole):
    """With stochastic depth and mixing at work: what is dropped and mixed does not depend on the passes."""
    for most in (6, 2):
        run = tuning(most=most)
        run.run()
        assert apart(numbers(run), whole) < 2e-5


def test_learns_and_the_averages_do_too(whole):
    source = Squares(60)
    run = tuning(source, epochs=20, lr=5e-3)
    run.run()
    fresh = Squares(90)
    found = answer(
        run.model,
        {"raw": {}, "ema": run.averages},
        Rows(fresh, np.arange(60, 90)),
        np.arange(30) % 3,
        preprocess=PREPROCESS,
        device=CPU,
        precision="fp32",
        batch_size=8,
    )
    assert found.accuracy("raw") > 0.9 and found.accuracy("ema") > 0.9
    assert run.losses()[-1] < run.losses()[0] and len(run.losses()) == 20
    # The loss of the first steps is that of guessing.
    assert run.course.losses[0] == pytest.approx(math.log(3), abs=0.1)


def test_killed_by_force_and_continued(whole, tmp_path):
    """SIGKILL amid the run, another process afterwards: bitwise what it would have been."""
    done = subprocess.run(
        [sys.executable, __file__, "kill", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    stage = Parts(tmp_path).stage("finetune", {})
    run = tuning()
    told = []
    run.run(stage=stage, every=2, advance=told.append)
    assert run.resumed == 6 and sum(told) == run.total == 12
    assert same(numbers(run), whole)
    # Continued once more it is at its end already.
    again = tuning()
    again.run(stage=stage)
    assert again.resumed == 12 and same(numbers(again), whole)


def test_two_processes_share_a_batch(whole, tmp_path):
    done = launch(__file__, "ranks", str(tmp_path), processes=2, module="")
    assert done.returncode == 0, done.stderr
    found = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2)]
    assert same(found[0], found[1])
    assert apart(found[0], whole) < 2e-5
    # Killed at step 6 by an error of one process, continued from what the main process alone holds.
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(one["error"] == "WorkError" and one["resumed"] == 6 for one in told)
    for one in told:
        assert one["answers"] == told[0]["answers"] and len(one["answers"]) == 48


def test_held_out_images_choose_the_epoch():
    asked: list[dict[str, torch.Tensor]] = []
    accuracies = [0.2, 0.7, 0.7]

    def held_out(weights: dict[str, torch.Tensor]) -> float:
        asked.append({name: weight.detach().clone() for name, weight in weights.items()})
        return accuracies[len(asked) - 1]

    for which in ("raw", "ema"):
        asked.clear()
        run = tuning()
        run.run(held_out=held_out, which=which)
        assert run.course.best == 2 and run.course.held_out == accuracies and not run.averages
        assert all(torch.equal(weight, asked[1][name]) for name, weight in run.weights.items())


def test_the_chosen_epoch_survives_a_stop(tmp_path):
    stage = Parts(tmp_path).stage("finetune", {})
    accuracies = iter([0.9, 0.1])

    def fails(_weights) -> float:
        if (found := next(accuracies, None)) is None:
            raise WorkError("no more")
        return found

    with pytest.raises(WorkError, match="no more"):
        tuning().run(stage=stage, every=1, held_out=fails)
    run = tuning()
    run.run(stage=stage, every=1, held_out=lambda _: 0.3)
    assert run.course.held_out == [0.9, 0.1, 0.3] and run.course.best == 1
    straight = tuning()
    straight.run(held_out=lambda _: 0.5)  # of equal epochs the first
    assert straight.course.best == 1
    assert all(torch.equal(weight, straight.weights[name]) for name, weight in run.weights.items())


def test_a_loss_that_is_not_finite_stops_and_is_not_kept(tmp_path):
    stage = Parts(tmp_path).stage("finetune", {})
    run = tuning()
    with torch.no_grad():
        run.model.head.bias[0] = torch.nan
    with pytest.raises(WorkError, match=r"nan at step 1 of 12: lower lr"):
        run.run(stage=stage, every=2)
    assert stage.load(0) is None


def test_batches_and_passes_that_fit():
    assert fitting_batch(128, 1000, 2) == 128
    assert fitting_batch(128, 31, 2) == 28
    assert fitting_batch(128, 3, 4) == 8
    for batch, processes in ((7, 1), (12, 4), (2, 2)):
        with pytest.raises(UserError, match="multiple of"):
            fitting_batch(batch, 1000, processes)
    assert [pass_size(48, most) for most in (64, 47, 16, 7, 1)] == [48, 24, 16, 6, 2]


def test_views_do_not_depend_on_workers_or_ranks():
    source = Squares(20, broken=(7,))
    look = Look(16, 0.3, jitter=0.4)

    def seen(workers: int, rank: int = 0, world_size: int = 1) -> list[tuple[list[int], torch.Tensor]]:
        own = 12 // world_size
        views = Views(
            source,
            look,
            batch=own,
            seed=5,
            workers=workers,
            bad=BadImages(0.5),
            rank=rank,
            world_size=world_size,
        )
        batches, found = views.batches(first=1), []
        for _ in range(2):
            batch = next(batches)
            found.append((batch.rows.tolist(), views.coloured(batch, slice(0, own), CPU)))
        batches.close()
        return found

    alone = seen(0)
    assert all(7 not in rows and images.shape == (12, 3, 16, 16) for rows, images in alone)
    halves = [seen(0, rank, 2) for rank in range(2)]
    dealt = [(a[0] + b[0], torch.cat([a[1], b[1]])) for a, b in zip(*halves, strict=True)]
    for other in (seen(2), dealt):
        for (rows, images), (others, theirs) in zip(alone, other, strict=True):
            assert rows == others and torch.equal(images, theirs)
    # Colours are jittered, and without jitter the crops are only normalised.
    plain = Views(source, Look(16, 0.3, jitter=0), batch=12, seed=5, workers=0, bad=BadImages(0.5))
    batch = next(plain.batches(first=1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (look.mean, look.std))
    whole = slice(0, 12)
    assert torch.allclose(plain.coloured(batch, whole, CPU), (batch.crops / 255 - mean) / std, atol=1e-5)
    assert not torch.allclose(plain.coloured(batch, whole, CPU), alone[0][1], atol=0.05)


def test_some_rows_of_a_source_are_a_source():
    source = Squares(20, broken=(4,))
    part = Rows(source, np.array([1, 4, 9, 17]))
    assert len(part) == 4 and part.ids == ["1.png", "4.png", "9.png", "17.png"] and part.name(2) == "9.png"
    assert part.read(3) == source.read(17)
    assert part.labels is not None and part.labels.tolist() == [1, 1, 0, 2]
    assert digests(source).shape == (20, 32)
    assert bytes(digests(part)[2]) == hashlib.sha256(source.read(9)).digest()


def _scenario(command: str, folder: Path) -> None:
    """What the tests above start in processes of its own."""
    torch.set_num_threads(1)
    stage = Parts(folder).stage("finetune", {})
    if command == "kill":
        run = tuning()

        def advance(_steps: int) -> None:
            if run.course.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        run.run(stage=stage, every=2, advance=advance)
        return
    ranks = join("cpu")
    first = tuning(ranks=ranks)

    def fail(_steps: int) -> None:
        # The main process has just saved; the other one stops, and all hear of it.
        if first.course.step == 6:
            ranks.together(lambda: _stop(ranks.rank == 1))

    told: dict = {}
    try:
        first.run(stage=stage if ranks.main else None, every=3, advance=fail)
    except WorkError as error:
        told["error"] = type(error).__name__
    run = tuning(ranks=ranks)
    run.run(stage=stage if ranks.main else None, every=3)
    told["resumed"] = run.resumed
    sets: dict = {"raw": {}}
    source = Squares()
    told["answers"] = (
        answer(
            run.model,
            sets,
            source,
            np.arange(48) % 3,
            preprocess=PREPROCESS,
            device=CPU,
            precision="fp32",
            batch_size=7,
            ranks=ranks,
        )
        .predictions["raw"]
        .tolist()
    )
    np.savez(folder / f"{ranks.rank}.npz", **numbers(run))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))
    ranks.wait()
    leave()


def _stop(here: bool) -> None:
    if here:
        raise WorkError("this process stops")


if __name__ == "__main__":
    _scenario(sys.argv[1], Path(sys.argv[2]))

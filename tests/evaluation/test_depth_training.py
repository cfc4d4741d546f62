"""Training of depth heads: what they are shown, what moves, and that neither ranks nor a kill change it."""

import textwrap

import numpy as np
import pytest
import torch

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.source import open_source
from dinov2cli.distributed import ALONE
from dinov2cli.errors import WorkError
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.tokens import Sight
from dinov2cli.evaluation.depth.data import DepthScale
from dinov2cli.evaluation.depth.heads import build_head, head_blocks
from dinov2cli.evaluation.depth.measures import gradient_loss, gradient_sums, log_sums, scale_invariant_log_loss
from dinov2cli.evaluation.depth.training import (
    WHOLE,
    DepthBatches,
    DepthLoss,
    Recipe,
    default_steps,
    recoloured,
    train_depth,
)
from tests.evaluation.depth_sets import PATCH, scenes, tiny_model
from tests.launch import launch

SCALE = DepthScale(units_per_metre=1000)


def seeing(kind="lin4", size=None):
    model = tiny_model()
    blocks = tuple(head_blocks(kind, model.backbone.depth))
    sight = Sight(size, WHOLE, WHOLE)
    return Seeing(model.backbone, model.preprocess.normalize, sight, blocks, torch.device("cpu"), norm=False)


def made(kind="lin4"):
    return build_head(kind, 32, bins=16, channels=8, start=2.5, generator=torch.Generator().manual_seed(0))


def batches(spec, recipe, **settings):
    source = open_source(spec)
    sight = settings.pop("sight", Sight(None, WHOLE, WHOLE))
    return DepthBatches(source, np.arange(len(source)), sight, SCALE, recipe, patch_size=PATCH, seed=3, **settings)


@pytest.mark.parametrize(("images", "steps"), [(290, 1000), (6400, 10_000), (24_231, 37_861), (10**6, 38_400)])
def test_steps_follow_the_number_of_images(images, steps):
    assert default_steps(images, 16) == steps


def test_crops_keep_image_and_depth_together(tmp_path):
    recipe = Recipe(10, batch_size=6, crop=0.7, colour=0)
    spec = scenes(tmp_path / "set.parquet", 6)
    (part,) = batches(spec, recipe)(0)
    assert part.images.shape == (6, 3, 28, 28)
    assert part.targets.shape == (6, 28, 28)
    np.testing.assert_allclose(part.targets, 1 + 3 * part.images[:, 0].float() / 255, atol=1e-3)
    (again,) = batches(spec, recipe, workers=2)(0)
    assert torch.equal(part.images, again.images)
    assert not torch.equal(part.images, batches(spec, recipe)(1)[0].images)


def test_images_are_shown_at_the_size_asked_for(tmp_path):
    spec = scenes(tmp_path / "set.parquet", 2)
    (part,) = batches(spec, Recipe(10, batch_size=2, crop=1.0, colour=0), sight=Sight(84, WHOLE, WHOLE))(0)
    assert part.targets.shape == (2, 84, 112)


def test_colours_change_within_their_limits():
    image = torch.full((3, 4, 5), 128, dtype=torch.uint8)
    found = torch.stack([recoloured(image, np.random.default_rng(seed)) for seed in range(40)]).float() / 255
    assert found.shape == (40, 3, 4, 5)
    level = 128 / 255
    assert found.min() >= level**1.1 * 0.75 * 0.9 - 0.005
    assert found.max() <= level**0.9 * 1.25 * 1.1 + 0.005
    assert found.std(dim=0).min() > 0.02
    assert (found[:, 0] != found[:, 1]).any()


@pytest.mark.parametrize("gradient", [0.0, 0.5])
def test_the_loss_and_its_gradient_are_those_of_the_whole_batch(tmp_path, gradient):
    head, shown = made(), seeing()
    parts = batches(scenes(tmp_path / "set.parquet", 4), Recipe(10, batch_size=4, crop=1.0))(0)
    total, count = DepthLoss(head, shown, SCALE, gradient)(parts)
    total.backward()
    found = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    tokens, depth = parts[0].seen(shown)
    predicted = torch.nn.functional.interpolate(
        head(tokens.maps, tokens.cls)[:, None], depth.shape[1:], mode="bilinear", align_corners=False
    )[:, 0]
    valid = (depth > 0.001) & (depth < 10)
    expected = scale_invariant_log_loss(log_sums(predicted, depth, valid))
    expected = expected + gradient * gradient_loss(gradient_sums(predicted, depth, valid))
    expected.backward()
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, parameter in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lin1", "lin4", "dpt"])
def test_training_moves_the_head_alone_and_lowers_the_loss(tmp_path, kind):
    source, shown, head = open_source(scenes(tmp_path / "set.parquet", 12)), seeing(kind), made(kind)
    before = {name: value.clone() for name, value in shown.encoder.state_dict().items()}
    recipe = Recipe(50, batch_size=6, lr=0.03 if kind != "dpt" else 0.002, gradient=0, crop=1.0, colour=0)
    trained = train_depth(head, source, np.arange(12), shown, SCALE, recipe, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in shown.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in shown.encoder.parameters())
    assert trained.losses.shape == (50,)
    assert trained.losses[-5:].mean() < 0.75 * trained.losses[:5].mean()
    assert all(not torch.equal(new, old) for new, old in zip(head.parameters(), made(kind).parameters(), strict=True))


def test_a_model_whose_tokens_are_no_numbers_is_refused(tmp_path):
    shown = seeing()
    with torch.no_grad():
        shown.encoder.pos_embed[:] = torch.nan
    with pytest.raises(WorkError, match="patch tokens of the model hold NaN"):
        train_depth(
            made(), open_source(scenes(tmp_path / "a.parquet", 2)), np.arange(2), shown, SCALE, Recipe(2), seed=0
        )


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    source, shown = open_source(scenes(tmp_path / "set.parquet", 5)), seeing()
    recipe = Recipe(9, batch_size=4, lr=0.01)

    def run(head, **settings):
        return train_depth(head, source, np.arange(5), shown, SCALE, recipe, seed=0, **settings)

    whole = made()
    losses = run(whole).losses
    done = []

    def stop_at_seven(_count):
        done.append(1)
        if len(done) == 7:
            raise Stopped

    stage = Parts(tmp_path).stage("head", {})
    with pytest.raises(Stopped):
        run(made(), stage=stage, every=2, on_step=stop_at_seven)
    left, steps = made(), []
    again = run(left, stage=stage, every=2, on_step=steps.append)
    assert len(steps) == 3  # the sixth step was kept
    np.testing.assert_array_equal(again.losses, losses)
    for ours, expected in zip(left.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


_LAUNCHED = """
    import sys
    import numpy as np
    from dinov2cli.distributed import join
    from tests.evaluation.test_depth_training import trained

    ranks = join("cpu")
    losses, numbers = trained(sys.argv[1], ranks)
    np.savez(f"{sys.argv[2]}/{ranks.rank}.npz", losses=losses, numbers=numbers)
"""


def trained(spec, ranks=ALONE):
    """Losses and all numbers of a head after four steps."""
    head, recipe = made(), Recipe(4, batch_size=3, lr=0.01)
    found = train_depth(head, open_source(spec), np.arange(5), seeing(), SCALE, recipe, seed=0, ranks=ranks)
    return found.losses, torch.cat([parameter.detach().flatten() for parameter in head.parameters()]).numpy()


@pytest.mark.slow
def test_two_ranks_train_the_head_that_one_trains(tmp_path):
    spec, script = scenes(tmp_path / "set.parquet", 5), tmp_path / "script.py"
    script.write_text(textwrap.dedent(_LAUNCHED))
    done = launch(str(script), spec, str(tmp_path), processes=2, module="")
    assert done.returncode == 0, done.stderr
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    losses, numbers = trained(spec)
    np.testing.assert_array_equal(first["numbers"], second["numbers"])
    np.testing.assert_allclose(first["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(first["numbers"], numbers, atol=2e-4)
    assert np.abs(numbers - torch.cat([p.detach().flatten() for p in made().parameters()]).numpy()).max() > 0.01

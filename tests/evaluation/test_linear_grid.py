import numpy as np
import pytest

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.linear.grid import LEARNING_RATES, Batches, default_steps, head_grid, split_validation


def test_grid_has_52_heads_with_unique_names():
    heads, notes = head_grid(4)
    assert len(LEARNING_RATES) == 13 and len(heads) == 52 and not notes
    assert len({head.id for head in heads}) == 52
    # Rates that round to one name stay two heads.
    close, _ = head_grid(4, learning_rates=[0.10001, 0.10002], blocks=[1], averaged_patches=[True])
    assert len({head.id for head in close}) == 2


def test_shallow_models_use_the_blocks_they_have():
    heads, notes = head_grid(2)
    assert {head.blocks for head in heads} == {1, 2} and len(heads) == 52
    assert notes == ["last 4 blocks clipped to the 2 there are"]


def test_impossible_grids_are_refused():
    for rates in ([], [0.1, -1], [float("nan")], [float("inf")]):
        with pytest.raises(UserError, match=r"^linear learning rates are"):
            head_grid(4, learning_rates=rates)
    with pytest.raises(UserError, match=r"^linear blocks are \[0\]"):
        head_grid(4, blocks=[0])


def test_validation_is_held_out_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    fit, held = split_validation(labels, 0.1, seed=0)
    assert np.array_equal(np.sort(np.concatenate([fit, held])), np.arange(113))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 1, 1, 0]


def test_one_image_per_class_names_the_cure():
    for labels in (np.arange(5), np.zeros(0, np.int64)):
        with pytest.raises(InputError, match="no training class has two images, so none can be held out") as caught:
            split_validation(labels, 0.1, seed=0)
        assert "use `dinov2 eval knn`" in str(caught.value)


@pytest.mark.parametrize("rows, batch", [(10, 4), (7, 7), (5, 1), (3, 8)])
def test_batches_are_passes_over_all_rows(rows, batch):
    batches = Batches(rows, batch, seed=1)
    walked = np.concatenate([batches.at(step) for step in range(3 * rows)])
    passes = walked[: len(walked) // rows * rows].reshape(-1, rows)
    assert (np.sort(passes, axis=1) == np.arange(rows)).all()
    if rows > 4:
        assert len({tuple(order) for order in passes[:4]}) > 1
    # Any step can be asked for first.
    for step in (3 * rows - 1, 0, 2):
        assert np.array_equal(Batches(rows, batch, seed=1).at(step), batches.at(step))


def test_steps_are_passes_but_never_too_few():
    assert default_steps(50_000, 1024) == 1000
    assert default_steps(1_281_167, 1024) == 12_512
    assert default_steps(1_281_167, 1024, epochs=1) == 1252

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.linear import LEARNING_RATES, _Bank, head_grid, linear_probe, split_validation


@pytest.fixture(scope="module")
def digits():
    """Pixels of digits as if they were tokens: only the last block and the averaged patches know anything."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 4 - 1).astype(np.float32)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(images), 3, 64)).astype(np.float32)
    tokens = np.concatenate([noise, images[:, None]], axis=1)
    patches = images + rng.normal(0, 0.1, images.shape).astype(np.float32)
    return (tokens[:1200], patches[:1200], labels[:1200]), (tokens[1200:], patches[1200:], labels[1200:])


def test_reaches_logistic_regression_on_digits(digits):
    train, test = digits
    result = linear_probe(*train, *test, seed=0)
    oracle = LogisticRegression(max_iter=2000).fit(train[0][:, -1], train[2]).score(test[0][:, -1], test[2])
    assert oracle > 0.88
    assert result.correct().mean() > oracle - 0.02
    # The accuracy is that of the predictions, and ranks and predictions tell one story.
    assert np.array_equal(result.correct(), result.predictions == test[2])
    assert result.correct(top=5).mean() > result.correct().mean()


def test_one_bank_moves_as_torch_sgd_moves_each_head():
    heads, _ = head_grid(1, learning_rates=[0.01, 0.3], blocks=[1], averaged_patches=[False])
    bank = _Bank(heads, slice(0, 6), 4, 32, torch.device("cpu"), seed=0)
    references = []
    for index, head in enumerate(heads):
        layer = torch.nn.Linear(6, 4)
        with torch.no_grad():
            layer.weight.copy_(bank.weight_DHC[:, index].T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=head.learning_rate * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0)
        references.append((layer, optimizer, schedule))
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        x = torch.randn(32, 6, generator=generator)
        y = torch.randint(0, 4, (32,), generator=generator)
        bank.step(x, y, 0.5 * (1 + math.cos(math.pi * step / 20)))
        for layer, optimizer, schedule in references:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
    for index, (layer, _, _) in enumerate(references):
        assert torch.allclose(bank.weight_DHC[:, index].T, layer.weight, atol=1e-6)
        assert torch.allclose(bank.bias_HC[index], layer.bias, atol=1e-6)


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


@pytest.mark.parametrize("blocks, patches, signal", [(1, False, "last"), (4, False, "first"), (1, True, "patches")])
def test_each_head_reads_its_own_columns(blocks, patches, signal):
    """Only one part of the input knows the label, and the heads that win are those that read it."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    tokens = rng.normal(size=(400, 4, 8)).astype(np.float32)
    averaged = rng.normal(size=(400, 8)).astype(np.float32)
    {"last": tokens[:, 3], "first": tokens[:, 0], "patches": averaged}[signal][np.arange(400), labels] += 6
    result = linear_probe(
        tokens[:300], averaged[:300], labels[:300], tokens[300:], averaged[300:], labels[300:], seed=0, steps=200
    )
    assert result.correct().mean() > 0.9
    for head in result.heads:
        reads = head.blocks >= blocks and (head.averaged_patches or not patches)
        if head.learning_rate == 0.1:
            assert (result.validation[head.id] > 0.8) == reads, head.id


def test_test_labels_never_reach_training_or_choice(digits):
    train, (tokens, patches, labels) = digits
    honest = linear_probe(*train, tokens, patches, labels, seed=0, steps=60)
    shuffled = linear_probe(*train, tokens, patches, np.roll(labels, 1), seed=0, steps=60)
    assert honest.chosen == shuffled.chosen and honest.validation == shuffled.validation
    assert np.array_equal(honest.predictions, shuffled.predictions)
    assert shuffled.correct().mean() < 0.3


def test_seed_decides_everything(digits):
    train, test = digits
    first = linear_probe(*train, *test, seed=1, steps=50)
    second = linear_probe(*train, *test, seed=1, steps=50)
    other = linear_probe(*train, *test, seed=2, steps=50)
    assert first.validation == second.validation and np.array_equal(first.predictions, second.predictions)
    assert first.validation != other.validation


def test_validation_is_held_out_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    fit, held = split_validation(labels, 0.1, seed=0)
    assert np.array_equal(np.sort(np.concatenate([fit, held])), np.arange(113))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 1, 1, 0]


def test_one_image_per_class_names_the_cure():
    with pytest.raises(InputError, match="no training class has two images, so none can be held out") as caught:
        split_validation(np.arange(5), 0.1, seed=0)
    assert "use `dinov2 eval knn`" in str(caught.value)


def test_diverged_heads_are_never_chosen_and_all_diverged_is_an_error(digits):
    (tokens, patches, labels), test = digits
    rates = [1e-5, 1e38]
    result = linear_probe(tokens, patches, labels, *test, seed=0, steps=30, learning_rates=rates)
    assert result.chosen.learning_rate == 1e-5
    assert min(result.validation.values()) == -1
    with pytest.raises(WorkError, match=r"^all 4 linear heads diverged: the features are too large"):
        linear_probe(tokens, patches, labels, *test, seed=0, steps=30, learning_rates=[1e38])


def test_rows_say_how_the_head_was_chosen(digits):
    train, test = digits
    rows = linear_probe(*train, *test, seed=0, steps=50).rows(model="pixels", dataset="digits")
    assert [row.metric for row in rows] == ["top1", "top5"]
    settings = rows[0].settings
    assert settings["heads"] == 52 and settings["train_images"] + settings["validation_images"] == 1200
    assert settings["augmentation"].startswith("none") and "held out" in settings["selection"]
    assert rows[0].ci_low < rows[0].value < rows[0].ci_high and rows[0].n == 597


def test_bad_settings_and_shapes_are_refused(digits):
    train, test = digits
    with pytest.raises(UserError, match=r"^linear batch size and steps are 0 and None"):
        linear_probe(*train, *test, seed=0, batch_size=0)
    with pytest.raises(UserError, match=r"^linear learning rates are \[0\]"):
        linear_probe(*train, *test, seed=0, learning_rates=[0])
    with pytest.raises(UserError, match=r"^the validation fraction is 1, expected a number between 0 and 1"):
        linear_probe(*train, *test, seed=0, validation_fraction=1)
    with pytest.raises(ValueError, match=r"must be \[n, blocks, D\] and \[n, D\], got \(1200, 64\)"):
        linear_probe(train[0][:, 0], *train[1:], *test, seed=0)

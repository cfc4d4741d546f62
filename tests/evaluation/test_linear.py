import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dinov2cli.artifacts.parts import Parts
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.linear.probe import KEEP_EVERY, LinearClassifier, LinearTraining, train_linear
from dinov2cli.evaluation.linear.training import Inputs


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


def same(first, second) -> bool:
    """Bit for bit."""
    return (
        first.chosen == second.chosen
        and first.validation == second.validation
        and torch.equal(first.classifier.weight, second.classifier.weight)
        and torch.equal(first.classifier.bias, second.classifier.bias)
    )


def test_reaches_logistic_regression_on_digits(digits):
    train, test = digits
    trained = train_linear(*train, seed=0)
    oracle = LogisticRegression(max_iter=2000).fit(train[0][:, -1], train[2]).score(test[0][:, -1], test[2])
    answers = trained.classifier.logits(*test[:2]).argmax(1).numpy()
    assert oracle > 0.88
    assert (answers == test[2]).mean() > oracle - 0.02
    assert trained.steps == 1000 and trained.n_train + trained.n_validation == 1200


@pytest.mark.parametrize("blocks, patches, signal", [(1, False, "last"), (4, False, "first"), (1, True, "patches")])
def test_each_head_reads_its_own_columns(blocks, patches, signal):
    """Only one part of the input knows the label, and the heads that learn it are those that read it."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    tokens = rng.normal(size=(400, 4, 8)).astype(np.float32)
    averaged = rng.normal(size=(400, 8)).astype(np.float32)
    {"last": tokens[:, 3], "first": tokens[:, 0], "patches": averaged}[signal][np.arange(400), labels] += 6
    trained = train_linear(tokens[:300], averaged[:300], labels[:300], seed=0, steps=200)
    answers = trained.classifier.logits(tokens[300:], averaged[300:]).argmax(1).numpy()
    assert (answers == labels[300:]).mean() > 0.9
    for head in trained.heads:
        reads = head.blocks >= blocks and (head.averaged_patches or not patches)
        if head.learning_rate == 0.1:
            assert (trained.validation[head.id] > 0.8) == reads, head.id


def test_the_classifier_is_the_product_it_says(digits):
    (tokens, patches, _), _ = digits
    rng = np.random.default_rng(3)
    for blocks, averaged in ((1, False), (4, True), (2, True)):
        weight = rng.normal(size=((blocks + averaged) * 64, 5)).astype(np.float32)
        bias = rng.normal(size=5).astype(np.float32)
        classifier = LinearClassifier(torch.from_numpy(weight), torch.from_numpy(bias), blocks, averaged)
        inputs = [tokens[:70, block] for block in range(4 - blocks, 4)] + [patches[:70]] * averaged
        expected = np.concatenate(inputs, axis=1).astype(np.float64) @ weight + bias
        found = classifier.logits(tokens[:70], patches[:70], block=32)
        assert found.dtype == torch.float32 and found.shape == (70, 5)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"features of width 128 .* the head was trained on 192"):
        classifier.logits(tokens[:70])


def test_seed_decides_everything(digits):
    train, _ = digits
    first = train_linear(*train, seed=1, steps=50)
    assert same(first, train_linear(*train, seed=1, steps=50))
    assert first.validation != train_linear(*train, seed=2, steps=50).validation


def test_a_head_does_not_depend_on_the_others(digits):
    """The whole grid, and a grid of one head only: the same weights but for the order of sums, the same answers."""
    train, _ = digits
    grid = train_linear(*train, seed=0, steps=120)
    rate, blocks = grid.chosen.learning_rate, grid.chosen.blocks
    alone = train_linear(*train, seed=0, steps=120, learning_rates=[rate], blocks=[blocks])
    other = next(head for head in alone.heads if head.averaged_patches == grid.chosen.averaged_patches)
    assert alone.validation[other.id] == pytest.approx(grid.validation[grid.chosen.id], abs=0.01)
    assert alone.chosen == other
    assert torch.allclose(alone.classifier.weight, grid.classifier.weight, rtol=1e-3, atol=1e-5)


def test_diverged_heads_harm_none_and_are_never_chosen(digits):
    (tokens, patches, labels), _ = digits
    alone = train_linear(tokens, patches, labels, seed=0, steps=30, learning_rates=[1e-3])
    beside = train_linear(tokens, patches, labels, seed=0, steps=30, learning_rates=[1e-3, 1e38])
    assert min(beside.validation.values()) == -1 and beside.settings()["diverged_heads"] == 4
    assert beside.chosen == alone.chosen
    assert torch.allclose(alone.classifier.weight, beside.classifier.weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(WorkError, match=r"^all 4 linear heads diverged: the features are too large"):
        train_linear(tokens, patches, labels, seed=0, steps=30, learning_rates=[1e38])


def test_one_vector_without_patches_has_a_grid_of_rates(digits):
    (tokens, _, labels), (test_tokens, _, test_labels) = digits
    trained = train_linear(tokens[:, 3:], None, labels, seed=0, steps=300)
    assert len(trained.heads) == 13 and {head.reads for head in trained.heads} == {(1, False)}
    assert "this model gives one vector per image: the grid has learning rates only" in trained.notes
    answers = trained.classifier.logits(test_tokens[:, 3:], None).argmax(1).numpy()
    assert (answers == test_labels).mean() > 0.85


def test_the_settings_tell_how_the_head_was_chosen(digits):
    settings = train_linear(*digits[0], seed=0, steps=50, batch_size=64).settings()
    assert settings["heads"] == 52 and settings["train_images"] + settings["validation_images"] == 1200
    assert "held out" in settings["selection"] and settings["steps"] == 50 and settings["batch_size"] == 64


class _StopError(Exception):
    pass


def test_a_stopped_training_goes_on_bitwise_the_same(digits, tmp_path):
    train, _ = digits
    settings = {"seed": 5, "steps": 90, "batch_size": 96, "keep_every": 20}
    whole = train_linear(*train, **settings)
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done == 71:
            raise _StopError

    kept = {"store": Parts(tmp_path), "features": {"model": "a"}}
    with pytest.raises(_StopError):
        train_linear(*train, **settings, **kept, advance=stop)
    counted: list[int] = []
    assert same(whole, train_linear(*train, **settings, **kept, advance=counted.append))
    assert len(counted) == 30  # from step 60 on
    counted.clear()
    assert same(whole, train_linear(*train, **settings, **kept, advance=counted.append)) and not counted
    # Other features, labels or settings begin anew.
    train_linear(*train, **settings, store=Parts(tmp_path), features={"model": "b"}, advance=counted.append)
    train_linear(*train[:2], train[2][::-1], **settings, **kept, advance=counted.append)
    train_linear(*train, **{**settings, "seed": 6}, **kept, advance=counted.append)
    assert len(counted) == 270


_KILLED = """
    import os, signal, sys
    import numpy as np
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.evaluation.linear.probe import train_linear
    arrays = np.load(sys.argv[1])
    done = 0
    def advance(count):
        global done
        done += count
        if done == 55:
            os.kill(os.getpid(), signal.SIGKILL)
    train_linear(arrays["tokens"], arrays["patches"], arrays["labels"], seed=0, steps=80, keep_every=10,
                 store=Parts(__import__("pathlib").Path(sys.argv[2])), features={"model": "a"}, advance=advance)
"""


def test_a_killed_training_goes_on_bitwise_the_same(digits, tmp_path):
    (tokens, patches, labels), _ = digits
    np.savez(tmp_path / "features.npz", tokens=tokens, patches=patches, labels=labels)
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path / "features.npz"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    counted: list[int] = []
    kept = {"store": Parts(tmp_path), "features": {"model": "a"}, "advance": counted.append, "keep_every": 10}
    resumed = train_linear(tokens, patches, labels, seed=0, steps=80, **kept)
    assert len(counted) == 30
    assert same(resumed, train_linear(tokens, patches, labels, seed=0, steps=80))


def test_a_state_that_is_damaged_or_of_other_heads_is_not_taken(digits, tmp_path):
    train, _ = digits
    stage = Parts(tmp_path).stage("linear", {})
    about = {"available_blocks": 4, "dim": 64, "seed": 0, "steps": 20, "stage": stage}
    inputs = Inputs.of(*train[:2], "train")
    LinearTraining(train[2], **about).run(inputs)
    assert LinearTraining(train[2], **about).step == 20
    assert LinearTraining(train[2], **about, blocks=[1]).step == 0
    (file,) = tmp_path.rglob("*.npz")
    file.write_bytes(file.read_bytes()[:1000])
    assert LinearTraining(train[2], **about).step == 0
    assert KEEP_EVERY > 20  # so what was kept came from the end of `run`


def test_bad_settings_and_features_are_refused(digits):
    (tokens, patches, labels), _ = digits
    with pytest.raises(UserError, match=r"^linear batch size, epochs and steps are 0, 10 and None"):
        train_linear(tokens, patches, labels, seed=0, batch_size=0)
    with pytest.raises(UserError, match=r"^linear learning rates are \[0\]"):
        train_linear(tokens, patches, labels, seed=0, learning_rates=[0])
    with pytest.raises(UserError, match=r"^the validation fraction is 1, expected a number between 0 and 1"):
        train_linear(tokens, patches, labels, seed=0, validation_fraction=1)
    with pytest.raises(ValueError, match=r"must be \[n, blocks, D\] and \[n, D\], got \(1200, 64\)"):
        train_linear(tokens[:, 0], patches, labels, seed=0)
    with pytest.raises(InputError, match="none can be held out"):
        train_linear(tokens[:3], patches[:3], np.arange(3), seed=0)
    broken = patches.copy()
    broken[7, 3] = np.nan
    with pytest.raises(WorkError, match=r"^1 of 1200 feature vectors of photos hold NaN or infinity"):
        train_linear(tokens, broken, labels, seed=0, name="photos")

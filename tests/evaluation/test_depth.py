"""Bins, losses, windows and metrics of depth, against their definitions in float64."""

import numpy as np
import pytest
import torch

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.depth.measures import (
    bin_depths,
    crop_window,
    errors_of,
    expected_depth,
    gradient_loss,
    gradient_sums,
    image_errors,
    log_sums,
    scale_invariant_log_loss,
    valid_pixels,
)

RANGE = {"min_depth": 0.001, "max_depth": 10.0}


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def maps(rng, *shape, holes=0.2):
    """Predicted and true depths, some of the true ones missing or cut off."""
    truth = rng.uniform(0.5, 9.0, shape)
    predicted = truth * rng.uniform(0.5, 2.5, shape)
    truth[rng.random(shape) < holes] = 0.0
    truth[rng.random(shape) < 0.05] = 10.0
    truth[rng.random(shape) < 0.05] = np.nan
    return predicted, truth


def sig_loss(predicted, truth, valid):
    return scale_invariant_log_loss(log_sums(predicted, truth, valid))


def matching_loss(predicted, truth, valid):
    return gradient_loss(gradient_sums(predicted, truth, valid))


def test_bins_span_the_range_evenly():
    depths = bin_depths(256, 0.001, 10.0)
    assert depths.shape == (256,)
    np.testing.assert_allclose(depths, 0.001 + np.arange(256) * (10 - 0.001) / 255, rtol=1e-6)


@pytest.mark.parametrize(("bins", "low", "high"), [(1, 0.001, 10), (256, 0.0, 10), (256, 10, 10), (8, 1, float("inf"))])
def test_impossible_bins_are_refused(bins, low, high):
    with pytest.raises(UserError, match="expected"):
        bin_depths(bins, low, high)


def test_expected_depth_is_the_mean_of_the_bins_under_linear_weights(rng):
    scores = rng.normal(size=(2, 16, 3, 5))
    depths = bin_depths(16, 0.5, 8.0)
    weights = np.maximum(scores, 0) + 0.1
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.tensordot(weights, depths.double().numpy(), axes=([1], [0]))
    np.testing.assert_allclose(expected_depth(torch.tensor(scores).float(), depths), expected, rtol=1e-5)


def test_a_pixel_whose_scores_are_all_negative_gets_the_middle_of_the_range():
    depths = bin_depths(11, 1.0, 3.0)
    np.testing.assert_allclose(expected_depth(torch.full((1, 11, 1, 1), -5.0), depths), 2.0, rtol=1e-6)


def test_scale_invariant_loss_by_definition(rng):
    predicted, truth = maps(rng, 2, 9, 11)
    valid = (truth > 0.001) & (truth < 10)
    g = np.log(predicted[valid] + 1e-3) - np.log(truth[valid] + 1e-3)
    expected = np.sqrt(np.mean(g**2) - 0.85 * np.mean(g) ** 2)
    tensors = torch.tensor(predicted), torch.tensor(truth)
    found = sig_loss(*tensors, valid_pixels(tensors[1], 0.001, 10))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_gradient_loss_by_definition(rng):
    predicted, truth = maps(rng, 2, 17, 20)
    expected = 0.0
    for step in (1, 2, 4, 8):
        p, t = predicted[:, ::step, ::step], truth[:, ::step, ::step]
        valid = (t > 0.001) & (t < 10)
        total = 0.0
        for b, i, j in np.ndindex(p.shape):
            for other in ((b, i + 2, j), (b, i, j + 2)):
                if other[1] < p.shape[1] and other[2] < p.shape[2] and valid[b, i, j] and valid[other]:
                    here = np.log(p[b, i, j] + 1e-3) - np.log(t[b, i, j] + 1e-3)
                    there = np.log(p[other] + 1e-3) - np.log(t[other] + 1e-3)
                    total += abs(here - there)
        expected += total / valid.sum()
    tensors = torch.tensor(predicted), torch.tensor(truth)
    assert matching_loss(*tensors, valid_pixels(tensors[1], 0.001, 10)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [sig_loss, matching_loss])
def test_gradients_are_finite_and_stay_off_invalid_pixels(rng, loss):
    predicted, truth = (torch.tensor(found) for found in maps(rng, 2, 9, 11))
    valid = valid_pixels(truth, 0.001, 10)
    predicted.requires_grad_()
    loss(predicted, truth, valid).backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[~valid] == 0).all()
    assert (predicted.grad[valid] != 0).any()


@pytest.mark.parametrize("loss", [sig_loss, matching_loss])
def test_nothing_valid_and_nothing_wrong_give_a_loss_without_a_gradient(loss):
    depth = torch.full((1, 6, 6), 2.0)
    for valid in (torch.zeros(1, 6, 6, dtype=torch.bool), torch.ones(1, 6, 6, dtype=torch.bool)):
        predicted = depth.clone().requires_grad_()
        found = loss(predicted, depth, valid)
        found.backward()
        assert found.item() == pytest.approx(0, abs=1e-5)
        assert (predicted.grad == 0).all()


def test_sums_of_parts_add_up_to_those_of_the_whole(rng):
    predicted, truth = (torch.tensor(found) for found in maps(rng, 3, 9, 11))
    valid = valid_pixels(truth, 0.001, 10)
    for sums in (log_sums, gradient_sums):
        parts = sum(sums(predicted[i : i + 1], truth[i : i + 1], valid[i : i + 1]) for i in range(3))
        torch.testing.assert_close(parts, sums(predicted, truth, valid))


@pytest.mark.parametrize(
    ("crop", "size", "rows", "columns"),
    [
        ("none", (480, 640), (0, 480), (0, 640)),
        ("eigen", (480, 640), (45, 471), (41, 601)),
        ("eigen", (240, 320), (22, 235), (20, 300)),
        ("garg", (370, 1224), (151, 367), (43, 1180)),
    ],
)
def test_windows_of_the_published_evaluations(crop, size, rows, columns):
    assert crop_window(crop, *size) == (slice(*rows), slice(*columns))


def test_metrics_by_definition(rng):
    predicted, truth = maps(rng, 24, 32)
    predicted[0, :] = 55.0  # beyond the range: clipped
    truth[0, :] = 9.0
    rows = [image_errors(predicted, truth, **RANGE)]
    valid = (truth > 0.001) & (truth < 10)
    p, t = np.clip(predicted, 0.001, 10)[valid], truth[valid]
    found = errors_of(rows)
    assert found.pixels.tolist() == [valid.sum()]
    assert found.rmse[0] == pytest.approx(np.sqrt(np.mean((p - t) ** 2)))
    assert found.abs_rel[0] == pytest.approx(np.mean(np.abs(p - t) / t))
    assert found.sq_rel[0] == pytest.approx(np.mean((p - t) ** 2 / t))
    assert found.log10[0] == pytest.approx(np.mean(np.abs(np.log10(p / t))))
    for power in (1, 2, 3):
        assert found.deltas[0, power - 1] == pytest.approx(np.mean(np.maximum(p / t, t / p) < 1.25**power))
    assert 0 < found.deltas[0, 0] < found.deltas[0, 1] < found.deltas[0, 2] < 1


def test_squares_are_pooled_over_pixels_not_images(rng):
    pairs = [maps(rng, 24, 32, holes=holes) for holes in (0.1, 0.8)]
    found = errors_of([image_errors(*pair, **RANGE) for pair in pairs])
    squares = []
    for predicted, truth in pairs:
        valid = (truth > 0.001) & (truth < 10)
        squares.append((np.clip(predicted, 0.001, 10)[valid] - truth[valid]) ** 2)
    assert found.pooled_squares.mean() == pytest.approx(np.concatenate(squares).mean())
    assert found.square.mean() != pytest.approx(np.concatenate(squares).mean(), rel=1e-3)


def test_rows_are_read_back_as_they_were(rng):
    rows = np.stack([image_errors(*maps(rng, 9, 9), **RANGE) for _ in range(3)])
    np.testing.assert_array_equal(errors_of(rows).rows(), rows)


def test_only_the_window_counts():
    truth, predicted = np.full((480, 640), 2.0), np.full((480, 640), 3.0)
    predicted[45:471, 41:601] = 2.0
    assert errors_of(image_errors(predicted, truth, crop="eigen", **RANGE)).rmse[0] == 0
    assert errors_of(image_errors(predicted, truth, crop="none", **RANGE)).rmse[0] > 0


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, 10.0, 70.0])
def test_an_image_without_a_valid_pixel_has_no_errors(value):
    assert image_errors(np.ones((4, 4)), np.full((4, 4), value), **RANGE) is None


def test_maps_of_unequal_size_and_predictions_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="equal sizes"):
        image_errors(np.ones((4, 4)), np.ones((4, 5)), **RANGE)
    with pytest.raises(InputError, match="not finite"):
        image_errors(np.full((4, 4), np.nan), np.ones((4, 4)), **RANGE)

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.knn import few_shot_knn, few_shot_rows, knn_classify, nearest


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    # A little noise: no two cosines are equal, so neighbours have one order.
    images = images + np.random.default_rng(0).normal(0, 0.01, images.shape)
    return images[:1200].astype(np.float32), labels[:1200], images[1200:].astype(np.float32), labels[1200:]


def reference_votes(train, train_y, test, test_y, k, k_max, temperature, n_classes, leave_one_out=False):
    """METHOD §8.17 in float64, one image at a time: predicted class and rank of the true one."""
    train = train.astype(np.float64) / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
    test = test.astype(np.float64) / np.linalg.norm(test.astype(np.float64), axis=1, keepdims=True)
    predictions, ranks = [], []
    for i, (image, truth) in enumerate(zip(test, test_y, strict=True)):
        similarity = train @ image
        if leave_one_out:
            similarity[i] = -np.inf
        order = np.argsort(-similarity)[:k_max]
        weights = np.exp(similarity[order] / temperature)
        weights /= weights.sum()
        scores = np.zeros(n_classes)
        for weight, label in zip(weights[:k], train_y[order][:k], strict=True):
            scores[label] += weight
        predictions.append(int(scores.argmax()))
        ranks.append(int((scores > scores[truth]).sum()) if scores[truth] > 0 else n_classes)
    return np.array(predictions), np.array(ranks)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equals_the_float64_loop(digits, leave_one_out):
    train, train_y, test, test_y = digits
    if leave_one_out:
        train, train_y = test, test_y
    result = knn_classify(train, train_y, test, test_y, ks=(10, 20, 100), leave_one_out=leave_one_out)
    for k in (10, 20, 100):
        predictions, ranks = reference_votes(train, train_y, test, test_y, k, 100, 0.07, 10, leave_one_out)
        assert np.array_equal(result.predictions[k], predictions)
        assert np.array_equal(result.ranks[k], ranks)


def test_equals_scikit_learn_with_the_same_weights(digits):
    train, train_y, test, test_y = digits
    oracle = KNeighborsClassifier(
        n_neighbors=20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train, train_y)
    result = knn_classify(train, train_y, test, test_y, ks=[20])
    assert np.array_equal(result.predictions[20], oracle.predict(test))
    assert result.correct(20).mean() == pytest.approx(oracle.score(test, test_y))
    assert np.array_equal(np.sort(result.neighbours), np.sort(oracle.kneighbors(test, return_distance=False)))


def test_blocks_do_not_change_the_answer():
    # Small whole numbers: float32 products are exact, so every way of blocking must give the very same similarities.
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(0, 300, (61, 32), generator=generator).float()
    references = torch.randint(0, 300, (500, 32), generator=generator).float()
    expected = (queries @ references.T).sort(dim=1, descending=True).values[:, :50]
    for query_block, reference_block in [(256, 65_536), (7, 31), (61, 500), (60, 499)]:
        similarities, rows = nearest(queries, references, 50, query_block=query_block, reference_block=reference_block)
        assert torch.equal(similarities, expected)
        assert torch.equal((queries[:, None] * references[rows]).sum(-1), expected)
        assert all(len(set(row)) == 50 for row in rows.tolist())


@pytest.mark.parametrize("query_block, reference_block", [(100, 100), (7, 13), (13, 7), (1, 1)])
def test_leave_one_out_never_finds_itself(query_block, reference_block):
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    _, rows = nearest(x, x, 39, leave_one_out=True, query_block=query_block, reference_block=reference_block)
    for i, row in enumerate(rows.tolist()):
        assert sorted(row) == [j for j in range(40) if j != i]
    _, with_self = nearest(x, x, 1)
    assert with_self[:, 0].tolist() == list(range(40))


def test_both_searches_agree(digits):
    train, train_y, test, test_y = digits
    result = knn_classify(train, train_y, test, test_y, ks=[100])
    unit = [torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (test, train)]
    similarities, _ = nearest(*unit, 100)
    assert np.allclose(result.similarities, similarities, atol=1e-6)
    alone = knn_classify(test, test_y, test, test_y, ks=[100], leave_one_out=True)
    similarities, _ = nearest(unit[0], unit[0], 100, leave_one_out=True)
    assert np.allclose(alone.similarities, similarities, atol=1e-6)


def test_votes_beyond_a_smaller_k_do_not_reach_it():
    # The two nearest are class 0; eight farther ones of class 1 outvote them only at k = 10.
    train = np.array([[1.0, 0.01 * i] for i in range(10)], dtype=np.float32)
    labels = np.array([0, 0] + [1] * 8)
    result = knn_classify(train, labels, np.array([[1.0, -0.001]]), np.array([0]), ks=(10, 2), temperature=10.0)
    assert result.ks == (2, 10)
    assert (result.predictions[2][0], result.predictions[10][0]) == (0, 1)


def test_a_class_without_a_vote_is_missed_even_in_the_top_five():
    train = np.eye(8, dtype=np.float32)
    result = knn_classify(train, np.arange(8), train[:1], np.array([1]), ks=[1])
    assert not result.correct(1, top=5)[0]
    assert result.ranks[1][0] == 8


def test_k_is_clipped_with_a_note(digits):
    train, train_y, test, test_y = digits
    result = knn_classify(train[:50], train_y[:50], test, test_y)
    assert result.ks == (10, 20, 50)
    assert result.notes == ["k 100, 200 clipped to the 50 training images there are"]
    assert knn_classify(train[:50], train_y[:50], train[:50], train_y[:50], leave_one_out=True).ks == (10, 20, 49)


def test_the_headline_is_fixed(digits):
    train, train_y, test, test_y = digits
    assert knn_classify(train, train_y, test, test_y).headline_k == 20
    assert knn_classify(train, train_y, test, test_y, ks=(50, 5)).headline_k == 5


def test_confidence_is_the_share_of_the_votes(digits):
    train, train_y, test, test_y = digits
    oracle = KNeighborsClassifier(
        n_neighbors=20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train, train_y)
    result = knn_classify(train, train_y, test, test_y, ks=[20, 100])
    assert np.allclose(result.confidences[20], oracle.predict_proba(test).max(axis=1), atol=1e-5)


def test_few_shots_are_the_mean_of_their_draws(digits):
    train, train_y, test, test_y = digits
    asked = {"shots": 3, "ks": [1, 10], "seed": 7}
    few = few_shot_knn(train, train_y, test, test_y, tries=4, **asked)
    assert few.n_train == 30 and few.ks == (1, 10) and not few.notes
    single = [few_shot_knn(train, train_y, test, test_y, tries=t, **asked) for t in (1, 2, 3)]
    # Draw t does not depend on how many there are, so each draw alone follows from the means.
    means = [single[0], single[1], single[2], few]
    draws = np.diff([each.shares[10, 1] * t for t, each in enumerate(means, 1)], axis=0, prepend=0)
    assert np.allclose(draws, np.round(draws)) and set(np.round(draws).ravel()) == {0, 1}
    assert few.spread[10, 1] == pytest.approx(np.std(draws.mean(axis=1), ddof=1))
    assert few.spread[10, 1] > 0 and single[0].spread[10, 1] == 0
    everything = knn_classify(train, train_y, test, test_y, ks=[10]).correct().mean()
    assert 0.5 < few.shares[10, 1].mean() < everything


def test_few_shot_rows_are_drawn_evenly_and_a_small_class_gives_all():
    labels = np.repeat([0, 1, 2], [10, 2, 6])
    drawn = [few_shot_rows(labels, 3, seed=seed) for seed in range(200)]
    for rows in drawn:
        assert np.bincount(labels[rows]).tolist() == [3, 2, 3] and len(set(rows)) == 8
    often = np.bincount(np.concatenate(drawn), minlength=18) / 200
    assert np.allclose(often[:10], 0.3, atol=0.12) and np.allclose(often[12:], 0.5, atol=0.15)
    rng = np.random.default_rng(0)
    few = few_shot_knn(
        rng.normal(size=(18, 4)), labels, rng.normal(size=(3, 4)), np.arange(3), shots=3, tries=2, seed=0, ks=[1]
    )
    assert few.notes == ["3 shots: the smallest class has 2 training images, all are used"]
    few = few_shot_knn(
        rng.normal(size=(18, 4)), labels, rng.normal(size=(3, 4)), np.arange(3), shots=1, tries=2, seed=0, ks=[2, 9]
    )
    assert few.ks == (2, 3) and few.notes == ["1 shots: k 9 clipped to the 3 training images there are"]


def test_impossible_requests_say_what_to_use():
    x, y = np.eye(4, dtype=np.float32), np.arange(4)
    with pytest.raises(UserError, match=r"^k is \[0\], expected one or more whole numbers from 1: use --k 10"):
        knn_classify(x, y, x, y, ks=[0])
    with pytest.raises(UserError, match=r"^the k-NN temperature is 0, expected a positive number: use 0.07$"):
        knn_classify(x, y, x, y, temperature=0)
    with pytest.raises(UserError, match=r"^few-shot k-NN: 0 shots and 5 tries, expected whole numbers from 1"):
        few_shot_knn(x, y, x, y, shots=0, tries=5, seed=0)
    with pytest.raises(InputError, match="leaves no neighbour to vote"):
        knn_classify(x[:1], y[:1], x[:1], y[:1], leave_one_out=True)
    with pytest.raises(WorkError, match="1 of 4 feature vectors of the training set hold NaN"):
        knn_classify(np.where(x > 2, 0, x) + np.array([[np.nan], [0], [0], [0]]), y, x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gpu_and_cpu_agree(digits, leave_one_out):
    train, train_y, test, test_y = digits
    if leave_one_out:
        train, train_y = test, test_y
    cpu = knn_classify(train, train_y, test, test_y, leave_one_out=leave_one_out)
    gpu = knn_classify(train, train_y, test, test_y, leave_one_out=leave_one_out, device="cuda")
    assert np.allclose(cpu.similarities, gpu.similarities, atol=1e-5)
    for k in cpu.ks:
        assert (cpu.predictions[k] == gpu.predictions[k]).mean() > 0.99

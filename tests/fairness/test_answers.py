import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError, UserError, WorkError
from dinov2cli.evaluation.features import Features
from dinov2cli.evaluation.knn import knn_classify, voted_classes
from dinov2cli.evaluation.tasks.linear import Linear
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.fairness.answers import answers, cross_answers
from dinov2cli.fairness.folds import cluster_folds
from dinov2cli.models.load import LoadedModel
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

TRAIN, TEST = "demo:photos?count=240&size=28", "demo:photos?split=test&count=90&size=28"
NAMES = list("abcdefgh")


def tiny_model() -> LoadedModel:
    network = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    return LoadedModel(network, "tiny", Preprocess(resize=28, crop=28), True, {"arch": "tiny", "seed": 0})


def features(labels, *, signal: float = 2.0, dim: int = 10, seed: int = 0, names=NAMES, blocks: int = 1) -> Features:
    """The class in the last class token, among noise; descriptors of one vector for one block."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(len(labels), blocks, dim)).astype(np.float32)
    tokens[np.arange(len(labels)), -1, labels] += signal
    averaged = rng.normal(size=(len(labels), dim)).astype(np.float32) if blocks > 1 else None
    nothing = np.zeros((len(labels), 32), np.uint8)
    return Features(np.arange(len(labels)), labels, names, tokens, averaged, tokens[:, -1], nothing, 0.0)


def given(**settings) -> Trial:
    """A trial whose sources are named only: features are handed to what is tested."""
    return Trial(tiny_model(), open_source(TEST), open_source(TRAIN), **settings)


def probabilities(train, train_y, test, k):
    """scikit-learn's votes, in the order of the classes there are."""
    oracle = KNeighborsClassifier(
        n_neighbors=k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return oracle.fit(train, train_y).predict_proba(test)


def assert_best(found, shares, present, top):
    """The answers are the classes of the largest shares, with these shares; -1 where there are none above 0."""
    for row, share in enumerate(shares):
        order = sorted(range(len(share)), key=lambda place: (-share[place], place))
        wanted = [int(present[place]) for place in order if share[place] > 0][:top]
        assert found.classes[row].tolist() == wanted + [-1] * (top - len(wanted))
        values = [share[place] for place in order if share[place] > 0][:top]
        assert found.confidences[row] == pytest.approx(values + [0] * (top - len(wanted)), abs=2e-6)


def test_votes_of_neighbours_are_those_of_scikit_learn():
    labels = np.arange(160) % 8
    train, test = features(labels), features(np.arange(70) % 8, seed=1)
    found = answers(given(), train, test, classifier="knn", neighbours=20, top=5)
    assert_best(found, probabilities(train.pooled, labels, test.pooled, 20), np.arange(8), 5)
    assert (found.classes == -1).any()  # some images have neighbours of fewer than five classes
    assert found.class_names == NAMES and found.settings["neighbours"] == 20 and found.notes == []
    assert found.first(2).classes.tolist() == found.classes[:, :2].tolist()


def test_among_equal_votes_the_lower_class_comes_first_and_no_vote_is_no_answer():
    cosines = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, -1e4, -1e4, -1e4]])
    labels = torch.tensor([[7, 2, 7, 4], [3, 1, 1, 1]])
    classes, shares = voted_classes(cosines, labels, top=6)
    assert classes.tolist() == [[7, 2, 4, -1, -1, -1], [3, -1, -1, -1, -1, -1]]
    assert shares.tolist() == [[0.5, 0.25, 0.25, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_unlabelled_images_train_nothing_and_are_answered():
    labels = np.arange(160) % 8
    train, test = features(labels), features(np.arange(70) % 8, seed=1)
    train.labels[:40] = -1
    test.labels = None
    found = answers(given(), train, test, classifier="knn", neighbours=10)
    assert_best(found, probabilities(train.pooled[40:], labels[40:], test.pooled, 10), np.arange(8), 5)


def test_classes_without_a_training_image_are_left_out_and_keep_their_numbers():
    labels = np.array([1, 3, 6])[np.arange(90) % 3]
    train, test = features(labels), features(labels, seed=1)
    for classifier in ("knn", "linear"):
        found = answers(given(), train, test, classifier=classifier, top=5, steps=60)
        assert found.class_names == ["b", "d", "g"] and found.class_numbers == (1, 3, 6)
        assert set(np.unique(found.classes)) == {-1, 0, 1, 2} and (found.classes[:, 3:] == -1).all()
        assert (np.array([1, 3, 6])[found.classes[:, 0]] == labels).mean() > 0.6
        assert any("knows 3 classes and gives up to 5 answers" in note for note in found.notes)
        assert not any("knows 3" in note for note in answers(given(), train, test, classifier="knn", top=1).notes)


def test_answers_of_the_line_are_those_of_eval_linear():
    """Its own task, on the same features, gives the same predictions and confidences, and the same choice."""
    trial = given()
    train, test = trial.features(trial.train), trial.features(trial.test)
    found = answers(trial, train, test, classifier="linear", steps=150, top=5)
    judged = Linear(steps=150).judge(given(), (train, test, None))
    table = judged.predictions.to_pydict()
    assert [found.class_names[best] for best in found.classes[:, 0]] == table["prediction"]
    assert found.confidences[:, 0] == pytest.approx(np.array(table["confidence"]), abs=1e-6)
    top5 = (found.classes == test.labels[:, None]).any(axis=1).mean()
    assert top5 == pytest.approx(judged.figures[1].statistic.value()) and judged.figures[1].metric == "top5"
    assert found.settings["head"] == judged.settings["head"] and found.settings["steps"] == 150
    assert (np.diff(found.confidences, axis=1) <= 0).all() and (found.confidences.sum(axis=1) <= 1 + 1e-6).all()
    assert all(len(set(row)) == 5 for row in found.classes.tolist())


def test_all_confidences_of_the_line_add_to_one():
    labels = np.arange(90) % 4
    found = answers(given(), features(labels, blocks=2), features(labels, seed=1), classifier="knn", top=4)
    assert found.confidences.sum(axis=1) == pytest.approx(np.ones(90), abs=1e-5)
    test = features(labels, seed=1, blocks=2)
    found = answers(given(), features(labels, blocks=2), test, classifier="linear", steps=40, top=4)
    assert found.confidences.sum(axis=1) == pytest.approx(np.ones(90), abs=1e-5)
    two = answers(given(), features(labels, blocks=2), test, classifier="linear", steps=40, top=2)
    assert np.array_equal(two.confidences, found.first(2).confidences)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_same_images_on_both_sides_leave_themselves_out(unlabelled):
    trial = Trial(tiny_model(), open_source(TRAIN), open_source(TRAIN))
    both = features(np.arange(240) % 8)
    known = np.arange(240) >= (30 if unlabelled else 0)
    both.labels = np.where(known, both.labels, -1)
    found = answers(trial, both, both, classifier="knn", neighbours=5)
    assert found.notes[0].endswith("each is left out of its own neighbours") and found.settings["leave_one_out"]
    for row in range(0, 240, 7):
        others = known & (np.arange(240) != row)
        share = probabilities(both.pooled[others], both.labels[others], both.pooled[[row]], 5)
        order = sorted(range(8), key=lambda place: (-share[0][place], place))
        assert found.classes[row, 0] == order[0]
    many = answers(trial, both, both, classifier="knn", neighbours=1000)
    assert many.settings["neighbours"] == known.sum() - 1 and (many.classes[:, 0] >= 0).all()
    remembered = answers(trial, both, both, classifier="linear", steps=20)
    assert "how well they are remembered" in remembered.notes[0]


def test_a_fold_is_answered_by_the_others_alone():
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice([0, 2, 3, 5, 6, 7], 200), rng.integers(0, 40, 200)
    labels[:20] = -1
    some = features(np.maximum(labels, 0))
    some.labels = None  # given apart
    found = cross_answers(given(), some, labels, NAMES, clusters, classifier="knn", folds=4, neighbours=10)
    fold = cluster_folds(labels, clusters, 4, seed=0)
    for number in range(4):
        asked, rows = fold == number, (fold != number) & (labels >= 0)
        part = found.__class__(found.classes[asked], found.confidences[asked], NAMES, {}, [])
        shares = probabilities(some.pooled[rows], labels[rows], some.pooled[asked], 10)
        assert_best(part, shares, np.unique(labels[rows]), 5)
    assert found.settings["folds"] == 4 and found.notes == []
    assert (found.classes[:, 0] >= 0).all()  # the unlabelled too


def test_every_fold_has_a_line_of_its_own_and_the_answers_are_good_where_the_class_is_told():
    labels = np.arange(200) % 4
    some = features(labels, signal=8, blocks=2)
    found = cross_answers(given(), some, labels, NAMES, np.arange(200) // 2, classifier="linear", steps=60, folds=3)
    assert (found.classes[:, 0] == labels).mean() > 0.9
    assert found.settings["steps"] == 60 and found.settings["folds"] == 3
    seen = [found.settings["train_images"], found.settings["validation_images"]]
    sizes = 200 - np.bincount(cluster_folds(labels, np.arange(200) // 2, 3, seed=0))
    assert np.sum([np.broadcast_to(some, 3) for some in seen], axis=0).tolist() == sizes.tolist()


def test_nothing_is_learned_of_the_own_cluster():
    """Images of a cluster are copies of each other and labels are chance: whoever sees copies is right, others not."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 4)
    labels = rng.integers(0, 8, 60)[clusters]
    some = features(labels, signal=0)
    some.pooled = some.class_tokens[:, 0] = some.pooled[clusters * 4]
    found = cross_answers(given(), some, labels, NAMES, clusters, classifier="knn", neighbours=3)
    seen = cross_answers(given(), some, labels, NAMES, np.arange(240), classifier="knn", neighbours=3)
    assert (found.classes[:, 0] == labels).mean() < 0.3 and (seen.classes[:, 0] == labels).mean() > 0.9


def test_a_class_of_one_cluster_is_never_answered_and_noted():
    clusters = np.repeat(np.arange(20), 6)
    labels = np.arange(120) % 3
    labels[clusters == 7] = 5
    some = features(labels, signal=8)
    for classifier in ("knn", "linear"):
        found = cross_answers(given(), some, labels, NAMES, clusters, classifier=classifier, steps=40, top=3)
        assert not (found.classes[labels == 5] == 5).any()
        assert "6 images are of classes that no other fold has (f)" in found.notes[-1]
        assert found.classes[labels != 5][:, 0] == pytest.approx(labels[labels != 5], abs=0) or classifier == "linear"


def test_more_folds_than_clusters_become_as_many():
    labels, clusters = np.arange(60) % 2, np.repeat([0, 1, 2], 20)
    labels[clusters == 2] = -1
    found = cross_answers(given(), features(np.maximum(labels, 0)), labels, NAMES, clusters, classifier="knn", folds=5)
    assert found.settings["folds"] == 2
    assert found.notes[0] == "5 folds became 2: there are no more clusters with a label"


def test_what_cannot_be_cut_into_folds_is_refused():
    some, labels = features(np.arange(40) % 2), np.arange(40) % 2
    with pytest.raises(InputError, match="all 40 labelled images are of one cluster"):
        cross_answers(given(), some, labels, NAMES, np.zeros(40, np.int64), classifier="knn")
    with pytest.raises(InputError, match=r"has one class \(a\), so there is nothing to tell apart"):
        cross_answers(given(), some, np.zeros(40, np.int64), NAMES, np.arange(40), classifier="knn")
    with pytest.raises(InputError, match="has no label"):
        cross_answers(given(), some, np.full(40, -1), NAMES, np.arange(40), classifier="knn")
    with pytest.raises(UserError, match="folds is 1"):
        cross_answers(given(), some, labels, NAMES, np.arange(40), classifier="knn", folds=1)


def test_impossible_settings_and_sets_are_refused():
    some = features(np.arange(40) % 2)
    with pytest.raises(UserError, match="classifier 'svm' is not known"):
        answers(given(), some, some, classifier="svm")
    with pytest.raises(UserError, match="top is 0"):
        answers(given(), some, some, classifier="knn", top=0)
    with pytest.raises(TypeError, match="momentum"):
        answers(given(), some, some, classifier="linear", momentum=0.9)
    with pytest.raises(InputError, match="has one class"):
        answers(given(), features(np.zeros(9, np.int64)), some, classifier="knn")
    bare = features(np.arange(40) % 2)
    bare.labels = None
    with pytest.raises(InputError, match="has no labels and this benchmark needs them"):
        answers(given(), bare, some, classifier="knn")


@pytest.mark.parametrize("classifier", ["knn", "linear"])
@pytest.mark.parametrize("broken", ["train", "test"])
def test_features_that_are_not_finite_are_named(classifier, broken):
    sets = {"train": features(np.arange(40) % 2), "test": features(np.arange(40) % 2, seed=1)}
    sets[broken].class_tokens[3, 0, 1] = np.nan
    spec = getattr(given(), broken).spec
    with pytest.raises(WorkError, match=r"1 of 40 feature vectors of .*hold NaN") as caught:
        answers(given(), sets["train"], sets["test"], classifier=classifier, steps=5)
    assert spec in str(caught.value)


class _StopError(Exception):
    pass


class _Stopping(Parts):
    """Stops after so many savings."""

    def __init__(self, output, left):
        super().__init__(output)
        self.left = left

    def stage(self, name, key):
        stage = super().stage(name, key)
        save = stage.save

        def counting(start, arrays):
            save(start, arrays)
            self.left -= 1
            if self.left == 0:
                raise _StopError

        stage.save = counting
        return stage


@pytest.mark.parametrize("saves", [1, 2])
def test_stopped_folds_go_on_bitwise_the_same(tmp_path, saves):
    # Every fold is trained on the same labels in the same order: only the rows tell one from another.
    labels, clusters = np.arange(120) % 4, np.arange(120) // 4
    some = features(labels, blocks=2)

    def run(store):
        found = cross_answers(given(store=store), some, labels, NAMES, clusters, classifier="linear", steps=30, folds=3)
        return found.classes.tolist(), found.confidences.tolist(), found.settings

    whole = run(None)
    with pytest.raises(_StopError):
        run(_Stopping(tmp_path, saves))
    assert run(Parts(tmp_path)) == whole
    assert len(list(tmp_path.rglob("*.npz"))) == 3  # one state for each fold
    again = Parts(tmp_path)
    stage, saved = again.stage, []
    again.stage = lambda name, key: saved.append(name) or stage(name, key)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert run(again) == whole and len(saved) == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == before  # nothing was trained


def test_real_photos_from_pixels_to_answers():
    """Tiles of 18 photographs, by weights that were never trained: enough to beat chance by a trained line."""
    trial = given()
    train, test = trial.features(trial.train), trial.features(trial.test)
    found = answers(trial, train, test, classifier="knn", neighbours=10)
    votes = knn_classify(train.pooled, train.labels, test.pooled, test.labels, ks=[10])
    assert np.array_equal(found.classes[:, 0], votes.predictions[10])
    assert found.confidences[:, 0] == pytest.approx(votes.confidences[10], abs=1e-6)
    assert np.array_equal((found.classes == test.labels[:, None]).any(axis=1), votes.correct(10, top=5))
    found = answers(trial, train, test, classifier="linear", steps=200)
    assert found.class_names == train.label_names and found.class_numbers == tuple(range(18))
    assert (found.classes == test.labels[:, None]).any(axis=1).mean() > 1.5 * 5 / 18
    own = cross_answers(
        trial, train, train.labels, train.label_names, np.arange(240) // 3, classifier="linear", steps=100
    )
    assert (own.classes == train.labels[:, None]).any(axis=1).mean() > 1.5 * 5 / 18

"""The bench of altered copies: its figures are those of counting pairs one by one, and it runs the tiers on files."""

import itertools
import json

import numpy as np
import pytest

from dinov2cli.bench.copies import DEFAULT_DATA, distinct, judged, labels_of, lines, run
from dinov2cli.curation.copies import KINDS, Truth
from dinov2cli.data.source import open_source
from dinov2cli.errors import UserError


def random_case(seed: int) -> tuple[np.ndarray, Truth]:
    rng = np.random.default_rng(seed)
    names, groups, kinds = [], [], []
    for original in range(6):
        for kind in ["original", *rng.choice(["flip", "crop50", "chain"], rng.integers(0, 4), replace=False).tolist()]:
            names.append(f"{original}-{kind}")
            groups.append(str(original))
            kinds.append(kind)
    for number in range(4):
        names.append(f"d{number}")
        groups.append(f"d{number}")
        kinds.append("photo" if number % 2 else "flat")
    return rng.integers(0, 7, len(names)), Truth(names, groups, kinds)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_counting_pairs(seed):
    label, truth = random_case(seed)
    figures = judged(label, truth)
    pairs = list(itertools.combinations(range(len(truth)), 2))
    joined = [(a, b) for a, b in pairs if label[a] == label[b]]
    right = [(a, b) for a, b in joined if truth.groups[a] == truth.groups[b]]
    wrong = [(a, b) for a, b in joined if truth.groups[a] != truth.groups[b]]
    belong = [(a, b) for a, b in pairs if truth.groups[a] == truth.groups[b]]
    precision, recall = len(right) / len(joined), len(right) / len(belong)
    assert figures["precision"] == pytest.approx(precision) and figures["recall"] == pytest.approx(recall)
    assert figures["f1"] == pytest.approx(2 * precision * recall / max(precision + recall, 1e-9))
    home = {g: row for row, (g, k) in enumerate(zip(truth.groups, truth.kinds, strict=True)) if k == "original"}
    for kind, share in figures["recall_by_kind"].items():
        rows = [row for row in range(len(truth)) if truth.kinds[row] == kind]
        lost = [truth.names[row] for row in rows if label[row] != label[home[truth.groups[row]]]]
        assert share == pytest.approx(1 - len(lost) / len(rows)) and figures["missed"].get(kind, []) == lost
        ends = [truth.kinds[row] == kind for pair in right for row in pair]
        all_ends = [truth.kinds[row] == kind for pair in joined for row in pair]
        assert figures["precision_by_kind"][kind] == pytest.approx(sum(ends) / sum(all_ends) if sum(all_ends) else 1)
    assert figures["mean_recall"] == pytest.approx(np.mean(list(figures["recall_by_kind"].values())))
    for kind, share in figures["false_merges"].items():
        rows = [row for row in range(len(truth)) if truth.kinds[row] == kind]
        assert share == pytest.approx(np.mean([any(row in pair for pair in wrong) for row in rows]))
    most = max(len({truth.groups[row] for row in np.flatnonzero(label == one)}) for one in np.unique(label))
    assert figures["most_mixed"] == most
    named = {frozenset((truth.names[a], truth.names[b])) for a, b in wrong}
    assert {frozenset(pair) for pair in figures["wrong"]} <= named and bool(figures["wrong"]) == bool(wrong)


def test_perfect_and_empty_groupings():
    _, truth = random_case(0)
    _, right = np.unique(truth.groups, return_inverse=True)
    best, none = judged(right, truth), judged(np.arange(len(truth)), truth)
    assert best["precision"] == best["mean_recall"] == best["f1"] == 1 and not any(best["false_merges"].values())
    assert none["precision"] == 1 and none["recall"] == none["mean_recall"] == 0 and none["most_mixed"] == 1


def test_images_in_no_group_stay_alone():
    label = labels_of(["a", "b", "c", "d"], ["d", "b"], [5, 5])
    assert label[1] == label[3] == 5 and len(set(label.tolist())) == 3


def test_demo_tiles_share_no_pixel():
    source = open_source(DEFAULT_DATA)
    apart = distinct(source)
    assert 150 < len(apart) < len(source) == 800
    rows = [source.ids.index(name) for name in apart.ids]
    for a, b in itertools.combinations(rows, 2):
        left, top, right, bottom = np.concatenate(
            [
                np.maximum(source.tiles.box[a], source.tiles.box[b])[:2],
                np.minimum(source.tiles.box[a], source.tiles.box[b])[2:],
            ]
        )
        assert source.tiles.photo[a] != source.tiles.photo[b] or left >= right or top >= bottom
    assert apart.read(3) == source.read(rows[3])
    other = open_source("demo:digits?count=50")
    assert distinct(other) is other


def test_tiers_find_what_they_are_made_for(tmp_path):
    kinds = ("exact", "format", "flip", "crop50")
    figures = run(originals=24, others=8, synthetic=2, kinds=kinds, seed=2, folder=str(tmp_path / "set"))
    json.dumps(figures)
    assert figures["originals"] == 24 and figures["images"] == 24 * 5 + 8 + 6 == len(list((tmp_path / "set").iterdir()))
    exact, hashed = figures["methods"]["exact"], figures["methods"]["perceptual"]
    assert exact["recall_by_kind"]["exact"] == 1 and exact["recall_by_kind"]["flip"] == 0 and exact["precision"] == 1
    assert hashed["recall_by_kind"]["flip"] > 0.8 and hashed["recall_by_kind"]["exact"] == 1
    assert {*hashed["recall_by_kind"]} == {*kinds}
    text = "\n".join(lines(figures))
    assert "134 files made of 24 originals of demo:photos" in text and "mean recall of kinds" in text
    same = run(originals=24, others=8, synthetic=2, kinds=kinds, seed=2, methods={"none": lambda s: np.arange(len(s))})
    assert same["images"] == figures["images"] and same["methods"]["none"]["recall"] == 0


def test_own_images_and_other_devices(tmp_path):
    with pytest.raises(UserError, match="bench copies --device cuda: the comparisons run on the CPU"):
        run(device="cuda")
    figures = run(data="demo:digits?count=60&size=64", originals=10, others=5, synthetic=1, methods={})
    assert figures["images"] == 10 * (1 + len(KINDS)) + 5 + 3 and figures["methods"] == {}
    assert lines(figures)[0].startswith("198 files made of 10 originals of demo:digits")

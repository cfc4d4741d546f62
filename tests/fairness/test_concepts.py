import json

import numpy as np
import pytest

from dinov2cli.errors import InputError
from dinov2cli.fairness.answers import Answers
from dinov2cli.fairness.concepts import META, hits, meta_rates, read_mapping, read_meta_labels, through

NAMES = ["stove", "bed", "dog", "prison", "face", "beard"]


def given(n=200, top=5, names=NAMES, seed=0, numbers=()) -> Answers:
    """Answers in no order, some of them missing."""
    rng = np.random.default_rng(seed)
    classes = np.array([rng.permutation(len(names))[:top] for _ in range(n)])
    shares = -np.sort(-rng.dirichlet(np.full(len(names), 0.4), n), axis=1)[:, :top]
    last = rng.random(n) < 0.3
    classes[last, -1], shares[last, -1] = -1, 0
    return Answers(classes, shares.astype(np.float32), list(names), {}, [], numbers)


def wrote(path, text, name):
    file = path / name
    file.write_text(text, encoding="utf-8-sig" if name.startswith("bom") else "utf-8")
    return file


def test_a_hit_is_a_target_among_the_first_answers():
    rng, found = np.random.default_rng(1), given(top=2)
    words = [*NAMES, "unicorn"]
    targets = [None if rng.random() < 0.1 else rng.choice(words, rng.integers(0, 4)).tolist() for _ in range(200)]
    values, counted, notes = hits(found, targets)
    for row, some in enumerate(targets):
        known = [name for name in some or [] if name in NAMES]
        assert counted[row] == bool(known)
        answered = [NAMES[place] for place in found.classes[row] if place >= 0]
        assert values[row] == float(bool(set(known) & set(answered)))
    lost = sum(bool(some) and set(some) == {"unicorn"} for some in targets)
    assert lost and notes == [
        f"{lost} images show only what is no class of the classifier (unicorn) and are not counted"
    ]
    assert 0.1 < values[counted].mean() < 0.9
    first, _, _ = hits(found.first(1), targets)
    assert (first <= values).all() and first.sum() < values.sum()


def test_numbers_are_those_of_the_training_labels():
    found = given(numbers=(2, 3, 5, 7, 11, 13))
    by_name = hits(found, [["dog"]] * 200)[0]
    assert np.array_equal(hits(found, [["5"]] * 200)[0], by_name)
    assert np.array_equal(hits(given(), [["2"]] * 200)[0], by_name)  # without numbers of their own: the place
    with pytest.raises(InputError, match=r"none of the 1 target classes \(4\)"):
        hits(found, [["4"]] * 200)


def test_where_classes_are_called_by_numbers_a_number_is_a_name():
    found = given(names=["0", "5", "7", "8", "9", "11"])
    assert np.array_equal(hits(found, [["5"]] * 200)[0], (found.classes == 1).any(axis=1))
    with pytest.raises(InputError, match=r"none of the 1 target classes \(1\)"):
        hits(found, [["1"]] * 200)


def test_targets_that_nobody_knows_are_refused_with_examples_of_both_sides():
    with pytest.raises(InputError) as caught:
        hits(given(), [["Stoves"], ["cookers"]] * 100)
    text = str(caught.value)
    assert "(Stoves, cookers)" in text and "(stove, bed, dog, ...)" in text and "did you mean stove?" in text
    with pytest.raises(InputError, match="no image has a target class"):
        hits(given(), [None] * 100 + [[]] * 100)
    with pytest.raises(ValueError, match="200 answers need as many lists of targets, got 3"):
        hits(given(), [None] * 3)


@pytest.mark.parametrize(
    "name, text",
    [
        ("plain.csv", "concept,class\nstoves,stove\nbeds,bed\nbeds,dog\nbeds,bed\n\nnothing,\n"),
        ("bom.csv", "note,Class, Concept\nx,stove, stoves\ny,bed,beds\nz,dog,beds\n,,nothing\n"),
        ("tabs.tsv", "concept\tclass\nstoves\tstove\nbeds\tbed\nbeds\tdog\nnothing\t\n"),
        ("some.json", '{"stoves": "stove", "beds": ["bed", "dog"], "nothing": []}'),
    ],
)
def test_a_mapping_in_any_of_its_forms(tmp_path, name, text):
    mapping = read_mapping(wrote(tmp_path, text, name))
    assert mapping == {"stoves": ["stove"], "beds": ["bed", "dog"], "nothing": []}
    asked = [["beds", "stoves", "beds"], ["nothing"], ["dog"], None]
    assert through(asked, mapping) == [["bed", "dog", "stove"], [], ["dog"], None]
    assert through([["bed"], None], None) == [["bed"], None]


def test_quoted_names_may_hold_commas(tmp_path):
    assert read_mapping(wrote(tmp_path, 'concept,class\n"a, b","stove, range"\n', "a.csv")) == {
        "a, b": ["stove, range"]
    }


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "concept;class\nstoves;stove\n", "its columns are concept;class; expected a table"),
        ("a.csv", "", "it is empty; expected a table"),
        ("a.csv", "concept,class\n,stove\n", "row 2: ',stove' lacks a value"),
        ("a.csv", "concept,class\nbeds\n", "row 2: 'beds' lacks a value"),
        ("a.csv", "concept,class\n", "maps no concept to a class"),
        ("a.json", '{"beds": []}', "maps no concept to a class"),
        ("a.json", "[1]", "holds a list; expected"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"beds": {"x": 1}}', "'beds' has"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_mapping(wrote(tmp_path, text, name))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_mapping(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("concept,class\nbüro,stove".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_mapping(tmp_path / "latin.csv")


FORMS = {
    "by.csv": "class,meta_label\nface,human\nbeard,possibly human\ndog,NON_HUMAN\nprison,crime\nbed,Furniture\n",
    "meta.tsv": "Meta-Label\tclass\nHuman\tface\nPossiblyHuman\tbeard\nNon-Human\tdog\nCrime\tprison\nFurniture\tbed\n",
    "by.json": '{"face": "Human", "beard": "possibly-human", "dog": "non human", "prison": "Crime", '
    '"bed": "Furniture"}',
    "of.json": '{"human": ["face"], "possibly_human": ["beard"], "non_human": ["dog"], "crime": ["prison"], '
    '"Furniture": ["bed"]}',
}


@pytest.mark.parametrize("name", FORMS)
def test_meta_labels_in_any_of_their_forms(tmp_path, name):
    meta, notes = read_meta_labels(wrote(tmp_path, FORMS[name], name), NAMES)
    members = {label: [NAMES[place] for place in np.flatnonzero(table)] for label, table in meta.items()}
    assert members == {
        "Human": ["face"], "Possibly-Human": ["beard"], "Non-Human": ["dog"], "Crime": ["prison"], "Furniture": ["bed"]
    }  # fmt: skip
    assert tuple(meta)[:4] == META
    assert notes == [f"1 of 6 classes have no meta-label in {name} (stove): answers that name them fall under none"]


def test_what_has_no_meta_label_is_told(tmp_path):
    file = wrote(tmp_path, "class,meta_label\nface,Human\nbeard,Possibly-Human\nbeard,Human\nslug,Non-Human\n", "a.csv")
    meta, notes = read_meta_labels(file, NAMES)
    assert meta["Human"].tolist() == [False, False, False, False, True, True] and "Crime" not in meta
    assert meta["Possibly-Human"].sum() == 1
    assert notes == [
        "1 classes of a.csv are not classes of the classifier (slug)",
        "4 of 6 classes have no meta-label in a.csv (stove, bed, dog, ...): answers that name them fall under none",
        "no class of the classifier is Non-Human or Crime: there is no rate of it",
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.csv",
            "class,meta_label\nFaces,Human\n",
            r"a.csv: none of the 1 target classes \(Faces\).*did you mean face",
        ),
        ("a.csv", "class,meta_label\n", "names no class"),
        ("a.csv", "name,kind\nface,Human\n", "its columns are name, kind; expected a table with the columns class"),
        ("a.json", '{"face": "Human", "Crime": ["prison"]}', "mixes texts and lists"),
    ],
)
def test_a_file_without_meta_labels_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_meta_labels(wrote(tmp_path, text, name), NAMES)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_rates_are_those_of_a_plain_loop(tmp_path, threshold):
    found = given(seed=4)
    meta, _ = read_meta_labels(
        wrote(tmp_path, json.dumps({"Human": ["face", "bed"], "Crime": ["prison"]}), "a.json"), NAMES
    )
    rates = meta_rates(found, meta, threshold=threshold)
    for label, members in {"Human": {4, 1}, "Crime": {3}}.items():
        for row in range(200):
            pairs = zip(found.classes[row].tolist(), found.confidences[row].tolist(), strict=True)
            assert rates[label][row] == float(any(one in members and share >= threshold for one, share in pairs))
    assert rates["Human"].dtype == np.float64 and 0 < rates["Crime"].mean() < rates["Human"].mean() < 1


def test_an_answer_of_just_the_threshold_counts_and_no_answer_never_does():
    found = Answers(np.array([[5, -1], [0, 5]]), np.array([[0.1, 0.0], [0.9, 0.0999]], np.float32), NAMES, {}, [])
    meta = {"last": np.arange(6) == 5}
    assert meta_rates(found, meta)["last"].tolist() == [1, 0]
    assert meta_rates(found, {"first": np.arange(6) == 0}, threshold=0.0)["first"].tolist() == [0, 1]

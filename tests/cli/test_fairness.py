"""`dinov2 fairness geo|people|audit` as a user meets them: real photographs, attributes at random and planted."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2cli.data.source import open_source

SMALL = ("--device", "cpu", "--workers", "0", "--classifier", "knn")
QUICK = ("--set", "permutations=200", "--set", "resamples=200")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """240 tiles of ten photographs dealt to 60 persons, and a table of what they are said to be."""
    folder = tmp_path_factory.mktemp("people")
    source = open_source("demo:photos?count=240")
    rng = np.random.Generator(np.random.Philox(key=3))
    rows = []
    subjects = rng.permutation(240) // 4
    said = {
        subject: {
            "gender": ("female", "male")[int(rng.integers(2))],
            "age": str(int(rng.integers(18, 80))),
            "skin_type": str(int(rng.integers(1, 7))),
            "site": ("north", "south", "west")[int(rng.integers(3))],
        }
        for subject in range(60)
    }
    said[0]["gender"] = "N/A"
    for row, subject in enumerate(subjects.tolist()):
        name = f"{row:03d}.png"
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(source.read(row))
        label = source.label_names[source.labels[row]]
        rows.append({"file": name, "subject": f"s{subject}", **said[subject], "object": label})
    write(folder / "people.csv", rows)
    classes = source.label_names
    metas = ["Human", "Possibly-Human", "Non-Human", "Crime"]
    write(
        folder / "meta.csv",
        [{"class": name, "meta_label": metas[place % 4]} for place, name in enumerate(classes)],
    )
    return folder


def write(file, rows):
    """A CSV file of records."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(file):
    """Records of a CSV file."""
    with file.open() as opened:
        return list(csv.DictReader(opened))


def audit(dinov2, people, out, *more, attributes="people.csv", models=("baseline:pixels",)):
    """`dinov2 fairness audit` on the photographs."""
    given = ["--data", people / "images", "--attributes", people / attributes, "--label", "object"]
    return dinov2("fairness", "audit", *models, *given, "-o", out, *SMALL, *QUICK, *more)


def test_audit_of_random_attributes_finds_no_gap(dinov2, people, tmp_path):
    asked = ("--by", "gender,age:40:60,gender*site", "--cluster", "subject", "--json")
    done = audit(dinov2, people, tmp_path / "out", *asked, models=("baseline:pixels", "baseline:histogram"))
    assert done.code == 0, done.err
    gaps = pq.read_table(tmp_path / "out" / "gaps.parquet").to_pylist()
    assert {row["axis"] for row in gaps} == {"gender", "age", "gender × site"}
    assert not any(row["significant"] for row in gaps)
    assert {row["unknown"] for row in gaps if row["axis"] == "gender" and row["metric"] == "accuracy"} == {4}
    groups = pq.read_table(tmp_path / "out" / "groups.parquet").to_pylist()
    ours = [row for row in groups if row["metric"] == "accuracy" and row["model"] == "baseline:pixels"]
    by_gender = {row["group"]: row for row in ours if row["axis"] == "gender"}
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    right = [row["accuracy"] for row in table if row["model"] == "baseline:pixels" and row["gender"] == "female"]
    assert by_gender["female"]["value"] == pytest.approx(np.mean(right)) and by_gender["female"]["images"] == len(right)
    assert by_gender["unknown"]["images"] == 4 and not by_gender["unknown"]["enough"]
    metrics = {row["metric"] for row in done.json["results"]}
    assert {"accuracy", "accuracy[gender=female]", "accuracy_gap[gender]", "accuracy_drop[gender]"} <= metrics
    changes = pq.read_table(tmp_path / "out" / "model_gaps.parquet").to_pylist()
    assert changes and all(row["low"] <= row["change"] <= row["high"] for row in changes)
    compared = dinov2("eval", "compare", tmp_path / "out", "--json")
    assert compared.code == 0, compared.err
    again = audit(dinov2, people, tmp_path / "out", *asked, models=("baseline:pixels", "baseline:histogram"))
    assert again.code == 0 and "already done" in again.err + again.out
    assert audit(dinov2, people, tmp_path / "out", "--by", "gender").code == 2


def test_audit_finds_a_planted_gap_and_says_where(dinov2, people, tmp_path):
    """The images of one site are turned into noise, which nobody can recognise."""
    from PIL import Image

    folder = tmp_path / "images"
    shutil.copytree(people / "images", folder)
    rng = np.random.Generator(np.random.Philox(key=0))
    for row in read(people / "people.csv"):
        if row["site"] == "west":
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / row["file"])
    given = ["--data", folder, "--attributes", people / "people.csv", "--label", "object", "--by", "site,gender"]
    out = tmp_path / "out"
    done = dinov2(
        "fairness", "audit", "baseline:pixels", *given, "--cluster", "subject", "-o", out, *SMALL,
        "--set", "permutations=1000",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = {(row["axis"], row["metric"]): row for row in pq.read_table(out / "gaps.parquet").to_pylist()}
    site = found["site", "accuracy"]
    assert site["significant"] and site["worst"] == "west" and site["gap_low"] > 0
    assert "west against" in done.err
    page = (out / "report.html").read_text()
    assert "west" in page and "data:image" not in page and "<script" not in page
    shown = tmp_path / "shown"
    done = dinov2(
        "fairness", "audit", "baseline:pixels", *given, "--cluster", "subject", "-o", shown, *SMALL, *QUICK,
        "--show-images",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "data:image" in (shown / "report.html").read_text()


def test_people_by_a_table(dinov2, people, tmp_path):
    done = dinov2(
        "fairness", "people", "baseline:pixels", "--train", "demo:photos?count=240", "--data", people / "images",
        "--attributes", people / "people.csv", "--meta-labels", people / "meta.csv", "-o", tmp_path / "out",
        *SMALL, *QUICK, "--min-images", "20",
    )  # fmt: skip
    assert done.code == 0, done.err
    groups = pq.read_table(tmp_path / "out" / "groups.parquet").to_pylist()
    axes = {row["axis"] for row in groups}
    assert {"gender", "age", "skin type", "skin tone", "gender × skin tone"} <= axes
    names = {row["metric"] for row in groups}
    assert {"Human", "Possibly-Human", "Non-Human", "Crime", "same gender among the nearest 5"} <= names
    assert {row["group"] for row in groups if row["axis"] == "age"} <= {"18–30", "30–45", "45–70", "70+", "unknown"}
    alike = [row for row in groups if row["metric"] == "same gender among the nearest 5"]
    assert {row["axis"] for row in alike} == {"gender"} and all(row["expected"] is not None for row in alike[:2])


def test_geo_by_the_columns_of_dollar_street(dinov2, people, tmp_path):
    rng = np.random.Generator(np.random.Philox(key=1))
    rows = []
    for number, row in enumerate(read(people / "people.csv")):
        home = int(row["subject"][1:])
        place = [("Africa", "Kenya"), ("Asia", "India"), ("Europe", "Spain")][home % 3]
        url = f"http://host/media/{place[1]}%20{home}/image/x/480x480-{row['file']}?size=1"
        rows.append(
            {
                "": number, "country": place[1], "url": url, "income": 50 + 20 * home, "region": place[0],
                "label": f"['{row['object']}s']", "sin21k_labels": f"['{row['object']}', 'never heard of']",
                "other": rng.random(),
            }
        )  # fmt: skip
        (tmp_path / "homes").mkdir(exist_ok=True)
        shutil.copy(people / "images" / row["file"], tmp_path / "homes" / f"480x480-{row['file']}")
    write(tmp_path / "metadata.csv", rows)
    given = ("--train", "demo:photos?count=240", "--data", tmp_path / "homes", *SMALL, *QUICK, "--top", "2")
    own = ("--attributes", tmp_path / "metadata.csv")
    done = dinov2("fairness", "geo", "baseline:pixels", *given, *own, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = done.json["results"][0]["settings"]["found"]
    assert found["clusters"] == 60 and found["cluster_unit"] == "households" and found["images"] == 240
    groups = pq.read_table(tmp_path / "out" / "groups.parquet").to_pylist()
    assert {row["group"] for row in groups if row["axis"] == "income" and row["known"]} == {"low", "medium", "high"}
    assert {row["axis"] for row in groups} == {"region", "income", "region × income", "country"}
    assert len(pq.read_table(tmp_path / "out" / "curve.parquet")) > 10
    # Targets through a mapping of the users' own concepts give the same hits.
    mapping = {f"{row['object']}s": [row["object"]] for row in read(people / "people.csv")}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    mapped = dinov2(
        "fairness", "geo", "baseline:pixels", *given, *own, "--concepts", tmp_path / "map.json", "-o",
        tmp_path / "mapped", "--json",
    )  # fmt: skip
    assert mapped.code == 0, mapped.err
    assert mapped.json["results"][0]["value"] == done.json["results"][0]["value"]
    # Targets that nobody trained on are refused before any image is read.
    strange = [{**row, "sin21k_labels": "['pan, cooking_pan']"} for row in rows]
    write(tmp_path / "strange.csv", strange)
    refused = dinov2(
        "fairness", "geo", "baseline:pixels", *given, "--attributes", tmp_path / "strange.csv", "-o", tmp_path / "no"
    )
    assert refused.code == 3 and "is a class of the classifier" in refused.err and not (tmp_path / "no").exists()
    # An income of zero, and the cure.
    rows[5]["income"] = 0
    write(tmp_path / "zero.csv", rows)
    zero = ("--attributes", tmp_path / "zero.csv")
    failed = dinov2("fairness", "geo", "baseline:pixels", *given, *zero, "-o", tmp_path / "zero")
    assert failed.code == 3 and "income" in failed.err and "invalid=unknown" in failed.err
    cured = dinov2(
        "fairness", "geo", "baseline:pixels", *given, *zero, "-o", tmp_path / "zero", "--set", "invalid=unknown"
    )
    assert cured.code == 0, cured.err


@pytest.mark.parametrize(
    "more, code, said",
    [
        (("--by", "gendre"), 3, "did you mean 'gender'"),
        (("--cluster", "person"), 3, "person"),
        (("--by", "gender", "--id", "nothing"), 3, "nothing"),
        (("--by", "gender", "--set", "min_images=1"), 2, "min_images"),
    ],
)
def test_wrong_columns_are_one_line(dinov2, people, tmp_path, more, code, said):
    done = audit(dinov2, people, tmp_path / "out", *more)
    assert done.code == code and said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: [{**row, "age": "03-Sep" if place == 7 else "20-29"} for place, row in enumerate(rows)], "3-9"),
        (lambda rows: [*rows, {**rows[0], "gender": "other"}], "000.png"),
        (lambda rows: [{**row, "file": f"x{row['file']}"} for row in rows], "--id"),
        (lambda rows: [{**row, "gender": "female", "age": "20-29"} for row in rows], "gender (female)"),
        (lambda rows: [{**row, "object": ""} for row in rows], "label"),
    ],
    ids=["spreadsheet", "conflict", "no image", "one group", "no labels"],
)
def test_bad_tables_are_one_line(dinov2, people, tmp_path, change, said):
    write(tmp_path / "bad.csv", change(read(people / "people.csv")))
    done = audit(dinov2, people, tmp_path / "out", "--by", "gender,age", attributes=tmp_path / "bad.csv")
    assert done.code == 3 and said in done.err, done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error")]) == 1


def test_rows_and_images_without_each_other_are_counted(dinov2, people, tmp_path):
    rows = read(people / "people.csv")
    write(tmp_path / "some.csv", [*rows[10:], rows[20], {**rows[0], "file": "gone.png"}])
    done = audit(dinov2, people, tmp_path / "out", "--by", "gender", "--json", attributes=tmp_path / "some.csv")
    assert done.code == 0, done.err
    found = done.json["results"][0]["settings"]["found"]
    counts = {key: found[key] for key in ("rows_without_image", "images_without_row", "repeated_rows")}
    assert counts == {"rows_without_image": 1, "images_without_row": 10, "repeated_rows": 1}
    assert "10 of 240 images have no row" in done.err


def test_what_would_be_done_is_shown_first(dinov2, people, tmp_path):
    done = audit(dinov2, people, tmp_path / "out", "--by", "gender", "--dry-run")
    assert done.code == 0 and "odds.parquet" in done.err + done.out
    assert not (tmp_path / "out").exists()


def test_images_without_attributes_are_refused(dinov2, people, tmp_path):
    done = dinov2("fairness", "audit", "baseline:pixels", "--data", people / "images", "-o", tmp_path / "out", *SMALL)
    assert done.code == 3 and "--attributes FILE" in done.err

import pytest

from dinov2cli.data.spec import DataSpec, expand_braces, parse_spec
from dinov2cli.errors import InputError


def message(spec: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_spec(spec)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..10}.tar", ["s-8.tar", "s-9.tar", "s-10.tar"]),
        ("s-{08..10}.tar", ["s-08.tar", "s-09.tar", "s-10.tar"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("s-{2..0}.tar", ["s-2.tar", "s-1.tar", "s-0.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


def test_bad_brace_range():
    with pytest.raises(InputError, match=r"'\{a\.\.c\}' is not a range of numbers; write for example \{000\.\.015\}"):
        expand_braces("s-{a..c}.tar")


def test_kinds_on_disk(tmp_path, picture_folder):
    (tmp_path / "list.txt").write_text("x")
    (tmp_path / "x.tar").touch()
    (tmp_path / "x.parquet").touch()
    (tmp_path / "one.jpg").touch()
    kinds = {
        name: parse_spec(str(tmp_path / name)).kind for name in ("photos", "list.txt", "x.tar", "x.parquet", "one.jpg")
    }
    assert kinds == {"photos": "folder", "list.txt": "list", "x.tar": "tar", "x.parquet": "parquet", "one.jpg": "list"}
    assert parse_spec("hf:owner/name?split=train&image=jpg") == DataSpec(
        "hub", "owner/name", {"split": "train", "image": "jpg"}
    )
    assert parse_spec("demo:photos?split=test&size=96").options == {"split": "test", "size": "96"}


def test_options_are_percent_decoded_and_survive_the_canonical_form(picture_folder, tmp_path, monkeypatch):
    (tmp_path / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    spec = parse_spec("x.parquet?label=a%26b=c&image=my pic")
    assert spec.options == {"label": "a&b=c", "image": "my pic"}
    canonical = spec.canonical()
    assert canonical.startswith(str(tmp_path / "x.parquet?"))
    assert parse_spec(canonical).options == spec.options
    assert parse_spec(canonical).canonical() == canonical


def test_a_question_mark_in_a_file_name(tmp_path):
    path = tmp_path / "what?.parquet"
    path.touch()
    assert parse_spec(str(path)).options == {}


def test_missing_path_suggests_a_sibling(tmp_path, picture_folder):
    text = message(str(tmp_path / "photo"))
    assert text == (
        f"{tmp_path}/photo: no such file or folder; expected a folder, a .tar, a .parquet or a text file of paths; "
        "did you mean 'photos'?"
    )
    assert f"its folder {tmp_path}/no does not exist either" in message(str(tmp_path / "no" / "photos"))


def test_missing_path_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert message("owner/name").endswith("for a dataset of the Hugging Face hub write hf:owner/name")


def test_unknown_key(picture_folder):
    text = message(f"{picture_folder}?lable=folder")
    assert "unknown key 'lable' after the '?'; did you mean 'label'?; known here: image, label, mask" in text
    assert "unknown key 'copies'" in message("demo:digits?copies=0.1")
    assert "'label' after the '?' is not key=value" in message(f"{picture_folder}?label")


def test_unknown_demo_and_empty_names():
    assert (
        message("demo:photo") == "demo:photo: there is no such demo set; the demo sets are demo:photos and demo:digits"
    )
    assert "'hf:' names no dataset; write hf:owner/name" in message("hf:")
    assert message("").startswith("DATA is empty; expected a folder")


def test_files_of_other_kinds(tmp_path):
    for name in ("x.zip", "x.csv", "noextension"):
        (tmp_path / name).touch()
    assert "a .zip file is not a set of images; unpack it and give the folder; expected" in message(
        str(tmp_path / "x.zip")
    )
    assert "a .csv file is not a set of images; expected a folder, a .tar" in message(str(tmp_path / "x.csv"))
    assert "a file without extension is not a set of images" in message(str(tmp_path / "noextension"))


def test_missing_shards_are_named(tmp_path):
    (tmp_path / "s-0.tar").touch()
    spec = parse_spec(str(tmp_path / "s-{0..2}.tar"))
    assert spec.kind == "tar"
    with pytest.raises(
        InputError, match=r"2 of its 3 files do not exist \(.*s-1\.tar, .*s-2\.tar\); correct the range"
    ):
        spec.files()
    assert "braces are expanded for .tar and .parquet files only" in message(str(tmp_path / "s-{0..2}.zip"))


@pytest.mark.parametrize(
    "kind, noun, cure",
    [
        ("run", "a run directory", "use it as MODEL, as in `dinov2 embed DATA -m"),
        ("results", "a results directory", "report.html"),
        ("demo", "the output of `dinov2 demo`", "give one of the directories in it"),
    ],
)
def test_a_directory_of_another_kind_names_its_command(tmp_path, kind, noun, cure):
    (tmp_path / "manifest.json").write_text(f'{{"kind": "{kind}", "schema": 1}}')
    text = message(str(tmp_path))
    assert text.startswith(f"{tmp_path}: this is {noun}")
    assert cure in text


def test_somebody_elses_manifest_is_just_a_file(picture_folder):
    (picture_folder / "manifest.json").write_text("[1, 2]")
    assert parse_spec(str(picture_folder)).kind == "folder"

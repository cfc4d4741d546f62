import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2cli.data.bad import BadImage
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError


def message(spec: object) -> str:
    with pytest.raises(InputError) as caught:
        _ = open_source(str(spec)).labels
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_parquet(path, images, *, metadata=True, image_name="image", **columns):
    data = {image_name: [{"bytes": image, "path": None} for image in images], **columns}
    if metadata:
        features = datasets.Features({image_name: datasets.Image()})
        for name, values in columns.items():
            features[name] = (
                datasets.ClassLabel(names=["cat", "dog"])
                if name == "label" and isinstance(values[0], int)
                else datasets.Features.from_arrow_schema(pa.table({name: values}).schema)[name]
            )
        datasets.Dataset.from_dict(data, features=features).to_parquet(path)
    else:
        pq.write_table(pa.table(data), path)
    return path


# --- folder -------------------------------------------------------------------------------------------------------


def test_folder(picture_folder):
    (picture_folder / ".hidden.png").write_bytes(b"")
    (picture_folder / "__MACOSX").mkdir()
    (picture_folder / "__MACOSX" / "0.png").write_bytes(b"")
    source = open_source(str(picture_folder))
    assert source.kind == "folder"
    assert source.ids == ["cat/0.png", "cat/1.jpg", "dog/2.png"]
    assert source.paths[0] == str(picture_folder / "cat/0.png")
    assert source.read(1) == (picture_folder / "cat/1.jpg").read_bytes()
    assert source.labels is None and source.label_names is None
    assert source.columns.num_columns == 0
    assert source.origin(2) == (str(picture_folder), 2)


def test_folder_labels_only_if_asked(picture_folder, encode):
    (picture_folder / "loose.png").write_bytes(encode(9))
    for source in (
        open_source(f"{picture_folder}?label=folder"),
        open_source(str(picture_folder), label_from="folder"),
    ):
        assert source.label_names == ["cat", "dog"]
        assert source.labels.tolist() == [0, 0, 1, -1]
        assert source.labels.dtype == np.int64
    assert "no image lies in a sub-folder; make one folder per label" in message(f"{picture_folder}/cat?label=folder")


def test_linked_folders_are_followed_once(picture_folder, tmp_path):
    (tmp_path / "farm").mkdir()
    os.symlink(picture_folder, tmp_path / "farm" / "a")
    os.symlink(tmp_path / "farm", picture_folder / "back")  # a loop
    assert open_source(str(tmp_path / "farm")).ids == ["a/cat/0.png", "a/cat/1.jpg", "a/dog/2.png"]


def test_a_file_that_vanished_is_bad_not_fatal(picture_folder):
    source = open_source(str(picture_folder))
    (picture_folder / "cat/1.jpg").unlink()
    with pytest.raises(BadImage, match=r"cat/1\.jpg: the file does not exist"):
        source.read(1)


def test_file_names_that_are_not_utf_8(tmp_path, encode):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write(encode(0))
    source = open_source(str(tmp_path))
    assert source.ids == ["caf\\xe9.png"] and source.read(0) == encode(0)
    before = source.content_hash()
    os.utime(name, ns=(1, 1))
    assert source.content_hash() != before


def test_folders_without_images(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (
        message(empty)
        == f"{empty}: the folder is empty; expected images (.jpg, .png, .webp, .tif, …) in it or below it"
    )
    for name in ("a.txt", "b.txt", "c.csv", "README"):
        (empty / name).touch()
    text = message(empty)
    assert text == (
        f"{empty}: no image among its 4 files (2 .txt, 1 no extension, 1 .csv); "
        "expected .jpg, .png, .webp, .tif, …, .parquet or .tar"
    )


def test_column_options_make_no_sense_for_a_folder(picture_folder):
    assert "'image=' names a column, and a folder of images has none" in message(f"{picture_folder}?image=x")
    assert "leave it out, and give the sub-folder itself" in message(f"{picture_folder}?split=train")
    assert "has no column 'kind'; its labels are ?label=folder" in message(f"{picture_folder}?label=kind")


# --- list ---------------------------------------------------------------------------------------------------------


def test_list_of_paths(picture_folder, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(
        f"# my list\nphotos/dog/2.png\r\n\n{picture_folder}/cat/1.jpg\n./photos/dog/2.png\nphotos/gone.png\n",
        encoding="utf-8-sig",
    )
    source = open_source(str(listing))
    assert source.kind == "list"
    assert source.ids == ["photos/dog/2.png", "photos/cat/1.jpg", "photos/gone.png"]
    assert source.read(1) == (picture_folder / "cat/1.jpg").read_bytes()
    with pytest.raises(BadImage):
        source.read(2)
    assert open_source(f"{listing}?label=folder").label_names == ["photos"]


def test_one_image_file_is_a_set_of_one(picture_folder):
    source = open_source(str(picture_folder / "cat/0.png"))
    assert len(source) == 1 and source.ids == ["0.png"]


def test_bad_lists(tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("\n# nothing\n")
    assert message(listing) == f"{listing}: the list is empty; expected one image path a line"
    listing.write_text("a.jpg\nb.jpg\n")
    assert message(listing) == (
        f"{listing}: none of its 2 paths exists (first: a.jpg); "
        f"expected one image path a line, absolute or relative to {tmp_path}"
    )
    listing.write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file in UTF-8; expected one image path a line" in message(listing)


# --- parquet ------------------------------------------------------------------------------------------------------


def test_parquet_with_features(tmp_path, encode):
    images = [encode(seed) for seed in range(3)]
    path = write_parquet(tmp_path / "x.parquet", images, label=[1, 0, 1], place=["a", "b", "c"])
    source = open_source(str(path))
    assert source.kind == "parquet" and len(source) == 3
    assert [source.read(row) for row in range(3)] == images
    assert source.labels.tolist() == [1, 0, 1] and source.label_names == ["cat", "dog"]
    assert source.columns.column_names == ["place"] and source.columns["place"].to_pylist() == ["a", "b", "c"]
    assert source.ids == ["00000000", "00000001", "00000002"]
    assert source.paths[2] == f"{path}#2"


def test_parquet_without_metadata_and_named_columns(tmp_path, encode):
    images, masks = [encode(seed) for seed in range(2)], [encode(seed) for seed in (8, 9)]
    path = write_parquet(
        tmp_path / "x.parquet",
        images,
        metadata=False,
        image_name="photo",
        mask=[{"bytes": mask, "path": f"{row}.png"} for row, mask in enumerate(masks)],
        species=["wolf", None],
        venue=[7, 7],
        id=["b", "a"],
    )
    source = open_source(f"{path}?image=photo&label=species&group=venue")
    assert source.read(1) == images[1] and source.read(1, "mask") == masks[1]
    assert source.has_role("mask") and not source.has_role("depth")
    assert source.labels.tolist() == [0, -1] and source.label_names == ["wolf"]
    assert source.column("group").to_pylist() == [7, 7]
    assert source.column("is_query") is None
    assert source.ids == ["b", "a"]
    assert open_source(f"{path}?mask=photo").read(0) == masks[0]  # what plays another role is not the image
    with pytest.raises(InputError, match="no column 'vnue' for group; its columns are species, venue"):
        open_source(f"{path}?group=vnue").column("group")


def test_parquet_of_paths(picture_folder, encode):
    table = pa.table({"file": ["cat/0.png", str(picture_folder / "dog/2.png"), "nowhere.png"], "cls": [3, None, 5]})
    pq.write_table(table, picture_folder / "index.parquet")
    source = open_source(f"{picture_folder}/index.parquet?image=file")
    assert source.read(0) == (picture_folder / "cat/0.png").read_bytes()
    assert source.read(1) == (picture_folder / "dog/2.png").read_bytes()
    with pytest.raises(BadImage, match="the file does not exist"):
        source.read(2)
    assert source.labels.tolist() == [3, -1, 5]


def test_parquet_folder_and_braces_keep_order(tmp_path, encode):
    (tmp_path / "data").mkdir()
    for part in range(3):
        write_parquet(tmp_path / "data" / f"part-{part:03d}.parquet", [encode(part)], number=[part])
    folder = open_source(str(tmp_path))
    assert folder.kind == "parquet" and folder.columns["number"].to_pylist() == [0, 1, 2]
    braces = open_source(f"{tmp_path}/data/part-{{002..001}}.parquet")
    assert braces.columns["number"].to_pylist() == [2, 1]


def test_parquet_paths_with_pattern_characters(tmp_path, encode):
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    path = write_parquet(folder / "x.parquet", [encode(0)])
    assert len(open_source(str(path))) == 1


def test_splits_side_by_side_are_never_mixed_in_silence(tmp_path, encode):
    write_parquet(tmp_path / "train.parquet", [encode(0), encode(1)])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [encode(2)])
    assert message(tmp_path) == (
        f"{tmp_path}: holds the splits test, train side by side; choose one, as {tmp_path}?split=train, "
        "or give one file"
    )
    assert len(open_source(f"{tmp_path}?split=train")) == 2
    assert open_source(f"{tmp_path}?split=test").read(0) == encode(2)
    assert "no Parquet file of split 'val'; splits found by file name: test, train" in message(f"{tmp_path}?split=val")


def test_parquet_errors(tmp_path, encode):
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"name": ["a"], "x": [1.5]}), path)
    assert message(path) == f"{path}: no image column among name (string), x (float64); name it with ?image=COLUMN"
    assert "column 'x' holds float64, not images" in message(f"{path}?image=x")
    assert "no column 'nme' for image; did you mean 'name'?; its columns are name, x" in message(f"{path}?image=nme")
    path.write_bytes(b"PAR1 no PAR1")
    text = message(path)
    assert text.startswith(f"{path}: not a readable Parquet file (") and text.endswith("fetch or write it again")
    good = write_parquet(tmp_path / "good.parquet", [encode(0)], score=[0.5])
    assert "no column 'scor' for labels; did you mean 'score'?; its columns are score" in message(f"{good}?label=scor")
    assert "labels are of type double, expected whole numbers or strings" in message(f"{good}?label=score")


# --- hub ----------------------------------------------------------------------------------------------------------


def test_local_copy_of_a_hub_dataset(tmp_path, encode, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    write_parquet(copy / "train-00000-of-00001.parquet", [encode(0), encode(1)], label=[0, 1])
    write_parquet(copy / "test-00000-of-00001.parquet", [encode(2)], label=[1])
    monkeypatch.chdir(tmp_path)
    source = open_source("hf:./copy?split=test&image=image")
    assert source.kind == "hub" and source.spec == f"hf:{copy}?image=image&split=test"
    assert source.read(0) == encode(2) and source.labels.tolist() == [1] and source.label_names == ["cat", "dog"]
    assert len(open_source("hf:./copy")) == 2
    assert open_source(source.spec).content_hash() == source.content_hash() != open_source("hf:./copy").content_hash()
    assert 'Unknown split "val"' in message("hf:./copy?split=val")
    assert "hf:./cpy" not in message("hf:./cpy") and "did you mean 'copy'?" in message("hf:./cpy")


def test_hub_name_that_cannot_be_reached():
    text = message("hf:nobody/nothing-here")
    assert text.startswith("hf:nobody/nothing-here: could not be read as a dataset of the Hugging Face hub (")
    assert text.endswith("; check name, split and connection; private sets need `hf auth login`")


# --- all sources --------------------------------------------------------------------------------------------------


def test_fingerprint_is_stable_and_follows_the_data(picture_folder, tmp_path, encode):
    path = write_parquet(tmp_path / "x.parquet", [encode(0)], label=[0])
    for spec, touched in ((str(picture_folder), picture_folder / "dog/2.png"), (str(path), path)):
        first = open_source(spec).fingerprint()
        assert set(first) == {"spec", "kind", "rows", "hash"}
        assert open_source(spec).fingerprint() == first
        json.dumps(first)
        os.utime(touched, ns=(1, 1))
        assert open_source(spec).fingerprint()["hash"] != first["hash"]
    before = open_source(str(picture_folder)).content_hash()
    shutil.copy(picture_folder / "dog/2.png", picture_folder / "dog/3.png")
    assert open_source(str(picture_folder)).content_hash() != before


def test_changed_parquet_is_read_anew(tmp_path, encode):
    path = write_parquet(tmp_path / "x.parquet", [encode(0)])
    assert open_source(str(path)).read(0) == encode(0)
    write_parquet(path, [encode(1)])
    os.utime(path, ns=(5, 5))
    assert open_source(str(path)).read(0) == encode(1)


def test_sources_pickle_without_their_lists(picture_folder, tmp_path, encode):
    path = write_parquet(tmp_path / "x.parquet", [encode(0)])
    for spec in (str(picture_folder), str(path), "demo:digits?count=3"):
        source = open_source(spec)
        names, first = source.ids, source.read(0)
        clone = pickle.loads(pickle.dumps(source))
        assert "ids" not in clone.__dict__
        assert clone.ids == names and clone.read(0) == first and clone.spec == source.spec


def test_images_that_a_table_only_names_belong_to_its_content(tmp_path):
    for row in range(3):
        Image.new("RGB", (8, 8), (40 * row, 0, 0)).save(tmp_path / f"{row}.png")
    names = [f"{row}.png" for row in range(3)]
    inside = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in names]
    tables = {"cells": [{"bytes": None, "path": name} for name in names], "texts": names, "whole": inside}
    for name, column in tables.items():
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")

    def hashes():
        return {name: open_source(f"{tmp_path}/{name}.parquet?image=image").content_hash() for name in tables}

    before = hashes()
    assert hashes() == before and len(set(before.values())) == 3
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "1.png")
    after = hashes()
    assert {name for name in tables if after[name] != before[name]} == {"cells", "texts"}

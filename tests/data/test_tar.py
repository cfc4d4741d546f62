import io
import json
import pickle
import tarfile

import pytest

from dinov2cli.data.bad import BadImage
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, image, extension="jpg", **more):
    texts = {name: (json.dumps(value) if name == "json" else str(value)).encode() for name, value in more.items()}
    return [(f"{key}.{extension}", image), *((f"{key}.{name}", text) for name, text in texts.items())]


def message(spec: object) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_img2dataset_shards(tmp_path, encode):
    images = [encode(seed) for seed in range(4)]
    for shard in range(2):
        members = []
        for row in (2 * shard, 2 * shard + 1):
            about = {"url": f"http://x/{row}", "width": 10 + row, "nested": {"a": [row]}, "status": None}
            members += sample(f"{row:09d}", images[row], txt=f"caption {row}", cls=row % 2, json=about)
        write_tar(tmp_path / f"s-{shard:03d}.tar", members)
    source = open_source(f"{tmp_path}/s-{{000..001}}.tar")
    assert source.kind == "tar" and [source.read(row) for row in range(4)] == images
    assert source.ids == [f"{row:09d}" for row in range(4)]
    assert source.paths[3] == f"{tmp_path}/s-001.tar/000000003"
    assert source.labels.tolist() == [0, 1, 0, 1]
    columns = source.columns
    assert columns["txt"].to_pylist()[1] == "caption 1"
    assert columns["url"].to_pylist()[2] == "http://x/2" and columns["width"].to_pylist() == [10, 11, 12, 13]
    assert columns["nested"].to_pylist()[0] == '{"a": [0]}'
    assert open_source(f"{tmp_path}/s-000.tar?label=url").label_names == ["http://x/0", "http://x/1"]
    assert open_source(str(tmp_path)).ids == source.ids  # a folder of shards
    clone = pickle.loads(pickle.dumps(source))
    del source  # closes its files: the clone must have its own
    assert clone.read(3) == images[3]


def test_samples_may_differ_in_their_members(tmp_path, encode):
    a, b, mask = encode(0), encode(1), encode(2)
    members = [
        *sample("x/1", a, "jpg", json={"k": 1}),
        ("x/1.mask.png", mask),
        *sample("x/2", b, "PNG", json={"other": "text"}),
        ("x/3.txt", b"no image here"),
        ("__MACOSX/4.jpg", b"junk"),
    ]
    path = write_tar(tmp_path / "mixed.tar", members)
    source = open_source(f"{path}?mask=mask.png")
    assert source.ids == ["x/1", "x/2"]
    assert source.read(0) == a and source.read(1) == b and source.read(0, "mask") == mask
    with pytest.raises(BadImage, match="the sample has no mask"):
        source.read(1, "mask")
    assert open_source(str(path)).read(0) == a  # jpg before mask.png
    assert open_source(f"{path}?image=mask.png").read(0) == mask
    assert open_source(f"{path}?label=folder").label_names == ["x"]


def test_keys_that_repeat_across_shards_get_their_shard(tmp_path, encode):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", sample("0", encode(0)))
    assert open_source(f"{tmp_path}/{{a,b}}.tar").ids == ["a/0", "b/0"]


def test_rewritten_shard_is_indexed_anew(tmp_path, encode):
    path = write_tar(tmp_path / "s.tar", sample("0", encode(0)))
    first = open_source(str(path))
    before = first.content_hash()
    write_tar(path, [*sample("0", encode(1)), *sample("1", encode(2))])
    again = open_source(str(path))
    assert len(again) == 2 and again.read(1) == encode(2) and again.content_hash() != before


def test_tar_errors(tmp_path, encode):
    path = write_tar(tmp_path / "texts.tar", [("1.txt", b"a"), ("2.txt", b"b"), ("2.json", b"{}")])
    assert message(path) == (
        f"{path}: no images in the tar, found 2 .txt, 1 .json; expected samples such as 000001.jpg + 000001.json"
    )
    empty = write_tar(tmp_path / "empty.tar", [])
    assert "no files in the tar; expected WebDataset samples such as" in message(empty)
    good = write_tar(
        tmp_path / "good.tar", [*sample("0", encode(0)), *sample("1", encode(1, size=(200, 200), format="BMP"))]
    )
    assert "no member '.png' (asked by ?image=png) in the tar, found 2 .jpg" in message(f"{good}?image=png")
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:60_000])
    assert message(tmp_path / "cut.tar") == (
        f"{tmp_path}/cut.tar: not a whole tar file (it ends inside 1.jpg); fetch or write it again"
    )
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    assert "text.tar: not a whole tar file (" in message(tmp_path / "text.tar")
    (tmp_path / "z.tar.gz").touch()
    assert "compressed shards cannot be read at random; unpack it first with `gunzip" in message(tmp_path / "z.tar.gz")

"""Casual Conversations: annotations as a table, videos found by their frames."""

import json

import pytest

from dinov2cli.errors import InputError
from dinov2cli.evaluation.clustered import cluster_codes
from dinov2cli.fairness.attributes import read_attributes, texts
from dinov2cli.fairness.casual_conversations import read_casual_conversations
from dinov2cli.fairness.groups import age_axis, skin_axes
from tests.fairness.named_images import NamedImages

A = "CasualConversationsA"
SUBJECTS = {
    "1140": {
        "label": {"age": "34", "gender": "Female", "skin-type": "3"},
        "files": [f"{A}/1140/1140_00.MP4", f"{A}/1140/1140_01.MP4"],
        "dark_files": [f"{A}/1140/1140_01.MP4"],
    },
    "1141": {
        "label": {"age": "N/A", "gender": "Male", "skin-type": "6"},
        "files": [f"{A}/1141/1141_00.MP4"],
        "dark_files": [],
    },
}


def written(folder, content):
    path = folder / "CasualConversations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_row_per_video(tmp_path):
    table = read_casual_conversations(written(tmp_path, SUBJECTS))
    assert table.to_pydict() == {
        "subject": ["1140", "1140", "1141"],
        "age": ["34", "34", "N/A"],
        "gender": ["Female", "Female", "Male"],
        "skin_type": ["3", "3", "6"],
        "lighting": ["bright", "dark", "bright"],
        "video": [f"{A}/1140/1140_00.MP4", f"{A}/1140/1140_01.MP4", f"{A}/1141/1141_00.MP4"],
    }


def test_other_spellings_numbers_and_dark_videos_listed_only_there(tmp_path):
    entry = {"label": {"age": 50, "skin_type": 2, "eye-colour": "b"}, "files": ["a/1.mp4"], "dark-files": ["a/2.mp4"]}
    table = read_casual_conversations(written(tmp_path, {"7": entry})).to_pydict()
    assert table["lighting"] == ["bright", "dark"] and table["video"] == ["a/1.mp4", "a/2.mp4"]
    assert table["age"] == ["50", "50"] and table["skin_type"] == ["2", "2"] and table["eye_colour"] == ["b", "b"]
    assert table["gender"] == [None, None]
    del entry["dark-files"]
    table = read_casual_conversations(written(tmp_path, {"7": entry}))
    assert table["lighting"].to_pylist() == [None]


FRAMES = {
    f"{A}/1140/1140_00/frame_0003.jpg": 0,
    "1140_00/1.png": 0,
    "1140_00_12.png": 0,
    "1140_00.jpg": 0,
    "1140_00": 0,
    "x/1140_00-5.jpg": 0,
    "1140_01_0001_face.jpg": 1,
    "1140_01/1140_00_1.jpg": 0,  # the file's own name comes before its folder's
    "1140_00/1141_00/1.jpg": 2,  # and the nearest folder before those above
    "1141_00 12.jpg": 2,
    "1140_001.jpg": -1,
    "1140_0.jpg": -1,
    "1140/frame.jpg": -1,
    "other.jpg": -1,
}


def test_frames_find_their_videos(tmp_path):
    found = read_attributes(written(tmp_path, SUBJECTS), NamedImages(FRAMES))
    videos = [None if row < 0 else ["1140_00", "1140_01", "1141_00"][row] for row in FRAMES.values()]
    stems = [None if video is None else video.split("/")[-1][:-4] for video in texts(found, "video")]
    assert stems == videos and found.matched.tolist() == [row >= 0 for row in FRAMES.values()]
    assert (found.rows, found.rows_without_image, found.images_without_row) == (3, 0, 4)
    assert found.notes == ["4 of 14 images have no row in CasualConversations.json: all their attributes are unknown"]
    kind, tone = skin_axes(texts(found, "skin_type"))
    assert tone.codes[0] == 0 and tone.codes[9] == 1 and kind.codes[-1] == -1
    age, _ = age_axis("age", found, "age")
    assert age.names[age.codes[0]] == "30–45" and age.codes[9] == -1
    subjects = cluster_codes(texts(found, "subject"))
    assert subjects[0] == subjects[6] != subjects[9]


def test_the_longest_name_is_taken(tmp_path):
    entry = {"label": {"age": "1"}, "files": ["v/9.mp4", "v/9_1.mp4", "v/9_1_2.mp4"]}
    found = read_attributes(written(tmp_path, {"9": entry}), NamedImages(["9_1_2_3.jpg", "9_1_3.jpg", "9_3.jpg"]))
    assert texts(found, "video") == ["v/9_1_2.mp4", "v/9_1.mp4", "v/9.mp4"]


def test_folders_tell_videos_of_one_name_apart(tmp_path):
    parts = {str(n): {"label": {"age": str(n)}, "files": [f"p/{n}/00.MP4"], "dark_files": []} for n in (20, 30)}
    names = ["p/30/00/1.jpg", "p/20/00_1.jpg", "00_1.jpg"]
    found = read_attributes(written(tmp_path, parts), NamedImages(names, root="/q"))
    assert texts(found, "age") == ["30", "20", None]


def test_names_in_the_folders_above_the_images(tmp_path):
    source = NamedImages(["1.jpg", "2.jpg"], root=f"/data/{A}/1141/1141_00")
    assert texts(read_attributes(written(tmp_path, SUBJECTS), source), "subject") == ["1141", "1141"]


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "cannot be read as JSON (JSONDecodeError)"),
        ("[1, 2]", "a list of 2"),
        ("{}", "an empty JSON value"),
        ('"x"', "a JSON value"),
        ({"1": {"files": ["a"]}}, "subject '1' has no label, or no list of files"),
        ({"1": {"label": {"age": 3}}}, "subject '1' has no label, or no list of files"),
        ({"1": {"label": {"age": 3}, "files": "a.mp4"}}, "subject '1' has no label, or no list of files"),
        ({"1": {"label": {"age": 3}, "files": ["a"], "dark_files": [3]}}, "subject '1' has no label, or no list of"),
        ({"1": {"label": {"age": 3}, "files": []}}, "none of its 1 subjects has a video"),
    ],
)
def test_other_files(tmp_path, content, said):
    with pytest.raises(InputError) as caught:
        read_attributes(written(tmp_path, content), NamedImages(["a"]))
    assert said in str(caught.value) and "expected Casual Conversations (version 1)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_frame_of_any_video(tmp_path):
    file = written(tmp_path, SUBJECTS)
    with pytest.raises(
        InputError, match=r"no image of /pictures is called as a frame .* 'z.jpg', a video Casual.*MP4;"
    ):
        read_attributes(file, NamedImages(["z.jpg"]))
    with pytest.raises(InputError, match="found by the names of their videos, not by 'subject'; leave --id out"):
        read_attributes(file, NamedImages(["1140_00.jpg"]), key="subject")
    assert read_attributes(file, NamedImages(["1140_00.jpg"]), key="video").matched.all()


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read as JSON \(FileNotFoundError\)"):
        read_casual_conversations(tmp_path / "none.json")

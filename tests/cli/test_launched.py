"""Commands under a launch of one, two and three processes: the same bytes and figures, said and written once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2cli.artifacts.manifest import read_manifest
from tests.launch import ROOT, launch

HERE = Path(__file__).parent
EMBED = ["embed", "-m", "tiny", "--pool", "mean", "--workers", "0", "--set", "shard_size=20", "--batch-size", "3"]
DIGITS = "demo:digits?count=60"
LINEAR = ["--set", "steps=20", "--set", "learning_rates=[0.001,0.01]"]


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    """The photographs, and six files that cannot be read: the first batch has nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "photos").symlink_to(photos, target_is_directory=True)
    for number in range(5):
        (folder / f"a_{number}.png").write_text("no image")
    (folder / "z.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def commands(folder: Path) -> dict[str, list[str]]:
    """What to run, by the name of the directory that it writes; outputs are relative to the working directory."""
    query = next(path for path in sorted((folder / "photos").iterdir()) if path.is_dir())
    quiet = ["--workers", "0", "--device", "cpu"]
    return {
        "embeddings": [*EMBED, str(folder)],
        "tokens": [*EMBED, "demo:photos?count=40", "--patch", "--pool", "cls"],
        "unique": ["dedup", str(folder), *quiet],
        "unlike": ["dedup", str(folder), *quiet, "-m", "tiny", "--tiers", "exact,embedding", "--threshold", "0.9"],
        "distinct": [
            *("dedup", "embeddings", *quiet, "--tiers", "exact,embedding", "--threshold", "0.97"),
            *("--set", "index=IVF4,SQ8", "--set", "nprobe=2", "--against", str(query), "-m", "tiny"),
        ],
        "leaked": ["dedup", str(folder), *quiet, "--tiers", "exact,perceptual", "--against", str(query)],
        "balanced": ["curate", "embeddings", *quiet, "--target-size", "20", "--set", "levels=[12,4]"],
        "near": ["curate", "embeddings", *quiet, "--query", str(query), "--set", "neighbours=3"],
        "at_home": [
            *("curate", "embeddings", *quiet, "--query", str(query), "--mode", "cluster", "--target-size", "9"),
            *("--set", "clusters=4", "--set", "more_than=0"),
        ],
        "knn": ["eval", "knn", "tiny", *quiet, "--train", DIGITS, "--test", DIGITS, "--k", "5"],
        "linear": ["eval", "linear", "tiny", *quiet, "--train", DIGITS, "--test", "demo:digits?count=75", *LINEAR],
    }


@pytest.fixture(scope="module")
def launched(folder, tmp_path_factory):
    """{processes: (directory with all outputs, for each rank (code, stdout, stderr) of every command)}."""
    places = {}
    wanted = [[*arguments, "-o", name] for name, arguments in commands(folder).items()]
    wanted += [[*EMBED, str(folder), "-o", "embeddings"], [*EMBED, str(folder), "-o", "new", "--dry-run"]]
    for processes in (1, 2, 3):
        place = tmp_path_factory.mktemp(f"launched{processes}")
        (place / "commands.json").write_text(json.dumps(wanted))
        script = [str(HERE / "launched_commands.py"), "commands.json", "."]
        done = launch(*script, processes=processes, module="", cwd=place)
        assert done.returncode == 0, done.stderr
        places[processes] = place, [json.loads((place / f"{rank}.json").read_text()) for rank in range(processes)]
    return places


def figures(results: Path) -> list[dict]:
    rows = json.loads((results / "results.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_every_rank_ends_well_and_the_main_one_alone_speaks(launched, folder):
    for _, ranks in launched.values():
        for said in ranks:
            assert [code for code, _, _ in said] == [0] * (len(commands(folder)) + 2), said
        assert [out.strip() for _, out, _ in ranks[0]] == [*commands(folder), "embeddings", ""]
        for other in ranks[1:]:
            assert [(out, err) for _, out, err in other] == [("", "")] * len(other)
        assert "already done, nothing to do" in ranks[0][-2][2]
        assert "dry run" in ranks[0][-1][2]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(launched, processes, folder):
    alone, together = launched[1][0], launched[processes][0]
    for name in commands(folder):
        files = {path.relative_to(alone) for path in (alone / name).rglob("*") if path.suffix in (".npy", ".parquet")}
        assert files == {
            p.relative_to(together) for p in (together / name).rglob("*") if p.suffix in (".npy", ".parquet")
        }
        assert files
        for file in files:
            if "results" not in file.name:
                assert (together / file).read_bytes() == (alone / file).read_bytes(), file
        before, after = read_manifest(alone / name), read_manifest(together / name)
        assert after.complete
        assert after.extra == before.extra and after.rows == before.rows
    for name in ("knn", "linear"):
        assert figures(together / name) == figures(alone / name)


def test_unreadable_images_of_all_ranks_are_counted(launched):
    for place, ranks in launched.values():
        manifest = read_manifest(place / "embeddings")
        assert (manifest.rows, manifest.extra["unreadable"], len(manifest.extra["bad"])) == (72, 6, 6)
        shards = sorted((place / "embeddings" / "metadata").glob("*.parquet"))
        assert len(shards) == 4
        assert ranks[0][0][2].count("skipped unreadable image") == 6


def errors(done) -> list[str]:
    """The lines of a command's errors, without those of the launcher."""
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_too_many_unreadable_images_end_all_ranks_with_one_line(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_text("no image")
    done = launch(*EMBED, str(folder), "-o", str(tmp_path / "e"), processes=2)
    assert done.returncode != 0
    assert len(errors(done)) == 1, done.stderr
    assert errors(done)[0].startswith("error: none of the 12 images can be read: 0.png")
    assert "exitcode  : 3" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["embed", "IN", "-o", "OUT", "--pool", "none"], 2, "pool"),
        (["dedup", "IN/absent", "-o", "OUT"], 3, "absent"),
        (["eval", "knn", "tiny", "--train", "IN", "--test", "IN", "-o", "OUT", "--workers", "0"], 3, "has no labels"),
    ],
    ids=["option", "input", "after the work"],
)
def test_what_is_wrong_is_said_once(photos, tmp_path, arguments, code, text):
    places = {"IN": str(photos), "OUT": str(tmp_path / "out")}
    done = launch(*(a.replace("IN", places["IN"]).replace("OUT", places["OUT"]) for a in arguments), processes=2)
    assert len(errors(done)) == 1, done.stderr
    assert text in errors(done)[0]
    assert f"exitcode  : {code}" in done.stderr


def test_a_path_from_a_pipe_reaches_every_rank(photos, tmp_path):
    done = launch("dedup", "-", "-o", str(tmp_path / "d"), "--workers", "0", processes=2, input=f"{photos}\n")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "d").inputs[0]["rows"] == 72


def test_a_killed_launch_continues_to_the_same_bytes(launched, folder, tmp_path):
    """kill -9 of the launcher and its processes after the first shard; another number of them finishes."""
    out = tmp_path / "e"
    arguments = [*EMBED, str(folder), "-o", str(out), "-q"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dinov2cli",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.DEVNULL, start_new_session=True, cwd=ROOT, env=environment
    )
    first = out / "metadata" / "metadata_0000.parquet"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    stop_session(process.pid)
    process.wait()
    assert not read_manifest(out).complete
    before = first.stat().st_mtime_ns
    done = launch(*arguments, processes=3)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before
    alone = launched[1][0] / "embeddings"
    for file in [*alone.rglob("*.parquet"), *alone.rglob("*.npy")]:
        assert (out / file.relative_to(alone)).read_bytes() == file.read_bytes()


def stop_session(leader: int) -> None:
    """Kill the launcher and its workers, which have sessions of their own."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    for pid in (*map(int, children), leader):
        os.kill(pid, signal.SIGKILL)

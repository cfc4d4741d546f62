"""`dinov2 dedup` as a user runs it: crops and pages, leaks, thresholds, memory, refusals, and runs that were killed."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from dinov2cli.artifacts.embeddings import EmbeddingsWriter
from dinov2cli.artifacts.manifest import read_manifest
from dinov2cli.artifacts.output import Output
from dinov2cli.curation.copies import altered_file
from dinov2cli.data.decode import decode_image
from dinov2cli.errors import WorkError

EDITS = ("crop50", "screenshot", "reencode", "exact")


def rows(path, name="dropped"):
    return pq.read_table(path / f"{name}.parquet").to_pylist()


def encoded(pixels, quality=92):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@pytest.fixture(scope="module")
def altered(tmp_path_factory):
    """Eight different photographs, four of them with altered copies."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("altered")
    tiles = [image[top : top + 200, left : left + 300] for image in load_sample_images().images
             for top in (0, 220) for left in (0, 320)]  # fmt: skip
    for number, pixels in enumerate(tiles):
        (folder / f"{number}.jpg").write_bytes(encoded(pixels))
        for edit in EDITS if number < 4 else ():
            data = encoded(pixels) if edit == "exact" else altered_file(pixels, edit, seed=number)
            (folder / f"{number}-{edit}.jpg").write_bytes(data)
    return folder


def made_embeddings(path, vectors, manifest=None):
    """An embeddings directory of these vectors, of images that are nowhere."""
    out = Output.open(path, "embeddings", command="dinov2 embed", config=manifest or {"model": "made"})
    writer = EmbeddingsWriter(out, vectors.shape[1])
    names = [f"{i:04d}.jpg" for i in range(len(vectors))]
    table = {"id": names, "image_path": names, "width": [9] * len(names), "height": [9] * len(names)}
    writer.write_shard(0, vectors, pa.table({**table, "sha256": [f"{i:064x}" for i in range(len(names))]}))
    writer.finish(len(vectors))
    return path


@pytest.fixture
def unit():
    x = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    x[150:] = x[:50] + 0.02 * np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_crops_and_pages_are_found_by_local_features(dinov2, altered, tmp_path):
    pytest.importorskip("cv2")
    done = dinov2("dedup", altered, "-o", tmp_path / "d", "--verify", "geometric", "--workers", "0", "--json")
    assert done.code == 0, done.err
    assert {r["id"][0] for r in rows(tmp_path / "d", "kept")} == set("01234567")
    assert done.json["kept"] <= 9  # one half of a photograph may show nothing but clouds
    reasons = {r["id"]: r["reason"] for r in rows(tmp_path / "d")}
    assert "geometric" in reasons.values() and "bytes" in reasons.values()
    for record in rows(tmp_path / "d"):
        assert record["id"][0] == record["duplicate_of"][0], record
    rules = {rule["tier"]: rule["edges"] for rule in read_manifest(tmp_path / "d").extra["summary"]["rules"]}
    assert list(rules) == ["bytes", "pixels", "perceptual", "geometric"] and rules["geometric"] >= 3
    assert not (tmp_path / "d" / "parts").exists()


def test_killed_at_any_stage_it_continues_to_the_same_files(altered, tmp_path):
    pytest.importorskip("cv2")
    command = [
        sys.executable,
        "-m",
        "dinov2cli",
        "dedup",
        str(altered),
        "--verify",
        "geometric",
        "--workers",
        "0",
        "-o",
    ]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    for stage in ("fingerprint-*", "local-features-*"):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(out.glob(f"parts/{stage}/*.npz")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not read_manifest(out).complete
    parts = {file: file.stat().st_mtime_ns for file in out.glob("parts/*/*.npz")}
    assert parts
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing where an earlier run stopped" in done.stderr
    for name in ("kept", "dropped", "groups"):
        assert (out / f"{name}.parquet").read_bytes() == (tmp_path / "whole" / f"{name}.parquet").read_bytes()


def test_leaks_are_reported_with_their_match_and_whole_groups_on_request(dinov2, altered, tmp_path):
    reference = tmp_path / "test"
    reference.mkdir()
    (reference / "leak.jpg").write_bytes((altered / "1-reencode.jpg").read_bytes())
    empty = tmp_path / "other"
    empty.mkdir()
    (empty / "grey.png").write_bytes(encoded(np.full((40, 40, 3), 99, np.uint8)))
    common = (
        "dedup",
        altered,
        "--against",
        empty,
        "--against",
        reference,
        "--workers",
        "0",
        "--json",
        "--tiers",
        "exact",
    )
    done = dinov2(*common, "-o", tmp_path / "direct")
    assert done.code == 0, done.err
    leaked = [r for r in rows(tmp_path / "direct") if r["reason"] == "against"]
    assert [(r["id"], r["duplicate_of"], r["tier"]) for r in leaked] == [("1-reencode.jpg", "leak.jpg", "bytes")]
    page = (tmp_path / "direct" / "report.html").read_text()
    assert "What the reference sets hold already" in page and "1 images match" in page
    assert leaked[0]["reference"] == str(reference)
    done = dinov2(*common[:-1], "exact,perceptual", "--against-components", "-o", tmp_path / "whole")
    assert done.code == 0, done.err
    leaked = {r["id"] for r in rows(tmp_path / "whole") if r["reason"] == "against"}
    assert {"1.jpg", "1-exact.jpg", "1-reencode.jpg"} <= leaked and all(name.startswith("1") for name in leaked)


def test_the_search_is_recorded_and_no_picture_is_no_obstacle(dinov2, unit, tmp_path):
    made_embeddings(tmp_path / "e", unit)
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--threshold", "0.9", "--memory", "1GB", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] == 150
    extra = read_manifest(tmp_path / "d").extra
    assert extra["thresholds"]["embedding"] == 0.9 and extra["thresholds"]["origin"] == "as asked"
    (search,) = extra["search"]
    assert search["plan"]["kind"] == "flat" and search["recall"] == 1
    assert "the report has no pictures" in done.err and "<image" not in (tmp_path / "d" / "report.html").read_text()
    # Another limit of memory is no other result.
    again = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--threshold", "0.9", "--memory", "2GB")
    assert again.code == 0 and "already done" in again.err


def test_a_background_lowers_what_everything_resembles(dinov2, unit, tmp_path):
    """All rows share a direction, so that all cosines are high; less the background's share only copies are."""
    haze = np.concatenate([unit, np.full((len(unit), 1), 3.0, np.float32)], axis=1)
    other = np.random.default_rng(5).normal(size=(40, 64)).astype(np.float32)
    other = np.concatenate([other / np.linalg.norm(other, axis=1, keepdims=True), np.full((40, 1), 3.0)], axis=1)
    made_embeddings(tmp_path / "e", haze.astype(np.float32))
    made_embeddings(tmp_path / "b", other.astype(np.float32))
    plain = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--threshold", "0.045", "--json", "-q")
    assert plain.code == 0 and plain.json["kept"] == 1
    done = dinov2(
        *("dedup", tmp_path / "e", "-o", tmp_path / "n", "--threshold", "0.045", "--background", tmp_path / "b"),
        *("--json", "-q"),
    )
    assert done.code == 0, done.err
    assert done.json["kept"] == 150


def test_calibration_sets_the_thresholds(dinov2, photos, tmp_path):
    done = dinov2(
        *("dedup", photos, "-o", tmp_path / "d", "--calibrate", "--workers", "0", "--json"),
        *("--set", "calibrate_images=72", "--set", "false_merge=0.02"),
    )
    assert done.code == 0, done.err
    extra = read_manifest(tmp_path / "d").extra
    tier = extra["calibration"]["tiers"]["perceptual"]
    assert extra["thresholds"]["hash_radius"] == tier["threshold"]
    assert tier["recall"]["exact"] > 0.9 and tier["reason"] in done.err
    assert "Calibration" in (tmp_path / "d" / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threshold", "0.9", "--tiers", "exact"], "threshold: of the embedding tier, which does not run here"),
        (["--tiers", "embedding"], "holds no embeddings"),
        (["--verify", "colour"], "none"),
        (["--memory", "lots"], "expected an amount of memory such as 8GB"),
        (["--tiers", "exact,shape"], "shape"),
    ],
)
def test_settings_that_cannot_be_are_refused(dinov2, photos, tmp_path, arguments, message):
    done = dinov2("dedup", photos, "-o", tmp_path / "d", *arguments)
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "d").exists()


def test_vectors_that_cannot_be_compared_are_refused(dinov2, unit, tmp_path):
    made_embeddings(tmp_path / "e", unit)
    made_embeddings(tmp_path / "short", unit[:, :8])
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--against", tmp_path / "short")
    assert done.code == 3 and "holds vectors of length 8" in done.err and "of length 64" in done.err, done.err
    bad = unit.copy()
    bad[7, 3] = np.nan
    made_embeddings(tmp_path / "nan", bad)
    done = dinov2("dedup", tmp_path / "nan", "-o", tmp_path / "n")
    assert done.code == 3 and "row 7 holds NaN" in done.err, done.err
    made_embeddings(tmp_path / "few", unit[:2])
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "b", "--background", tmp_path / "few", "--threshold", "0.3")
    assert done.code == 2 and "found 2 background images; expected at least 3" in done.err, done.err


def test_all_alike_few_and_empty_sets(dinov2, unit, tmp_path):
    made_embeddings(tmp_path / "same", np.repeat(unit[:1], 300, axis=0))
    done = dinov2("dedup", tmp_path / "same", "-o", tmp_path / "d", "--json", "-q")
    assert done.code == 0 and done.json["kept"] == 1, done.err
    made_embeddings(tmp_path / "zero", np.concatenate([np.zeros((3, 64), np.float32), unit[:5]]))
    done = dinov2("dedup", tmp_path / "zero", "-o", tmp_path / "z", "--json", "-q")
    assert done.code == 0 and done.json["kept"] == 8, done.err  # rows of zeros are similar to nothing
    made_embeddings(tmp_path / "two", unit[:2])
    done = dinov2("dedup", tmp_path / "two", "-o", tmp_path / "t", "--json", "-q")
    assert done.code == 0 and done.json["kept"] == 2, done.err


def test_a_dry_run_names_the_index(dinov2, unit, tmp_path):
    made_embeddings(tmp_path / "e", unit)
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert "200 x 64" in json.dumps(done.json) and not (tmp_path / "d").exists()
    many = ["--set", "plan.images=1200000000", "--set", "plan.machines=160xV100"]
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--dry-run", "--json", *many)
    assert done.code == 0 and "on 160xV100 for 1,200,000,000 images" in done.json["cost"], done.err
    assert "160 GPUs" in done.json["cost of edges"]
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--dry-run", "--set", "plan.machines=3xA9")
    assert done.code == 2 and "no rates for GPU 'A9'; expected one of V100, H100" in done.err
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--dry-run", "--set", "plan.machines=many")
    assert done.code == 2 and "plan.machines" in done.err


def test_a_copy_detection_model_brings_the_published_thresholds(dinov2, altered, tmp_path):
    """Random weights: what they find means nothing; shapes and thresholds are what a real file gets."""
    torch = pytest.importorskip("torch")
    from dinov2cli.models.resnet import ResNet

    torch.manual_seed(0)
    weights = {f"backbone.{name}": value for name, value in ResNet().state_dict().items()}
    torch.save(weights, tmp_path / "sscd.pth")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(4):
        (few / f"{number}.jpg").write_bytes((altered / f"{number}.jpg").read_bytes())
    (few / "copy.png").write_bytes(altered_file(decode_image((few / "0.jpg").read_bytes(), name=""), "format", seed=0))
    done = dinov2(
        *("dedup", few, "-m", f"sscd:{tmp_path / 'sscd.pth'}?size=64", "--against", few, "-o", tmp_path / "d"),
        *("--workers", "0", "--tiers", "embedding", "--json"),
    )
    assert done.code == 0, done.err
    extra = read_manifest(tmp_path / "d").extra
    assert (extra["thresholds"]["embedding"], extra["thresholds"]["against"]) == (0.6, 0.45)
    assert "copy-detection" in extra["thresholds"]["origin"]
    assert done.json["kept"] == 0 and {r["tier"] for r in rows(tmp_path / "d")} == {"embedding"}
    vectors = np.load(tmp_path / "d" / "embeddings" / "img_emb" / "img_emb_0000.npy")
    assert vectors.shape == (5, 512)


def test_images_without_any_feature_do_not_end_local_search(dinov2, tmp_path):
    pytest.importorskip("cv2")
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(70):  # more than a block of them
        Image.new("RGB", (40, 40), (number, 90, 90)).save(folder / f"{number:02d}.png")
    done = dinov2("dedup", folder, "-o", tmp_path / "d", "--verify", "geometric", "--workers", "0", "--json", "-q")
    assert done.code == 0 and done.json["kept"] == 70, done.err


def test_the_sharper_of_two_copies_stays_also_with_embeddings(dinov2, photos, altered, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    pixels = decode_image((altered / "0.jpg").read_bytes(), name="")
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5))
    blurred.save(folder / "a-soft.png")
    (folder / "b-sharp.jpg").write_bytes((altered / "0.jpg").read_bytes())
    tiers = ["--tiers", "exact,perceptual,embedding"]
    done = dinov2("dedup", folder, "-m", "tiny", "-o", tmp_path / "d", *tiers, "--workers", "0", "--json", "-q")
    assert done.code == 0, done.err
    assert [r["id"] for r in rows(tmp_path / "d", "kept")] == ["b-sharp.jpg"]


def test_a_model_without_training_is_not_trusted_and_unreadable_images_are_listed(dinov2, altered, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes((altered / f"{number}.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes(b"not an image")
    done = dinov2("dedup", folder, "-m", "tiny", "-o", tmp_path / "d", "--workers", "0", "--json")
    assert done.code == 0 and "using hashes instead" in done.err, done.err
    assert done.json["kept"] == 8
    done = dinov2(
        *("dedup", folder, "-m", "tiny", "-o", tmp_path / "e", "--tiers", "exact,embedding", "--threshold", "0.999999"),
        *("--workers", "0", "--json"),
    )
    assert done.code == 0, done.err
    assert [(r["id"], r["reason"]) for r in rows(tmp_path / "e") if r["reason"] == "unreadable"] == [
        ("broken.jpg", "unreadable")
    ]
    assert done.json["kept"] + done.json["dropped"] == 9


def test_only_the_tiers_asked_for_join_anything(dinov2, unit, tmp_path):
    """Two rows are the same file, and unlike in their vectors."""
    made_embeddings(tmp_path / "e", unit[:100])
    file = next((tmp_path / "e" / "metadata").glob("*.parquet"))
    table = pq.read_table(file)
    digests = table.column("sha256").to_pylist()
    digests[1] = digests[0]
    pq.write_table(table.set_column(table.column_names.index("sha256"), "sha256", pa.array(digests)), file)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    manifest["files"][f"metadata/{file.name}"]["size"] = file.stat().st_size
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    for tiers, kept in (("exact", 99), ("embedding", 100), ("exact,embedding", 99)):
        out = tmp_path / tiers
        done = dinov2("dedup", tmp_path / "e", "-o", out, "--tiers", tiers, "--json", "-q")
        assert done.code == 0 and done.json["kept"] == kept, (tiers, done.err)


def test_a_background_needs_a_threshold_of_its_own(dinov2, unit, tmp_path):
    made_embeddings(tmp_path / "e", unit)
    done = dinov2("dedup", tmp_path / "e", "-o", tmp_path / "d", "--background", tmp_path / "e")
    assert done.code == 2 and "changes the scale of similarities" in done.err


def test_work_is_kept_where_the_result_cannot_be_written(dinov2, altered, tmp_path, monkeypatch):
    """A disk that fills while the tables are written: the parts are still there for the next try."""

    def full(*_, **__):
        raise WorkError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_table", full)
        done = dinov2("dedup", altered, "-o", tmp_path / "d", "--workers", "0", "-q")
    assert done.code == 1 and list((tmp_path / "d" / "parts").glob("*/*.npz"))
    done = dinov2("dedup", altered, "-o", tmp_path / "d", "--workers", "0", "-q")
    assert done.code == 0 and not (tmp_path / "d" / "parts").exists()

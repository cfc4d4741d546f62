import base64

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dinov2cli.artifacts.results import ResultRow
from dinov2cli.curation.coverage import Coverage, Share, balance
from dinov2cli.curation.profile import SimilarityProfile
from dinov2cli.curation.tables import Curated
from dinov2cli.data.source import open_source
from dinov2cli.evaluation.intervals import Difference
from dinov2cli.report.curate import curate_report
from dinov2cli.report.dedup import dedup_report, duplicate_pair_samples
from dinov2cli.report.demo import Comparison, change_sentence, demo_report
from dinov2cli.report.evaluation import ModelResult, evaluation_report
from dinov2cli.report.grids import DuplicatePair, Neighbour
from dinov2cli.report.results import metric_name
from dinov2cli.report.run import run_report
from dinov2cli.report.thumbnails import spread, thumbnail, thumbnails

PHOTO = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
UP = Comparison("k-NN accuracy", (0.412, 0.38, 0.443), (0.63, 0.601, 0.658), Difference(0.218, 0.19, 0.246, 500), 500)

NOTHING_DROPPED = pa.table(
    {n: pa.array([], pa.string()) for n in ("id", "reason", "duplicate_of")}
    | {"similarity": pa.array([], pa.float64())}
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        Image.fromarray(np.full((300, 500, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"broken")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def pool(images):
    return pa.table({"id": images.ids, "image_path": images.paths, "source": ["s"] * 6, "row": list(range(6))})


def test_a_change_is_said_with_its_interval():
    assert change_sentence(UP) == (
        "k-NN accuracy rose from 41.2 % [38.0, 44.3] to 63.0 % [60.1, 65.8]: "
        "+21.8 points, interval +19.0 to +24.6, outside the confidence interval."
    )
    fell = Comparison("x", UP.after, UP.before, Difference(-0.218, -0.246, -0.19, 500), 500)
    assert "x fell from 63.0 %" in change_sentence(fell)
    unsure = Comparison("x", UP.before, UP.before, Difference(0.01, -0.01, 0.03, 500), 500)
    assert change_sentence(unsure).endswith("the interval holds zero, so this may be chance.")


def test_demo_report_holds_every_part():
    tokens = np.random.default_rng(0).normal(size=(2, 4, 4, 8))
    page = demo_report(
        title="Demo",
        lead="lead",
        comparisons=[UP],
        metrics=[{"step": i, "loss/total": 1.0} for i in range(3)],
        pairs=[DuplicatePair(PHOTO, PHOTO, 0.9)],
        duplicates="9 of 10 copies were found.",
        clusters=[("cluster 1", [PHOTO])],
        curation="half was chosen.",
        neighbours={"after training": [(PHOTO, "cat", [Neighbour(PHOTO, "cat", 0.9, True)])]},
        pca_images=[PHOTO, PHOTO],
        pca_tokens={"before training": tokens, "after training": tokens},
        sentences=["More to say."],
        settings={"model": "tiny"},
        footer="made by a test",
    ).html()
    for part in (
        "k-NN accuracy rose from",
        "was 41.2 %: +21.8 points",
        "+21.8 [+19.0, +24.6]",
        "Total loss",
        "9 of 10 copies were found.",
        "half was chosen.",
        "Nearest neighbours after training",
        "What the patches see",
        "More to say.",
        "made by a test",
    ):
        assert part in page, part


def test_demo_report_leaves_out_what_there_is_not():
    page = demo_report(title="Demo", lead="", comparisons=[], metrics=[]).html()
    assert "<figure>" not in page and "<h2>" not in page


def test_thumbnails_are_small_and_skip_the_unreadable(images):
    assert thumbnail(images, 1, size=100).shape == (60, 100, 3)
    assert thumbnail(images, 5) is None
    assert len(thumbnails(images, range(6))) == 5
    assert spread(range(100), 3) == [0, 50, 99] and spread([4, 5], 9) == [4, 5]


def test_dedup_report_shows_pairs_groups_and_reasons(images, pool):
    names = images.ids
    dropped = pa.table(
        {
            "id": [names[1], names[2], names[5]],
            "reason": ["duplicate", "duplicate", "unreadable"],
            "duplicate_of": [names[0], names[3], None],
            "similarity": [0.91, None, None],
            "group": [0, 1, None],
            "tier": ["embedding", "bytes", None],
        }
    )
    groups = pa.table({"id": names[:4], "group": [0, 0, 1, 1]})
    rules = [{"tier": "embedding", "edges": 1, "rule": "cosine above 0.6"}]
    summary = {"rules": rules}
    found = Curated(pool.take([0, 3, 4]), dropped, np.array([0, 3, 4]), summary, ["kept 3 of 6 images"], groups)
    pairs = duplicate_pair_samples(dropped, images)
    assert [(p.similarity, p.reason) for p in pairs] == [(None, "by bytes"), (0.91, "by embedding")]
    assert pairs[0].kept[0, 0, 0] == 120 and pairs[0].dropped[0, 0, 0] == 80
    sized = pool.append_column("width", pa.array([500] * 6)).append_column("height", pa.array([300] * 6))
    page = dedup_report(found, sized, images, title="Duplicates in <x>")
    for part in ("Duplicates in &lt;x&gt;", "kept 3 of 6 images", "50.0% of the images", "unreadable", "by embedding"):
        assert part in page, part
    assert "2 groups, median 2 images" in page and "cosine above 0.6" in page
    assert '<td class="number">0.3</td>' in page  # two images of 0.15 megapixels
    assert page.count("<image ") == 4 + 4  # two pairs, two groups of two
    plain = dedup_report(found, pool, None, title="t")
    assert "<image" not in plain


def test_dedup_report_without_duplicates(images, pool):
    found = Curated(pool, NOTHING_DROPPED, np.arange(6), {}, ["nothing to drop"])
    page = dedup_report(found, pool, images, title="t")
    assert "nothing to drop" in page and "Duplicate pairs" not in page


def test_dedup_report_shows_both_sides_of_the_threshold(images, pool):
    found = Curated(pool, NOTHING_DROPPED, np.arange(6), {}, [])
    counts = np.zeros(100, int)
    counts[[40, 96]] = 30, 4
    profile = SimilarityProfile(0.6, 34, counts, [(0, 1, 0.59), (2, 5, 0.58)], [(0, 2, 0.61)], 0.68)
    page = dedup_report(found, pool, images, title="t", profile=profile)
    assert "around 0.68" in page and "cosine 0.590" in page and "cosine 0.610" in page
    assert page.count("<image ") == 4  # image 5 cannot be read, so its pair is left out
    assert "--calibrate" in dedup_report(
        found, pool, images, title="t", profile=SimilarityProfile(0.6, 34, counts, [], [], None)
    )


def test_dedup_report_parts_what_the_reference_holds(images, pool):
    names = images.ids
    dropped = pa.table(
        {
            "id": [names[0], names[1]],
            "reason": ["against", "against"],
            "duplicate_of": [names[2], names[2]],
            "similarity": [0.5, 0.7],
            "tier": ["embedding", "perceptual"],
            "reference": ["test/", "test/"],
        }
    )
    found = Curated(pool.slice(2), dropped, np.arange(2, 6), {}, [])
    page = dedup_report(found, pool, images, title="t", references={"test/": images})
    assert "2 images match." in page and "Image of test/ and dropped image." in page and page.count("<image ") == 4
    assert "Duplicate pairs" not in page
    assert page.index("similarity 0.700") < page.index("similarity 0.500")
    assert "<image" not in dedup_report(found, pool, images, title="t")


def test_curate_report_shows_clusters_or_a_sample(images, pool):
    kept = pool.take([0, 1, 2]).append_column("cluster_top", pa.array([7, 7, 8]))
    dropped = pa.table({"id": images.ids[3:], "reason": ["not_sampled"] * 3})
    found = Curated(kept, dropped, np.array([0, 1, 2]), {}, ["chosen"])
    counts = (np.array([4, 2]), np.array([2, 1]))
    shares = [Share("flowers", 0.25, 0.75)]
    coverage = Coverage(2, balance(counts[0]), balance([3, 0]), counts, "source", shares, shares, [0.7], 50)
    page = curate_report(found, images, title="t", coverage=coverage)
    assert "cluster 7: 2 images chosen" in page and "cluster 8: 1 image chosen" in page
    assert "was 0.92; 1 is all equal" in page and "was 0.17; 0 is all equal" in page and page.count("<image ") == 3
    for part in ("each of 2 clusters", "Images near each query set", "at most", "Where images come from", "75.0 %"):
        assert part in page, part
    retrieved = Curated(pool.take([0, 1]), dropped, np.array([0, 1]), {}, [])
    assert "Chosen images" in curate_report(retrieved, images, title="t")


def test_curate_report_counts_query_sets_like_the_paper(images, pool):
    asked = {"dataset": "a", "images": 9, "retrieval": "sample", "settings": {"neighbours": 4}, "pairs": 36}
    table = [{**asked, "retrieved": 5, "final": 3, "only": 1}, {**asked, "dataset": "b", "retrieved": 2, "final": 2}]
    table[1]["only"] = 0
    overlap = [{"sets": ["a", "b"], "images": 2}]
    included = {"images": 2, "table": [{"dataset": "a", "images": 9, "final": 2}]}
    summary = {"kept": 3, "table": table, "overlap": overlap, "included": included}
    dropped = pa.table({"id": images.ids[3:], "reason": ["not_retrieved"] * 3})
    page = curate_report(Curated(pool.take([0, 1, 2, 3, 4]), dropped, np.arange(5), summary), images, title="t")
    assert "3 of 6 images chosen" in page and "5 images in all" in page
    for part in ("sample: neighbours 4", "as it is", "a and b", "all, each image once", ">5</td>"):
        assert part in page, part


def test_run_report_says_what_was_seen():
    rows = [
        {"step": s, "images": 8 * s, "loss/total": 9.0 - s / 10, "rankme": 5.0, "lr": 0.1, "grad_norm": 1.0}
        for s in (10, 20)
    ]
    rows[1]["eval/knn_top1"] = 0.5
    page = run_report(rows, title="run", messages=["the features have collapsed"])
    for part in ("160", "7.00", "was 8.00 at step 10", "the features have collapsed", "RankMe", "50.0 %", "Total loss"):
        assert part in page, part
    assert "No metrics were logged" in run_report([], title="run")


def test_run_report_shows_pictures_recipe_and_how_far_it_is():
    rows = [{"step": 10, "total_steps": 40, "loss/total": 9.0}]
    first, middle, last = (b"\x89PNG\r\n\x1a\n" + text for text in (b"first", b"middle", b"last"))
    encoded = {name: base64.b64encode(name).decode() for name in (first, middle, last)}
    page = run_report(rows, title="r", crops=first, maps=[(5, first), (7, middle), (9, last)], recipe="a: <b>\n")
    assert "Not finished: this page shows it at step 10 of 40." in page and "of 40" in page
    assert page.count(encoded[first]) == 2 and page.count(encoded[last]) == 1 and encoded[middle] not in page
    assert "First evaluation, step 5." in page and "Newest evaluation, step 9." in page
    assert "<pre>a: &lt;b&gt;</pre></details>" in page
    plain = run_report([{"step": 40, "total_steps": 40, "loss/total": 9.0}], title="r", maps=[(5, first)])
    assert "Not finished" not in plain and "Newest evaluation" not in plain and "<details>" not in plain


def test_run_report_lists_the_newest_findings():
    page = run_report([{"step": 1, "loss/total": 9.0}], title="r", messages=[f"finding {i}!" for i in range(20)])
    assert "12 earlier findings are in the log." in page
    assert "finding 12!" in page and "finding 19!" in page and "finding 11!" not in page


def test_results_report_shows_figures_with_intervals_and_settings():
    rows = [
        ResultRow("m", "knn", "d", f"top1_k{k}", 0.63, 0.6, 0.66, 1234, {"k": k, "classes": 7, "confidence": 0.9}, 1.0)
        for k in (10, 20)
    ]
    page = evaluation_report({"m": ModelResult(rows)}, title="knn of m")
    for part in ("On d: 1,234 units.", "knn, top-1, k = 10", "63.0 %", "[60.0, 66.0]", "90% confidence"):
        assert part in page, part
    assert "<td>classes</td>" in page and "<td>k</td>" not in page
    assert metric_name("top5_k200") == "top-5, k = 200" and metric_name("miou") == "miou"
    assert metric_name("mean_per_class") == "mean per class"
    assert "There are no results." in evaluation_report({}, title="t")

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dinov2cli.report import grids, plots
from dinov2cli.report.grids import Cell, DuplicatePair, Neighbour
from dinov2cli.report.palette import LIGHT
from dinov2cli.report.pca import pca_colours, pca_maps

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8)


def texts(svg):
    """All text of an SVG, which must be well-formed."""
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def metrics(count=5):
    return [
        {"step": i, "loss/total": 9 - i / count, "loss/new": 1.0, "loss/koleo": -0.1, "lr": 1e-3, "grad_norm": 2.0}
        for i in range(count)
    ]


def test_loss_curves_have_one_chart_per_metric_in_known_order():
    found = texts(plots.loss_curves(metrics()))
    titles = ["Total loss", "KoLeo, spread of features", "loss/new", "Learning rate", "Gradient norm"]
    assert [text for text in found if text in titles] == titles
    assert "iBOT, masked patches" not in found


def test_loss_curves_leave_out_what_is_not_a_number():
    rows = metrics()
    rows[2]["loss/total"] = None
    rows[3]["loss/total"] = float("nan")
    rows.append({"step": 9, "eval/knn": 0.5})
    steps, values = plots._series(rows, "loss/total")
    assert steps.tolist() == [0, 1, 4] and np.isfinite(values).all()
    assert "eval/knn" in texts(plots.loss_curves(rows, keys=["loss/total", "eval/knn"]))
    with pytest.raises(ValueError, match="no finite value of lr in 1 rows of metrics"):
        plots.loss_curves([{"step": 1, "lr": None}], keys=["lr"])


def test_very_long_curves_are_averaged_in_groups_and_one_point_is_a_dot():
    rows = [{"step": i, "loss/total": i % 2} for i in range(10 * plots._POINTS)]
    steps, values = plots._series(rows, "loss/total")
    assert len(steps) == plots._POINTS and np.all(np.diff(steps) == 10) and steps[0] == 4.5
    assert np.allclose(values, 0.5)
    assert "<use " in plots.loss_curves(rows[:1], keys=["loss/total"])
    assert "<use " not in plots.loss_curves(rows[:2], keys=["loss/total"]).split('id="patch_2"')[1].split("line2d_1")[0]


def test_the_average_keeps_constants_and_lines_and_does_not_lag():
    assert np.allclose(plots.smooth(np.full(200, 3.0)), 3.0)
    line = np.arange(400.0)
    assert np.allclose(plots.smooth(line)[40:-40], line[40:-40])
    noisy = line + np.random.default_rng(1).normal(0, 10, 400)
    assert np.abs(plots.smooth(noisy) - line)[40:-40].std() < 4


def test_charts_are_the_same_bytes_for_the_same_data_and_wear_the_theme():
    rows = metrics(80)
    first = plots.loss_curves(rows)
    assert plots.loss_curves(rows) == first
    assert "var(--accent, " in first and "var(--ink, " in first
    for value in LIGHT.values():
        assert not re.search(rf'style="[^"]*(?<!, ){value}', first)


def test_comparison_bars_show_values_and_guessing():
    series = {"before": [(0.412, 0.38, 0.443)], "after": [(0.63, 0.6, 0.66)]}
    found = texts(plots.comparison_bars(["k-NN <1>"], series, chance=[0.1]))
    assert {"41.2 %", "63.0 %", "before", "after", "guessing", "k-NN <1>"} <= set(found)
    assert "guessing" not in texts(plots.comparison_bars(["a"], series))
    with pytest.raises(ValueError, match="every series needs one estimate for each of the 2 names"):
        plots.comparison_bars(["a", "b"], series)


def test_similarity_histogram_counts_what_lies_above_the_threshold():
    edges = np.linspace(0, 1, 101)
    counts = np.histogram([0.1, 0.2, 0.595, 0.605, 0.61, 0.9], bins=edges)[0]
    shown = texts(plots.similarity_histogram(counts, edges, 0.6, gap=0.75))
    assert "3 of 6 (50.0%) above 0.60" in shown
    with pytest.raises(ValueError, match="no similarity"):
        plots.similarity_histogram(np.zeros(100, int), edges, 0.6)


@pytest.mark.parametrize("sizes", [[3], [1, 1, 2], [1, 50, 2000], np.arange(1, 100)])
def test_cluster_sizes_name_number_and_median(sizes):
    title = f"Number of groups by size: {len(sizes)} groups, median {np.median(sizes):,.0f} images"
    assert title in texts(plots.cluster_sizes(sizes, unit="groups"))


def test_matplotlib_is_imported_on_first_use():
    code = "import sys, dinov2cli.report.plots, dinov2cli.report.grids; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_grid_holds_every_image_and_escapes_captions():
    rows = [[Cell(PHOTO, ["<b>", "x & y"]), Cell(PHOTO)], [Cell(PHOTO, ["a very long caption that cannot fit"])]]
    svg = grids.image_grid(rows, titles=["first", "second"], columns=["left", "right"])
    assert svg.count("<image ") == 3 and svg.count("data:image/png;base64,") == 3
    found = texts(svg)
    assert {"<b>", "x & y", "first", "second", "left", "right"} <= set(found)
    assert "a very long caption that cannot fit" in svg  # whole in the tooltip
    assert any(text.endswith("…") for text in found)


def test_large_photographs_are_made_small_and_maps_stay_exact():
    large = np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8)
    assert len(grids.image_grid([[Cell(large)]], size=50)) < 20_000
    assert "image/jpeg" in grids.image_grid([[Cell(large)]])
    assert "image/png" in grids.image_grid([[Cell(large, exact=True)]])


@pytest.mark.parametrize("image", [PHOTO.astype(np.float32), PHOTO[..., 0]])
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(ValueError, match=r"an image of a grid must be uint8 \[H, W, 3\], got"):
        grids.image_grid([[Cell(image)]])


def test_empty_grids_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        grids.image_grid([[]])
    with pytest.raises(ValueError, match="no pair"):
        grids.duplicate_pairs([])
    with pytest.raises(ValueError, match="grid of 1 rows needs as many titles, got 2"):
        grids.image_grid([[Cell(PHOTO)]], titles=["a", "b"])


def test_right_and_wrong_differ_in_shape_not_only_in_colour():
    def signs(right):
        svg = grids.knn_neighbours([(PHOTO, "cat", [Neighbour(PHOTO, "dog", 0.87654, right)])])
        return re.findall(r'<path d="([^"]+)"', svg), texts(svg)

    right, words = signs(True)
    wrong, _ = signs(False)
    assert len(right) == len(wrong) == 1 and right != wrong
    assert words == ["cat", "test image", "dog", "similarity 0.877"]


def test_duplicate_pairs_say_what_was_kept_and_why():
    svg = grids.duplicate_pairs([DuplicatePair(PHOTO, PHOTO, 0.9123, "by hash"), DuplicatePair(PHOTO, PHOTO)])
    assert texts(svg)[:4] == ["kept", "similarity 0.912", "dropped", "by hash"]
    assert svg.count("<image ") == 4


def test_samples_per_cluster_have_their_titles():
    svg = grids.samples_per_cluster([("cluster 1: 3 images", [PHOTO] * 3), ("cluster 2: 1 image", [PHOTO])])
    assert texts(svg) == ["cluster 1: 3 images", "cluster 2: 1 image"] and svg.count("<image ") == 4


def test_pca_colours_follow_scikit_learns_components():
    rng = np.random.default_rng(3)
    tokens = rng.normal(size=(4, 5, 6, 16)) * np.linspace(3, 0.1, 16)
    colours = pca_colours(tokens)
    assert colours.shape == (4, 5, 6, 3) and colours.dtype == np.uint8
    expected = PCA(3).fit_transform(tokens.reshape(-1, 16))
    for channel in range(3):
        seen = colours[..., channel].ravel().astype(float)
        inside = (seen > 0) & (seen < 255)
        assert abs(np.corrcoef(seen[inside], expected[inside, channel])[0, 1]) > 0.999
    # The sign is fixed, so turning the tokens round changes nothing but the order of colours within a channel.
    assert np.array_equal(pca_colours(tokens.copy()), colours)


def test_pca_colours_of_tokens_without_three_directions_are_grey_there():
    tokens = np.zeros((1, 2, 2, 8))
    tokens[0, :, :, 0] = [[0, 1], [2, 3]]
    colours = pca_colours(tokens)
    assert len(np.unique(colours[..., 0])) == 4
    assert np.ptp(colours[..., 1:]) == 0
    assert np.ptp(pca_colours(np.ones((1, 2, 2, 8)))) == 0


def test_pca_maps_stand_beside_their_images():
    tokens = RNG.normal(size=(3, 4, 4, 8))
    svg = pca_maps([PHOTO] * 3, {"before": tokens, "after": tokens * 2}, images_per_row=2)
    assert svg.count("<image ") == 9
    assert texts(svg) == ["image", "before", "after"] * 2
    with pytest.raises(ValueError, match="patch tokens of all 2 images"):
        pca_maps([PHOTO] * 2, {"before": tokens})

from dinov2cli.bench.embed import run


def test_both_loops_give_the_same_features_and_figures_are_there():
    figures = run(device="cpu", data="demo:photos?count=40", rounds=1)
    assert figures["images"] == 40
    assert figures["largest_difference"] < 2e-3  # Pillow's resize rounds otherwise than torch's
    assert figures["seconds"] > 0 and figures["images_per_s"] > 0 and figures["speedup"] > 0

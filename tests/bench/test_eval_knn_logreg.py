import torch

from dinov2cli.bench.eval_knn import by_turns, knn_figures
from dinov2cli.bench.eval_logreg import logreg_figures


def test_both_searches_find_the_same():
    figures = knn_figures(device="cpu", seed=1, tests=300, references=900, dim=32, rounds=1)
    assert figures["same_neighbours"] > 0.999 and 0 < figures["accuracy"] <= 1
    assert figures["ratio"] == figures["seconds"] / figures["product_and_top_k_seconds"]
    assert figures["ratio_to_product"] == figures["seconds"] / figures["product_seconds"]


def test_both_regressions_are_as_good():
    figures = logreg_figures(device="cpu", seed=1, images=400, tests=300, dim=24, classes=4, strengths=5)
    assert figures["strengths"] == 5 and figures["speedup"] == figures["reference_seconds"] / figures["seconds"]
    assert abs(figures["accuracy"] - figures["reference_accuracy"]) < 0.02 and figures["accuracy"] > 0.5
    assert figures["largest_difference"] < 0.06


def test_turns_are_taken():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = by_turns(runs, 2, torch.device("cpu"))
    assert order == list("ababab") and [len(values) for values in seconds.values()] == [2, 2]

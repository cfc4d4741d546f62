"""Times of calls by turns, and the copy rate. No timing is asserted."""

import torch

from dinov2cli.bench.device_time import copy_rate, median_seconds, named

CPU = torch.device("cpu")


def test_calls_go_through_all_inputs_by_turns():
    seen: list[int] = []
    seconds = median_seconds([lambda i=i: seen.append(i) for i in range(3)], CPU, rounds=5, warmup=2)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert seconds >= 0


def test_a_copy_has_a_rate_and_a_device_a_name():
    assert copy_rate(CPU) > 1e7
    assert named(CPU).startswith("cpu (")

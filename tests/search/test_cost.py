"""The cost model: its figures follow the work, and are of the order of what was measured."""

import pytest

from dinov2cli.errors import UserError
from dinov2cli.search.cost import CPU, STAGES, Machines, amount, calibrated, duration, estimate, lines


def cost(stage, rows, dim=256, **settings):
    return estimate(rows, dim, stages=(stage,), **settings)[0]


def test_every_stage_has_time_memory_and_disk():
    costs = estimate(1_000_000, 256)
    assert tuple(c.stage for c in costs) == STAGES
    assert all(c.seconds > 0 and c.memory > 0 and c.disk >= 0 for c in costs)
    table = lines(costs)
    assert len(table) == 1 + len(STAGES) and "IVF2048,PQ64x4fs" in table[3]


def test_time_follows_the_work():
    for stage in STAGES:
        assert cost(stage, 2_000_000).seconds > 1.3 * cost(stage, 1_000_000).seconds, stage
        many = cost(stage, 2_000_000, machines=Machines(cores=64))
        assert many.seconds <= cost(stage, 2_000_000).seconds, stage
    exact = [cost("edges", n, machines=Machines(cores=1)).seconds for n in (4000, 8000)]
    assert 2 < exact[1] / exact[0] < 4.2  # every pair is compared
    assert cost("components", 10**7, edges_per_row=4).seconds > 1.5 * cost("components", 10**7, edges_per_row=2).seconds


def test_memory_limit_costs_time_and_is_kept():
    free = cost("edges", 50_000_000)
    bound = cost("edges", 50_000_000, memory=4 << 30)
    assert bound.memory <= 4 << 30 < free.memory and bound.seconds > free.seconds


def test_measured_runs_are_within_the_stated_factor():
    # Exact search of 200,000 x 384 by Faiss on two cores, and 20 M edges of 20 M nodes, took 168 s and 3 to 6 s.
    two = Machines(cores=2)
    exact = 2.0 * 200_000**2 * 384 / (CPU.flops * two.cores)
    assert 84 < exact < 336
    assert 2 < cost("components", 20_000_000, edges_per_row=0.5).seconds < 12


def test_the_set_of_the_paper_on_its_machines():
    costs = {c.stage: c for c in estimate(1_200_000_000, 512, machines=Machines(gpus=160), k=64)}
    assert costs["embed"].seconds > 10 * costs["edges"].seconds  # embedding is nearly all of it
    assert sum(c.seconds for c in costs.values()) < 2 * 86_400  # under two days, as the paper reports
    assert costs["edges"].memory < 32e9 and "NOT fit" not in costs["edges"].assumed
    assert "NOT fit" in cost("edges", 1_200_000_000, 1280, machines=Machines(gpus=8)).assumed
    assert costs["components"].memory < 6e9


def test_calibration_scales_the_rates():
    rates = calibrated(0.01)
    assert rates.flops > 1e8 and rates.codes / CPU.codes == pytest.approx(rates.flops / CPU.flops)
    assert rates.read == CPU.read


def test_what_is_not_known_is_said():
    with pytest.raises(UserError, match="no rates for GPU 'A1'; expected one of V100, H100"):
        estimate(1000, 8, machines=Machines(gpus=1, kind="A1"))
    with pytest.raises(UserError, match="no stage 'dream'; expected some of hash, embed"):
        estimate(1000, 8, stages=("dream",))


def test_units():
    assert [duration(s) for s in (3.21, 90, 600, 36_000, 1e6)] == ["3.2 s", "90 s", "10 min", "10 h", "12 days"]
    assert [amount(b) for b in (5e3, 2.5e6, 4e9, 1.23e12)] == ["5 kB", "2.5 MB", "4 GB", "1.23 TB"]

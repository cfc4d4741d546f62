"""The traffic model against hand-made sums, on numbers small enough to add up."""

import pytest

from dinov2cli.train.sizes import Batch, HeadSizes, Layout, NetworkSizes
from dinov2cli.train.traffic import collectives, traffic

BLOCK, ROOT, HEAD, PROTOTYPES, WIDTH = 64 * 64, 64, 64 * 32, 32, 64
NETWORK = NetworkSizes(
    block=((64, 64),),
    root=((64,),),
    heads=(HeadSizes(((64, 32),), (64, 32), PROTOTYPES),) * 2,
    depth=3,
    width=WIDTH,
    attention_heads=1,
    hidden=64,
    gated=False,
    layerscale=False,
    patch=14,
    channels=3,
    prefix=1,
    drop_rates=(0.0,) * 3,
)
BATCH = Batch(2)
WEIGHTS = 2 * 3 * BLOCK + 4 * (2 * HEAD + ROOT)  # blocks in 16 bit, the rest in fp32
GATHERED = 3 * WEIGHTS - 4 * 2 * HEAD  # student forward and backward, less its heads, which stay; teacher forward


def of(layout: Layout, batch: Batch = BATCH, purpose: str = "", kind: str = "") -> float:
    rows = collectives(NETWORK, batch, layout)
    return sum(row.sent for row in rows if purpose in ("", row.purpose) and kind in ("", row.kind))


def test_one_rank_sends_nothing():
    assert collectives(NETWORK, BATCH, Layout()) == []
    assert traffic(NETWORK, BATCH, Layout())["total"] == {"inside": 0, "between": 0, "total": 0}


def test_ddp_reduces_fp32_gradients_once():
    size = 4 * (3 * BLOCK + 2 * HEAD + ROOT)
    assert of(Layout("ddp", 4), purpose="gradients") == pytest.approx(2 * 3 / 4 * size)
    assert of(Layout("ddp", 4), Batch(4, accumulate=2), "gradients") == pytest.approx(2 * 3 / 4 * size)


def test_fsdp_gathers_thrice_and_scatters_once():
    layout = Layout("fsdp", 4, per_node=2)
    assert of(layout, purpose="student") == pytest.approx(3 / 4 * (2 * WEIGHTS - 4 * 2 * HEAD))  # heads stay gathered
    assert of(layout, purpose="teacher") == pytest.approx(3 / 4 * WEIGHTS)
    assert of(layout, purpose="gradients") == of(layout, kind="reduce_scatter") == pytest.approx(3 / 4 * WEIGHTS)
    kept = Layout("fsdp", 4, per_node=2, reshard=False)
    assert of(kept, purpose="student") == pytest.approx(3 / 4 * WEIGHTS)
    parts = Batch(4, accumulate=2)  # weights for every part, gradients with the last
    assert of(layout, parts, "teacher") == pytest.approx(2 * 3 / 4 * WEIGHTS)
    assert of(layout, parts, "gradients") == pytest.approx(3 / 4 * WEIGHTS)
    assert of(layout, Batch(2, precision="fp32"), "teacher") == pytest.approx(3 * (3 * BLOCK + 2 * HEAD + ROOT))


def test_hybrid_gathers_in_the_node_and_reduces_shards_between_nodes():
    layout = Layout("hybrid", 4, per_node=2)
    sent = traffic(NETWORK, BATCH, layout, koleo_global=False)
    assert sent["all_gather"] == pytest.approx({"inside": GATHERED / 2, "between": 0, "total": GATHERED / 2})
    assert sent["reduce_scatter"]["between"] == 0
    assert of(layout, purpose="gradients", kind="all_reduce") == pytest.approx(2 * 1 / 2 * WEIGHTS / 2)
    assert sent["all_reduce"]["between"] > WEIGHTS / 2
    with pytest.raises(ValueError, match="full nodes"):
        Layout("hybrid", 12, per_node=8)


def test_small_collectives():
    ring = 2 * 3 / 4
    layout = Layout("ddp", 4)
    assert of(layout, purpose="sinkhorn") == pytest.approx(ring * (2 * 4 * 4 * PROTOTYPES + 2 * 4))
    tokens = 4 * WIDTH * 2 * 4  # of all ranks
    assert of(layout, purpose="koleo", kind="all_gather") == pytest.approx(3 / 4 * 2 * (tokens + 4 * 2 * 4))
    assert of(layout, purpose="koleo", kind="all_reduce") == pytest.approx(ring * 2 * (tokens + 4))


@pytest.mark.parametrize(
    ("ranks", "stride", "share"), [(8, 1, 0), (16, 1, 1 / 8), (64, 1, 1 / 8), (2, 8, 1), (4, 4, 1 / 2)]
)
def test_share_of_hops_that_leave_the_node(ranks, stride, share):
    assert Layout("fsdp", 64).crossing(ranks, stride) == share

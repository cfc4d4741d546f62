"""Bugs planted in a copy of the CUDA attention kernels: the emulation must find each of them.

What is found: a fault of the emulation itself, NaN or an error beyond 0.01, or a result that depends on the order of
threads. The full set of plants runs with DINOV2_TEST_FULL=1.
"""

import os
from dataclasses import dataclass

import emulated
import pytest
from emulated import Emulation, KernelFaultError, errors, expected, problem

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler (c++, g++ or $CXX)")

FORWARD, BACKWARD, TAIL = "csrc/forward.cuh", "csrc/backward.cuh", "csrc/backward_tail.cuh"
SEEDS = range(4)
LARGE_ERROR = 0.01


@dataclass(frozen=True)
class Plant:
    """A bug: in `file` the text `before` becomes `after`; at `tokens` tokens something must show.

    `short` ones are part of every run; `negative` ones show where all scores are negative; `forward` and `backward`
    are the variants of the kernels to be called.
    """

    name: str
    file: str
    before: str
    after: str
    tokens: int
    short: bool = False
    negative: bool = False
    forward: int = 0
    backward: int = 0


PLANTS = (
    Plant(
        "no barrier after the forward load",
        FORWARD,
        "      copy_wait();\n      sync_threads();\n",
        "      copy_wait();\n",
        50,
        short=True,
    ),
    Plant("no wait for the forward copies", FORWARD, "  copy_wait();\n", "", 50),
    Plant("no forward mask", FORWARD, "s = -INFINITY;", "s = s;", 50, short=True),
    Plant("wrong swizzle", "csrc/tiles.cuh", "copy_async(chunk_at(tile, row, chunk),", "copy_async(tile + i * 16,", 17),
    Plant(
        "no first barrier of the merge", FORWARD, "kSum = kMost + 4;\n  sync_threads();\n", "kSum = kMost + 4;\n", 257
    ),
    Plant("rows not rescaled", FORWARD, "rows.sum[half] *= factor;", "", 100),
    Plant(
        "no scalar products with the tail",
        FORWARD,
        "attend_vector<Element>(rows[m], keys, values, k, p.scale_log2, lane);",
        ";",
        257,
        forward=2,
    ),
    Plant(
        "warps share keys of the tail rows wrongly", FORWARD, "key + kShare : n;", "key + kShare : kTileTokens;", 264
    ),
    Plant("no wait for the backward copies", BACKWARD, "    copy_wait();\n", "", 50),
    Plant(
        "no backward mask",
        BACKWARD,
        "const bool inside = key + m * 16 + (lane >> 2) + (i >> 1) * 8 < tokens;",
        "const bool inside = true;",
        50,
        negative=True,
        short=True,
    ),
    Plant(
        "no barrier before dQ",
        BACKWARD,
        "    sync_threads();  // dS of all keys is there\n",
        "",
        50,
        short=True,
    ),
    Plant("no barrier before a block", BACKWARD, "    sync_threads();  // the block has landed", "    // ", 100),
    Plant(
        "no delta", BACKWARD, "(delta + (first + b * kStep) * 4) = sum;", "(delta + (first + b * kStep) * 4) = 0;", 50
    ),
    Plant(
        "next block over this one",
        BACKWARD,
        "load_block(first + kQueryBlock, stage ^ 1)",
        "load_block(first + kQueryBlock, stage)",
        100,
    ),
    Plant(
        "no barrier before the next block is loaded",
        BACKWARD,
        "      sync_threads();\n      load_block(",
        "      load_block(",
        257,
        backward=1,
    ),
    Plant(
        "matrices stored in the wrong order",
        BACKWARD,
        "query + (lane & 7) + ((lane >> 4) << 3)",
        "query + (lane & 7) + (((lane >> 3) & 1) << 3)",
        50,
    ),
    Plant(
        "no scores of the tail",
        BACKWARD,
        "        tail_scores<Element>(keys,",
        "        if (n < 0) tail_scores<Element>(keys,",
        257,
        short=True,
    ),
    Plant(
        "no dQ from the tail",
        BACKWARD,
        "keys, row, group, held,",
        "keys, row, group, held < kTileTokens ? held : kTileTokens,",
        272,
    ),
    Plant(
        "no mask in the tail",
        TAIL,
        "const bool inside = kTileTokens + column + e < tokens;",
        "const bool inside = true;",
        257,
        negative=True,
    ),
    Plant("misaligned rows", "csrc/tiles.cuh", "k * 2 + (lane >> 4)));", "k * 2 + (lane >> 4)) + 2);", 50),
    Plant("too little shared memory", FORWARD, "return 2 * round_up(tokens, 16)", "return 2 * tokens", 50),
    Plant(
        "not all warps at a barrier", BACKWARD, "    sync_threads();  // dS", "    if (warp) sync_threads();  // dS", 50
    ),
    Plant("sums of the tail not cleared", BACKWARD, "  if (Layout::kTail) sums.clear();\n", "", 257),
)


def fault(emulation: Emulation, plant: Plant) -> str | None:
    """What gives the bug away, in the first order of threads that shows it."""
    given = problem(plant.tokens)
    if plant.negative:
        given = emulated.negative(given)
    truth, first = expected(given), None
    for seed in SEEDS:
        try:
            result = emulation.run(given, seed, plant.forward, plant.backward)
        except KernelFaultError as error:
            return str(error)
        found = errors(result, truth, floor=0.5)
        if not all(error <= LARGE_ERROR for error in found.values()):
            return str(found)
        if first is not None and not result.equals(first):
            return f"seed {seed} gives other bits"
        first = result
    return None


def test_every_bug_can_be_planted():
    for plant in PLANTS:
        count = (emulated.KERNELS / plant.file).read_text().count(plant.before)
        assert count == 1, f"{plant.name}: its text is {count} times in {plant.file}, expected once; follow the source"


def test_without_a_bug_nothing_is_found(tmp_path):
    emulation = emulated.build(tmp_path)
    calls = {(plant.tokens, plant.negative, plant.forward, plant.backward): plant for plant in PLANTS}
    for plant in calls.values():
        assert fault(emulation, plant) is None, plant.name


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug_is_found(tmp_path, plant):
    if not plant.short and os.environ.get("DINOV2_TEST_FULL") != "1":
        pytest.skip("a minute for all: set DINOV2_TEST_FULL=1 to plant every bug")
    emulation = emulated.build(tmp_path, (plant.file, plant.before, plant.after))
    found = fault(emulation, plant)
    print(f"\n{plant.name}: {found}")
    assert found is not None, f"not found: {plant.name}"

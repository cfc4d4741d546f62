"""The bench over ranks makes the same steps everywhere and counts honestly. No timing is asserted."""

import json
import re
from pathlib import Path

import pytest
import torch

from dinov2cli.bench.ranks import SETTINGS, lines, run
from dinov2cli.bench.train import Case
from dinov2cli.errors import UserError, WorkError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
KEPT = json.loads((ROOT / "benchmarks" / "ranks.json").read_text())
TINY = Case("tiny", 4, 512, 32, 16, 2, 0.3, "fp32", "cpu", 0)


@pytest.fixture(scope="module")
def figures():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # glibc gives large blocks back as soon as they are freed, rather than keep what outweighs so small a model.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
        return run(case=TINY, warmup=1, steps=1, settings=("one process", "ddp", "fsdp"))


@pytest.mark.slow
def test_every_figure_is_there_and_all_make_the_same_steps(figures):
    json.dumps(figures)
    assert [(row["setting"], row["ranks"]) for row in figures["settings"]] == [
        ("one process", 1),
        ("ddp", 2),
        ("fsdp", 2),
    ]
    assert figures["loss_difference"] < 1e-4
    assert figures["best"] in ("ddp", "fsdp")
    for row in figures["settings"]:
        assert row["seconds"] > 0 and row["images_per_s"] > 0 and row["start_memory_mib"] <= row["memory_mib"]
    assert len(lines(figures)) == 4 + 6 + 1


@pytest.mark.slow
def test_state_is_counted_exactly_and_memory_is_about_what_the_model_says(figures):
    """Resident memory also holds libraries' workspaces, temporaries, and some slack of the allocator."""
    for row in figures["settings"]:
        assert row["state_mib"] == pytest.approx(5 * row["modelled"]["weights"] / 2**20, rel=1e-3)
        assert 0.6 < row["ratio"] < 1.6, row["setting"]
    assert figures["state_ratio"] == pytest.approx(0.5, abs=0.01)
    assert figures["memory_ratio"] < 1


def test_what_cannot_be_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="found 3 processes; expected 2 or more that divide 4"):
        run(case=TINY, ranks=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expected no launcher around it"):
        run(case=TINY)


def test_a_process_that_fails_says_why():
    wrong = Case("tiny", 4, 512, 32, 16, 2, 0.3, "nonsense", "cpu", 0)
    with pytest.raises(WorkError, match=r"none over 1 failed with 1: .*nonsense"):
        run(case=wrong, settings=("one process",))


def test_the_page_says_what_the_file_holds():
    rows = {row["setting"]: row for row in KEPT["settings"]}
    assert list(rows) == list(SETTINGS)
    state, peak, modelled = figures_on_page(r"take # of DDP's, its peak of resident memory # \(model: #\)")
    assert [state, peak] == pytest.approx([KEPT["state_ratio"], KEPT["memory_ratio"]], abs=0.06)
    assert modelled == pytest.approx(KEPT["modelled_memory_ratio"], abs=0.006)
    several = [row["ratio"] for row in rows.values() if row["ranks"] > 1]
    on_page = figures_on_page(r"from # to # times the model's over two ranks, and in one process # times")
    assert on_page == pytest.approx([min(several), max(several), rows["one process"]["ratio"]], abs=0.06)


def figures_on_page(sentence: str) -> list[float]:
    """The numbers that stand for every # in a sentence of the page; measured ones vary by some hundredths."""
    found = re.search(sentence.replace("#", r"(\d+\.\d+)"), " ".join(PAGE.split()))
    assert found, f"docs/scaling.md lacks: {sentence}"
    return [float(number) for number in found.groups()]

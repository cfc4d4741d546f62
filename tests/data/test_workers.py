"""Worker processes: order, bounds, errors, and what happens when one of them dies."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from dinov2cli.data import crop_loader
from dinov2cli.data.bad import BadImages
from dinov2cli.data.cores import default_workers
from dinov2cli.data.crop_loader import CropLoader
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import iterate_images
from dinov2cli.data.ring import Ring
from dinov2cli.data.source import open_source
from dinov2cli.data.workers import Hand, Pool
from dinov2cli.errors import InputError, WorkError


class Squares:
    """Squares numbers; does something else where told to."""

    def __init__(self, marks: Path | None = None, **deeds: list[int]) -> None:
        self.marks, self.deeds = marks, deeds

    def name(self, item: int) -> str:
        return f"item {item}"

    def __call__(self, task: int, hand: Hand) -> int | str:
        hand.hold(task)
        if hand.deadly(task):
            return "passed over"
        if task in self.deeds.get("dies_once", []):
            mark = self.marks / str(task)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if task in self.deeds.get("dies", []):
            os.kill(os.getpid(), signal.SIGTRAP)
        if task in self.deeds.get("leaves", []):
            os._exit(7)
        if task in self.deeds.get("refuses", []):
            raise InputError(f"no {task}")
        if task in self.deeds.get("breaks", []):
            raise ConnectionResetError("peer")
        if task in self.deeds.get("ends", []):
            raise EOFError("end")
        if task in self.deeds.get("strange", []):
            raise StrangeError("a", "b")
        if task in self.deeds.get("odd", []):
            raise OddError(lambda: None)
        if task in self.deeds.get("slow", []):
            time.sleep(0.3)
        return task * task


class OddError(Exception):
    """Carries something that does not pickle."""


class StrangeError(Exception):
    """Pickles, but cannot be made again from what was pickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    reader = Squares(slow=[0, 7])
    assert list(Pool(reader, workers, ahead=5).run(range(20))) == [n * n for n in range(20)]
    assert list(Pool(reader, workers, ahead=5).run([])) == []


@pytest.mark.parametrize("workers, ahead, most", [(1, 2, 2), (2, 4, 4), (3, 1, 3), (0, 4, 1)])
def test_no_more_is_asked_for_than_ahead(workers, ahead, most):
    """Tasks taken, less results given, stay within `ahead` (or one per worker)."""
    taken = []

    def tasks():
        for number in range(30):
            taken.append(number)
            yield number

    for done, _ in enumerate(Pool(Squares(), workers, ahead=ahead).run(tasks())):
        assert len(taken) - done <= most


class Wordy(Squares):
    """Answers that fill a pipe."""

    def __call__(self, task: list[int], hand: Hand) -> bytes:
        return bytes(len(task) * 100)


def test_full_pipes_never_stop_both_sides():
    """Many tasks far ahead, each of some kilobytes, with larger answers: more than any pipe holds."""
    tasks = [list(range(500))] * 600
    assert [len(found) for found in Pool(Wordy(), 1, ahead=10_000).run(tasks)] == [50_000] * 600


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_keep_their_kind(workers):
    results = Pool(Squares(refuses=[3]), workers, ahead=4).run(range(9))
    assert list(islice(results, 3)) == [0, 1, 4]
    with pytest.raises(InputError, match="no 3"):
        next(results)
    for deed, kinds, said in (
        ("odd", (RuntimeError, OddError), None),
        ("strange", (RuntimeError, StrangeError), None),
        ("breaks", ConnectionResetError, "peer"),  # not to be taken for the end of the worker's pipe
        ("ends", EOFError, "end"),
    ):
        with pytest.raises(kinds, match=said):
            list(Pool(Squares(**{deed: [1]}), workers, ahead=4).run(range(9)))


def test_a_chance_death_changes_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = list(Pool(Squares(tmp_path, dies_once=[0, 5]), 2, ahead=6).run(range(12)))
    assert found == [n * n for n in range(12)]
    assert sorted(caplog.messages) == [
        f"a loader worker died (killed by SIGKILL, perhaps for want of memory) over item {n}: "
        "its work is done again by a new one"
        for n in (0, 5)
    ]


@pytest.mark.parametrize("deed, how", [("dies", "killed by SIGTRAP"), ("leaves", "exit code 7")])
def test_an_item_that_kills_twice_is_passed_over(deed, how, caplog):
    tasks = [0, 1, 4, 5, 4, 6]  # once more after it was found out: by then all workers know
    with caplog.at_level(logging.WARNING):
        found = list(Pool(Squares(**{deed: [4]}), 2, ahead=2).run(tasks))
    assert found == [0, 1, "passed over", 25, "passed over", 36]
    assert caplog.messages == [
        f"a loader worker died ({how}) over item 4: its work is done again by a new one",
        f"a loader worker died ({how}) over item 4: the image is passed over from now on",
    ]


def test_two_chance_deaths_over_one_item_lose_nothing(tmp_path):
    """At different times: between them the item was done."""
    reader = Squares(tmp_path, dies_once=[4])
    found = []
    for number, result in enumerate(Pool(reader, 1, ahead=1).run([4, 1, 2, 4, 3])):
        found.append(result)
        if number == 1:
            (tmp_path / "4").unlink()
    assert found == [16, 1, 4, 16, 9]


class Half(Squares):
    """Dies in the middle of a long answer."""

    def __call__(self, task: int, hand: Hand) -> bytes | int:
        mark = self.marks / "half"
        if task == 2 and not mark.exists():
            mark.touch()
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return bytes(50_000_000)
        return task


def test_a_death_in_the_middle_of_an_answer(tmp_path):
    results = Pool(Half(tmp_path), 1, ahead=4).run(range(5))
    assert [next(results), next(results)] == [0, 1]
    time.sleep(0.8)  # nobody reads: the answer stays in the pipe as far as it went
    assert list(results) == [2, 3, 4]


class Settled(Squares):
    """Tells how its process is set up."""

    def __call__(self, task: int, hand: Hand) -> tuple[int, bool]:
        ignored = all(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        return torch.get_num_threads(), ignored


def test_workers_have_one_thread_and_leave_signals_to_the_main_process():
    assert list(Pool(Settled(), 2, ahead=2).run(range(2))) == [(1, True)] * 2


EXITS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_workers import Squares
from dinov2cli.data.workers import Pool
results = Pool(Squares(), 2, ahead=4).run(range(100))
print(next(results), flush=True)
if sys.argv[2] == "error":
    raise SystemExit("enough")
"""


@pytest.mark.parametrize("how", ["end", "error"])
def test_a_program_ends_with_an_iterator_still_open(how):
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(Path(__file__).parent), how], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("0\n", int(how == "error"))


def test_too_many_deaths_stop_the_run():
    with pytest.raises(WorkError) as caught:
        list(Pool(Squares(dies=[1, 2, 3]), 2, ahead=2, max_deaths=3).run(range(9)))
    assert str(caught.value).startswith("4 loader workers have died, the last over item ")
    assert "killed by SIGTRAP" in str(caught.value) and caught.value.exit_code == 1
    with pytest.raises(WorkError, match=r"1 loader workers have died.*more than 0 are too many"):
        list(Pool(Squares(dies=[1]), 1, ahead=2, max_deaths=0).run(range(9)))


def test_idle_workers_may_die_too(caplog):
    pool = Pool(Squares(), 2, ahead=2)
    results = pool.run(range(10))
    assert next(results) == 0
    time.sleep(0.1)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.1)
    with caplog.at_level(logging.WARNING):
        assert list(results) == [n * n for n in range(1, 10)]
    assert len(caplog.messages) == 2 and all("over no image in hand" in text for text in caplog.messages)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_closing_ends_the_workers():
    pool = Pool(Squares(slow=list(range(100))), 2, ahead=8)
    results = pool.run(range(100))
    next(results)
    pids = [worker.process.pid for worker in pool._workers]
    assert all(map(alive, pids))
    results.close()
    assert not any(map(alive, pids))


ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_workers import Squares
from dinov2cli.data.workers import Pool
pool = Pool(Squares(), 3, ahead=6)
results = pool.run(range(100))
next(results)
print(*(worker.process.pid for worker in pool._workers), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_do_not_outlive_a_killed_run():
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    pids = [int(text) for text in process.stdout.readline().split()]
    assert len(pids) == 3 and all(map(alive, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not any(map(alive, pids)):
            return
        time.sleep(0.05)
    pytest.fail("workers still live 5 seconds after the main process was killed")


def test_default_workers_leave_a_core():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert default_workers(4) == max(1, min(cores - 1, 4))


# --- the ring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forked", [True, False])
def test_slots_do_not_touch_each_other(forked):
    layout = {"a": ((3, 5), torch.uint8), "none": ((0, 4), torch.uint8), "b": ((2,), torch.int64)}
    ring = Ring(3, layout, forked=forked)
    for number in range(3):
        for name, value in ring.slot(number).items():
            value.fill_(10 * number + len(name))
    for number in range(3):
        slot = ring.slot(number)
        assert {name: (tuple(v.shape), v.dtype) for name, v in slot.items()} == layout
        assert slot["a"].eq(10 * number + 1).all() and slot["b"].eq(10 * number + 1).all()


# --- loaders with images that kill ----------------------------------------------------------------------------------


CROP = MultiCrop(global_size=16, local_size=8, local_number=2)


@pytest.fixture
def folder(tmp_path, encode) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(10):
        (root / f"{number}.png").write_bytes(encode(number))
    return root


def batches(root: Path, number: int = 6, **options) -> tuple[list[dict[str, torch.Tensor]], CropLoader]:
    options = {"workers": 2, "bad": BadImages(max_fraction=1), **options}
    loader = CropLoader(open_source(str(root)), crop=CROP, batch_size=4, seed=1, **options)
    return [{k: v.clone() for k, v in batch.items()} for _, batch in zip(range(number), loader, strict=False)], loader


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


@pytest.fixture
def deadly(monkeypatch):
    """deadly(name): opening the image of that name kills the process."""
    opened = crop_loader.open_image

    def arm(name: str) -> None:
        def open_or_die(data, *, name, max_pixels):
            if name == target:
                os.kill(os.getpid(), signal.SIGTRAP)
            return opened(data, name=name, max_pixels=max_pixels)

        target = name
        monkeypatch.setattr(crop_loader, "open_image", open_or_die)

    return arm


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forked workers see the patched function")
def test_an_image_that_kills_its_worker_is_named_and_replaced(folder, deadly, caplog):
    deadly("3.png")
    with caplog.at_level(logging.WARNING):
        found, loader = batches(folder)
    assert loader.bad.reasons == {"3.png": "it killed the two workers that decoded it"}
    assert "a loader worker died (killed by SIGTRAP) over 3.png: its work is done again by a new one" in caplog.messages
    used = torch.cat([batch["index"] for batch in found])
    assert 3 not in used.tolist() and len(used) == 24
    deadly("nothing")
    (folder / "3.png").write_bytes(b"junk")
    assert same(found, batches(folder, workers=0)[0])  # as if it could not be read


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forked workers see the patched function")
def test_the_first_death_may_stop_the_run(folder, deadly):
    deadly("3.png")
    with pytest.raises(WorkError, match=r"1 loader workers have died, the last over 3\.png \(killed by SIGTRAP\)"):
        batches(folder, max_deaths=0)


def test_killing_workers_at_random_changes_no_batch(folder):
    expected, _ = batches(folder, 12)
    loader = CropLoader(open_source(str(folder)), crop=CROP, batch_size=4, seed=1, workers=2)
    found = []
    for number, batch in zip(range(12), loader, strict=False):
        found.append({k: v.clone() for k, v in batch.items()})
        if number in (2, 7):
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            for pid in children.read_text().split()[:1] if children.exists() else []:
                os.kill(int(pid), signal.SIGKILL)
    assert same(found, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forked workers see the patched function")
def test_reading_in_row_order_survives_deaths_too(folder, monkeypatch):
    from dinov2cli.data import loader

    decode = loader.decode_image
    monkeypatch.setattr(
        loader,
        "decode_image",
        lambda data, *, name, **more: os._exit(9) if name == "5.png" else decode(data, name=name),
    )
    bad = BadImages(max_fraction=1)
    found = list(iterate_images(open_source(str(folder)), resize=8, crop=8, batch_size=3, workers=2, bad=bad))
    assert [row for batch in found for row in batch.index] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert bad.reasons == {"5.png": "it killed the two workers that decoded it"}


@pytest.mark.parametrize("workers, batches_held", [(0, 1), (1, 3), (4, 3), (16, 9)])
def test_memory_does_not_grow_with_the_workers(folder, workers, batches_held):
    """Three batches: two ahead and the one put together. More only for more workers than images."""
    loader = CropLoader(open_source(str(folder)), crop=CROP, batch_size=4, seed=1, workers=workers)
    one = 4 * 3 * (2 * 16 * 16 + 2 * 8 * 8)
    assert loader.memory_bytes() == batches_held * one
    assert CropLoader(open_source(str(folder)), crop=CROP, batch_size=256, seed=1, workers=16).memory_bytes() == (
        3 * 64 * one
    )

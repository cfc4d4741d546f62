"""The teacher's tokens on disk: the same numbers whether they were there or not, and what survives a kill."""

import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from dinov2cli.errors import WorkError
from dinov2cli.train.teacher import TeacherTokens
from dinov2cli.train.teacher_cache import TokenCache, bytes_needed

SHAPE = {"images": 7, "views": 3, "crops": 2, "tokens": 5, "width": 6}
KEY = {"teacher": "abc", "seed": 1}


def opened(folder, **changes):
    return TokenCache(folder, **(SHAPE | {"key": KEY} | changes))


class Oracle:
    """A teacher whose tokens of an image in a view are drawn from the two alone; it counts what it is asked for."""

    def __init__(self, sample, view, scale=1.0):
        self.sample, self.view, self.scale, self.asked = sample, view, scale, []

    def __call__(self, rows):
        self.asked += [(int(self.sample[i]), int(self.view[i])) for i in rows]
        drawn = [truth(self.sample[i], self.view[i]) for i in rows]
        together = self.scale * torch.stack(drawn, dim=1).flatten(0, 1)  # crop after crop
        return TeacherTokens(together[:, 0], together[:, 1:])


def truth(sample, view):
    """Tokens [crops, 1 + N, D] of a view."""
    generator = torch.Generator().manual_seed(100 * int(sample) + int(view))
    return torch.randn(2, 5, 6, generator=generator)


def batch(*pairs):
    sample, view = zip(*pairs, strict=True)
    return torch.tensor(sample), torch.tensor(view)


def fetched(cache, *pairs, **changes):
    """What the cache gives of these (image, view) pairs, and which of them it had to ask for."""
    oracle = Oracle(*batch(*pairs), **changes)
    return cache.fetch(*batch(*pairs), oracle), oracle.asked


def test_rows_come_back_crop_after_crop(tmp_path):
    pairs = [(4, 2), (0, 0), (6, 1)]
    found, asked = fetched(opened(tmp_path), *pairs)
    assert asked == pairs
    assert found.cls.shape == (6, 6) and found.patches.shape == (6, 4, 6) and found.cls.dtype == torch.float32
    for i, (sample, view) in enumerate(pairs):
        for crop in range(2):
            stored = truth(sample, view)[crop].half().float()
            assert torch.equal(found.cls[crop * 3 + i], stored[0])
            assert torch.equal(found.patches[crop * 3 + i], stored[1:])


def test_only_missing_rows_are_computed_and_a_hit_is_a_miss_bit_for_bit(tmp_path):
    cache = opened(tmp_path)
    missed, _ = fetched(cache, (1, 0), (2, 0), (3, 0))
    found, asked = fetched(cache, (3, 0), (5, 1), (1, 0), (1, 1))
    assert asked == [(5, 1), (1, 1)] and len(cache) == 5
    for crop in (0, 1):
        assert torch.equal(found.patches[4 * crop], missed.patches[3 * crop + 2])
        assert torch.equal(found.cls[4 * crop + 2], missed.cls[3 * crop])
    again, asked = fetched(cache, (3, 0), (5, 1), (1, 0), (1, 1), scale=9.0)
    assert asked == [] and torch.equal(again.cls, found.cls) and torch.equal(again.patches, found.patches)


def test_an_image_twice_in_a_batch_is_one_row(tmp_path):
    cache = opened(tmp_path)
    found, _ = fetched(cache, (2, 1), (2, 1))
    assert len(cache) == 1 and torch.equal(found.cls[0], found.cls[1])


def test_a_later_process_finds_what_was_flushed(tmp_path):
    cache = opened(tmp_path)
    found, _ = fetched(cache, (1, 0), (6, 2))
    cache.flush()
    fetched(cache, (4, 0))  # never marked
    later = opened(tmp_path)
    assert len(later) == 2 and not later.restarted
    again, asked = fetched(later, (1, 0), (6, 2))
    assert asked == [] and torch.equal(again.patches, found.patches)
    assert fetched(later, (4, 0))[1] == [(4, 0)]
    later.close()
    assert len(opened(tmp_path)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"key": KEY | {"seed": 2}},
        {"key": {}},
        {"images": 8},
        {"views": 2},
        {"tokens": 17},
        {"crops": 5, "tokens": 2},
    ],
)
def test_a_cache_of_something_else_is_begun_afresh(tmp_path, changes):
    cache = opened(tmp_path)
    assert not cache.restarted
    fetched(cache, (1, 0))
    cache.close()
    other = opened(tmp_path, **changes)
    assert other.restarted and len(other) == 0
    # The old marks must not come back once other rows may lie there.
    assert not (tmp_path / "marks").exists()
    assert len(opened(tmp_path)) == 0


def test_keys_are_compared_by_their_values(tmp_path):
    cache = opened(tmp_path, key={"a": 1, "size": (3, 4)})
    fetched(cache, (1, 0))
    cache.close()
    assert len(opened(tmp_path, key={"size": [3, 4], "a": 1})) == 1


@pytest.mark.parametrize("name", ["tokens.f16", "marks"])
@pytest.mark.parametrize("how", ["cut", "lost"])
def test_damaged_files_are_dropped(tmp_path, name, how):
    cache = opened(tmp_path)
    fetched(cache, (1, 0))
    cache.close()
    file = tmp_path / name
    if how == "lost":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    assert len(opened(tmp_path)) == 0


KILLED = """
import os, sys, torch
from pathlib import Path
from dinov2cli.train.teacher import TeacherTokens
from dinov2cli.train.teacher_cache import TokenCache
cache = TokenCache(Path(sys.argv[1]), images=7, views=3, crops=2, tokens=5, width=6, key={})
def compute(rows):
    return TeacherTokens(torch.ones(2 * len(rows), 6), torch.ones(2 * len(rows), 4, 6))
cache.fetch(torch.tensor([0, 1]), torch.tensor([0, 0]), compute)
cache.flush()
write, calls = os.pwrite, []
def dying(fd, content, offset):
    calls.append(offset)
    if len(calls) == 2:
        write(fd, content[:7], offset)
        os.kill(os.getpid(), 9)
    return write(fd, content, offset)
os.pwrite = dying
if sys.argv[2] == "flush":
    os.replace = lambda *paths: os.kill(os.getpid(), 9)
    cache.fetch(torch.tensor([2]), torch.tensor([0]), compute)
    cache.flush()
cache.fetch(torch.tensor([3, 4, 5]), torch.tensor([1, 1, 1]), compute)
"""


@pytest.mark.parametrize("moment", ["write", "flush"])
def test_kill_9_leaves_no_row_marked_that_is_not_there(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    cache = opened(tmp_path, key={})
    assert len(cache) == 2
    found, asked = fetched(cache, (0, 0), (1, 0), (3, 1), (4, 1))
    assert asked == [(3, 1), (4, 1)]
    assert (found.cls[:2] == 1).all() and (found.patches[4:6] == 1).all()
    assert torch.equal(found.patches[3], truth(4, 1)[0, 1:].half().float())


def test_marks_follow_the_rows_to_the_disk(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    fetched(cache, (1, 0))
    order = []
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("rows" if fd == cache._fd else "marks"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("renamed"), replace(*paths)))
    cache.flush()
    assert order == ["rows", "marks", "renamed"]


def test_a_full_disk_is_told_and_nothing_is_marked(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    fetched(cache, (1, 0))

    def full(fd, content, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(WorkError, match=r"no space left on device; all of them take .* GB: .*teacher.cache=false"):
            fetched(cache, (2, 0))
    assert fetched(cache, (2, 0), (1, 0))[1] == [(2, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: full(fd, b"", 0))
        with pytest.raises(WorkError, match="no space left on device"):
            cache.flush()


def test_a_limit_on_the_size_of_files_is_told(tmp_path):
    code = f"""
import resource, sys
from pathlib import Path
from dinov2cli.errors import WorkError
from dinov2cli.train.teacher_cache import TokenCache
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
try:
    TokenCache(Path(sys.argv[1]), images=100, views=1, crops=2, tokens=17, width=64, key={{}})
except WorkError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "file too large; all of them take 0.000435 GB" in done.stdout


def test_writes_that_stop_halfway_go_on(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: write(fd, content[:11], offset))
    found, _ = fetched(opened(tmp_path), (1, 2), (3, 0))
    assert torch.equal(found.patches[3], truth(3, 0)[1, 1:].half().float())


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_never_stored(tmp_path, value):
    cache = opened(tmp_path)

    def compute(rows):
        patches = torch.zeros(2 * len(rows), 4, 6)
        patches[1, 2, 3] = value
        return TeacherTokens(torch.zeros(2 * len(rows), 6), patches)

    with pytest.raises(WorkError, match=r"float16 up to 65504: train without it \(teacher.cache=false\)"):
        cache.fetch(*batch((1, 0)), compute)
    assert len(cache) == 0
    found, _ = fetched(cache, (1, 0), scale=0.0)
    assert (found.patches == 0).all()


def test_the_largest_and_16_bit_tokens_are_held(tmp_path):
    cache = opened(tmp_path)
    largest = torch.full((2, 6), 65504.0)
    found = cache.fetch(*batch((1, 0)), lambda rows: TeacherTokens(largest, torch.ones(2, 4, 6).bfloat16().float()))
    assert torch.equal(found.cls, largest)
    half = TeacherTokens(torch.ones(2, 6).bfloat16(), torch.ones(2, 4, 6).bfloat16())
    assert cache.fetch(*batch((2, 0)), lambda rows: half).cls.dtype == torch.float32


def test_what_it_takes_is_known_beforehand(tmp_path):
    needed = bytes_needed(**SHAPE)
    cache = opened(tmp_path)
    assert cache.bytes_needed == needed
    fetched(cache, *[(image, view) for image in range(7) for view in range(3)])
    cache.flush()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == needed
    assert len(cache) == 21


def test_the_file_is_sparse(tmp_path):
    cache = opened(tmp_path, images=2000, tokens=257, width=384)
    assert (tmp_path / "tokens.f16").stat().st_size > 2e9
    assert (tmp_path / "tokens.f16").stat().st_blocks * 512 < 1e6
    assert len(cache) == 0


def test_what_does_not_belong_is_refused(tmp_path):
    cache = opened(tmp_path)
    with pytest.raises(ValueError, match=r"images \[7\]: expected a row of numbers from 0 to 6"):
        fetched(cache, (7, 0))
    with pytest.raises(ValueError, match=r"views \[3\]: expected a row of numbers from 0 to 2"):
        fetched(cache, (0, 3))
    with pytest.raises(ValueError, match=r"tokens \[2, 4, 6\], expected \[2, 5, 6\]"):
        cache.fetch(*batch((1, 0)), lambda rows: TeacherTokens(torch.zeros(2, 6), torch.zeros(2, 3, 6)))
    assert len(cache) == 0


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match=r"cannot write the teacher's tokens to .*teacher.cache=false"):
        opened(tmp_path / "file" / "cache")

"""The progress of training in words: figures of a line, time left, lines for logs and the bar of a terminal."""

import io

import pytest
from rich.console import Console

from dinov2cli.cli import progress
from dinov2cli.cli.progress import Pace, clock, figures, resident_gib, training_progress
from dinov2cli.cli.talk import Talk

LINE = {
    "step": 120,
    "loss/total": 6.514,
    "loss/dino_local": 4.1,
    "loss/dino_global": 0.5,
    "loss/ibot": 2.04,
    "loss/koleo": -0.1,
    "images_per_s": 1410.2,
    "data_wait": 0.031,
    "memory_gib": 0.94,
}


class Clock:
    """time.monotonic of the module, set by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def told():
    """A voice whose words land in a list, as those of a command in a pipe."""
    talk = Talk()
    talk.console = Console(file=io.StringIO(), soft_wrap=True)
    lines = []
    talk.say = lines.append
    return talk, lines


def test_a_line_says_all_there_is():
    assert ", ".join(figures(LINE)) == (
        "loss 6.51 (local 4.10, global 0.50, ibot 2.04, koleo -0.10), 1,410 images/s, data wait 3 %, 0.9 GiB"
    )
    assert "3 skipped" in figures({**LINE, "skipped": 3}) and not any("skipped" in f for f in figures({"skipped": 0}))
    assert figures({"loss/total": 1.0, "images_per_s": 0.25, "memory_gib": 2}) == [
        "loss 1.00",
        "0.25 images/s",
        "2.0 GiB",
    ]


def test_memory_is_that_of_this_process_where_no_gpu_tells(monkeypatch):
    resident = resident_gib()
    assert resident is not None and 0.01 < resident < 100
    assert figures({})[-1] == f"{resident_gib():.1f} GiB"
    monkeypatch.setattr(progress, "_STATM", progress.Path("/no/such/file"))
    assert resident_gib() is None
    assert figures({}) == []


@pytest.mark.parametrize("seconds, text", [(17.4, "00:17"), (59.6, "01:00"), (3599, "59:59"), (18017, "5:00:17")])
def test_lengths_of_time(seconds, text):
    assert clock(seconds) == text


def test_time_left_follows_the_clock_and_a_total_that_moves(time):
    pace = Pace(10)
    time.now += 30  # workers start
    assert pace.text(11, 100) == ""
    time.now += 10
    assert pace.text(21, 101) == "01:20 left"  # one second a step since the first line; the start is not counted
    assert pace.text(21, 51) == "00:30 left"
    time.now += 5
    assert pace.text(51, 51) == "in 00:45"


def test_logs_get_a_line_every_ten_seconds_and_the_last(time, told):
    talk, lines = told
    with training_progress(talk, "pretrain") as show:
        for step in range(0, 561, 20):
            time.now += 1
            show({**LINE, "step": step}, 560)
    assert [line.split(",")[0] for line in lines] == [f"pretrain: step {s}/560" for s in (0, 200, 400, 560)]
    assert lines[1].endswith("0.9 GiB, 00:18 left") and lines[-1].endswith("in 00:29")
    assert "loss 6.51 (local 4.10" in lines[0]


def test_an_interrupted_run_ends_without_a_last_line(time, told):
    talk, lines = told

    def interrupted():
        with training_progress(talk, "pretrain") as show:
            show(LINE, 600)
            show({**LINE, "step": 140}, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(lines) == 1


@pytest.mark.parametrize(
    "width, figures",
    [
        (170, "loss 6.51 (local 4.10, global 0.50, ibot 2.04, koleo -0.10), 1,410 images/s, data wait 3 %, 0.9 GiB"),
        (110, "loss 6.51, 1,410 images/s, data wait 3 %, 0.9 GiB"),
        (80, "loss 6.51, 1,410 images/s"),
    ],
)
def test_terminals_get_a_bar_with_as_many_figures_as_fit(time, width, figures):
    screen = io.StringIO()
    talk = Talk()
    talk.console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with training_progress(talk, "pretrain", start=100) as show:
        time.now += 10
        show(LINE, 600)
    line = [text for text in screen.getvalue().splitlines() if "120/600" in text][-1]
    assert line.rstrip().endswith(f" 120/600 {figures}, 04:00 left") and "━" in line
    assert len(line.removeprefix("\x1b[2K").rstrip()) <= width


def test_quiet_says_nothing(told):
    talk, lines = told
    talk.quiet = True
    with training_progress(talk, "pretrain") as show:
        show(LINE, 600)
    assert lines == []

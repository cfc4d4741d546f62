"""Worker processes for the loaders: how they start, what they ignore, what happens when one dies.

Why not torch's DataLoader: when a worker dies it cannot say over which image, it raises from a signal handler in the
middle of whatever the main process does (a training step), and the other workers' work is lost. Here a dead worker is
replaced and its tasks are done again; results are small, for pixels go through `data/ring.py`.
"""

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch

from dinov2cli.data.ring import Ring, forks
from dinov2cli.errors import WorkError

logger = logging.getLogger(__name__)

MAX_DEATHS = 10
DEADLY = "it killed the two workers that decoded it"
"""Why an item that `Hand.deadly` knows is passed over."""


class TaskReader(Protocol):
    """Something that turns one task into one (small) result, in any process, the same each time."""

    def __call__(self, task: Any, hand: "Hand") -> Any: ...

    def name(self, item: int) -> str:
        """What to call an item that a worker had in hand when it died."""
        ...


class Hand:
    """What one worker has in hand, where the main process can see it after the worker's death.

    `killers`: items that killed their worker twice, to be passed over by all.
    """

    def __init__(self, shared: dict[str, torch.Tensor], worker: int) -> None:
        self._notes, self._killers, self._worker = shared["notes"].numpy(), shared["killers"].numpy(), worker

    def hold(self, item: int) -> None:
        """Take an item in hand; -1 for none."""
        self._notes[self._worker] = item

    def deadly(self, item: int) -> bool:
        """Whether an item is to be passed over."""
        number = self._killers[0]
        return number > 0 and item in self._killers[1 : number + 1]


@dataclass
class _Worker:
    """A process, this side of its pipe, and the numbers and contents of the tasks it was given, oldest first."""

    process: Any
    pipe: Connection
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)


class Pool:
    """Results of `reader(task)` in the order of the tasks, computed by `workers` processes (0: in this one).

    At most `ahead` tasks are given out before their results are asked for. A worker that dies is replaced and its tasks
    are done again, so that a chance death changes nothing; an item that kills the next worker at once as well is passed
    over from then on (`Hand.deadly`). More than `max_deaths` deaths stop the run.
    """

    def __init__(self, reader: TaskReader, workers: int, *, ahead: int, max_deaths: int = MAX_DEATHS) -> None:
        self._reader, self._ahead, self._max_deaths = reader, max(ahead, workers), max_deaths
        self._context = multiprocessing.get_context("fork" if forks() else "spawn")
        # Enough places for killers: each costs two deaths.
        layout = {"notes": ((max(workers, 1),), torch.int64), "killers": ((max_deaths + 2,), torch.int64)}
        self._ring = Ring(1, layout, forked=forks())
        self._shared = self._ring.slot(0)
        self._notes, self._killers = self._shared["notes"], self._shared["killers"]
        self._notes.fill_(-1)
        self._deaths: list[str] = []
        self._suspects: dict[int, int] = {}  # item over which a worker died, by the number of its task
        self._workers: list[_Worker] = []
        self._number = workers

    def run(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Results in order. Raises what the reader raises, and WorkError when workers keep dying."""
        if self._number == 0:
            hand = Hand(self._shared, 0)
            yield from (self._reader(task, hand) for task in tasks)
            return
        _open_pools().add(self)
        try:
            for worker in range(self._number):
                self._workers.append(self._start(worker))
            yield from self._results(enumerate(tasks))
        finally:
            self.close()

    def _results(self, tasks: Iterator[tuple[int, Any]]) -> Iterator[Any]:
        waiting: dict[int, tuple[str, Any]] = {}
        given = due = 0
        more = True
        while True:
            while more and given - due < self._ahead:
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                self._give(task)
                given += 1
            if due == given:
                return
            while due not in waiting:
                waiting.update(self._collect())
            kind, content = waiting.pop(due)
            if kind == "error":  # in its turn, after the results of the tasks before
                raise content
            due += 1
            yield content

    def _give(self, task: tuple[int, Any]) -> None:
        """Hand a task to the worker with the fewest."""
        worker = min(self._workers, key=lambda one: len(one.tasks))
        worker.tasks.append(task)
        _send(worker.pipe, task)

    def _collect(self) -> dict[int, tuple[str, Any]]:
        """Wait until something comes from a worker; the answers that did ("result" or "error"), by task number."""
        came: dict[int, tuple[str, Any]] = {}
        by_source: dict[Any, int] = {}
        for index, worker in enumerate(self._workers):
            by_source[worker.pipe] = by_source[worker.process.sentinel] = index
        for index in sorted({by_source[source] for source in wait(list(by_source))}):
            worker = self._workers[index]
            messages, whole = _messages(worker.pipe)
            for number, kind, content in messages:
                worker.tasks.popleft()
                self._suspects.pop(number, None)
                came[number] = kind, content
            if not whole or (not messages and not worker.process.is_alive()):
                self._replace(index)
        return came

    def _replace(self, index: int) -> None:
        """Put a new worker in the place of a dead one, with its tasks. Raises WorkError after too many deaths."""
        dead = self._workers[index]
        dead.process.kill()  # it may live and only have lost its pipe
        dead.process.join()
        item = int(self._notes[index])
        how = _cause(dead.process.exitcode)
        name = self._reader.name(item) if item >= 0 else "no image in hand"
        self._deaths.append(f"{name} ({how})")
        number = dead.tasks[0][0] if dead.tasks else -1
        again = item >= 0 and self._suspects.get(number) == item
        self._suspects[number] = item
        if len(self._deaths) > self._max_deaths:
            raise WorkError(
                f"{len(self._deaths)} loader workers have died, the last over {self._deaths[-1]}; more than "
                f"{self._max_deaths} are too many: remove such images, or lower --workers if memory is short"
            )
        if again:
            count = int(self._killers[0])
            self._killers[count + 1] = item
            self._killers[0] = count + 1
        following = "the image is passed over from now on" if again else "its work is done again by a new one"
        logger.warning("a loader worker died (%s) over %s: %s", how, name, following)
        self._notes[index] = -1
        dead.pipe.close()
        self._workers[index] = self._start(index)
        for task in dead.tasks:
            self._workers[index].tasks.append(task)
            _send(self._workers[index].pipe, task)

    def _start(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        # A forked worker has this side of all pipes too, and would keep them open when the main process is gone.
        inherited = [ours, *(one.pipe for one in self._workers if not one.pipe.closed)] if forks() else []
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_work, args=(self._reader, theirs, self._ring, index, inherited), daemon=True
        )
        # Python drops a KeyboardInterrupt that comes while the hooks of a fork run: Ctrl-C is held back meanwhile. The
        # worker keeps it blocked, and ignores it anyway.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        return _Worker(process, ours)

    def close(self) -> None:
        """End the workers at once: whatever they write is written aside, and nobody waits for their results."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()


def _send(pipe: Connection, task: tuple[int, Any]) -> None:
    try:
        pipe.send(task)
    except OSError:  # the worker has just died: `_collect` finds that out and gives its tasks to the next
        logger.debug("a worker is gone", exc_info=True)


def _messages(pipe: Connection) -> tuple[list[tuple[int, str, Any]], bool]:
    """What a worker has sent so far, and whether its pipe still holds."""
    found: list[tuple[int, str, Any]] = []
    try:
        while pipe.poll():
            found.append(pipe.recv())
    except (EOFError, OSError):  # OSError: it died in the middle of a message
        return found, False
    return found, True


@cache
def _open_pools() -> "weakref.WeakSet[Pool]":
    """Pools to close when the program ends. Registered after multiprocessing's own exit handler and so run before it,
    which would wait for workers that ignore its SIGTERM."""
    pools: weakref.WeakSet[Pool] = weakref.WeakSet()
    atexit.register(_close_all, pools)
    return pools


def _close_all(pools: "weakref.WeakSet[Pool]") -> None:
    for pool in list(pools):
        pool.close()


def _work(reader: TaskReader, pipe: Connection, ring: Ring, index: int, inherited: list[Connection]) -> None:
    """The life of a worker process: tasks until the pipe ends."""
    for other in inherited:
        other.close()
    _settle()
    hand = Hand(ring.slot(0), index)
    # Sent by a thread: a worker that waits for its answer to be taken would not take tasks, and the main process that
    # waits for a task to be taken does not take answers.
    answers: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(pipe, answers), daemon=True).start()
    while True:
        try:
            number, task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (number, "result", reader(task, hand))
        except Exception as error:
            answer = (number, "error", _portable(error))
        hand.hold(-1)
        answers.put(answer)


def _answer(pipe: Connection, answers: "queue.SimpleQueue[tuple[int, str, Any]]") -> None:
    try:
        while True:
            pipe.send(answers.get())
    except OSError:  # the main process is gone
        os._exit(0)


def _settle() -> None:
    # A terminal sends Ctrl-C, and a scheduler SIGTERM or SIGUSR1, to every process of the job. The main process alone
    # acts on them (it saves first, and then ends its workers); a worker that dies before would turn that into an error.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # One thread each: more would fight over cores, and OpenMP pools do not survive a fork.
    torch.set_num_threads(1)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way to the main process, else its text."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
        error.add_note("in a loader worker:\n" + traceback.format_exc())
        return error
    except Exception:
        return RuntimeError(f"in a loader worker:\n{traceback.format_exc()}")


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")

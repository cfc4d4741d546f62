"""Stops a run between two steps instead of in the middle of one: SIGTERM, SIGUSR1 and Ctrl-C set a flag."""

import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which the signals of STOPPING are noted in `received` (their name, or None) rather than obeyed.

    A second Ctrl-C interrupts at once. Worker processes forked inside inherit the handlers: there SIGTERM still ends
    the process and Ctrl-C is left to the parent. Outside the main thread, where Python allows no handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def code(self) -> int:
        """The signal noted, as its place in STOPPING from 1 on; 0 for none. What ranks can agree on."""
        return 0 if self.received is None else [number.name for number in STOPPING].index(self.received) + 1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

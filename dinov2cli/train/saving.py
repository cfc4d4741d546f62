"""Who writes the checkpoints: the training itself, or a thread beside it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from dinov2cli.distributed import Ranks
from dinov2cli.train.checkpoint import Tensors, save_checkpoint


class Saver:
    """Writes checkpoints, one at a time. `save` takes what `save_checkpoint` takes, without `ranks`.

    In the `background` the tensors are first copied into the host's memory, which is all that the training waits for;
    what went wrong with a checkpoint is raised by the next `save` or by `finish`.
    """

    def __init__(self, ranks: Ranks, *, background: bool = False) -> None:
        self._ranks, self._background = ranks, background
        self._own: Ranks | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, root: Path, step: int, tensors: Tensors, **arguments: Any) -> None:
        """Write a checkpoint, or begin to. Raises what `save_checkpoint` does."""
        if not self._background:
            save_checkpoint(root, step, tensors, ranks=self._ranks, **arguments)
            return
        self.finish()
        copies = {part: {name: t.to("cpu", copy=True) for name, t in held.items()} for part, held in tensors.items()}
        ranks = self._own_ranks()
        self._start(lambda: save_checkpoint(root, step, copies, ranks=ranks, **arguments))

    def finish(self) -> None:
        """Return when the last checkpoint is on disk. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self, write: Callable[[], object]) -> None:
        def work() -> None:
            try:
                write()
            except BaseException as error:  # raised where the training asks
                self._error = error

        # Not a daemon: a process that ends for another reason still completes the checkpoint it began. (Not under a
        # launch, whose other ranks it would need; the next run then removes what was begun.)
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def _own_ranks(self) -> Ranks:
        """The ranks with a group that the training does not use: exchanges of two threads must not mix."""
        if self._own is None:
            self._own = self._ranks
            if self._ranks.world_size > 1:
                import torch.distributed as dist

                group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
                self._own = replace(self._ranks, host=group)
        return self._own

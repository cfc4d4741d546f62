"""The way of a batch from the loader's memory to the device."""

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

_PIXELS = ("global_crops", "local_crops")


def on_device(batches: Iterator[Mapping[str, Any]], device: torch.device) -> Generator[Mapping[str, Any], None, None]:
    """The same batches with their crops on `device`; to a GPU they are copied while it computes.

    The copy runs on a stream of its own, so it overlaps with what was queued before. The loader writes the next batch
    over this one: before it is asked for that, the copy is waited for (the computation is not).
    """
    try:
        if device.type != "cuda":
            yield from batches
            return
        stream = torch.cuda.Stream(device)
        for batch in batches:
            with torch.cuda.stream(stream):
                moved = {name: batch[name].to(device, non_blocking=True) for name in _PIXELS}
                copied = stream.record_event()
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for crops in moved.values():
                crops.record_stream(computing)  # made on the one stream, used on the other
            try:
                yield {**batch, **moved}
            finally:
                del moved, crops
                copied.synchronize()
    finally:
        # End the loader's workers now: a traceback would keep the iterator alive.
        close = getattr(batches, "close", None)
        if close is not None:
            close()

"""Checkpoints of a run: `checkpoints/step_00001000/` as in DESIGN §3; no pickle is written or read.

    student/ teacher/ optimizer/   sharded safetensors, by torch.distributed.checkpoint's Hugging Face storage
    state.json                     step, RNG state, sampler position, elapsed time, length of the run

A checkpoint is written beside its place and renamed, so a directory with the final name is complete; a killed run
leaves at most a `.partial-…` directory, which the next save removes.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import InputError, WorkError

FORMAT = 2
_NAME = re.compile(r"^step_(\d{8})$")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint taken after `step` updates."""
    return f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints under `root` (a run's `checkpoints/`), oldest first, as (step, path)."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := _NAME.match(path.name))]
    return sorted((step, path) for step, path in found if (path / "state.json").is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = list_checkpoints(root)
    return found[-1][1] if found else None


def steps_done(root: Path) -> int:
    """Steps of the newest complete checkpoint; 0 without any."""
    found = list_checkpoints(root)
    return found[-1][0] if found else 0


def rng_state(device: torch.device) -> dict[str, str]:
    """State of torch's global generators (CPU and, on a GPU, that device's), as base64 text for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Restore what `rng_state` returned; a state of a device this process does not use is left out."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)


Optimizers = Mapping[str, torch.optim.Optimizer]
"""Optimizers by the name of what they train ("" for one that is alone); their groups hold `names`."""


def joined(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Modules as one, whose tensors bear the module's name in front; one named "" as it is."""
    return modules[""] if "" in modules else nn.ModuleDict(modules)


def _optimized(optimizers: Optimizers) -> dict[str, tuple[torch.optim.Optimizer, Tensor]]:
    """Every parameter and the optimizer it belongs to, by name."""
    return {
        f"{owner}.{name}" if owner else name: (optimizer, parameter)
        for owner, optimizer in optimizers.items()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' state as '<parameter name>.<state name>' -> tensor."""
    return {
        f"{name}.{key}": value
        for name, (optimizer, parameter) in _optimized(optimizers).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _write(tensors: dict[str, Tensor], path: Path, ranks: Ranks) -> None:
    # Tensors that share memory (tied heads) would be written once per name, which is what loading expects.
    writer = HuggingFaceStorageWriter(
        path=str(path), fqn_to_index_mapping=dict.fromkeys(tensors, 1), save_distributed=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, **_group(ranks))


def _read_into(tensors: dict[str, Tensor], path: Path, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=HuggingFaceStorageReader(path=str(path)),
            **_group(ranks),
        )


def _group(ranks: Ranks) -> dict[str, Any]:
    """How torch's checkpoint functions are told who takes part; over one rank nothing is exchanged."""
    return {"no_dist": True} if ranks.world_size == 1 else {"process_group": ranks.host}


def _stored_names(path: Path) -> set[str]:
    return set(HuggingFaceStorageReader(path=str(path)).read_metadata().state_dict_metadata)


Tensors = dict[str, dict[str, Tensor]]


def tensors_of(student: nn.Module, teacher: nn.Module, optimizers: Optimizers) -> Tensors:
    """What a checkpoint holds, by part and name; shared with the modules, so to be written before the next step."""
    parts = {
        "student": dict(student.state_dict()),
        "teacher": dict(teacher.state_dict()),
        "optimizer": optimizer_tensors(optimizers),
    }
    return {part: {name: t.detach() for name, t in held.items()} for part, held in parts.items() if held}


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Tensors,
    *,
    state: dict,
    keep: int = 2,
    keep_every: int = 0,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint of `step` under `root` and drop all but the newest `keep` (0 keeps every one).

    `tensors` are those of `tensors_of`. All `ranks` must call, and see the same `root`: each writes its shards, the
    main one the rest. Those of steps that are multiples of `keep_every` stay for good (0: none do). `state` (the main
    rank's) is JSON-able and comes back from `read_state`. Raises WorkError if the disk refuses; older checkpoints are
    then still in place.
    """
    final = root / checkpoint_name(step)
    partial = root / f".partial-{checkpoint_name(step)}"

    def begin() -> None:
        with _explained(final):
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".partial-*"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def write() -> None:
        with _explained(final):
            for part, held in tensors.items():
                _write(held, partial / part, ranks)

    def finish() -> None:
        with _explained(final):
            with open(partial / "state.json", "w") as file:
                json.dump({"format": FORMAT, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            if final.exists():
                os.rename(final, root / f".partial-old-{final.name}")
            os.rename(partial, final)
        drop_old(root, keep, keep_every)

    ranks.first(begin)
    ranks.together(lambda: wait_until_seen(partial))
    ranks.together(write)
    ranks.first(finish)
    return final


def wait_until_seen(path: Path, patience: float = 90.0) -> None:
    """Return when this rank sees a directory that another one made: a network file system may need a minute for it.

    Raises WorkError after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise WorkError(
                f"{path} is not seen on {socket.gethostname()}, though the main process made it; the output directory "
                "must be on a file system that all machines see"
            )
        time.sleep(0.5)


def drop_old(root: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` (0: none is removed) and those of multiples of `keep_every`."""
    for step, path in list_checkpoints(root)[:-keep] if keep else []:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise WorkError(
            f"{path}: cannot write the checkpoint ({_cause(error)}); free space or choose another place; "
            "the same command continues from the last complete checkpoint"
        ) from error


def _cause(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__


def read_state(path: Path) -> dict:
    """The JSON state of a checkpoint, with its `step`. Raises InputError for one of another format."""
    try:
        state: dict = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its state.json cannot be read ({_cause(error)}); remove this directory") from error
    if state.get("format") != FORMAT:
        raise InputError(
            f"{path}: found checkpoint format {state.get('format')!r}, expected {FORMAT}; "
            "it was written by another version; start again with --overwrite"
        )
    return state


def load_checkpoint(
    path: Path,
    *,
    student: nn.Module,
    teacher: nn.Module,
    optimizers: Optimizers,
    ranks: Ranks = ALONE,
) -> dict:
    """Load weights and moments in place and return the JSON state (see `read_state`).

    Modules may be spread over the `ranks` in another way than they were when it was written. Raises InputError where
    the checkpoint does not hold exactly the tensors of these modules.
    """
    state = read_state(path)
    for part, module in (("student", student), ("teacher", teacher)):
        load_module(path / part, module, ranks)
    parameters = _optimized(optimizers)
    moments: dict[str, Tensor] = {}
    if (path / "optimizer").is_dir():
        for stored in sorted(_stored_names(path / "optimizer")):
            name, key = stored.rsplit(".", 1)
            if name not in parameters:
                raise InputError(
                    f"{path}: the optimizer state of {name} has no parameter in this run; start again with --overwrite"
                )
            optimizer, parameter = parameters[name]
            # Adam counts steps in a 0-d float32 tensor, which the fused kernel wants on the parameter's device.
            like = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
            moments[stored] = optimizer.state[parameter][key] = like
        _read_into(moments, path / "optimizer", ranks)
    return state


def load_module(path: Path, module: nn.Module, ranks: Ranks = ALONE) -> None:
    """Load one part ('student' or 'teacher') of a checkpoint into `module`, in place.

    Raises InputError naming what differs if names or shapes do not match.
    """
    target = dict(module.state_dict())
    stored = HuggingFaceStorageReader(path=str(path)).read_metadata().state_dict_metadata
    differing = sorted(
        name
        for name in target.keys() | stored.keys()
        if name not in target
        or name not in stored
        or tuple(getattr(stored[name], "size", ())) != tuple(target[name].shape)
    )
    if differing:
        raise InputError(
            f"{path}: the checkpoint is of another model ({len(differing)} tensors differ, first {differing[0]}); "
            "use the config of the run, or start again with --overwrite"
        )
    _read_into(target, path, ranks)

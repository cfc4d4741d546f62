"""The training loop of one run directory: steps, metrics, checkpoints, resume, stop on signal.

Everything random in a step is keyed on (seed, step) or, in the loader, on (seed, epoch, sample), so a resumed run
repeats an uninterrupted one bit for bit on the CPU.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2cli.artifacts.run import Journal
from dinov2cli.data.masks import make_masks
from dinov2cli.errors import Preempted, WorkError
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train import checkpoint
from dinov2cli.train.ema import ema_update, pair_parameters
from dinov2cli.train.monitor import Monitor, batch_statistics
from dinov2cli.train.optim import apply_schedule, clip_gradients
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.schedules import RunLength, Schedules, StepValues
from dinov2cli.train.signals import StopRequest
from dinov2cli.train.ssl import Objective, SSLModel, SSLStep, ssl_losses

_MASKS, _DEPTH = (1 << 63) + 1, (1 << 63) + 2


class BatchSource(Protocol):
    """Endless batches {"global_crops": uint8 [2, B, 3, S, S], "local_crops": uint8 [L, B, 3, s, s], "index": int64 [B],
    "epoch": int64 [B]} that can go on from a position counted in batches handed out."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Augmentation(Protocol):
    """Colour augmentation and normalisation on the device, keyed on (seed, epoch, sample)."""

    def __call__(
        self, global_crops: Tensor, local_crops: Tensor, *, seed: int, epoch: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def step_rng(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers of one step: Philox keyed on (seed, purpose), the step as the top word of its counter."""
    word = (1 << 64) - 1
    key = np.array([seed & word, purpose & word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=np.array([0, 0, 0, step], dtype=np.uint64), key=key))


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `metrics` is the last line of metrics.jsonl written by this process (empty if none)."""

    step: int
    images: int
    seconds: float
    metrics: dict[str, float]
    checkpoint: Path


class Trainer:
    """One run in `run` (an existing directory). See `train` for the arguments."""

    def __init__(
        self,
        run: Path,
        *,
        model: SSLModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        length: RunLength,
        loader: BatchSource,
        augment: Augmentation,
        batch_size: int,
        global_size: int,
        parallel: Parallel,
        seed: int = 0,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        clip: float | None = 3.0,
        checkpoint_every: int = 1000,
        keep: int = 2,
        log_every: int = 10,
        eval_every: int = 0,
        evaluate: Callable[[VisionTransformer, int], Mapping[str, float]] | None = None,
        on_metrics: Callable[[Mapping[str, float], int], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.model, self.objective, self.optimizer = Path(run), model, objective, optimizer
        self.schedules, self.length, self.loader, self.augment = schedules, length, loader, augment
        self.batch_size, self.parallel, self.seed, self.clip = batch_size, parallel, seed, clip
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        self.checkpoint_every, self.keep = checkpoint_every, keep
        self.log_every, self.eval_every, self.evaluate = log_every, eval_every, evaluate
        self.on_metrics = on_metrics
        self.journal = Journal(self.run, on_message)
        self.scaler = parallel.grad_scaler()
        backbone = model.student.backbone
        self.grid = (global_size // backbone.patch_size, global_size // backbone.patch_size)
        self.monitor = Monitor(
            rank_limit=min(2 * batch_size, backbone.embed_dim), clip=clip, quiet_until=2 * schedules.warmup
        )
        self.averaged = pair_parameters(model.teacher, model.student)
        self.clipped = {name: list(part.parameters()) for name, part in model.student.named_children()}
        self.step, self.elapsed, self._saved = 0, 0.0, -1
        # Losses since the last log line, summed on the device; the first step whose loss was not finite, else -1.
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=parallel.device)
        self._busy = self._waited = 0.0
        self._last: dict[str, float] = {}

    @property
    def checkpoints(self) -> Path:
        """Where this run keeps its checkpoints."""
        return self.run / "checkpoints"

    def train(self) -> TrainResult:
        """Go on from the newest checkpoint, or from the start, to the end of the run. Errors: see `train`."""
        self._resume()
        with StopRequest() as stop:
            batches = iter(self.loader)  # workers start with the first batch: a finished run has none
            try:
                self._loop(batches, stop)
            finally:
                # End the workers now: they ignore signals, and a traceback would keep the iterator alive.
                close = getattr(batches, "close", None)
                if close is not None:
                    close()
        return TrainResult(
            step=self.step,
            images=self.step * self._total_batch,
            seconds=self.elapsed,
            metrics=dict(self._last),
            checkpoint=self.checkpoints / checkpoint.checkpoint_name(self.step),
        )

    def _loop(self, batches: Iterator[Mapping[str, Any]], stop: StopRequest) -> None:
        started = time.monotonic() - self.elapsed
        total = self.length.update(self.step, self.elapsed)
        while self.step < total:
            waiting = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - waiting
            values = self.schedules.at(self.step, total)
            out, norms = self._update(batch, values)
            self._busy += time.perf_counter() - waiting
            self.elapsed = time.monotonic() - started
            total = self.length.update(self.step, self.elapsed)
            self._report(out, norms, values, total)
            if self.step == total or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                self._save()
            if stop.received and self.step < total:
                self._stop(stop.received, total)

    @property
    def _total_batch(self) -> int:
        return self.batch_size * self.parallel.world_size

    def _update(self, batch: Mapping[str, Any], values: StepValues) -> tuple[SSLStep, dict[str, Tensor]]:
        """One optimisation step: losses, backward, clip, AdamW, EMA."""
        model, device = self.model, self.parallel.device
        global_crops, local_crops = self.augment(
            batch["global_crops"].to(device, non_blocking=True),
            batch["local_crops"].to(device, non_blocking=True),
            seed=self.seed,
            epoch=batch["epoch"],
            sample=batch["index"],
        )
        masks = make_masks(
            2 * self.batch_size,
            self.grid,
            rng=step_rng(self.seed, self.step, _MASKS + 2 * self.parallel.rank),
            probability=self.mask_probability,
            ratio_min=self.mask_ratio[0],
            ratio_max=self.mask_ratio[1],
        )
        depth_seed = step_rng(self.seed, self.step, _DEPTH + 2 * self.parallel.rank).integers(1 << 63)
        apply_schedule(self.optimizer, values)
        with self.parallel.autocast():
            out = ssl_losses(
                model,
                self.objective,
                global_crops=global_crops,
                local_crops=local_crops,
                masks=masks.to(device),
                teacher_temperature=values.teacher_temperature,
                generator=torch.Generator().manual_seed(int(depth_seed)),
                group=self.parallel.group,
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.total).backward()
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.clipped, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        ema_update(*self.averaged, values.momentum)
        self.step += 1
        self._accumulate(out)
        return out, norms

    def _accumulate(self, out: SSLStep) -> None:
        """Add the losses to the sums since the last line, without making a GPU wait."""
        total = out.total.detach()
        for name, value in {"total": total, **out.terms}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1
        first = (self._bad_step < 0) & ~torch.isfinite(total)
        self._bad_step = torch.where(first, self.step, self._bad_step)

    def _check_finite(self) -> None:
        bad = int(self._bad_step)
        if bad < 0:
            return
        kept = checkpoint.latest_checkpoint(self.checkpoints)
        text = (
            f"{self.run}: the loss is not finite at step {bad}; expected a number; the last sound checkpoint is "
            f"{kept.name if kept else 'none'}; start again with a lower optim.lr, a longer optim.warmup "
            "or train.precision fp32"
        )
        self.journal.log(text)
        raise WorkError(text)

    def _report(self, out: SSLStep, norms: dict[str, Tensor], values: StepValues, total: int) -> None:
        """Write a line of metrics where one is due, and what the monitor has to say about it."""
        evaluating = self.evaluate is not None and self.eval_every > 0 and self.step % self.eval_every == 0
        if not (evaluating or self.step in (1, total) or self.step % self.log_every == 0):
            return
        self._check_finite()
        line: dict[str, float] = {"step": self.step, "images": self.step * self._total_batch}
        line |= {f"loss/{name}": float(value) / self._summed for name, value in self._sums.items()}
        line |= {"lr": values.lr, "grad_norm": float(norms.pop("all"))}
        line |= {"images_per_s": self._summed * self._total_batch / self._busy, "data_wait": self._waited / self._busy}
        line |= {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}
        line |= {
            "weight_decay": values.weight_decay,
            "momentum": values.momentum,
            "teacher_temperature": values.teacher_temperature,
        }
        line |= batch_statistics(
            class_tokens=out.teacher_tokens.flatten(0, 1),
            student_tokens=out.student_tokens[0],
            targets=out.targets.rows(0, out.targets.shape[0]),
        )
        if self.parallel.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self.parallel.device) / 2**30
        line |= {"seconds": self.elapsed, "total_steps": total}
        self._sums, self._summed, self._busy, self._waited = {}, 0, 0.0, 0.0
        if evaluating and self.evaluate is not None:
            line |= {f"eval/{k}": float(v) for k, v in self.evaluate(self.model.teacher.backbone, self.step).items()}
        self.journal.metrics(line)
        for finding in self.monitor.changes(line, self.step / total):
            self.journal.log(f"step {self.step}: {finding}")
        self._last = line
        if self.on_metrics:
            self.on_metrics(line, total)

    def _save(self) -> None:
        """Checkpoint the present step, unless it is on disk already; never one with a broken loss."""
        self._check_finite()
        if self._saved == self.step:
            return
        state = {
            "images": self.step * self._total_batch,
            "elapsed": self.elapsed,
            "length": self.length.state_dict(),
            "sampler": self.loader.state_dict(),
            "rng": checkpoint.rng_state(self.parallel.device),
            "scaler": self.scaler.state_dict(),
            "loss_sums": {name: float(value) for name, value in self._sums.items()},
            "loss_summed": self._summed,
            "world_size": self.parallel.world_size,
        }
        checkpoint.save_checkpoint(
            self.checkpoints,
            self.step,
            student=self.model.student,
            teacher=self.model.teacher_side(),
            optimizer=self.optimizer,
            state=state,
            keep=self.keep,
        )
        self._saved = self.step

    def _resume(self) -> None:
        found = checkpoint.latest_checkpoint(self.checkpoints)
        if found is None:
            self.journal.rewind(0)
            return
        state = checkpoint.load_checkpoint(
            found, student=self.model.student, teacher=self.model.teacher_side(), optimizer=self.optimizer
        )
        self.step = self._saved = int(state["step"])
        self.elapsed = float(state["elapsed"])
        self.length.load_state_dict(state["length"])
        self.loader.load_state_dict(state["sampler"])
        self.scaler.load_state_dict(state["scaler"])
        device = self.parallel.device
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["loss_sums"].items()}
        self._summed = int(state["loss_summed"])
        checkpoint.set_rng_state(state["rng"], device)
        self.journal.rewind(self.step)
        self.journal.log(f"continuing from {found.name}")

    def _stop(self, signal_name: str, total: int) -> None:
        """Save and leave, on a signal."""
        self._save()
        text = f"{self.run}: stopped by {signal_name} after saving step {self.step} of {total}"
        self.journal.log(text)
        if signal_name == "SIGINT":
            raise KeyboardInterrupt
        raise Preempted(f"{text}; run the same command to continue")


def train(run: Path, **settings: Any) -> TrainResult:
    """Train in the run directory `run`, going on from its newest complete checkpoint.

    Keyword arguments (see `Trainer`): `model`, `objective`, `optimizer` (built over `model.student`), `schedules`,
    `length`, `loader` and `augment` (see BatchSource, Augmentation), `batch_size` images per rank, `global_size` in
    pixels, `parallel`, `seed`, `mask_probability` and `mask_ratio`, `clip` per sub-module, `checkpoint_every`, `keep`,
    `log_every`, `eval_every` in steps (0 = never), `evaluate(teacher backbone, step) -> metrics` and the callbacks
    `on_metrics(line, total steps)` and `on_message(text)`.

    Raises Preempted after SIGTERM or SIGUSR1 and KeyboardInterrupt after Ctrl-C, both after saving; WorkError when the
    loss is no longer finite or the disk refuses; InputError when a checkpoint belongs to another model.
    """
    return Trainer(run, **settings).train()

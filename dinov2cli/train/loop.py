"""The training loop of one run directory: phases, metrics, checkpoints, resume, stop on signal."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2cli.artifacts.run import Journal
from dinov2cli.distributed import noticing_lost_ranks
from dinov2cli.errors import DinoError, InputError, Preempted, WorkError
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train import checkpoint
from dinov2cli.train.feed import on_device
from dinov2cli.train.learner import Learner, StepResult
from dinov2cli.train.method import Method
from dinov2cli.train.network import Network, SSLModel
from dinov2cli.train.parallel import Parallel
from dinov2cli.train.phase import Phase
from dinov2cli.train.saving import Saver
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.signals import STOPPING, StopRequest
from dinov2cli.train.step import Augmentation, FirstBatch, Settings, Stepper
from dinov2cli.train.tally import Tallies
from dinov2cli.train.watching import Watching, by_student, own_line


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `metrics` is the last line of metrics.jsonl written by this process (empty if none), `averages`
    the backbones of the students' moving averages with all their weights, by name, on the main process only."""

    step: int
    images: int
    seconds: float
    metrics: dict[str, float]
    checkpoint: Path
    averages: dict[str, VisionTransformer]


class Trainer:
    """One run in `run` (an existing directory). See `train` for the arguments."""

    def __init__(
        self,
        run: Path,
        *,
        models: Mapping[str, SSLModel],
        method: Method,
        make_optimizer: Callable[[Network], torch.optim.Optimizer],
        phases: Sequence[Phase],
        settings: Settings,
        augment: Augmentation,
        parallel: Parallel,
        checkpoint_every: int = 1000,
        keep: int = 2,
        keep_every: int = 0,
        save_in_background: bool = False,
        log_every: int = 10,
        eval_every: int = 0,
        max_bad_steps: int = 5,
        evaluate: Callable[[VisionTransformer, int, str], Mapping[str, float]] | None = None,
        on_first_batch: FirstBatch | None = None,
        on_metrics: Callable[[Mapping[str, float], int], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.make_optimizer, self.phases = Path(run), make_optimizer, list(phases)
        self.method, self.settings, self.augment, self.parallel = method, settings, augment, parallel
        self.checkpoint_every, self.keep, self.keep_every = checkpoint_every, keep, keep_every
        self.log_every, self.eval_every, self.evaluate = log_every, eval_every, evaluate
        self.max_bad_steps, self.on_first_batch, self.on_metrics = max_bad_steps, on_first_batch, on_metrics
        self.journal = Journal(self.run, on_message, writes=parallel.ranks.main)
        self.tallies = Tallies(models, parallel.device)
        self.saver = Saver(parallel.ranks, background=save_in_background)
        self.step, self.images, self.elapsed, self._saved = 0, 0, 0.0, -1
        self._last: dict[str, float] = {}
        self.method.place(parallel)
        self.learners: dict[str, Learner] = {}
        self._enter(0, step=0, elapsed=0.0, models=models)

    @property
    def checkpoints(self) -> Path:
        """Where this run keeps its checkpoints."""
        return self.run / "checkpoints"

    def train(self) -> TrainResult:
        """Go on from the newest checkpoint, or from the start, to the end of the run. Errors: see `train`."""
        self._resume()
        with StopRequest() as stop:
            while True:
                self._run_phase(stop)
                if self.index + 1 == len(self.phases):
                    break
                self.elapsed = self.parallel.agree(self.elapsed)  # what the next phase counts its time from
                self._enter(self.index + 1, step=self.step, elapsed=self.elapsed)
                self.journal.log(
                    f"phase {self.index + 1} begins after step {self.step}, {self.phase.global_size} pixels"
                )
        self.saver.finish()
        return TrainResult(
            step=self.step,
            images=self.images,
            seconds=self.elapsed,
            metrics=dict(self._last),
            checkpoint=self.checkpoints / checkpoint.checkpoint_name(self.step),
            averages=self._averages(),
        )

    def _averages(self) -> dict[str, VisionTransformer]:
        """The students' moving averages, whole, on the main process; all ranks must call."""
        main = self.parallel.ranks.main
        found = {name: one.networks.teacher_backbone(main) for name, one in self.learners.items()}
        return {name: backbone for name, backbone in found.items() if backbone is not None}

    def _enter(self, index: int, *, step: int, elapsed: float, models: Mapping[str, SSLModel] | None = None) -> None:
        """Make everything that belongs to one phase, which began after `step` updates and `elapsed` seconds; `models`
        are those that the run begins with."""
        self.index, self.phase = index, self.phases[index]
        self.phase_step, self.phase_elapsed = step, elapsed
        # Shards cannot change their shape: a model is put together, given its new grid, and spread again.
        wholes = dict(models) if models else {name: one.networks.whole() for name, one in self.learners.items()}
        self.learners.clear()  # their memory is free before as much is taken
        for name in list(wholes):
            self.learners[name] = self._learner(wholes.pop(name), index > 0)
        self.stepper = Stepper(
            self.learners,
            self.method,
            self.settings,
            augment=self.augment,
            parallel=self.parallel,
            batch_size=self.phase.batch_size,
            global_size=self.phase.global_size,
        )
        self.watching = Watching(
            self.learners,
            rows=2 * self.phase.batch_size // self.settings.accumulate,
            clip=self.settings.clip,
            quiet_until=2 * self.phase.schedules.warmup,
            frozen_teacher=self.method.frozen_teacher,
        )

    def _learner(self, model: SSLModel, regrid: bool) -> Learner:
        if regrid:
            for network in (model.student, model.teacher):
                network.backbone.set_grid(self.phase.global_size)
        networks = self.parallel.spread(model)
        # A new grid is a new parameter; the moments of the others start afresh too, under the phase's own warm-up.
        optimizer = self.make_optimizer(networks.model.student)
        return Learner(networks, optimizer, self.parallel, clip=self.settings.clip, graphs=self.settings.graphs)

    def _run_phase(self, stop: StopRequest) -> None:
        total = self._phase_total()
        if self.step - self.phase_step >= total:  # a finished run starts no workers
            return
        with contextlib.closing(on_device(iter(self.phase.loader), self.parallel.device)) as batches:
            self._loop(batches, stop, total)

    def _phase_total(self) -> int:
        return self.phase.length.update(self.step - self.phase_step, self.elapsed - self.phase_elapsed)

    def _loop(self, batches: Iterator[Mapping[str, Any]], stop: StopRequest, total: int) -> None:
        started = time.monotonic() - self.elapsed
        while (done := self.step - self.phase_step) < total:
            waiting = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waiting
            values = self.phase.schedules.at(done, total)
            results = self.stepper(batch, values, self.step, seed=self.phase.seed, told=self.on_first_batch)
            self.on_first_batch = None
            self.step, images = self.step + 1, self.phase.batch_size * self.parallel.world_size
            self.images += images
            self.tallies.add(results, images)
            self.tallies.time(time.perf_counter() - waiting, waited)
            self.elapsed = time.monotonic() - started
            if not self.phase.length.fixed:
                self.elapsed = self.parallel.agree(self.elapsed)
            total, done = self._phase_total(), done + 1
            if self.parallel.device.type == "cpu":  # elsewhere looking would make the device wait
                self._check_skips()
            self._report(results, values, done, total)
            if done == total or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                self._save()
            signal = int(self.parallel.agree(stop.code))
            if signal and not (done == total and self.index + 1 == len(self.phases)):
                self._stop(STOPPING[signal - 1].name, total)

    def _check_skips(self) -> None:
        """Raise WorkError after too many steps in a row whose loss or gradient was not finite."""
        waiting = time.perf_counter()
        name, run = self.tallies.longest_run()  # waits for the device, which is part of the step
        self.tallies.time(time.perf_counter() - waiting, 0.0)
        if run < self.max_bad_steps:
            return
        kept = checkpoint.latest_checkpoint(self.checkpoints)
        text = (
            f"{self.run}: the loss {f'of {name} ' if name else ''}or its gradient was not finite in {run} steps in a "
            f"row, the last seen at step "
            f"{self.step}; expected numbers; the last sound checkpoint is {kept.name if kept else 'none'}; "
            "start again with --overwrite or another -o, "
            "and a lower optim.lr, a longer optim.warmup or train.precision fp32"
        )
        self.journal.log(text)
        raise _of_all(WorkError(text))

    def _report(self, results: Mapping[str, StepResult], values: StepValues, done: int, total: int) -> None:
        """Write a line of metrics where one is due, and what the monitor has to say about it."""
        evaluating = self.evaluate is not None and self.eval_every > 0 and self.step % self.eval_every == 0
        if not (evaluating or self.step == 1 or done == total or self.step % self.log_every == 0):
            return
        self._check_skips()
        all_steps = self._all_steps(total)
        own = {name: own_line(result, self.tallies[name]) for name, result in results.items()}
        for name in self.learners:
            if skipped := self.tallies[name].skipped():
                self.journal.log(
                    f"step {self.step}: {f'{name}: ' if name else ''}{skipped} of the last steps skipped, loss or "
                    f"gradient was not finite; the run stops at {self.max_bad_steps} in a row; if it stays so, lower "
                    "optim.lr"
                )
        speed = self.tallies.speed()
        self.tallies.reset()
        if evaluating and self.evaluate is not None:
            for name, backbone in self._averages().items():
                found = self.evaluate(backbone, self.step, name)
                own[name] |= {f"eval/{key}": float(value) for key, value in found.items()}
            self.parallel.ranks.wait()  # on the host: a GPU's group has less patience
        line = self._common_line(values) | by_student(own) | speed
        line |= {"seconds": self.elapsed, "total_steps": all_steps}
        self.journal.metrics(line)
        for finding in self.watching.changes(own, done / total):
            self.journal.log(f"step {self.step}: {finding}")
        self._last = line
        if self.on_metrics:
            self.on_metrics(line, all_steps)

    def _all_steps(self, total: int) -> int:
        """Steps of the whole run, `total` being those of this phase; a later one of unknown length counts a guess."""
        later = (phase.length.total for phase in self.phases[self.index + 1 :])
        return self.phase_step + total + sum(1000 if steps is None else steps for steps in later)

    def _common_line(self, values: StepValues) -> dict[str, float]:
        """What all students have in common."""
        line: dict[str, float] = {"step": self.step, "images": self.images, "lr": values.lr}
        line |= {
            "weight_decay": values.weight_decay,
            "momentum": values.momentum,
            "teacher_temperature": values.teacher_temperature,
        }
        if len(self.phases) > 1:
            line |= {"phase": self.index + 1, "global_size": self.phase.global_size}
        if self.parallel.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self.parallel.device) / 2**30
        return line

    def _save(self) -> None:
        """Checkpoint the present step, unless it is on disk already; never one after too many skipped steps."""
        self._check_skips()
        if self._saved == self.step:
            return
        state = {
            "images": self.images,
            "elapsed": self.elapsed,
            "phase": {"index": self.index, "step": self.phase_step, "elapsed": self.phase_elapsed},
            "length": self.phase.length.state_dict(),
            "sampler": self.phase.loader.state_dict(),
            "rng": checkpoint.rng_state(self.parallel.device),
            **self._own_states(),
            "batch_size": self.phase.batch_size,
            "world_size": self.parallel.world_size,
            "precision": self.parallel.precision,
        }
        self.method.flush()
        tensors = checkpoint.tensors_of(*self._parts())
        self.saver.save(self.checkpoints, self.step, tensors, state=state, keep=self.keep, keep_every=self.keep_every)
        self._saved = self.step

    def _parts(self) -> tuple[nn.Module, nn.Module, dict[str, torch.optim.Optimizer]]:
        """What a checkpoint holds: of a student that is alone without its name."""
        return (
            checkpoint.joined({name: one.model.student for name, one in self.learners.items()}),
            checkpoint.joined({name: one.model.teacher_side() for name, one in self.learners.items()}),
            {name: one.optimizer for name, one in self.learners.items()},
        )

    def _own_states(self) -> dict[str, Any]:
        """What the state of a checkpoint holds of each student; of one that is alone without its name."""
        states = {
            name: {"scaler": one.scaler.state_dict(), "tally": self.tallies[name].state_dict()}
            for name, one in self.learners.items()
        }
        return states.get("", {"students": states})

    def _resume(self) -> None:
        ranks = self.parallel.ranks
        found = ranks.first(lambda: checkpoint.latest_checkpoint(self.checkpoints))
        if found is None:
            self.journal.rewind(0)
            return
        state = ranks.first(lambda: checkpoint.read_state(found))
        ranks.together(lambda: checkpoint.wait_until_seen(found))
        phase = state["phase"]
        if phase["index"] >= len(self.phases):
            raise InputError(f"{found}: belongs to phase {phase['index'] + 1}, this run has {len(self.phases)}")
        for index in range(1, phase["index"] + 1):
            self._enter(index, step=phase["step"], elapsed=phase["elapsed"])
        self.phase_step, self.phase_elapsed = int(phase["step"]), float(phase["elapsed"])
        student, average, optimizers = self._parts()
        checkpoint.load_checkpoint(found, student=student, teacher=average, optimizers=optimizers, ranks=ranks)
        self.step = self._saved = int(state["step"])
        self.images, self.elapsed = int(state["images"]), float(state["elapsed"])
        self.phase.length.load_state_dict(state["length"])
        self.phase.loader.load_state_dict(state["sampler"])
        for name, own in state.get("students", {"": state}).items():
            if own["scaler"]:  # empty in any precision but fp16, which a run may have changed to
                self.learners[name].scaler.load_state_dict(own["scaler"])
            self.tallies[name].load_state_dict(own["tally"])
        checkpoint.set_rng_state(state["rng"], self.parallel.device)
        self.journal.rewind(self.step)
        self.journal.log(f"continuing from {found.name}")
        if (precision := state.get("precision", self.parallel.precision)) != self.parallel.precision:
            self.journal.log(f"computing in {self.parallel.precision} from here on, it was {precision}")
        before = state["world_size"] * state.get("batch_size", self.phase.batch_size)
        if before != (now := self.parallel.world_size * self.phase.batch_size):
            self.phase.length.total = state["length"]["total"]
            self.journal.log(
                f"a step has {now} images from here on, it had {before}; the number of steps stays, the learning rate "
                f"follows the batch; data.global_batch_size={before} would keep it"
            )

    def _stop(self, signal_name: str, total: int) -> None:
        """Save and leave, on a signal."""
        self._save()
        self.saver.finish()
        text = f"{self.run}: stopped by {signal_name} after saving step {self.step} of {self._all_steps(total)}"
        self.journal.log(text)
        if signal_name == "SIGINT":
            raise KeyboardInterrupt
        raise _of_all(Preempted(f"{text}; run the same command to continue"))


def _of_all(error: DinoError) -> DinoError:
    """An error that all ranks raise together; the main one says it."""
    error.rank = 0
    return error


def train(run: Path, **arguments: Any) -> TrainResult:
    """Train in the run directory `run`, going on from its newest complete checkpoint.

    Keyword arguments (see `Trainer`): `models` by the student's name ("" for one that is alone), the `method` they are
    trained by, `make_optimizer(student)` (called at the start of each phase), `phases` (each with its own schedules,
    length, loader and crop size; the position grid is interpolated between them), `settings` and `augment` of every
    step, `parallel`, `checkpoint_every`, `keep` and `keep_every`, `save_in_background` (the step goes on while a copy
    is written), `log_every`, `eval_every` in steps (0 = never), `max_bad_steps` in a row, `evaluate(backbone of the
    moving average, step, name) -> metrics` and the callbacks `on_first_batch`, `on_metrics(line, total steps)` and
    `on_message(text)`.

    Raises Preempted after SIGTERM or SIGUSR1 and KeyboardInterrupt after Ctrl-C, both after saving; WorkError when the
    loss stays not finite, the disk refuses or another rank is gone; InputError when a checkpoint belongs to another
    model.
    """
    trainer = Trainer(run, **arguments)
    with noticing_lost_ranks(trainer.parallel.ranks):
        return trainer.train()

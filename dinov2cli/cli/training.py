"""A training run from its settings to its model: the one driver of `dinov2 pretrain` and `dinov2 distill`."""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE

if TYPE_CHECKING:
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import TrainingConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.train.parallel import Parallel


@dataclass(frozen=True)
class Place:
    """Where a run is written, the settings that it was begun with (None: a new one), whether a checkpoint will
    overwrite all weights, and whether all this is only a plan."""

    path: Path
    recorded: dict[str, Any] | None = None
    resumed: bool = False
    dry_run: bool = False


@dataclass
class Assembly(ABC):
    """What a command makes of its settings: `config` without any `auto`, what was `chosen` for those and why, the
    `arguments` of `train`, and the entries of models in the manifest (`inputs`)."""

    label: ClassVar[str]

    config: Any
    source: "ImageSource"
    parallel: "Parallel"
    chosen: dict[str, str]
    arguments: dict[str, Any]
    inputs: list[dict[str, Any]]

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """Facts for --dry-run."""

    @abstractmethod
    def announce(self, talk: "Talk") -> None:
        """Say what begins."""

    def begin(self, talk: "Talk") -> None:
        """Make what lies in the run directory, which is there from now on: nothing, unless a command says otherwise."""
        del talk

    @abstractmethod
    def card(self, training: str) -> tuple[str, dict[str, Any]]:
        """Text for the model card, in which `training` says how long on what, and metadata for it."""

    def compare(self, out: "Output", talk: "Talk", exports: Mapping[str, Path]) -> dict[str, float]:
        """Measure what was made, at the end of the run, and give back the figures by name."""
        del out, talk, exports
        return {}

    def length(self) -> dict[str, Any]:
        """Facts of every plan: device, precision, batch, steps."""
        phases, parallel = self.arguments["phases"], self.parallel
        totals = [phase.length.total for phase in phases]
        open_ended = None in totals
        images = None if open_ended else sum(p.length.total * p.batch_size for p in phases) * parallel.world_size
        return {
            "device": str(parallel.device),
            "precision": f"{parallel.precision} ({parallel.reason})",
            "ranks": parallel.world_size,
            "batch size": self.config.data.batch_size * parallel.world_size,
            "steps": self.config.train.budget if open_ended else sum(totals),
            "epochs": None if images is None else round(images / max(len(self.source), 1), 2),
        }


Make = Callable[["TrainingConfig", "ImageSource", "Parallel", Place], Assembly]
"""Makes the assembly of a command."""


def train_run(
    data: str,
    path: Path,
    config: "TrainingConfig",
    talk: "Talk",
    make: Make,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    planned: int | None = None,
) -> None:
    """Train one run directory from a resolved config. A dry run plans for `planned` ranks."""
    from dinov2cli.cli.assembly import parallel_of, with_batch_of_all
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.cli.watch import CONFIG_FILE, Follower, RunWatch, require_tensorboard
    from dinov2cli.recipe import to_yaml
    from dinov2cli.train.loop import train

    if config.log.tensorboard:
        require_tensorboard()
    given = config.data.global_batch_size is not None
    parallel = parallel_of(config, dry_run=dry_run, planned=planned)
    ranks = parallel.ranks if not dry_run else ALONE
    if not ranks.main:  # unreadable images are named by the process that met them
        logging.getLogger("dinov2cli.data.bad").setLevel(logging.ERROR if talk.silenced else logging.WARNING)
    data = ranks.first(lambda: options.from_stdin(data))
    overwrite = overwrite and not _restarted(talk)
    before = ranks.first(lambda: _before(path, overwrite=overwrite))
    run, place = ranks.together(lambda: _prepare(data, config, parallel, make, path, before, dry_run=dry_run))
    config, source, start = run.config, run.source, before[1]
    ranks.same([place["config"], _sample(source.ids)], "settings or images")
    if dry_run:
        state = check_output(path, "run", config=place["config"], inputs=place["inputs"], overwrite=overwrite)
        talk.plan(f"{run.label} {data}", {**run.plan(), **run.chosen, "output": f"{path} ({state})"})
        return
    models = run.arguments["models"]
    if not start and any(model.init == "structured" for model in config.learners().values()):
        for model in models.values():
            parallel.same_start(model)
    out = open_output(talk, path, "run", **place, overwrite=overwrite, ranks=ranks)
    if out is None:
        return
    with out:
        whole = with_batch_of_all(config, ranks.world_size) if given else config
        out.write_text(CONFIG_FILE, to_yaml(whole))
        run.announce(talk)
        run.begin(talk)
        for name, why in run.chosen.items():
            talk.say(f"  {name} {why}")
        patches = {name: model.student.backbone.patch_size for name, model in models.items()}
        shown: dict[str, Any] = {"patch_sizes": patches, "precision": parallel.precision, "label": run.label}
        watch = RunWatch(out, talk, config, source, start=start, **shown) if ranks.main else Follower()
        with watch:
            result = train(path, **run.arguments, **watch.callbacks(ranks))
        if not result.averages:  # the main process has the whole models, and writes them
            return
        training = f"{result.step:,} steps ({result.images:,} images) on `{source.spec}` ({len(source):,} images)"
        exports = _export(result.averages, path, run, training, config.data.batch_size * ranks.world_size)
        run.arguments.clear()  # their memory is needed for what comes
        compared = _compared(run, out, talk, exports)
        watch.write_report()
        figures = _finite({**result.metrics, **compared})
        manifest = out.finish(rows=result.images, steps=result.step, metrics=figures)
    where = path / "export"
    model = f"model in {where}" if len(exports) == 1 else f"{len(exports)} models in {where}"
    talk.say(f"{path}: {result.step} steps, {result.images:,} images in {result.seconds:.0f} s; {model}")
    talk.result(path, **result_fields(manifest))


def _compared(run: Assembly, out: "Output", talk: "Talk", exports: Mapping[str, Path]) -> dict[str, float]:
    """`Assembly.compare`; whatever goes wrong there is only said: the models are made, and the run is done."""
    from dinov2cli.errors import Preempted

    try:
        return run.compare(out, talk, exports)
    except Preempted:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("the comparison failed", exc_info=True)
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        talk.warn(f"not compared: {what}; `dinov2 eval` compares the models in {out.path / 'export'}")
        return {}


def _before(path: Path, *, overwrite: bool) -> tuple[dict[str, Any] | None, int]:
    """What the run at `path` was begun with, and the step of its newest checkpoint; (None, 0) for a new one."""
    from dinov2cli.artifacts.manifest import recorded_config
    from dinov2cli.train.checkpoint import steps_done

    return (None, 0) if overwrite else (recorded_config(path), steps_done(path / "checkpoints"))


def _sample(ids: Any) -> list[Any]:
    """How many images there are and the names of some: enough to tell the copies of a set on two machines apart."""
    return [len(ids), *(ids[row] for row in range(0, len(ids), max(1, len(ids) // 1000)))]


def _restarted(talk: "Talk") -> bool:
    """Whether a launcher or scheduler has started this command again, so that what is there is its own work."""
    if not any(int(os.environ.get(f"{name}_RESTART_COUNT", "0")) for name in ("TORCHELASTIC", "SLURM")):
        return False
    talk.say("started again: --overwrite has been done, the run goes on")
    return True


def _prepare(
    data: str,
    config: "TrainingConfig",
    parallel: "Parallel",
    make: Make,
    path: Path,
    before: tuple[Any, int],
    *,
    dry_run: bool,
) -> tuple[Assembly, dict[str, Any]]:
    """What one rank can do by itself: the assembly of the run, and what names the run in its manifest."""
    from dinov2cli.cli.assembly import batch_per_rank, identity_of
    from dinov2cli.data.source import open_source
    from dinov2cli.kernels.dispatch import choices

    choices(parallel.device)  # a back end that was asked for and is not there is told before anything is done
    recorded, start = before
    source = open_source(data)
    config = batch_per_rank(config, parallel.world_size)
    run = make(config, source, parallel, Place(path, recorded, bool(start), dry_run))
    identity = identity_of(run.config, parallel.world_size, recorded)
    return run, {"config": identity, "seed": config.seed, "inputs": [source.fingerprint(), *run.inputs]}


def _export(averages: Mapping[str, Any], path: Path, run: Assembly, training: str, batch: int) -> dict[str, Path]:
    """Write the models; where each is."""
    from dinov2cli.cli.assembly import final_size, preprocess_of
    from dinov2cli.models.export import save_hf

    size, prepared = final_size(run.config), preprocess_of(run.config)
    card, data = run.card(f"{training}, at {size} pixels with batch {batch}")
    places = {name: path / "export" / name if name else path / "export" for name in averages}
    for name, backbone in averages.items():
        save_hf(backbone, places[name], resize=prepared.resize, crop=prepared.crop, card=card, card_data=data)
    return places


def place_of(parallel: Any) -> str:
    """Where a run computes, in words: 'cpu', or '8 ranks of cuda, fsdp'."""
    if parallel.world_size == 1 and not parallel.sharding.sharded:
        return str(parallel.device)
    kind = parallel.sharding.kind
    over = f" over {parallel.sharding.shard_ranks} each" if kind == "hybrid" else ""
    return f"{parallel.world_size} rank{'s' * (parallel.world_size > 1)} of {parallel.device.type}, {kind}{over}"


def say_initial(talk: "Talk", backbone: Any, model: Any) -> None:
    """Say what was taken of the model that the settings `model` continue, if any."""
    if model.init_from is not None:
        talk.say(
            f"weights of {model.init_from}: all {len(backbone.state_dict())} of the backbone taken, none missing or "
            "unexpected; heads start afresh"
        )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        key: round(value, 6)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }

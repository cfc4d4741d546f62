"""`dinov2 export`: the backbone of a run, out of one of its checkpoints, in the format of another program."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import TrainingConfig
    from dinov2cli.models.vit import VisionTransformer
    from dinov2cli.train.stored import StoredBackbone

FORMATS = ("hf", "timm", "official")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_RUN = "A run of dinov2 pretrain or distill, finished or not, or - to read the path from stdin."
_TO = "Directory to write; for official a file, NAME.pth."
_FORMAT = "hf (transformers), timm, or official (a .pth with the names of the released weights)."
_LIMIT = "Largest file of weights, as 500MB; hf only."


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=_RUN)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_TO)],
    format_: Annotated[str, typer.Option("--format", metavar="NAME", help=_FORMAT)] = "hf",
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="The checkpoint after N steps; default: the newest.")
    ] = None,
    part: Annotated[
        str, typer.Option("--part", metavar="NAME", help="teacher (the moving average, which is better) or student.")
    ] = "teacher",
    student: Annotated[
        str, typer.Option("--student", metavar="NAME", help="Which of several students of a distillation.")
    ] = "",
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help=f"{_LIMIT} [default: 5GB]")
    ] = None,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Write the backbone of a run for other programs, out of a checkpoint.

    Works on runs of any number of processes, also unfinished ones, without a GPU. For hf the weights are read and
    written a piece at a time, so that a model of any size takes little memory; `transformers.AutoModel.from_pretrained`
    and every MODEL of dinov2 read the result. The same command again finds that all is done.

    Examples:

    - `dinov2 export run -o model`
    - `dinov2 export run -o early --step 20000`
    - `dinov2 export run -o model --max-shard-size 500MB`
    - `dinov2 export run -o weights.pth --format official`
    - `dinov2 export distilled -o model --student vits14`
    """
    from dinov2cli.cli.talk import Talk
    from dinov2cli.distributed import launched
    from dinov2cli.errors import UserError

    if launched():
        raise UserError("export needs one process and no GPU: start it without a launcher")
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    for name, value, known in (("format", format_, FORMATS), ("part", part, ("teacher", "student"))):
        if value not in known:
            raise UserError(f"--{name} {value}: expected {', '.join(known[:-1])} or {known[-1]}")
    if max_shard_size is not None and format_ != "hf":
        raise UserError(f"--max-shard-size goes with --format hf; {format_} is always one file")
    limit = parse_size("5GB" if max_shard_size is None else max_shard_size)
    path, which = Path(options.from_stdin(run)), (part, student)
    _export(path, out, talk, format_, step, which, limit, dry_run=dry_run, overwrite=overwrite)


def _export(
    path: Path,
    out: Path,
    talk: "Talk",
    format_: str,
    step: int | None,
    which: tuple[str, str],
    limit: int,
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    from dinov2cli.artifacts.manifest import require_kind
    from dinov2cli.artifacts.output import file_sha256
    from dinov2cli.cli.place import check_place
    from dinov2cli.models.registry import name_of
    from dinov2cli.train.stored import StoredBackbone

    started = time.monotonic()
    manifest = require_kind(path, "run", complete=False)
    step, checkpoint = _checkpoint(path, manifest, step)
    state, config, (part, student) = _state(checkpoint), _config(path, manifest), which
    _check_student(path, config, student)
    stored = StoredBackbone(checkpoint, part, name=student)
    backbone = _skeleton(path, config, student, stored, checkpoint)
    origin = {"run": path.resolve().name, "step": step, "part": part, "format": format_}
    if student:
        origin["student"] = student
    # The state holds seconds and random numbers, so that no two checkpoints are taken for one.
    origin["checkpoint"] = file_sha256(checkpoint / "state.json")[:16]
    files = _files(backbone, format_, limit)
    place = check_place(out, origin, files, run=path, overwrite=overwrite)
    facts: dict[str, Any] = {key: origin[key] for key in ("step", "part", "student", "format") if key in origin}
    facts["architecture"] = name_of(backbone)
    facts |= {"parameters": sum(p.numel() for p in backbone.parameters()), "bytes": sum(files.values())}
    facts |= {"files": [name or out.name for name in files]}
    if dry_run:
        talk.plan(f"export {path}", {**facts, "output": f"{out} ({place.state})"})
        return
    if place.done:
        place.finish()
        talk.say(f"{out}: already done, step {step} of {path} is there (--overwrite writes it again)")
        talk.result(out, **facts, already_done=True)
        return
    prepared = _prepared(config, state.get("phase", {}).get("index", 0))
    place.begin()
    _write(backbone, stored, out, origin, limit, prepared, _card(manifest, state, part, prepared.crop), _base(config))
    place.finish()
    _warn(talk, backbone, format_)
    seconds = time.monotonic() - started
    whose = _whose(part, student, config)
    talk.say(f"{out}: {facts['architecture']}, {whose} after step {step} of {path}, for {format_} ({seconds:.1f} s)")
    talk.result(out, **facts, seconds=round(seconds, 3))


def parse_size(text: str) -> int:
    """Bytes of '500MB' (decimal), '2GiB' (binary) or '1000000'. Raises UserError for anything else."""
    from dinov2cli.errors import UserError

    match = _SIZE.fullmatch(text.strip())
    power = "KMGT".index(match[2].upper()) + 1 if match and match[2] else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: expected a size, as 500MB or 5GB")
    return size


def _checkpoint(path: Path, manifest: "Manifest", step: int | None) -> tuple[int, Path]:
    """The checkpoint asked for, or the newest."""
    from dinov2cli.errors import InputError, UserError
    from dinov2cli.train.checkpoint import list_checkpoints

    found = dict(list_checkpoints(path / "checkpoints"))
    if not found and manifest.complete:
        raise InputError(
            f"{path} has no checkpoint any more: its final model is in {path / 'export'}, for transformers"
        )
    if not found:
        raise InputError(
            f"{path} has no complete checkpoint yet: run `{manifest.command or 'dinov2 pretrain'}` again, "
            "with --set checkpoint.every=N to have one sooner"
        )
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"--step {step}: {path} has checkpoints of steps {', '.join(map(str, found))}")
    return step, found[step]


def _state(checkpoint: Path) -> dict[str, Any]:
    from dinov2cli.errors import InputError
    from dinov2cli.train.checkpoint import read_state

    try:
        return read_state(checkpoint)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{checkpoint} has no readable state.json ({error}); export another step (--step)") from None


def _config(path: Path, manifest: "Manifest") -> "TrainingConfig":
    from dinov2cli.cli.watch import CONFIG_FILE, distilled
    from dinov2cli.config import DistillConfig, PretrainConfig, TrainingConfig
    from dinov2cli.errors import InputError, UserError
    from dinov2cli.recipe import load_config

    kind: type[TrainingConfig] = DistillConfig if distilled(manifest.config) else PretrainConfig
    try:
        return load_config(kind, recipe=str(path / CONFIG_FILE))
    except UserError as error:
        raise InputError(f"{path / CONFIG_FILE}, which names the architecture, cannot be used: {error}") from None


def _check_student(path: Path, config: "TrainingConfig", student: str) -> None:
    """Raise UserError unless the run has this student."""
    from dinov2cli.errors import UserError

    names = list(config.learners())
    if student in names:
        return
    if names == [""]:
        raise UserError(f"--student {student}: {path} trained one model; leave out --student")
    found = f"--student {student}" if student else "no --student"
    raise UserError(f"{found}: {path} has several students, expected --student {' or --student '.join(names)}")


def _skeleton(
    path: Path, config: "TrainingConfig", student: str, stored: "StoredBackbone", checkpoint: Path
) -> "VisionTransformer":
    """The run's backbone on the meta device, with the position grid of the checkpoint."""
    import math

    from dinov2cli.errors import InputError

    backbone = _architecture(path, config, student)
    positions = stored.shapes.get("pos_embed")
    grid = 0 if positions is None else math.isqrt(max(positions[1] - 1, 0))
    if grid and grid != backbone.grid:  # that of another phase
        backbone.set_grid(grid * backbone.patch_size)
    own = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    differing = sorted(name for name in own.keys() | stored.shapes.keys() if own.get(name) != stored.shapes.get(name))
    if differing:
        raise InputError(
            f"{checkpoint}: {len(differing)} weights of the backbone are missing or of other shapes than the run's "
            f"config says (first {differing[0]}): copy the run again, or export another step (--step)"
        )
    return backbone


def _architecture(path: Path, config: "TrainingConfig", student: str) -> "VisionTransformer":
    """The run's backbone on the meta device: no weights are drawn or read."""
    from dinov2cli.cli.assembly import overrides
    from dinov2cli.errors import InputError
    from dinov2cli.models.load import load_model
    from dinov2cli.models.registry import build

    model, exported = config.learners()[student], path / "export" / student
    initial = model.init_from
    if initial is None:
        return build(model.arch, device="meta", **overrides(config, model))
    try:
        return load_model(initial, device="meta").backbone
    except InputError as error:
        if (exported / "config.json").is_file():  # of the same numbers; the initial model may have moved
            return load_model(exported, device="meta").backbone
        raise InputError(f"{path} began from a model that is needed for its architecture: {error}") from None


def _files(backbone: "VisionTransformer", format_: str, limit: int) -> dict[str, int]:
    """The files of weights, '' for the output itself, with the bytes of what is in them."""
    from dinov2cli.models.shards import SINGLE, plan_files
    from dinov2cli.models.weights import to_timm

    if format_ == "hf":
        return {file.name: file.size for file in plan_files(backbone, limit)}
    state = backbone.state_dict()
    tensors = to_timm(state) if format_ == "timm" else state
    return {SINGLE if format_ == "timm" else "": 4 * sum(tensor.numel() for tensor in tensors.values())}


def _write(
    backbone: "VisionTransformer",
    stored: "StoredBackbone",
    out: Path,
    origin: dict[str, Any],
    limit: int,
    prepared: Any,
    card: str,
    card_data: dict[str, Any],
) -> None:
    from dinov2cli.models.export import save_official, save_timm, write_hf

    if origin["format"] == "hf":
        told: dict[str, Any] = {"origin": origin, "card": card, "card_data": card_data}
        write_hf(backbone, out, read=stored.read, preprocess=prepared, limit=limit, **told)
        return
    backbone.load_state_dict(stored.read(list(stored.shapes)), assign=True)
    if origin["format"] == "timm":
        save_timm(backbone, out, resize=prepared.resize, crop=prepared.crop, origin=origin)
    else:
        save_official(backbone, out, origin=origin)


def _prepared(config: "TrainingConfig", phase: int) -> Any:
    """How images are prepared for the model as it is in this phase of the run."""
    from dinov2cli.cli.assembly import preprocess_of

    sizes = [config.crops.global_size]
    sizes += [section.global_size for section in config.phases[:phase] if section.global_size is not None]
    return preprocess_of(config, sizes[-1])


def _card(manifest: "Manifest", state: dict[str, Any], part: str, size: int) -> str:
    from dinov2cli.cli.watch import distilled

    source = manifest.inputs[0] if manifest.inputs else {}
    images, batch = state.get("images", 0), state.get("batch_size", 0) * state.get("world_size", 1)
    of = f" on `{source['spec']}` ({source.get('rows') or 0:,} images)" if "spec" in source else ""
    command, average, teacher = "dinov2 pretrain", "EMA teacher", ""
    if distilled(manifest.config):
        command, average = "dinov2 distill", "student's moving average"
        teacher = f" from `{manifest.config['teacher'].get('model')}`"
    which = average if part == "teacher" else "student"
    return (
        f"Taken with `dinov2 export` out of a run of `{command}`{teacher} after {state['step']:,} steps "
        f"({images:,} images){of}, at {size} pixels with batch {batch}. These are the weights of the {which}."
    )


def _whose(part: str, student: str, config: "TrainingConfig") -> str:
    """Whose weights they are, in words: in a distillation the teacher is another model."""
    from dinov2cli.config import DistillConfig

    named = "moving average" if part == "teacher" and isinstance(config, DistillConfig) else part
    return f"the {named}{' of ' + student if student else ''}"


def _base(config: "TrainingConfig") -> dict[str, Any]:
    """What the header of the card says of the teacher of a distillation."""
    from dinov2cli.cli.distill_checks import base_model
    from dinov2cli.config import DistillConfig

    if not isinstance(config, DistillConfig):
        return {}
    return base_model(str(config.teacher.model))


def _warn(talk: "Talk", backbone: "VisionTransformer", format_: str) -> None:
    """Say what the format has no place for, where it matters."""
    if format_ != "official":
        return
    if backbone.embed_dim != 64 * backbone.num_heads:
        talk.warn(
            f"the file does not say that this model has {backbone.num_heads} heads, and they are not 64 wide: "
            "only code that is told so can use it (--format hf keeps it)"
        )
    registers = backbone.num_register_tokens > 0
    if (backbone.interpolate_offset, backbone.interpolate_antialias) != (0.0 if registers else 0.1, registers):
        talk.warn(
            "the file does not say how this model resamples positions, which is not as the released models do: "
            "features differ slightly at other image sizes (--format hf keeps it)"
        )

"""`dinov2 pretrain`: train a backbone by self-distillation, from a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig

_BUDGET = "Length of the run: 100 epochs, 20000 images, 300 steps, 30m."


def pretrain(
    data: options.Data,
    out: options.Out,
    config: options.Config = None,
    arch: Annotated[str | None, typer.Option("--arch", metavar="NAME", help="Architecture, as vits14.")] = None,
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Continue from the weights of any MODEL.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", metavar="AMOUNT", help=_BUDGET)] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images per step and rank.")
    ] = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    device: options.Device = None,
    seed: options.Seed = None,
    processes: options.Processes = None,
) -> None:
    """Train a backbone on images with the DINOv2 objective (DINO + iBOT + KoLeo).

    The run directory holds checkpoints, metrics.jsonl and, at the end, `export/`, which
    `transformers.AutoModel.from_pretrained` loads. The same command continues a stopped run.

    Examples:

    - `dinov2 pretrain photos/ -o run --config tiny-cpu`
    - `dinov2 pretrain curated/ -o run --budget "100 epochs" --set optim.lr=0.002`
    - `dinov2 pretrain photos/ -o run --init facebook/dinov2-small --set optim.lr=2e-4`
    - `dinov2 pretrain photos/ -o run -n 8` (8 GPUs; `accelerate launch` and `torchrun` for more machines)
    - `dinov2 pretrain photos/ -o run --dry-run`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DistillConfig, PretrainConfig
    from dinov2cli.recipe import load_config

    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    flags = {
        "model.arch": arch,
        "model.init_from": init,
        "train.budget": budget,
        "data.batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(
        PretrainConfig, recipe=config, sets=set_ or [], flags=flags, others={"distill": DistillConfig}
    )
    if not dry_run:
        relaunch(processes)
    train_run(options.from_stdin(data), out, settings, talk, dry_run=dry_run, overwrite=overwrite, planned=processes)


def train_run(
    data: str,
    path: Path,
    config: "PretrainConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    planned: int | None = None,
) -> None:
    """Train one run directory from a resolved config; also what the demo calls. A dry run plans for `planned` ranks."""
    from dinov2cli.cli import training
    from dinov2cli.cli.assembly_pretrain import assemble

    training.train_run(data, path, config, talk, assemble, dry_run=dry_run, overwrite=overwrite, planned=planned)

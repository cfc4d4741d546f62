"""`dinov2 distill`: train small backbones to see as a large, frozen one does, from a recipe."""

from typing import Annotated, Any

import typer

from dinov2cli.cli import options

_BUDGET = "Length of the run: 100 epochs, 20000 images, 300 steps, 30m."
_TEACHER = "What is learned from: a run, a Hugging Face or timm directory, a hub name, a .pth, transformers:DIR."
_STUDENT = "Architecture of the student, as vits14; given more than once, all learn from one pass of the teacher."


def distill(
    data: options.Data,
    out: options.Out,
    teacher: Annotated[str | None, typer.Option("--teacher", "-t", metavar="MODEL", help=_TEACHER)] = None,
    student: Annotated[list[str] | None, typer.Option("--student", metavar="NAME", help=_STUDENT)] = None,
    config: options.Config = None,
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
    """Distil a large model into small ones: they learn to see as the teacher does, which stays as it is.

    The paper's form is pretraining's loss with the teacher's own heads, which a run of `dinov2 pretrain` has kept; for
    a backbone alone heads are learned, or features compared without any (recipe distill-features). The run directory
    is like that of `dinov2 pretrain`; its report shows teacher and students side by side. The same command continues
    a stopped run.

    Examples:

    - `dinov2 distill photos/ --teacher run -o small --config distill-photos-cpu`
    - `dinov2 distill curated/ --teacher run -o s14 --student vits14 --config distill-vits14 -n 8`
    - `dinov2 distill curated/ --teacher run -o both --student vits14 --student vitb14 --config distill-vits14`
    - `dinov2 distill photos/ --teacher facebook/dinov2-large -o s14 --config distill-features`
    - `dinov2 distill photos/ --teacher run -o small --config distill-photos-cpu --dry-run`
    """
    from dinov2cli.cli import training
    from dinov2cli.cli.assembly_distill import assemble
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DistillConfig, PretrainConfig
    from dinov2cli.errors import UserError
    from dinov2cli.recipe import load_config

    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    flags = {
        "teacher.model": teacher,
        **_students(student or []),
        "train.budget": budget,
        "data.batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    others = {"pretrain": PretrainConfig}
    settings = load_config(DistillConfig, recipe=config, sets=set_ or [], flags=flags, others=others)
    if settings.teacher.model is None:
        raise UserError("--teacher is missing: expected the MODEL to learn from, as a run of `dinov2 pretrain`")
    if not dry_run:
        relaunch(processes)
    training.train_run(data, out, settings, talk, assemble, dry_run=dry_run, overwrite=overwrite, planned=processes)


def _students(names: list[str]) -> dict[str, Any]:
    """Settings for students given by name: alone it is the model of the recipe, whatever students that lists."""
    from dinov2cli.errors import UserError

    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"--student {twice[0]} is given twice; students of one architecture get names and settings of their own "
            f"in a recipe: students: [{{arch: {twice[0]}, name: a}}, {{arch: {twice[0]}, name: b}}]"
        )
    if len(names) > 1:
        return {"students": names}
    return {"model.arch": names[0], "students": []} if names else {}

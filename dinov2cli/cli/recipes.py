"""`dinov2 recipes`: list, show, copy and check recipes."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.options import Json, Quiet

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A recipe's name or a YAML file.")]


@app.command("ls")
def ls(json_output: Json = False) -> None:
    """List the recipes with what each is for, then what starts them on many GPUs."""
    import json

    from dinov2cli.recipe import launch_files, recipe_names, recipe_path

    files = {name: recipe_path(name) for name in recipe_names()} | launch_files()
    found = {name: _purpose(path) for name, path in files.items()}
    if json_output:
        print(json.dumps(found))  # noqa: T201
        return
    width = max(map(len, found))
    for name, purpose in found.items():
        print(f"{name.ljust(width)}  {purpose}")  # noqa: T201


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe."""
    print(_file(name).read_text(encoding="utf-8"), end="")  # noqa: T201


@app.command("cp")
def cp(name: Name, target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to put the copy.")]) -> None:
    """Copy a recipe to a file of your own, to change it there."""
    from dinov2cli.artifacts.output import write_aside
    from dinov2cli.errors import UserError

    if target.exists():
        raise UserError(f"{target} exists; choose another name, or delete it first")
    text = _file(name).read_text(encoding="utf-8")
    write_aside(target, lambda path: _write(path, text))
    print(target)  # noqa: T201


@app.command("validate")
def validate(name: Name, quiet: Quiet = False) -> None:
    """Check every key and value of a training recipe without running it; all problems are listed at once."""
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DistillConfig, PretrainConfig, TrainingConfig
    from dinov2cli.recipe import command_of, load_config

    configs: dict[str, type[TrainingConfig]] = {"pretrain": PretrainConfig, "distill": DistillConfig}
    command = command_of(name, configs)
    load_config(configs[command], recipe=name)
    Talk(quiet=quiet).say(f"{name}: valid, for `dinov2 {command}`")


def _file(name: str) -> Path:
    from dinov2cli.recipe import launch_files, recipe_path

    return launch_files().get(name) or recipe_path(name)


def _purpose(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").split("\n", 2)
    return lines[1 if lines[0].startswith("#!") else 0].removeprefix("#").strip()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""`dinov2 eval TASK MODEL…`: one command per benchmark, made from the settings that the task declares."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from functools import partial
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from dinov2cli.cli import options
from dinov2cli.cli.compare import compare
from dinov2cli.cli.suite import suite
from dinov2cli.distributed import join
from dinov2cli.errors import UserError
from dinov2cli.evaluation.tasks.interface import Task, settings_of
from dinov2cli.evaluation.tasks.registry import TASKS, find_task

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="One or more: a run, a Hugging Face or timm "
    "directory, an official .pth, transformers:DIR, baseline:pixels, an architecture (random weights).")]  # fmt: skip
Train = Annotated[str, typer.Option("--train", metavar="D", help="Images to learn from.")]
Test = Annotated[str, typer.Option("--test", metavar="D", help="Images to be judged on.")]
ImageSize = Annotated[int | None, typer.Option("--image-size", metavar="PX", help="Crop; default: the model's own.")]
Cache = Annotated[str | None, typer.Option("--cache", metavar="DIR|none", help="Where features are kept for other "
    "commands; default: the user's cache folder.")]  # fmt: skip
_COMMON: dict[str, Any] = {
    "image_size": (ImageSize, None),
    "cache": (Cache, None),
    "config": (options.Config, None),
    "set_": (options.Set, None),
    "dry_run": (options.DryRun, False),
    "json_output": (options.Json, False),
    "quiet": (options.Quiet, False),
    "verbose": (options.Verbose, False),
    "overwrite": (options.Overwrite, False),
    "workers": (options.Workers, None),
    "device": (options.Device, None),
    "seed": (options.Seed, None),
    "processes": (options.Processes, None),
}
_CONFIG_FLAGS = ("image_size", "cache", "workers", "device", "seed")


class _Tasks(TyperGroup):
    """One command per task, made when it is asked for: ours by name, anybody's by its file (`./mine.py`). Knows
    `--suite FILE` in place of a task too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(arg == "--suite" or arg.startswith("--suite=") for arg in args) and args[0] != "suite":
            args = ["suite", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*TASKS, *super().list_commands(ctx)]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        near = difflib.get_close_matches(args[0], known, n=1) if args[0] not in known else []
        if near and not args[0].endswith(".py"):
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in TASKS and not cmd_name.endswith(".py"):
            return super().get_command(ctx, cmd_name)
        own = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        own.command(cmd_name)(command_of(cmd_name, find_task(cmd_name)))
        return typer.main.get_command(own)


app = typer.Typer(
    cls=_Tasks,
    no_args_is_help=True,
    help="Measure frozen features, with confidence intervals. A task may also be a Python file of your own.",
)


def command_of(name: str, task: type[Task]) -> Callable[..., None]:
    """The function of a command for `task`, with an option for each of its settings that has a flag."""
    flagged = {field.name: field for field in settings_of(task) if field.metadata.get("flag")}

    def command(**given: Any) -> None:
        own = {field: _listed(given[field], flagged[field].type) for field in flagged}
        others = _named(given.get("others") or [], task.others or "")
        flags = {**{key: given[key] for key in _CONFIG_FLAGS}, **own}
        _evaluate(task, given, others, flags)

    parameters: dict[str, tuple[Any, Any]] = {"models": (Models, inspect.Parameter.empty)}
    if task.train:
        parameters["train"] = (Train, inspect.Parameter.empty)
    parameters |= {"test": (Test, inspect.Parameter.empty), "out": (options.Out, inspect.Parameter.empty)}
    if task.others:
        help_text = "A further set, by a name of yours; may be repeated."
        option = typer.Option(task.others, metavar="NAME=D", help=help_text)
        parameters["others"] = (Annotated[list[str] | None, option], None)
    for field in flagged.values():
        kind, metavar = _flag_type(field.type)
        option = typer.Option(field.metadata["flag"], metavar=metavar, help=_with_default(field))
        parameters[field.name] = (Annotated[kind, option], None)
    parameters |= _COMMON
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in parameters.items()
        ]
    )
    command.__annotations__ = {key: annotation for key, (annotation, _) in parameters.items()}
    command.__doc__ = _help(name, task)
    return command


def _help(name: str, task: type[Task]) -> str:
    given = " ".join(["--train D"] * task.train + ["--test D"])
    settings = "\n".join(
        f"- `{field.name}`: {_with_default(field)}" for field in settings_of(task) if not field.metadata.get("flag")
    )
    keys = f"\n\nFurther settings, by `--set KEY=VALUE`:\n\n{settings}" if settings else ""
    return f"{inspect.cleandoc(task.__doc__ or '')}\n\nExample: `dinov2 eval {name} run {given} -o results`{keys}"


def _with_default(field: Field[Any]) -> str:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    shown_one = f"{default:.4g}" if isinstance(default, float) else str(default).lower()
    text = ", ".join(map(str, default)) if isinstance(default, list) else shown_one
    shown = "" if default is None or text == "" else f" (default: {text})"
    return f"{field.metadata.get('help', '')}{shown}"


def _flag_type(annotation: Any) -> tuple[Any, str]:
    """The type that Typer is to parse for a setting, and its metavar; lists come as text with commas."""
    kind = _plain(annotation)
    metavar = {int: "N", float: "X", bool: ""}.get(kind)
    if metavar is not None:
        return kind | None, metavar
    if kind is Literal:
        return str | None, "|".join(map(str, _choices(annotation)))
    return str | None, "LIST" if kind is list else "NAME"


def _choices(annotation: Any) -> tuple[Any, ...]:
    while get_origin(annotation) is not Literal:
        annotation = get_args(annotation)[0]
    return get_args(annotation)


def _plain(annotation: Any) -> Any:
    """The type under bounds and `| None`: int of `Annotated[int, Ge(1)] | None`, list of `list[float]`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return get_origin(annotation) or annotation


def _listed(value: Any, annotation: Any) -> Any:
    if not isinstance(value, str) or _plain(annotation) is not list:
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _named(given: list[str], option: str) -> Mapping[str, str]:
    """NAME=DATA pairs. Raises UserError for what is none, and for a name that is given twice or taken."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, data = text.partition("=")
        if not equals or not name or not data or "/" in name:
            raise UserError(f"{option} {text}: expected NAME=DATA, as {option} other=photos/other")
        if name in found or name in ("train", "test"):
            raise UserError(f"{option} {text}: the name {name!r} is taken; expected another")
        found[name] = data
    return found


def _evaluate(task: type[Task], given: Mapping[str, Any], others: Mapping[str, str], flags: Mapping[str, Any]) -> None:
    from dinov2cli.cli.evaluating import DataSpecs, run_eval
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import task_config
    from dinov2cli.recipe import load_config

    config = load_config(task_config(task), recipe=given["config"], sets=given["set_"] or [], flags=flags)
    if not given["dry_run"]:
        relaunch(given["processes"])
    talk = Talk(json_output=given["json_output"], quiet=given["quiet"], verbose=given["verbose"])
    ranks = join(config.device)
    models = [ranks.first(partial(options.from_stdin, model)) for model in given["models"]]
    train, test = (ranks.first(partial(options.from_stdin, spec or "")) for spec in (given.get("train"), given["test"]))
    specs = DataSpecs(train or None, test, others)
    run_eval(
        task,
        models,
        specs,
        given["out"],
        config,
        talk,
        dry_run=given["dry_run"],
        overwrite=given["overwrite"],
        ranks=ranks,
    )


app.command("suite")(suite)
app.command("compare")(compare)

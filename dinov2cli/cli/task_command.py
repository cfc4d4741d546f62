"""A command for a task: its options made from the settings that the task declares."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from functools import partial
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import join
from dinov2cli.errors import UserError
from dinov2cli.evaluation.tasks.interface import Task, settings_of

if TYPE_CHECKING:
    from dinov2cli.cli.evaluating import Present

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="One or more: a run, a Hugging Face or timm "
    "directory, an official .pth, transformers:DIR, baseline:pixels, an architecture (random weights).")]  # fmt: skip
_TRAIN = typer.Option("--train", metavar="D", help="Images to learn from.")
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


def command_of(name: str, task: type[Task], present: "Present | None" = None) -> Callable[..., None]:
    """The function of a command for `task`, with an option for each of its settings that has a flag.

    present: makes the page of its results, if not that of `dinov2 eval`.
    """
    flagged = {field.name: field for field in settings_of(task) if field.metadata.get("flag")}

    def command(**given: Any) -> None:
        own = {field: _listed(given[field], flagged[field].type) for field in flagged}
        others = _named(given.get("others") or [], task.others or "")
        flags = {**{key: given[key] for key in _CONFIG_FLAGS}, **own}
        _evaluate(task, given, others, flags, present)

    parameters: dict[str, tuple[Any, Any]] = {"models": (Models, inspect.Parameter.empty)}
    if task.train is not False:
        needed = (Annotated[str, _TRAIN], inspect.Parameter.empty)
        parameters["train"] = needed if task.train else (Annotated[str | None, _TRAIN], None)
    test = Annotated[str, typer.Option(task.data, metavar="D", help="Images to be judged on.")]
    parameters |= {"test": (test, inspect.Parameter.empty), "out": (options.Out, inspect.Parameter.empty)}
    if task.others:
        help_text = "A further set, by a name of yours; may be repeated."
        option = typer.Option(task.others, metavar="NAME=D", help=help_text)
        parameters["others"] = (Annotated[list[str] | None, option], None)
    for field in flagged.values():
        kind, metavar = _flag_type(field.type)
        shown = field.metadata["metavar"] or metavar
        option = typer.Option(field.metadata["flag"], metavar=shown, help=_with_default(field))
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
    given = " ".join(["--train D"] * bool(task.train) + [f"{task.data} D", *task.example.split()])
    settings = "\n".join(
        f"- `{field.name}`: {_with_default(field)}" for field in settings_of(task) if not field.metadata.get("flag")
    )
    keys = f"\n\nFurther settings, by `--set KEY=VALUE`:\n\n{settings}" if settings else ""
    example = f"Example: `dinov2 {task.family} {name} run {given} -o results`"
    return f"{inspect.cleandoc(task.__doc__ or '')}\n\n{example}{keys}"


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


def _evaluate(
    task: type[Task],
    given: Mapping[str, Any],
    others: Mapping[str, str],
    flags: Mapping[str, Any],
    present: "Present | None",
) -> None:
    from dinov2cli.cli.evaluating import run_eval
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.cli.trials import DataSpecs
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
        present=present,
    )

"""`dinov2 eval TASK MODEL…`: one command per benchmark."""

import difflib
from typing import Any

import typer
from typer.core import TyperGroup

from dinov2cli.cli.compare import compare
from dinov2cli.cli.suite import suite
from dinov2cli.cli.task_command import command_of
from dinov2cli.evaluation.tasks.registry import TASKS, find_task


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


app.command("suite")(suite)
app.command("compare")(compare)

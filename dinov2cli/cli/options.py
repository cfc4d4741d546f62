"""Options that mean the same in every command, so that a user learns them once."""

from pathlib import Path
from typing import Annotated

import typer

_COMMON = "Common options"

Data = Annotated[str, typer.Argument(metavar="DATA", help="Images: a folder, tar shards, Parquet, a list of paths, "
    "hf:owner/name, a selection, demo:photos, or - to read the path from stdin.")]  # fmt: skip
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A run, a Hugging Face or timm directory, an official "
    ".pth, or an architecture such as vits14 (random weights).")]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Directory to write; the same command again "
    "continues there.")]  # fmt: skip
Config = Annotated[str | None, typer.Option("--config", metavar="NAME|FILE", help="Recipe by name or YAML file.",
    rich_help_panel=_COMMON)]  # fmt: skip
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the recipe; may be "
    "repeated.", rich_help_panel=_COMMON)]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=_COMMON)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.", rich_help_panel=_COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.", rich_help_panel=_COMMON)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.", rich_help_panel=_COMMON)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what dinov2 wrote at DIR before.",
    rich_help_panel=_COMMON)]  # fmt: skip
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Processes that decode images; default: "
    "one per spare core.", rich_help_panel=_COMMON)]  # fmt: skip
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1.",
    rich_help_panel=_COMMON)]  # fmt: skip
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything random.",
    rich_help_panel=_COMMON)]  # fmt: skip

Memory = Annotated[str | None, typer.Option("--memory", metavar="AMOUNT", help="Most memory that searches may take, as "
    "8GB; default: what they need.", rich_help_panel=_COMMON)]  # fmt: skip
Processes = Annotated[int | None, typer.Option("--processes", "-n", metavar="N", min=1, help="Share the work "
    "among N processes of this machine, one per GPU.", rich_help_panel=_COMMON)]  # fmt: skip


def from_stdin(value: str) -> str:
    """Return `value`, or for `-` the path on the first line of stdin.

    Raises UserError when stdin is a terminal or empty.
    """
    import sys

    from dinov2cli.errors import UserError

    if value != "-":
        return value
    line = "" if sys.stdin.isatty() else sys.stdin.readline().strip()
    if not line:
        raise UserError(
            "- reads a path from stdin, but stdin is empty; pipe one in, as `dinov2 embed … | dinov2 dedup - …`"
        )
    return line

"""`dinov2 eval compare`: results of several models side by side, with the differences between them."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from dinov2cli.cli.talk import Talk
    from dinov2cli.evaluation.comparison import Comparison
    from dinov2cli.report.comparison import Table


class Format(StrEnum):
    """How the tables are printed to stdout."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"


Results = Annotated[list[Path], typer.Argument(metavar="RESULTS…", help="Directories made by `dinov2 eval`, or with "
    "several of them below.")]  # fmt: skip
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Directory to write the comparison and "
    "its page to.")]  # fmt: skip
Baseline = Annotated[str | None, typer.Option("--baseline", metavar="MODEL", help="What the others are compared with; "
    "default: the first model.")]  # fmt: skip
All = Annotated[bool, typer.Option("--all", help="All figures, not only the one to quote of each task.")]
Printed = Annotated[Format | None, typer.Option("--format", help="Print the tables to stdout so.")]
Confidence = Annotated[float, typer.Option("--confidence", help="Of the intervals of differences.")]
Resamples = Annotated[int, typer.Option("--resamples", min=2, help="Of the paired bootstrap.")]

_COLUMNS = 4  # more than this stand below each other in a terminal

_WORDS = ("", "model", "figure", "verdict")  # columns that hold no numbers


def compare(
    results: Results,
    out: Out = None,
    baseline: Baseline = None,
    all_: All = False,
    format_: Printed = None,
    confidence: Confidence = 0.95,
    resamples: Resamples = 2000,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    overwrite: options.Overwrite = False,
    seed: options.Seed = None,
) -> None:
    """Compare models by their results: a table with the best in bold, and differences to a baseline, image by image.

    Example: `dinov2 eval compare results/small results/large --baseline small --format markdown`

    Differences are those on the very same test images (paired bootstrap); * marks those whose interval leaves out zero.
    """
    from dinov2cli.cli.talk import Talk
    from dinov2cli.errors import UserError
    from dinov2cli.evaluation.comparison import compare_results

    if json_output and format_ is not None:
        raise UserError(f"--json and --format {format_} both ask for stdout; expected one of them")
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    how: dict[str, Any] = {"baseline": baseline, "every": all_, "seed": seed or 0}
    how |= {"confidence": confidence, "resamples": resamples}
    comparison = compare_results(results, **how)
    for note in comparison.notes:
        talk.warn(note)
    done = False if out is None else _written(out, comparison, results, how, overwrite=overwrite)
    if format_ is not None:
        _print(comparison, format_)
    elif not quiet:
        _show(comparison, talk.console)
    if json_output:
        _result(talk, comparison, out, done)
    elif out is not None and format_ is None:
        talk.result(out)
    if done:
        talk.say(f"{out}: already done, nothing was written (--overwrite does it again)")


def comparison_page(paths: Sequence[Path | str], *, seed: int, title: str = "Comparison") -> str:
    """The page of a comparison of the figures to quote of some results directories, as HTML text."""
    from dinov2cli.evaluation.comparison import compare_results
    from dinov2cli.report.comparison import comparison_report

    return comparison_report(compare_results(paths, seed=seed), title=title)


def show_comparison(paths: Sequence[Path | str], talk: "Talk", *, seed: int) -> None:
    """Print the tables of the figures to quote of some results directories, for people."""
    from dinov2cli.evaluation.comparison import compare_results

    if not talk.quiet:
        _show(compare_results(paths, seed=seed), talk.console)


def _written(out: Path, comparison: "Comparison", results: Sequence[Path], how: dict[str, Any], **place: Any) -> bool:
    """Write the comparison to a directory; whether the same was there already."""
    from dinov2cli.artifacts.manifest import read_manifest
    from dinov2cli.artifacts.output import Output
    from dinov2cli.artifacts.results import find_results, write_comparison
    from dinov2cli.cli.frame import command_line
    from dinov2cli.report.comparison import comparison_report

    folders = dict.fromkeys(folder.resolve() for path in results for folder in find_results(path)[0])
    inputs = [
        {"spec": str(folder), "kind": "results", "hash": read_manifest(folder).files["results.json"]["sha256"]}
        for folder in folders
    ]
    config = {key: value for key, value in how.items() if key != "seed"}
    line = command_line()
    with Output.open(
        out, "comparison", command=line, config=config, seed=how["seed"], inputs=inputs, **place
    ) as opened:
        if not opened.done:
            page = comparison_report(comparison, confidence=how["confidence"])
            facts = {"models": comparison.models, "baseline": comparison.baseline, "notes": comparison.notes}
            write_comparison(opened, comparison.records(), report=page, **facts)
        return opened.done


def _result(talk: "Talk", comparison: "Comparison", out: Path | None, done: bool) -> None:
    import json

    fields = {
        "models": comparison.models,
        "baseline": comparison.baseline,
        "results": comparison.records(),
        "notes": comparison.notes,
    }
    if out is not None:
        talk.result(out, kind="comparison", **fields, already_done=done)
    else:
        print(json.dumps(fields, default=str, ensure_ascii=False))  # noqa: T201


def _print(comparison: "Comparison", format_: Format) -> None:
    """The tables on stdout."""
    from rich.console import Console

    from dinov2cli.report.comparison import as_csv, as_latex, as_markdown

    if format_ is Format.TABLE:
        _show(comparison, Console(highlight=False, emoji=False))
    elif format_ is Format.CSV:
        print(as_csv(comparison), end="")  # noqa: T201
    else:
        write = as_markdown if format_ is Format.MARKDOWN else as_latex
        print(write(_tables(comparison), comparison.notes), end="")  # noqa: T201


def _tables(comparison: "Comparison", *, transposed: bool = False) -> "list[Table]":
    from dinov2cli.report.comparison import differences_table, figures_table

    tables = [figures_table(comparison, transposed=transposed)]
    return [*tables, differences_table(comparison)] if comparison.changes else tables


def _show(comparison: "Comparison", console: "Console") -> None:
    """The tables for a terminal, the best in bold."""
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in _tables(comparison, transposed=len(comparison.columns) > _COLUMNS):
        shown = RichTable(box=None, pad_edge=False)
        for header in table.headers:
            shown.add_column(Text(header), justify="left" if header in _WORDS else "right")
        for row in table.rows:
            shown.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
        console.print(shown, soft_wrap=False)
        console.print()

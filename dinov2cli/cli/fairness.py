"""`dinov2 fairness geo|people|audit MODEL…`: the paper's two studies, and the general form for anybody's data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dinov2cli.cli.task_command import command_of
from dinov2cli.fairness.protocols.registry import PROTOCOLS, find_protocol

if TYPE_CHECKING:
    import pyarrow as pa

    from dinov2cli.artifacts.results import ResultRow
    from dinov2cli.cli.evaluating import Evaluated
    from dinov2cli.evaluation.tasks.run import Outcome


def _present(found: "Evaluated") -> "tuple[str, Mapping[str, pa.Table]]":
    """The page of a study, and what only several models have: how their gaps differ."""
    from dinov2cli.fairness.models import gap_changes
    from dinov2cli.report.fairness import FairnessPage, fairness_report

    first = next(iter(found.outcomes.values()))
    judged = {name: outcome.judged for name, outcome in found.outcomes.items()}
    settings = first.rows[0].settings
    limits = {key: settings[key] for key in ("confidence", "resamples", "seed")}
    more = {"model_gaps": gap_changes(judged, **limits)} if len(judged) > 1 else {}
    page = FairnessPage(
        protocol=found.task.name,
        models=list(found.outcomes),
        dataset=first.rows[0].dataset,
        tables={**found.tables, **more},
        overall={name: _overall(outcome) for name, outcome in found.outcomes.items()},
        settings=settings,
        found={name: one.settings for name, one in judged.items()},
        notes=list(dict.fromkeys(note for one in judged.values() for note in one.notes)),
        axes=first.judged.settings["axes"],
        ordered=first.judged.settings["ordered_axes"],
        environment=_versions(),
        panels={name: one.panels for name, one in judged.items() if one.panels},
    )
    return fairness_report(page), more


def _overall(outcome: "Outcome") -> "list[ResultRow]":
    """The figures to quote that are of all images, not of a group or between groups."""
    figures = zip(outcome.rows, outcome.judged.figures, strict=True)
    return [row for row, figure in figures if figure.said and "axis" not in row.settings]


def _versions() -> dict[str, str]:
    from dinov2cli.artifacts.manifest import environment

    return {key: str(value) for key, value in environment().items()}


class _Protocols(typer.core.TyperGroup):
    """One command per protocol, made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(PROTOCOLS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        del ctx
        if cmd_name not in PROTOCOLS:
            return None
        own = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        own.command(cmd_name)(command_of(cmd_name, find_protocol(cmd_name), _present))
        return typer.main.get_command(own)


app = typer.Typer(
    cls=_Protocols,
    no_args_is_help=True,
    help="How well a model serves groups of people and places, with honest intervals and tests.",
)


@app.callback()
def _group() -> None:
    """A group without commands of its own would not be one for Typer."""

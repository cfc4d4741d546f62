"""Running a task over models into one results directory: what `dinov2 eval TASK`, its suites and the demo share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.cli.trials import DataSpecs, Trials
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from dinov2cli.artifacts.output import Output
    from dinov2cli.artifacts.results import ResultRow
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EvalConfig
    from dinov2cli.evaluation.tasks.interface import Task
    from dinov2cli.evaluation.tasks.run import Outcome

_FILES = ["results.json", "results.parquet", "scores.parquet", "predictions.parquet", "report.html", "manifest.json"]


@dataclass(frozen=True)
class Evaluated:
    """What is shown of a finished task: its settings, the outcome of every model by name, the tables of all models in
    one (the first column is `model`), and the trials, for pictures."""

    task: "Task"
    outcomes: "Mapping[str, Outcome]"
    tables: "Mapping[str, pa.Table]"
    trials: "Trials"


Present = Callable[[Evaluated], "tuple[str, Mapping[str, pa.Table]]"]
"""Makes the page of a task as HTML text, and tables to be kept that need all models."""


def run_eval(
    task_type: "type[Task]",
    models: Sequence[str],
    specs: DataSpecs,
    path: Path,
    config: "EvalConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    present: Present | None = None,
) -> "list[ResultRow]":
    """Evaluate models in one task into one results directory; the work is shared among `ranks`.

    present: makes the page; by default that of evaluations. Everything that can be refused is refused before the first
    image is read. Returns the rows, also of work that was done already, on the main process; none for a dry run.
    """
    from dinov2cli.artifacts.results import read_results
    from dinov2cli.cli.frame import canonical_model, check_output, open_output
    from dinov2cli.config import task_from

    task = task_from(task_type, config)
    models = [canonical_model(model) for model in models]
    if repeated := {model for model in models if models.count(model) > 1}:
        raise UserError(f"model {sorted(repeated)[0]} is given twice; expected different models")
    trials = Trials(task, models, specs, config, talk, ranks)
    inputs = ranks.together(trials.inputs)
    identity = {"task": task_type.name, **config.identity()}
    if specs.others:
        identity["others"] = list(specs.others)
    place: dict[str, Any] = {"config": identity, "inputs": inputs, "overwrite": overwrite}
    if dry_run:
        state = ranks.first(lambda: check_output(path, "results", **place))
        talk.plan(
            f"{task_type.family} {task_type.name} {' '.join(models)}",
            {**trials.facts(), "files": [*_FILES, *map(_table_file, task_type.tables)], "output": f"{path} ({state})"},
        )
        return []
    out = open_output(talk, path, "results", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return read_results(path) if ranks.main else []
    with out:
        outcomes = [outcome for outcome in trials.run(out) if outcome is not None]
        ranks.first(lambda: _write(out, task, outcomes, trials, talk, present or _evaluation))
    return [row for outcome in outcomes for row in outcome.rows]


def _write(
    out: "Output", task: "Task", outcomes: "list[Outcome]", trials: Trials, talk: "Talk", present: Present
) -> None:
    """Write the results directory, on the main process, and tell the user."""
    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.artifacts.results import write_results
    from dinov2cli.cli.frame import result_fields

    rows = [row for outcome in outcomes for row in outcome.rows]
    by_name = dict(zip(trials.names, outcomes, strict=True))
    tables = {
        name: joined
        for name in task.tables
        if (joined := _joined({model: found.judged.tables.get(name) for model, found in by_name.items()})) is not None
    }
    html, more = present(Evaluated(task, by_name, tables, trials))
    Parts(out.path).remove()
    for name, table in {**tables, **more}.items():
        out.write_table(_table_file(name), table)
    manifest = write_results(
        out,
        rows,
        predictions=_joined({model: found.judged.predictions for model, found in by_name.items()}),
        scores=[scores for outcome in outcomes for scores in outcome.scores],
        report=html,
        random=any(trials.random),
    )
    for outcome in outcomes:
        for row, figure in zip(outcome.rows, outcome.judged.figures, strict=True):
            if figure.said:
                talk.say(said(row, several=len(trials.names) > 1))
    talk.result(out.path, **result_fields(manifest), results=[row.record() for row in rows])


def _table_file(name: str) -> str:
    return f"{name}.parquet"


def _joined(tables: "Mapping[str, pa.Table | None]") -> "pa.Table | None":
    """The tables of all models that have one, below each other, with a first column `model`."""
    import pyarrow as pa

    own = [
        table.add_column(0, "model", pa.array([name] * table.num_rows, pa.string()))
        for name, table in tables.items()
        if table is not None
    ]
    return pa.concat_tables(own, promote_options="default") if own else None


def _evaluation(found: Evaluated) -> "tuple[str, Mapping[str, pa.Table]]":
    """The page of an evaluation."""
    from dinov2cli.report.evaluation import ModelResult, best_of, evaluation_report

    shown = {
        name: ModelResult(outcome.rows, outcome.judged.predictions, outcome.judged.panels)
        for name, outcome in found.outcomes.items()
    }
    title = f"{found.task.name} of {', '.join(shown)}"
    return evaluation_report(shown, title=title, trial=found.trials.trial(best_of(shown))), {}


def said(row: "ResultRow", *, several: bool) -> str:
    """A result row as a line for people."""
    name = f"{row.model}: {row.metric}" if several else row.metric
    tested = f"; p = {row.settings['p_corrected']:.2g}" if "p_corrected" in row.settings else ""
    if "worst" in row.settings:
        tested = f", {row.settings['worst']} against {row.settings['best']}{tested}"
    if row.settings.get("unit", "share") == "share":
        return f"{name}: {row.value:.1%} [{row.ci_low:.1%}, {row.ci_high:.1%}], n = {row.n:,}{tested}"
    unit = " m" if row.settings["unit"] == "metres" else ""
    return f"{name}: {row.value:.4g}{unit} [{row.ci_low:.4g}, {row.ci_high:.4g}], n = {row.n:,}"

"""`dinov2 eval --suite FILE MODEL…`: many tasks on many data sets, one comparison at the end."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE, LostRank, Ranks, join
from dinov2cli.errors import DinoError, InputError, UserError, WorkError

if TYPE_CHECKING:
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.cli.trials import DataSpecs
    from dinov2cli.config import EvalConfig
    from dinov2cli.config.suite import SuiteConfig, SuiteEntry

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="One or more models, as of every task.")]
File = Annotated[str, typer.Option("--suite", metavar="FILE", help="YAML: tasks, their data sets and settings.")]
Cache = Annotated[str | None, typer.Option("--cache", metavar="DIR|none", help="Where features are kept for other "
    "commands; default: the user's cache folder.")]  # fmt: skip


def suite(
    models: Models,
    file: File,
    out: options.Out,
    cache: Cache = None,
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
    """Run every task of a YAML file on every model, features computed once, and compare.

    Example: `dinov2 eval --suite suite.yaml run transformers:clip -o results`

    The file lists `tasks`, each with `task`, `name`, `train`, `test` and perhaps `others` and `settings`; `settings`
    beside the list hold for all tasks that know them. Paths are relative to the working directory. An entry that fails
    does not keep the others from being done; the same command again does what is missing.
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config.suite import SuiteConfig
    from dinov2cli.recipe import load_config

    config = load_config(
        SuiteConfig, recipe=file, option="--suite", flags={"workers": workers, "device": device, "seed": seed}
    )
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(config.device)
    models = [ranks.first(partial(options.from_stdin, model)) for model in models]
    flags = {"cache": cache, "workers": config.workers, "device": config.device, "seed": config.seed}
    run_suite(models, config, out, flags, talk, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_suite(
    models: Sequence[str],
    config: "SuiteConfig",
    path: Path,
    flags: Mapping[str, Any],
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Run all entries into one results directory, each in a folder of its own below it.

    All settings are checked, all data opened and all models loaded once before anything is computed. Raises WorkError
    at the end where entries failed.
    """
    from dinov2cli.cli.frame import canonical_model, check_output, open_output

    models = [canonical_model(model) for model in models]
    settings = {entry.folder: _settings(entry, config, flags) for entry in config.tasks}
    inputs = ranks.together(lambda: _inputs(models, config, settings, talk, ranks))
    identity = {"suite": {entry.folder: _identity(entry, settings[entry.folder]) for entry in config.tasks}}
    place: dict[str, Any] = {"config": identity, "inputs": inputs, "overwrite": overwrite}
    if dry_run:
        state = ranks.first(lambda: check_output(path, "results", **place))
        entries = [f"{entry.task} on {entry.test}" for entry in config.tasks]
        talk.plan("eval suite", {"models": models, "tasks": entries, "output": f"{path} ({state})"})
        return
    ranks.first(lambda: _mend(path, place))
    out = open_output(talk, path, "results", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        failed = _run_entries(models, config, settings, out, talk, ranks)
        if failed:
            first = "; ".join(f"{name}: {error}" for name, error in list(failed.items())[:3])
            raise WorkError(
                f"{len(failed)} of {len(config.tasks)} tasks failed ({first}); the others are done: mend it and run "
                "the same command again"
            )
        ranks.first(lambda: _write(out, config, talk))


def _mend(path: Path, place: Mapping[str, Any]) -> None:
    """Let an unfinished suite go on with entries that were changed or added: each has an identity of its own."""
    from dinov2cli.artifacts.manifest import FILE_NAME, config_hash, has_manifest, plain, read_manifest
    from dinov2cli.artifacts.output import write_aside

    if place["overwrite"] or not has_manifest(path):
        return
    manifest = read_manifest(path)
    if manifest.complete or manifest.kind != "results" or "suite" not in manifest.config:
        return
    manifest.config = plain(place["config"])
    manifest.config_hash, manifest.inputs = config_hash(manifest.config), plain(place["inputs"])
    text = manifest.to_json()

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    write_aside(path / FILE_NAME, write)


def _settings(entry: "SuiteEntry", config: "SuiteConfig", flags: Mapping[str, Any]) -> "EvalConfig":
    """The settings of one entry. Raises UserError that names the entry."""
    from dinov2cli.config import task_config
    from dinov2cli.evaluation.tasks.registry import find_task
    from dinov2cli.recipe import load_config

    try:
        task = find_task(entry.task)
        known = task_config(task)
        shared = {key: value for key, value in config.settings.items() if key in known.model_fields}
        strange = [key for key in config.settings if not any(key in _keys(one) for one in config.tasks)]
        if strange:
            raise UserError(f"settings: {strange[0]}: no task of this suite has such a setting")
        if task.train and entry.train is None:
            raise UserError(f"task {entry.task} needs train: DATA")
        if entry.others and task.others is None:
            raise UserError(f"task {entry.task} takes no others")
        return load_config(known, flags={**shared, **entry.settings, **flags})
    except UserError as error:
        raise UserError(f"suite, {entry.folder}: {error}") from None


def _keys(entry: "SuiteEntry") -> set[str]:
    from dinov2cli.config import task_config
    from dinov2cli.evaluation.tasks.registry import find_task

    return set(task_config(find_task(entry.task)).model_fields)


def _inputs(
    models: Sequence[str],
    config: "SuiteConfig",
    settings: "Mapping[str, EvalConfig]",
    talk: "Talk",
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """What every entry reads, each once; the tasks look at their models and data here. Errors name the entry."""
    from dinov2cli.cli.trials import Trials
    from dinov2cli.config import task_from
    from dinov2cli.evaluation.tasks.registry import find_task

    found: list[dict[str, Any]] = []
    for entry in config.tasks:
        task = task_from(find_task(entry.task), settings[entry.folder])
        try:
            read = Trials(task, models, _specs(entry), settings[entry.folder], talk, ranks).inputs()
        except (UserError, InputError) as error:
            raise type(error)(f"suite, {entry.folder}: {error}") from None
        found += [one for one in read if one not in found]
    return found


def _specs(entry: "SuiteEntry") -> "DataSpecs":
    from dinov2cli.cli.trials import DataSpecs

    return DataSpecs(entry.train, entry.test, entry.others, label=entry.name)


def _identity(entry: "SuiteEntry", settings: "EvalConfig") -> dict[str, Any]:
    return {**entry.model_dump(exclude={"settings"}), "settings": settings.identity()}


def _run_entries(
    models: Sequence[str],
    config: "SuiteConfig",
    settings: "Mapping[str, EvalConfig]",
    out: "Output",
    talk: "Talk",
    ranks: Ranks,
) -> dict[str, DinoError]:
    """Run every entry that is not done; the errors of those that failed, by folder."""
    from dinov2cli.cli.evaluating import run_eval
    from dinov2cli.evaluation.tasks.registry import find_task

    failed: dict[str, DinoError] = {}
    for number, entry in enumerate(config.tasks, start=1):
        talk.say(f"{number}/{len(config.tasks)} {entry.task} on {entry.name}")
        try:
            run_eval(
                find_task(entry.task),
                models,
                _specs(entry),
                out.path / entry.folder,
                settings[entry.folder],
                talk.inner(),
                ranks=ranks,
            )
        except LostRank:
            raise
        except (UserError, InputError, WorkError) as error:
            talk.warn(f"{entry.folder}: {error}")
            failed[entry.folder] = error
    return failed


def _write(out: "Output", config: "SuiteConfig", talk: "Talk") -> None:
    from dinov2cli.artifacts.results import read_results, read_scores, write_results
    from dinov2cli.cli.compare import comparison_page, show_comparison
    from dinov2cli.cli.frame import result_fields

    folders = [out.path / entry.folder for entry in config.tasks]
    rows = [row for folder in folders for row in read_results(folder)]
    found = [read_scores(folder, number) for folder in folders for number in range(len(read_results(folder)))]
    scores = [one for one in found if one is not None]
    html = comparison_page(folders, seed=config.seed)
    manifest = write_results(out, rows, scores=scores if len(scores) == len(rows) else None, report=html)
    show_comparison(folders, talk, seed=config.seed)
    talk.result(out.path, **result_fields(manifest), results=[row.record() for row in rows])

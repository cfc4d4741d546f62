"""Running a task over models into one results directory: what `dinov2 eval TASK`, its suites and the demo share."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.artifacts.output import file_sha256
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError

if TYPE_CHECKING:
    from dinov2cli.artifacts.cache import FeatureCache
    from dinov2cli.artifacts.output import Output
    from dinov2cli.artifacts.results import ResultRow
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EvalConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.tasks.interface import Task
    from dinov2cli.evaluation.tasks.run import Outcome
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.models.load import LoadedModel
    from dinov2cli.search.blocks import Stage, Store

_FILES = ["results.json", "results.parquet", "scores.parquet", "predictions.parquet", "report.html", "manifest.json"]


@dataclass(frozen=True)
class DataSpecs:
    """The DATA strings of a task. label: what the test set is called in results, if not by its own name."""

    train: str | None
    test: str
    others: Mapping[str, str]
    label: str | None = None


@dataclass(frozen=True)
class _KeyedStore:
    """A store all of whose stages depend on `key` too."""

    store: "Store"
    key: Mapping[str, object]

    def stage(self, name: str, key: Mapping[str, object]) -> "Stage":
        return self.store.stage(name, {"for": self.key, **key})


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
) -> "list[ResultRow]":
    """Evaluate models in one task into one results directory; the work is shared among `ranks`.

    Everything that can be refused is refused before the first image is read. Returns the rows, also of work that was
    done already, on the main process; none for a dry run.
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
            f"eval {task_type.name} {' '.join(models)}",
            {**trials.facts(), "files": _FILES, "output": f"{path} ({state})"},
        )
        return []
    out = open_output(talk, path, "results", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return read_results(path) if ranks.main else []
    with out:
        outcomes = [outcome for outcome in trials.run(out) if outcome is not None]
        ranks.first(lambda: _write(out, task, outcomes, trials, talk))
    return [row for outcome in outcomes for row in outcome.rows]


class Trials:
    """The models of one command on its data, one after another: only one is in memory at a time."""

    def __init__(
        self,
        task: "Task",
        models: Sequence[str],
        specs: DataSpecs,
        config: "EvalConfig",
        talk: "Talk",
        ranks: Ranks,
    ) -> None:
        self.task, self.models, self.config, self.talk, self.ranks = task, models, config, talk, ranks
        self.specs = specs
        self._sources: dict[str, ImageSource] = {}
        self._loaded: dict[str, LoadedModel] = {}
        self.names: list[str] = []
        self.random: list[bool] = []
        self._fingerprints: list[dict[str, Any]] = []

    def inputs(self) -> list[dict[str, Any]]:
        """Open all data and every model once, let the task look at them, and return what the manifest records."""
        from dinov2cli.cli.frame import model_input

        entries = [source.fingerprint() for source in self._data().values()]
        for file in self._files():
            entries.append({"spec": str(file), "kind": "file", "sha256": file_sha256(file)})
        for model in self.models:
            loaded = self._load(model)
            self.names.append(loaded.name)
            self.random.append(loaded.random)
            how = {"config": loaded.config, "preprocess": asdict(loaded.preprocess)}
            entry = model_input(model, {**loaded.fingerprint, **how})
            self._fingerprints.append(entry)
            entries.append(entry)
            self.task.check(self._trial(loaded))
            if len(self.models) > 1:
                self._loaded.clear()
        if len(set(self.names)) < len(self.names):
            self.names = list(self.models)
        return entries

    def _files(self) -> list[Path]:
        """Files besides data and models that figures depend on; a task's own file too, if it is not one of ours."""
        named = [file for file in self.task.files() if file.is_file()]
        own = sys.modules[type(self.task).__module__].__file__
        if own is not None and not type(self.task).__module__.startswith("dinov2cli."):
            named.append(Path(own))
        return named

    def facts(self) -> dict[str, Any]:
        """What a dry run shows."""
        counts = {f"{role} images": len(source) for role, source in self._data().items()}
        return {"model" if len(self.names) == 1 else "models": ", ".join(self.names), **counts}

    def run(self, out: "Output") -> "list[Outcome | None]":
        """The outcome of every model, on the main process; None of each on the others."""
        from dinov2cli.artifacts.parts import Parts
        from dinov2cli.evaluation.tasks.run import run_task

        outcomes = []
        cache = self._cache()
        data = {role: source.fingerprint() for role, source in self._data().items()}
        for number, (model, name) in enumerate(zip(self.models, self.names, strict=True)):
            if len(self.models) > 1:
                self.talk.say(f"{name} ({number + 1} of {len(self.models)})")
            loaded = self.ranks.together(partial(self._load, model))
            files = {str(file): file_sha256(file) for file in self._files()}
            key = {"model": self._fingerprints[number], "data": data, "settings": self.config.identity(), **files}
            trial = replace(
                self._trial(loaded),
                store=_KeyedStore(Parts(out.path), key),
                folder=out.path / "models" / str(number),
                cache=cache,
            )
            outcomes.append(run_task(self.task, trial, **self._described(name, trial)))
            if len(self.models) > 1:
                self._loaded.clear()
        if cache is not None and self.ranks.main:
            cache.trim(self.config.cache_limit)
        return outcomes

    def trial(self, name: str) -> "Trial":
        """The model of this name again, for pictures."""
        return self._trial(self._load(self.models[self.names.index(name)]))

    def _described(self, name: str, trial: "Trial") -> dict[str, Any]:
        preprocess = trial.model.preprocess
        settings = {
            "train": trial.train.spec if trial.train is not None else None,
            "others": {other: source.spec for other, source in trial.others.items()},
            # Dense tasks show the model whole images, at a size of their own.
            "image_size": None if hasattr(self.task, "size") else preprocess.crop,
            "precision": trial.precision,
        }
        return {
            "model": name,
            "dataset": self.specs.label or trial.test.spec,
            "confidence": self.config.confidence,
            "resamples": self.config.resamples,
            "settings": {key: value for key, value in settings.items() if value},
        }

    def _data(self) -> "dict[str, ImageSource]":
        from dinov2cli.data.source import open_source

        if not self._sources:
            named = {"train": self.specs.train, "test": self.specs.test, **self.specs.others}
            self._sources = {role: open_source(spec) for role, spec in named.items() if spec is not None}
        return self._sources

    def _load(self, model: str) -> "LoadedModel":
        from dinov2cli.models.load import load_model

        if model not in self._loaded:
            self._loaded[model] = load_model(model, img_size=self.config.image_size, seed=self.config.seed)
        return self._loaded[model]

    def _trial(self, loaded: "LoadedModel") -> "Trial":
        from dinov2cli.cli.frame import workers_for
        from dinov2cli.device import choose_device, choose_precision
        from dinov2cli.evaluation.tasks.trial import Trial

        config, data = self.config, self._data()
        device = choose_device(config.device, local_rank=self.ranks.local_rank)
        precision, _ = choose_precision(config.precision, device)
        return Trial(
            model=loaded,
            test=data["test"],
            train=data.get("train"),
            others={name: data[name] for name in self.specs.others},
            device=device,
            precision=precision,
            batch_size=config.batch_size,
            workers=workers_for(config.workers),
            seed=config.seed,
            max_bad_fraction=config.max_bad_fraction,
            ranks=self.ranks,
            say=self.talk.say,
            warn=self.talk.warn,
            progress=self.talk.progress,
        )

    def _cache(self) -> "FeatureCache | None":
        from dinov2cli.artifacts.cache import FeatureCache, default_cache

        if self.config.cache == "none":
            return None
        return FeatureCache(default_cache() if self.config.cache == "auto" else Path(self.config.cache).expanduser())


def _write(out: "Output", task: "Task", outcomes: "list[Outcome]", trials: Trials, talk: "Talk") -> None:
    """Write the results directory, on the main process, and tell the user."""
    import pyarrow as pa

    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.artifacts.results import write_results
    from dinov2cli.cli.frame import result_fields
    from dinov2cli.report.evaluation import ModelResult, best_of, evaluation_report

    rows = [row for outcome in outcomes for row in outcome.rows]
    tables = [
        outcome.judged.predictions.add_column(0, "model", pa.array([name] * outcome.judged.predictions.num_rows))
        for name, outcome in zip(trials.names, outcomes, strict=True)
        if outcome.judged.predictions is not None
    ]
    shown = {
        name: ModelResult(outcome.rows, outcome.judged.predictions, outcome.judged.panels)
        for name, outcome in zip(trials.names, outcomes, strict=True)
    }
    html = evaluation_report(
        shown,
        title=f"{task.name} of {', '.join(trials.names)}",
        trial=trials.trial(best_of(shown)),
    )
    Parts(out.path).remove()
    manifest = write_results(
        out,
        rows,
        predictions=pa.concat_tables(tables, promote_options="default") if tables else None,
        scores=[scores for outcome in outcomes for scores in outcome.scores],
        report=html,
        random=any(trials.random),
    )
    for row in rows:
        talk.say(said(row, several=len(trials.names) > 1))
    talk.result(out.path, **result_fields(manifest), results=[row.record() for row in rows])


def said(row: "ResultRow", *, several: bool) -> str:
    """A result row as a line for people."""
    name = f"{row.model}: {row.metric}" if several else row.metric
    if row.settings.get("unit", "share") == "share":
        return f"{name}: {row.value:.1%} [{row.ci_low:.1%}, {row.ci_high:.1%}], n = {row.n:,}"
    unit = " m" if row.settings["unit"] == "metres" else ""
    return f"{name}: {row.value:.4g}{unit} [{row.ci_low:.4g}, {row.ci_high:.4g}], n = {row.n:,}"

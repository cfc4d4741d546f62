"""The models of a command on its data, one after another."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.artifacts.output import file_sha256
from dinov2cli.distributed import Ranks

if TYPE_CHECKING:
    from dinov2cli.artifacts.cache import FeatureCache
    from dinov2cli.artifacts.output import Output
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EvalConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.tasks.interface import Task
    from dinov2cli.evaluation.tasks.run import Outcome
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.models.load import LoadedModel
    from dinov2cli.search.blocks import Stage, Store


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
            confidence=config.confidence,
            resamples=config.resamples,
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

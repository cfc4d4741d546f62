"""`dinov2 eval`: benchmarks of frozen features, each with confidence intervals."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options
from dinov2cli.distributed import ALONE, Ranks, join

if TYPE_CHECKING:
    from dinov2cli.artifacts.manifest import Manifest
    from dinov2cli.artifacts.output import Output
    from dinov2cli.artifacts.results import ResultRow
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import EvalConfig, KnnConfig, LinearConfig
    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.tasks import Outcome
    from dinov2cli.models.load import LoadedModel

    Judge = Callable[[], Outcome]

app = typer.Typer(no_args_is_help=True, help="Measure frozen features, with confidence intervals.")
Train = Annotated[str, typer.Option("--train", metavar="D", help="Labelled images to learn from.")]
Test = Annotated[str, typer.Option("--test", metavar="D", help="Labelled images to be judged on.")]
ImageSize = Annotated[int | None, typer.Option("--image-size", metavar="PX", help="Crop; default: the model's own.")]


@app.command("knn")
def knn(
    model: options.Model,
    train: Train,
    test: Test,
    out: options.Out,
    k: Annotated[str | None, typer.Option("--k", metavar="LIST", help="Numbers of neighbours, as 10,20.")] = None,
    image_size: ImageSize = None,
    config: options.Config = None,
    set_: options.Set = None,
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
    """Classify by the weighted vote of the nearest training images: no training, no choices.

    Example: `dinov2 eval knn run --train photos/train?label=folder --test photos/val?label=folder -o knn`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import KnnConfig
    from dinov2cli.recipe import load_config

    flags = {
        "neighbours": None if k is None else [part.strip() for part in k.split(",")],
        "image_size": image_size,
        "workers": workers,
        "device": device,
        "seed": seed,
    }
    settings = load_config(KnnConfig, recipe=config, sets=set_ or [], flags=flags)
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(settings.device)
    model = ranks.first(lambda: options.from_stdin(model))
    run_eval("knn", model, train, test, out, settings, talk, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


@app.command("linear")
def linear(
    model: options.Model,
    train: Train,
    test: Test,
    out: options.Out,
    image_size: ImageSize = None,
    config: options.Config = None,
    set_: options.Set = None,
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
    """Train linear classifiers on frozen features and judge the best, chosen on held-out training images.

    Example: `dinov2 eval linear run --train photos/train?label=folder --test photos/val?label=folder -o linear`
    """
    from dinov2cli.cli.launch import relaunch
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import LinearConfig
    from dinov2cli.recipe import load_config

    flags = {"image_size": image_size, "workers": workers, "device": device, "seed": seed}
    settings = load_config(LinearConfig, recipe=config, sets=set_ or [], flags=flags)
    if not dry_run:
        relaunch(processes)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    ranks = join(settings.device)
    model = ranks.first(lambda: options.from_stdin(model))
    run_eval("linear", model, train, test, out, settings, talk, dry_run=dry_run, overwrite=overwrite, ranks=ranks)


def run_eval(
    task: str,
    model: str,
    train: str,
    test: str,
    path: Path,
    config: "EvalConfig",
    talk: "Talk",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Evaluate into one results directory, features shared among `ranks`; also what the demo calls.

    The main process judges and writes, the others wait for it.
    """
    from dataclasses import asdict

    from dinov2cli.cli.frame import canonical_model, check_output, model_input, open_output, result_fields

    model = canonical_model(model)
    sources, loaded = ranks.together(lambda: _opened(model, (train, test), config))
    inputs = [*(s.fingerprint() for s in sources), model_input(model, loaded.fingerprint)]
    identity = {"task": task, **config.identity()}
    identity.pop("batch_size")
    place: dict[str, Any] = {"config": identity, "inputs": inputs, "overwrite": overwrite}
    if dry_run:
        state = ranks.first(lambda: check_output(path, "results", **place))
        facts = {"model": loaded.name, "train images": len(sources[0]), "test images": len(sources[1])}
        files = ["results.json", "results.parquet", "report.html", "manifest.json"]
        talk.plan(f"eval {task} {model}", {**facts, "files": files, "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "results", seed=config.seed, ranks=ranks, **place)
    if out is None:
        return
    with out:
        judge = ranks.together(lambda: _BENCHMARKS[task](loaded, sources, config, talk, ranks))
        rows, manifest = ranks.first(lambda: _judged(task, judge(), out, loaded, sources, config, talk))
    for row in rows:
        talk.say(f"{row.metric}: {row.value:.1%} [{row.ci_low:.1%}, {row.ci_high:.1%}] on {row.n:,} images")
    talk.result(path, **result_fields(manifest), results=[asdict(row) for row in rows])


def _opened(model: str, specs: tuple[str, str], config: "EvalConfig") -> "tuple[list[ImageSource], LoadedModel]":
    from dinov2cli.data.source import open_source
    from dinov2cli.models.load import load_model

    sources = [open_source(spec) for spec in specs]
    loaded = load_model(model, img_size=config.image_size, seed=config.seed)
    _ = loaded.backbone  # a descriptor, which has no tokens, is refused before anything is written
    return sources, loaded


def _judged(
    task: str,
    outcome: "Outcome",
    out: "Output",
    loaded: "LoadedModel",
    sources: "list[ImageSource]",
    config: "EvalConfig",
    talk: "Talk",
) -> "tuple[list[ResultRow], Manifest]":
    from dinov2cli.artifacts.results import write_results
    from dinov2cli.report.results import results_report

    result = outcome.result
    for note in result.notes:
        talk.warn(note)
    rows = result.rows(model=loaded.name, dataset=sources[1].spec, confidence=config.confidence)
    html = results_report(rows, title=f"{task} of {loaded.name}")
    return rows, write_results(out, rows, predictions=outcome.table(*sources), report=html, random=loaded.random)


def _knn(
    loaded: "LoadedModel", sources: "list[ImageSource]", config: "KnnConfig", talk: "Talk", ranks: Ranks
) -> "Judge":
    from dinov2cli.evaluation.tasks import knn as task

    train = _features(loaded, sources[0], config, talk, ranks, pool=config.pool)
    if _same_images(sources):
        talk.warn("train and test are the same images: each is left out of its own neighbours")
        test = None
    else:
        test = _features(loaded, sources[1], config, talk, ranks, pool=config.pool)
    return lambda: task(
        train,
        test,
        ks=config.neighbours,
        temperature=config.temperature,
        device=loaded.backbone.cls_token.device,
        train_spec=sources[0].spec,
        test_spec=sources[1].spec,
    )


def _linear(
    loaded: "LoadedModel", sources: "list[ImageSource]", config: "LinearConfig", talk: "Talk", ranks: Ranks
) -> "Judge":
    from dinov2cli.evaluation.tasks import linear as task

    if _same_images(sources):
        talk.warn("train and test are the same images: the figures say how well they are remembered, not recognised")
    last = max(config.blocks)
    train, test = (_features(loaded, source, config, talk, ranks, last_blocks=last) for source in sources)
    talk.say("training the grid of linear heads on cached features")
    return lambda: task(
        train,
        test,
        seed=config.seed,
        learning_rates=config.learning_rates,
        blocks=config.blocks,
        batch_size=config.train_batch_size,
        steps=config.steps,
        validation_fraction=config.validation_fraction,
        device=loaded.backbone.cls_token.device,
        train_spec=sources[0].spec,
        test_spec=sources[1].spec,
    )


def _same_images(sources: "list[ImageSource]") -> bool:
    train, test = sources
    return len(train) == len(test) and train.content_hash() == test.content_hash() and train.ids == test.ids


# Collect the features, all ranks together; what they return makes the judgement of them, on the main process.
_BENCHMARKS: dict[str, Callable[..., "Judge"]] = {"knn": _knn, "linear": _linear}


def _features(
    loaded: "LoadedModel", source: "ImageSource", config: "EvalConfig", talk: "Talk", ranks: Ranks, **what: Any
) -> "Features":
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.data.bad import BadImages
    from dinov2cli.device import choose_device, choose_precision
    from dinov2cli.evaluation.features import extract_source

    device = choose_device(config.device, local_rank=ranks.local_rank)
    precision, _ = choose_precision(config.precision, device)
    loaded.backbone.to(device)
    done = 0
    with talk.progress(f"features of {source.spec}", len(source)) as advance:

        def on_rate(count: int, _seconds: float) -> None:
            nonlocal done
            advance(count - done)
            done = count

        return extract_source(
            loaded.backbone,
            source,
            preprocess=loaded.preprocess,
            precision=precision,
            batch_size=config.batch_size,
            workers=workers_for(config.workers),
            bad=BadImages(config.max_bad_fraction),
            on_rate=on_rate,
            ranks=ranks,
            **what,
        )

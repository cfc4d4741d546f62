"""`dinov2 demo`: the whole pipeline on real photographs that come with the program's dependencies."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig

_OUT = "Directory to write; the same command again continues there."
_TARGET = "Images kept by the curate step."
TRAIN, TEST = "demo:photos", "demo:photos?split=test"
DIGITS_TRAIN, DIGITS_TEST = "demo:digits", "demo:digits?split=test"
# Name of the benchmark, task, train set, test set, and the metric that is quoted.
_BENCHMARKS = (
    ("k-NN on held-out tiles", "knn", TRAIN, TEST, "top1_k20"),
    ("linear probe on held-out tiles", "linear", TRAIN, TEST, "top1"),
    ("k-NN on handwritten digits", "knn", DIGITS_TRAIN, DIGITS_TEST, "top1_k20"),
    ("linear probe on handwritten digits", "linear", DIGITS_TRAIN, DIGITS_TEST, "top1"),
)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help=_OUT)] = Path("demo-out"),
    config: options.Config = "tiny-cpu",
    target_size: Annotated[int, typer.Option("--target-size", metavar="N", help=_TARGET)] = 1500,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    device: options.Device = None,
    seed: options.Seed = None,
) -> None:
    """Run everything once, on a CPU, in about four minutes: embed, dedup, curate, pretrain, eval, report.

    The images are tiles of real photographs inside scikit-image and scikit-learn; nothing is downloaded. `report.html`
    shows what training changed, measured on tiles the model never saw and on handwritten digits.
    """
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import PretrainConfig
    from dinov2cli.recipe import load_config

    flags = {"workers": workers, "device": device, "seed": seed}
    settings = load_config(PretrainConfig, recipe=config, sets=set_ or [], flags=flags)
    talk = Talk(json_output=json_output, quiet=quiet, verbose=verbose)
    run_demo(out, settings, talk, target_size=target_size, dry_run=dry_run, overwrite=overwrite)


def run_demo(
    path: Path, config: "PretrainConfig", talk: "Talk", *, target_size: int, dry_run: bool, overwrite: bool
) -> None:
    """Run the pipeline into one directory, each step in a directory of its own, which a rerun finds done."""
    from dinov2cli.cli.frame import check_output, open_output, result_fields
    from dinov2cli.data.source import open_source

    inputs = [open_source(spec).fingerprint() for spec in (TRAIN, TEST, DIGITS_TRAIN, DIGITS_TEST)]
    identity = {**config.identity(), "target_size": target_size}
    if dry_run:
        state = check_output(path, "demo", config=identity, inputs=inputs, overwrite=overwrite)
        images = {str(entry["spec"]): entry["rows"] for entry in inputs}
        steps = ["embed", "dedup", "curate", "pretrain", "eval before and after", "report.html"]
        facts = {**images, "to keep": target_size, "training steps": config.train.steps or config.train.budget}
        talk.plan("demo", {**facts, "steps": steps, "output": f"{path} ({state})"})
        return
    out = open_output(talk, path, "demo", config=identity, seed=config.seed, inputs=inputs, overwrite=overwrite)
    if out is None:
        return
    with out:
        _prepare(path, config, talk, target_size)
        _train_and_judge(path, config, talk)
        comparisons, sentences, html = _report(path, config)
        out.write_text("report.html", html)
        summary = {
            c.name: {"before": c.before[0], "after": c.after[0], "low": c.change.low, "high": c.change.high}
            for c in comparisons
        }
        out.write_json("summary.json", summary)
        manifest = out.finish(summary=summary)
    for sentence in sentences:
        talk.say(sentence)
    talk.say(f"report: {path / 'report.html'}  ({manifest.seconds:.0f} s in all)")
    talk.result(path, **result_fields(manifest))


def _prepare(path: Path, config: "PretrainConfig", talk: "Talk", target_size: int) -> None:
    """The untrained model, its embeddings, and from them the images to train on."""
    from dinov2cli.cli.assembly import initial_backbone, preprocess_of
    from dinov2cli.cli.curate import run_curate
    from dinov2cli.cli.dedup import run_dedup
    from dinov2cli.cli.embed import run_embed
    from dinov2cli.config import CurateConfig, DedupConfig, EmbedConfig
    from dinov2cli.data.source import open_source
    from dinov2cli.models.export import save_hf

    common: dict[str, Any] = {"seed": config.seed, "workers": config.workers, "device": config.device}
    initial, size = path / "initial", preprocess_of(config)
    if not (initial / "config.json").is_file():
        card = "An untrained model of the same kind, for the comparison before and after."
        backbone, _ = initial_backbone(config, open_source(TRAIN))
        save_hf(backbone, initial, resize=size.resize, crop=size.crop, card=card)
    talk.say("1/6 embed: one vector per tile, by the untrained model")
    run_embed(TRAIN, path / "embeddings", EmbedConfig(model=str(initial), **common), talk.inner())
    talk.say("2/6 dedup: find the planted copies by their pixels")
    dedup = DedupConfig(tiers=["exact", "perceptual"], **common)
    run_dedup(str(path / "embeddings"), path / "unique", dedup, talk.inner())
    talk.say("3/6 curate: choose tiles evenly over clusters")
    curate = CurateConfig(target_size=target_size, **common)
    run_curate(str(path / "unique"), path / "curated", curate, talk.inner(), query=[])


def _train_and_judge(path: Path, config: "PretrainConfig", talk: "Talk") -> None:
    from dinov2cli.cli.evaluating import run_eval
    from dinov2cli.cli.pretrain import train_run
    from dinov2cli.cli.trials import DataSpecs
    from dinov2cli.config import task_config
    from dinov2cli.evaluation.tasks.registry import find_task

    common: dict[str, Any] = {"seed": config.seed, "workers": config.workers, "device": config.device}
    talk.say("4/6 pretrain: self-distillation, without labels")
    train_run(str(path / "curated"), path / "run", config, talk.inner())
    for step, (state, model) in enumerate((("before", "initial"), ("after", "run")), start=5):
        talk.say(f"{step}/6 eval {state} training: k-NN and linear probe, held-out tiles and digits")
        for number, (_, task, train, test, _) in enumerate(_BENCHMARKS):
            settings = task_config(find_task(task))(**common)
            place, specs = _results(path, number, state), DataSpecs(train, test, {})
            run_eval(find_task(task), [str(path / model)], specs, place, settings, talk.inner())


def _results(path: Path, number: int, state: str) -> Path:
    _, task, train, _, _ = _BENCHMARKS[number]
    return path / "eval" / f"{task}-{train.removeprefix('demo:')}-{state}"


def _report(path: Path, config: "PretrainConfig") -> tuple[list, list[str], str]:
    from dinov2cli.artifacts.results import read_predictions
    from dinov2cli.artifacts.run import read_metrics
    from dinov2cli.artifacts.selection import open_selection
    from dinov2cli.data.demo import demo_truth
    from dinov2cli.data.source import open_source
    from dinov2cli.models.load import load_model
    from dinov2cli.report import demo as page
    from dinov2cli.report.curate import cluster_samples_of
    from dinov2cli.report.dedup import duplicate_pair_samples
    from dinov2cli.report.demo_parts import (
        compare_results,
        patch_tokens,
        planted_copies_found,
        sample_images,
    )
    from dinov2cli.report.examples import neighbour_rows

    comparisons = [
        compare_results(
            _results(path, i, "before"), _results(path, i, "after"), name=name, metric=metric, seed=config.seed
        )
        for i, (name, _, _, _, metric) in enumerate(_BENCHMARKS)
    ]
    train, test = open_source(TRAIN), open_source(TEST)
    unique, curated = open_selection(path / "unique"), open_selection(path / "curated")
    images = sample_images(test, 6)
    found, planted, others = planted_copies_found(unique.dropped, demo_truth(TRAIN))
    models = {page.BEFORE: "initial", page.AFTER: "run"}
    html = page.demo_report(
        title="dinov2 demo",
        lead=f"{len(train):,} tiles of real photographs, from raw images to a trained and measured backbone.",
        comparisons=comparisons,
        metrics=read_metrics(path / "run"),
        pairs=duplicate_pair_samples(unique.dropped, train),
        duplicates=f"{unique.dropped.num_rows} of {len(train):,} tiles went as copies. Of {planted} copies planted on "
        f"purpose {found} were found; {others} more tiles looked the same as a neighbour. Crops escape the hashes.",
        clusters=cluster_samples_of(curated.kept, train),
        curation=f"{curated.kept.num_rows:,} tiles were chosen evenly over clusters of the untrained model's features, "
        "which follow colour and brightness.",
        neighbours={
            label: neighbour_rows(read_predictions(_results(path, 0, state)), train, test)
            for label, state in ((page.BEFORE, "before"), (page.AFTER, "after"))
        },
        pca_images=images,
        pca_tokens={label: patch_tokens(load_model(path / name), images) for label, name in models.items()},
        settings={
            "architecture": config.model.arch,
            "crops": f"2 of {config.crops.global_size} px, {config.crops.local_number} of {config.crops.local_size} px",
            "batch": config.data.batch_size,
            "steps": config.train.steps or config.train.budget,
            "seed": config.seed,
        },
    ).html()
    return comparisons, [page.change_sentence(c) for c in comparisons], html

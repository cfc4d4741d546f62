"""`dinov2 bench NAME`: how fast a part is beside a reference, measured in one process on this machine."""

import importlib
from typing import Annotated, Any

import typer

from dinov2cli.cli import options

_BENCHES = {
    "data": "the input path part by part beside an all-Pillow pipeline, and the workers that a model needs",
    "train": "one training step part by part; with --reference beside a textbook step",
    "distill": "one step of distillation beside one of pretraining of the same student, and the teacher's share of it",
    "attention": "attention of packed crops: every implementation that runs here, checked, then timed beside its floor",
    "losses": "Sinkhorn and the prototype cross-entropy: our kernels and torch's operations beside a textbook's",
    "stochastic-depth": "gather, norm and scaled add-back of the kept samples beside torch's operations",
    "curve": "losses of 50 steps with our kernels and with plain torch: whether they coincide",
    "search": "the graph of nearest neighbours that the planner chooses beside exact Faiss: time, memory, recall",
    "kmeans": "k-means beside Faiss's own, in memory and streamed, and hierarchical k-means with resampling",
    "components": "connected components of a large graph of edges beside SciPy's: time and memory",
    "hash": "images per second from files to perceptual hashes beside a textbook pHash",
    "copies": "precision and recall of dedup on altered copies made from your images, per kind of edit",
    "knn": "the k-NN classifier beside scikit-learn's",
    "eval": "linear probe, k-NN and logistic regression on features beside products alone and scikit-learn's",
    "fairness": "rates, intervals and tests of groups beside a textbook's loops of resampling and shuffling",
    "embed": "images per second from files to features, and the share of time spent waiting for images",
    "scaling": "memory, traffic and step time of the long recipes on 8 to 2,048 GPUs, modelled: nothing is timed",
    "ranks": "training steps over 2 or more processes of this machine beside one, and their memory beside the model's",
}
_TAKE_DATA = ("data", "search", "kmeans", "hash", "copies")
_TAKE_ROWS = ("search", "kmeans", "components", "eval", "fairness")
_MODULES = {"eval": "evaluation"}
"""Modules of `dinov2cli.bench` that are not called as their benchmark; the others are."""
_HELP = "; ".join(f"{name}: {what}" for name, what in _BENCHES.items())


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_HELP + ".")],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="data, hash, copies: the images to measure on; search, kmeans: embeddings. Default: made for it.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", metavar="NAME", help="data, train, curve: the model, as vits14 (default); distill: student."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="NAME", help="distill: the teacher's architecture, as vitl14.")
    ] = None,
    megapixels: Annotated[
        float | None,
        typer.Option("--megapixels", metavar="N", min=0.001, help="data: enlarge the images to camera JPEGs first."),
    ] = None,
    compile_: Annotated[
        str | None,
        typer.Option("--compile", metavar="HOW", help="train: false (default), true or graphs, as train.compile."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1000,
            help="search, kmeans, components: vectors (nodes), default 200000; eval, fairness: default 50000.",
        ),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="train: also time a textbook step on the same inputs, and compare.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", "-n", metavar="N", min=2, help="ranks: over N processes; default 2.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="NAME", help="ranks: fp32 (default), bf16, fp16 or auto.")
    ] = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = None,
    seed: options.Seed = None,
) -> None:
    """Measure one part beside a reference, side by side in one process; prints seconds, speed-up and memory ratio."""
    import json

    from dinov2cli.cli.talk import Talk
    from dinov2cli.errors import UserError

    if name not in _BENCHES:
        raise UserError(f"bench {name}: no such benchmark; expected one of {', '.join(_BENCHES)}")
    if data is not None and name not in _TAKE_DATA:
        raise UserError(
            f"bench {name}: found {data} behind it, but only {', '.join(_TAKE_DATA)} take any; leave it out"
        )
    talk = Talk(json_output=json_output, quiet=quiet)
    talk.say(f"bench {name}: {_BENCHES[name]}")
    extra: dict[str, Any] = {"reference": True} if reference and name == "train" else {}  # the others always compare
    module = importlib.import_module(f"dinov2cli.bench.{_MODULES.get(name, name.replace('-', '_'))}")
    if name == "scaling":
        extra["recipes"] = {recipe: _settings(recipe) for recipe in module.RECIPES}
    if name in _TAKE_DATA:
        extra["data"] = data
    if rows is not None and name in _TAKE_ROWS:
        extra["rows"] = rows
    if name == "data":
        extra |= {"megapixels": megapixels, "arch": arch or "vits14"}
    if arch is not None and name in ("train", "curve"):
        extra["arch"] = arch
    if name == "distill":
        extra |= {"arch": arch, "teacher": teacher}
    if compile_ is not None and name == "train":
        if compile_ not in ("false", "true", "graphs"):
            raise UserError(f"--compile: found {compile_!r}; expected false, true or graphs")
        extra["compile"] = compile_
    if name == "ranks":
        extra |= {"ranks": processes or 2, "precision": precision or "fp32"}
    figures = module.run(device=device or "auto", seed=seed or 0, **extra)
    if json_output:
        print(json.dumps({"name": name, **figures}))  # noqa: T201
        return
    print("\n".join(getattr(module, "lines", _lines)(figures)))  # noqa: T201


def _settings(recipe: str) -> dict[str, Any]:
    """A shipped recipe's settings of pretrain, as plain values: benches know no config."""
    from dinov2cli.config import PretrainConfig
    from dinov2cli.recipe import load_config

    return load_config(PretrainConfig, recipe=recipe).model_dump(mode="json")


def _lines(figures: dict[str, Any]) -> list[str]:
    """`key  value` lines, columns aligned; a table of times gets a line per part with its share."""
    width = max(map(len, figures))
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict):
            total = sum(value.values())
            lines += [f"{key.ljust(width)}  {total:.4g}"]
            lines += [
                f"  {part.ljust(width)}{seconds:8.4f} s  {seconds / total:6.1%}" for part, seconds in value.items()
            ]
        else:
            lines.append(
                f"{key.ljust(width)}  {value:.4g}" if isinstance(value, float) else f"{key.ljust(width)}  {value}"
            )
    return lines

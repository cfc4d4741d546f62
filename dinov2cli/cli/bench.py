"""`dinov2 bench NAME`: how fast a part is beside a reference, measured in one process on this machine."""

import importlib
from typing import Annotated

import typer

from dinov2cli.cli import options

_BENCHES = {
    "train": "one training step, packed, beside one forward per crop group with materialised targets",
    "search": "neighbour search beside a brute-force matrix product",
    "knn": "the k-NN classifier beside scikit-learn's",
    "embed": "images per second from files to features, and the share of time spent waiting for images",
}
_HELP = "; ".join(f"{name}: {what}" for name, what in _BENCHES.items())


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=_HELP + ".")],
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
    talk = Talk(json_output=json_output, quiet=quiet)
    talk.say(f"bench {name}: {_BENCHES[name]}")
    figures = importlib.import_module(f"dinov2cli.bench.{name}").run(device=device or "auto", seed=seed or 0)
    if json_output:
        print(json.dumps({"name": name, **figures}))  # noqa: T201
        return
    width = max(map(len, figures))
    for key, value in figures.items():
        print(f"{key.ljust(width)}  {value:.4g}" if isinstance(value, float) else f"{key.ljust(width)}  {value}")  # noqa: T201

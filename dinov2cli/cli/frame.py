"""Steps that every command shares: its command line for the manifest, its workers, its dry run."""

import shlex
import sys
from pathlib import Path
from typing import Any

from dinov2cli.artifacts.manifest import Manifest, config_hash, plain
from dinov2cli.artifacts.output import Output, inspect_output
from dinov2cli.cli.talk import Talk
from dinov2cli.distributed import ALONE, Ranks


def command_line() -> str:
    """Return the command as typed, for the manifest."""
    return shlex.join(["dinov2", *sys.argv[1:]])


def workers_for(asked: int | None) -> int:
    """Return the number of decoding processes: as asked, else one per spare core."""
    from dinov2cli.data.cores import default_workers

    return default_workers() if asked is None else asked


def open_output(
    talk: Talk,
    path: Path,
    kind: str,
    *,
    config: dict[str, Any],
    seed: int,
    inputs: list[dict[str, Any]],
    overwrite: bool,
    ranks: Ranks = ALONE,
) -> Output | None:
    """Open the output of a command; None when the work there is done already, which the user is told.

    Under a launch the main process alone opens it for writing, and the others follow.
    """
    mine: list[Output] = []

    def opened() -> tuple[Manifest, bool, bool]:
        line = command_line()
        mine.append(Output.open(path, kind, command=line, config=config, seed=seed, inputs=inputs, overwrite=overwrite))
        return mine[0].manifest, mine[0].done, mine[0].resumed

    manifest, done, resumed = ranks.first(opened)
    out = mine[0] if mine else Output.follow(path, manifest, done=done, resumed=resumed)
    if out.done:
        out.close()
        talk.say(f"{path}: already done, nothing to do (--overwrite does it again)")
        talk.result(path, **result_fields(out.manifest), **_stored_results(path, kind), already_done=True)
        return None
    if out.resumed:
        talk.say(f"{path}: continuing where an earlier run stopped")
    return out


def check_output(
    path: Path, kind: str, *, config: dict[str, Any], inputs: list[dict[str, Any]], overwrite: bool
) -> str:
    """For a dry run: refuse what `open_output` would refuse, without writing; return what would happen at `path`."""
    fresh = Manifest(kind=kind, config=plain(config), config_hash=config_hash(config), inputs=plain(inputs))
    old = inspect_output(path, fresh, overwrite=overwrite)
    if old is None:
        return "replaced" if overwrite and path.exists() else "new"
    return "already done" if old.complete else "continued"


def canonical_model(spec: str) -> str:
    """Return a MODEL that means the same from any directory and however it was spelled: paths made absolute."""
    from dinov2cli.models.load import canonical_spec

    return canonical_spec(spec)


def model_input(spec: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a model among a manifest's inputs; where its file lies is left out, so that it may move."""
    return {"spec": spec, "kind": "model", **{key: value for key, value in fingerprint.items() if key != "file"}}


def _stored_results(path: Path, kind: str) -> dict[str, Any]:
    """Return the rows of an evaluation that is done already, for `--json`."""
    if kind != "results":
        return {}

    from dinov2cli.artifacts.results import read_results

    return {"results": [row.record() for row in read_results(path)]}


def result_fields(manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a manifest that `--json` prints."""
    return {"kind": manifest.kind, "rows": manifest.rows, "seconds": manifest.seconds, **manifest.extra}

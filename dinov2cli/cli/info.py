"""`dinov2 info PATH`: what a directory made by this program is and how far it got."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.options import Json


def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A directory made by dinov2.")], json_output: Json = False
) -> None:
    """Show what a directory holds, what made it, and whether it is finished."""
    from dataclasses import asdict

    from dinov2cli.artifacts.manifest import describe_kind, read_manifest
    from dinov2cli.cli.talk import Talk

    manifest = read_manifest(path)
    talk = Talk(json_output=json_output)
    if json_output:
        talk.result(path, **asdict(manifest))
        return
    state = "finished" if manifest.complete else "unfinished: the same command continues it"
    talk.say(f"{path}: {describe_kind(manifest.kind)}, {state}")
    facts = {
        "command": manifest.command,
        "rows": manifest.rows,
        "seed": manifest.seed,
        "inputs": ", ".join(str(entry.get("spec")) for entry in manifest.inputs),
        "files": len(manifest.files),
        "bytes": sum(entry["size"] for entry in manifest.files.values()),
        "seconds": manifest.seconds,
        **manifest.extra,
    }
    for key, value in facts.items():
        if value is not None and value not in ("", {}, []):
            counted = isinstance(value, int) and not isinstance(value, bool) and key != "seed"
            talk.say(f"  {key}: {value:,}" if counted else f"  {key}: {value}")
    if manifest.kind == "results" and manifest.complete:
        from dinov2cli.artifacts.results import read_results
        from dinov2cli.report.results import interval_text, metric_name, value_text

        for row in read_results(path):
            if row.settings.get("headline", True):
                figure = f"{metric_name(row.metric)} {value_text(row)} {interval_text(row)}"
                talk.say(f"  {row.task} on {row.dataset}, {row.model}: {figure}")

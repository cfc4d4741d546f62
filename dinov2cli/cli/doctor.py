"""`dinov2 doctor`: what this machine and installation can do, and what to change."""

from typing import Annotated

import typer

from dinov2cli.cli import options

_STATES = {"ok": "[green]ok[/]     ", "advice": "[yellow]advice[/] ", "problem": "[bold red]problem[/]"}


def doctor(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Your images, to measure reading them; default: demo:photos.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="NAME", help="The model to feed; default: vits14 on a GPU, tiny without."),
    ] = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = None,
) -> None:
    """Check software, device and disk, and measure whether images come as fast as a model takes them.

    Exit code 0 when training can be expected to work here, 1 when something stands in its way.

    Examples:

    - `dinov2 doctor`
    - `dinov2 doctor photos/ --arch vitb14`
    """
    import json
    from dataclasses import asdict

    from rich.markup import escape

    from dinov2cli.bench.machine import Finding, examine, verdict
    from dinov2cli.cli.talk import Talk

    talk = Talk(json_output=json_output, quiet=quiet)
    findings: list[Finding] = []
    for finding in examine(device or "auto", data if data is None else options.from_stdin(data), arch):
        findings.append(finding)
        if not talk.quiet and not json_output:
            talk.console.print(f"{_STATES[finding.state]} {finding.name:<10} {escape(finding.found)}")
            if finding.advice:
                talk.console.print(f"{'':<19}{escape(finding.advice)}")
    text, ready = verdict(findings)
    talk.say(text)
    if json_output:
        print(json.dumps({"ready": ready, "verdict": text, "findings": [asdict(f) for f in findings]}))  # noqa: T201
    if not ready:
        raise typer.Exit(1)

"""`dinov2 kernels`: build our CUDA kernels, and say which implementation of each operator runs here and why."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli import options

if TYPE_CHECKING:
    from dinov2cli.kernels.build import Built
    from dinov2cli.kernels.compiler import Resources

app = typer.Typer(no_args_is_help=True, help="Build the CUDA kernels, and see which kernels run here and why.")


@app.command("build")
def build(
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="LIST",
            help="Architectures, with commas: sm_80 (A100, all of 8.x), sm_90a (H100, H200), sm_100, compute_80 (PTX, "
            "for any later GPU). Default: that of this machine's GPU; without a GPU sm_80,sm_90a.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again even if the library is there.")] = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compile the CUDA kernels into the cache, where they are found from then on; about half a minute.

    A machine with nvcc and a GPU does so by itself on first use. Do it ahead to have it done before many processes
    start, or on a machine without a GPU: copy the library whose path is printed, and name it in DINOV2_KERNEL_LIBRARY
    where it is to run (glibc 2.34 or later, torch 2.10 or later).

    Examples:

    - `dinov2 kernels build`
    - `dinov2 kernels build --arch sm_80,sm_90a --force`
    """
    from dinov2cli.cli.talk import Talk
    from dinov2cli.errors import UserError
    from dinov2cli.kernels.build import build as build_library

    talk = Talk(json_output=json_output, quiet=quiet)
    archs = _native() if arch is None else [name.strip() for name in arch.split(",") if name.strip()]
    if not archs:
        raise UserError(f"--arch: found {arch!r}; expected names such as sm_80,sm_90a")
    talk.say(f"building for {', '.join(archs)}")
    try:
        built = build_library(archs, force=force)
    except ValueError as error:
        raise UserError(f"--arch: {error}") from error
    _table(talk, built.resources)
    talk.say(
        f"{'built' if built.fresh else 'was built before'} in {built.seconds:.1f} s, nvcc {built.nvcc}: {built.path}"
    )
    talk.result(built.path, **_facts(built))


@app.command("info")
def info(
    json_output: options.Json = False,
    device: options.Device = None,
) -> None:
    """Show for each operator which implementation runs on this machine and why, and what the kernels are built with.

    Builds nothing, except that on a GPU with nvcc the first question whether our CUDA kernels run there does.

    Examples:

    - `dinov2 kernels info`
    - `DINOV2_KERNELS=torch dinov2 kernels info --json`
    """
    import json
    from dataclasses import asdict

    from dinov2cli.cli.talk import Talk
    from dinov2cli.device import choose_device
    from dinov2cli.kernels.build import current
    from dinov2cli.kernels.dispatch import choices

    talk = Talk(json_output=json_output)
    where = choose_device(device or "auto")
    chosen = choices(where)
    software, built = _software(), current()
    if json_output:
        found = {"device": str(where), "operators": [asdict(choice) for choice in chosen], **software}
        found["built"] = [{"path": str(one.path), **_facts(one)} for one in built]
        print(json.dumps(found))  # noqa: T201
        return
    width = max(len(choice.operator) for choice in chosen)
    talk.say(f"on {where}:")
    for choice in chosen:
        talk.say(f"  {choice.operator:<{width}}  {choice.backend:<9} {choice.reason}")
    for name, value in software.items():
        absent = "none in use" if name == "library" else "not found"
        talk.say(f"{name:<{width + 2}}  {value or absent}")
    for one in built:
        talk.say(f"built for {', '.join(one.archs)} in {one.seconds:.1f} s: {one.path}")
        _table(talk, one.resources)


def _native() -> list[str]:
    """The architecture of the GPU here; without one, those to carry elsewhere."""
    import torch

    from dinov2cli.kernels.build import ARCHS
    from dinov2cli.kernels.compiler import find_nvcc, native_arch

    nvcc = find_nvcc()
    if nvcc is None or not torch.cuda.is_available():
        return list(ARCHS)
    return [native_arch(torch.cuda.get_device_capability(), nvcc)]


def _software() -> dict[str, str | None]:
    """What is installed of all that kernels are made with, and where ours are kept."""
    import importlib.metadata
    import os

    import torch

    from dinov2cli.kernels.build import LIBRARY, cache_folder, loaded
    from dinov2cli.kernels.compiler import find_nvcc

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    nvcc, library = find_nvcc(), loaded() or os.environ.get(LIBRARY)
    return {
        "library": str(library) if library else None,
        "cache": str(cache_folder()),
        "nvcc": None if nvcc is None else f"{nvcc.version} {nvcc.path}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "xformers": version("xformers"),
    }


def _facts(built: "Built") -> dict[str, Any]:
    from dataclasses import asdict

    facts = asdict(built)
    del facts["path"]
    return facts


def _table(talk: Any, resources: "tuple[Resources, ...]") -> None:
    if not resources:
        return
    width = max(len(entry.kernel) for entry in resources)
    talk.say(f"  {'kernel':<{width}}  {'arch':<8} registers  spilled bytes  stack bytes  shared bytes")
    for entry in resources:
        figures = f"{entry.registers:>9}  {entry.spill:>13}  {entry.stack:>11}  {entry.shared:>12}"
        talk.say(f"  {entry.kernel:<{width}}  {entry.arch:<8} {figures}")

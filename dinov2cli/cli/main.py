"""The program `dinov2`: its commands, and how errors become one line and an exit code."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from dinov2cli import __version__
from dinov2cli.cli import (
    bench,
    curate,
    dedup,
    demo,
    distill,
    doctor,
    embed,
    evaluate,
    export,
    fairness,
    info,
    kernels,
    pack,
    pretrain,
    recipes,
)
from dinov2cli.cli.launch import Ended
from dinov2cli.distributed import LostRank, launched, leave, met, report_failure
from dinov2cli.errors import DinoError, Preempted, WorkError

_EPILOG = "Start with `dinov2 demo`, then `dinov2 pretrain PHOTOS -o RUN`. Every command explains itself with --help."

_LET_SPEAK = 5.0  # seconds

_INTERRUPTED = "stopped by Ctrl-C; what was finished is saved, the same command continues from there"

app = typer.Typer(
    name="dinov2",
    help="From a folder of raw images to a trained, evaluated, audited vision backbone.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dinov2cli {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


_DATA, _TRAIN, _LOOK = "Images", "Models", "Inspect"
app.command("embed", rich_help_panel=_DATA)(embed.embed)
app.command("dedup", rich_help_panel=_DATA)(dedup.dedup)
app.command("curate", rich_help_panel=_DATA)(curate.curate)
app.command("pack", rich_help_panel=_DATA)(pack.pack)
app.command("pretrain", rich_help_panel=_TRAIN)(pretrain.pretrain)
app.command("distill", rich_help_panel=_TRAIN)(distill.distill)
app.command("export", rich_help_panel=_TRAIN)(export.export)
app.add_typer(evaluate.app, name="eval", rich_help_panel=_TRAIN)
app.add_typer(fairness.app, name="fairness", rich_help_panel=_TRAIN)
app.command("demo", rich_help_panel=_LOOK)(demo.demo)
app.command("doctor", rich_help_panel=_LOOK)(doctor.doctor)
app.command("info", rich_help_panel=_LOOK)(info.info)
app.add_typer(recipes.app, name="recipes", rich_help_panel=_LOOK)
app.add_typer(kernels.app, name="kernels", rich_help_panel=_LOOK)
app.command("bench", rich_help_panel=_LOOK)(bench.bench)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0 done, 1 failed, 2 usage or config, 3 input, 75 preempted, 130 Ctrl-C."""
    code = run(arguments)
    if not (launched() or met()):
        sys.exit(code)
    if code == 0:
        leave()
    # Python's own exit destroys process groups that something still holds while their threads run, which aborts one
    # process in five; and after an error it would wait for ranks that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    # Read when torch is first imported. OpenMP threads that spin long while they wait starve each other where other
    # processes share the cores: measured 2 to 15 times slower steps. This is a thirtieth of the default spin.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Large tensors in huge pages: a training step of ViT-S with 65,536 prototypes took 2.0 instead of 3.4 s.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Triton changes its default with 3.10 and 3.9 warns of it: our kernels keep fused multiply-adds.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _preempt)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="dinov2", standalone_mode=True)
    except SystemExit as stop:  # Typer turns Ctrl-C into a silent exit 130, and a reader that has gone into exit 1
        if isinstance(stop.__context__, BrokenPipeError):
            return _reader_gone()
        if stop.code == 130:
            return _fail(_INTERRUPTED, 130, met_by=0)
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Ended as ended:
        return ended.code
    except LostRank as error:
        code = _fail(str(error), error.exit_code)
        # Where the launcher may start all again, this rank is to fail like the others, and at once.
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
            _let_others_leave()
        return code
    except DinoError as error:
        if os.environ.get("DINOV2_DEBUG") and error.__cause__ is not None:
            traceback.print_exc()
        return _fail(str(error), error.exit_code, met_by=error.rank)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, 130, met_by=0)
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        return _unexpected(error)
    return 0


def _reader_gone() -> int:
    """Whoever read our stdout has enough, as in `| head -1`: nothing failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _let_others_leave() -> None:
    """The launcher ends all ranks as soon as one has gone, and takes its code: let it be the one that says why."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LET_SPEAK)


def _unexpected(error: Exception) -> int:
    if os.environ.get("DINOV2_DEBUG"):
        traceback.print_exc()
    text = " ".join(str(error).split())[:300]
    hint = "" if os.environ.get("DINOV2_DEBUG") else "; run again with DINOV2_DEBUG=1 for the traceback and report it"
    return _fail(f"unexpected {type(error).__name__}: {text}{hint}", WorkError.exit_code)


def _fail(text: str, code: int, met_by: int | None = None) -> int:
    """Say why the command ends, once per launch where all ranks met the error together (`met_by` the one named)."""
    from rich.console import Console
    from rich.markup import escape

    rank = int(os.environ.get("RANK", "0"))
    if launched():
        speaker = rank if met_by is None else met_by
        if speaker != rank or (not met() and os.environ.get("LOCAL_RANK", "0") != "0"):
            # All ranks (of a machine, before they met) found the same: one of them says it.
            _let_others_leave()
            return code
        report_failure(text)
        text = f"rank {rank}: {text}" if rank else text
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(f"[bold red]error:[/] {escape(text)}")
    return code


def _preempt(number: int, _frame: Any) -> NoReturn:
    name = signal.Signals(number).name
    raise Preempted(f"stopped by {name}; what was finished is saved, the same command continues from there")

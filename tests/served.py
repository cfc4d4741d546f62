"""`dinov2` for tests that start it many times: a server with everything imported forks a process for each command.

A command takes its start-up (seconds, most of it torch) from the server; all else is as when a shell starts it: a
process of its own with its own working directory, environment, standard streams, signals and exit code. Kill the
process that a shell started, and the command is killed too.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    *("torch", "faiss", "scipy.sparse.csgraph", "pyarrow.parquet", "pandas", "datasets", "matplotlib.figure"),
    *(
        "dinov2cli.cli.main",
        "dinov2cli.config",
        "dinov2cli.train.loop",
        "dinov2cli.train.phase",
        "dinov2cli.models.export",
    ),
    *("dinov2cli.curation.dedup", "dinov2cli.curation.retrieval", "dinov2cli.curation.sampling"),
    *("dinov2cli.evaluation.knn", "dinov2cli.report.dedup", "dinov2cli.report.curate", "dinov2cli.report.run"),
)
CLIENT = """#!{python} -SEs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda got, _frame: os.kill(pid, got))
code = server.recv(1)
sys.exit(code[0] if code else 137)
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Path]:
    """A program `dinov2` in `folder`, to be put first on PATH; it works while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    address, program = folder / "socket", folder / "dinov2"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "tests.served", str(address)], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE) as server:  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield program
        finally:
            server.kill()


def _serve(address: str) -> None:
    import importlib

    from PIL import Image

    for name in IMPORTED:
        importlib.import_module(name)
    Image.init()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the client is told the exit code
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _command(client)
        client.close()


def _command(client: socket.socket) -> None:
    """Run one command with the client's streams and say how it ended; never returns."""
    from dinov2cli.cli.main import run

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(client, 4, 3)
    while len(request) < 4 + int.from_bytes(request[:4], "big"):
        request += client.recv(1 << 20)
    arguments, place, environment = json.loads(request[4:])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dinov2", *arguments]
    client.send(os.getpid().to_bytes(4, "big"))
    threading.Thread(target=_end_with, args=(client,), daemon=True).start()
    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    client.send(bytes([code]))
    os._exit(code)


def _end_with(client: socket.socket) -> None:
    if not client.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])

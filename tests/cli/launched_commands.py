"""Commands run one after the other in each process of a launch, as `dinov2` runs them; their exit codes as JSON.

Called with the file of the commands and the folder to write `RANK.json` to. Blocks are small, so that every process
gets some of each kind.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from dinov2cli.cli.main import run
from dinov2cli.curation import fingerprints
from dinov2cli.search import hamming, kmeans, neighbours


def shrink_blocks() -> None:
    """Blocks of 16 rows where they hold hundreds or thousands."""
    fingerprints._CHUNK = 16
    neighbours._QUERY_ROWS = 16
    hamming._QUERY_ROWS = 16 * hamming.ORIENTATIONS
    for function in (neighbours.neighbour_blocks, kmeans.assign):
        function.__kwdefaults__["block"] = 16


def main(commands: Path, folder: Path) -> None:
    shrink_blocks()
    results = []
    for arguments in json.loads(commands.read_text()):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
        results.append([code, out.getvalue(), err.getvalue()])
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

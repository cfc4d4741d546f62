"""Score normalisation against a background set, for copy detection (Pizzi et al. 2022, section on evaluation)."""

import numpy as np
import numpy.typing as npt

from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError
from dinov2cli.search.blocks import Progress
from dinov2cli.search.index import build_index
from dinov2cli.search.neighbours import neighbour_blocks
from dinov2cli.search.vectors import Float32, Vectors, as_vectors

NEAREST = 3
"""Background images whose mean similarity is what an image resembles by chance."""


def background_bias(
    vectors: Vectors | npt.NDArray[np.floating],
    background: Vectors | npt.NDArray[np.floating],
    *,
    n: int = NEAREST,
    beta: float = 1.0,
    index: str = "auto",
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Float32:
    """How similar every row is to images that it is no copy of: [N] float32.

    bias(x) = beta * mean cosine of x with its n nearest rows of the background. SSCD's score of a query q and a
    reference r is cos(q, r) - bias(q): an image of plain texture, near to everything, needs a higher cosine to be a
    copy. Within one set neither row is the query, so the symmetrical form is used there:
    score(a, b) = cos(a, b) - (bias(a) + bias(b)) / 2 (`similarity_edges` with `bias`). Thresholds of scores lie
    lower than those of cosines by the typical bias. The background must hold no copies of the rows: images of
    another source. A row of zeros has bias 0. Raises UserError for fewer than n background rows.
    """
    source, others = as_vectors(vectors), as_vectors(background)
    if n < 1 or others.rows < n:
        raise UserError(
            f"score normalisation: found {others.rows} background images; expected at least {max(n, 1)}; give more"
        )
    built = build_index(others, k=n, queries=source, index=index, seed=seed, memory=memory, ranks=ranks)
    bias = np.zeros(source.rows, dtype=np.float32)
    for block in neighbour_blocks(built, source, n, progress=progress, ranks=ranks):
        similarity = np.where(block.row < 0, 0.0, block.similarity)  # an approximate search may find fewer than n
        found = np.maximum((block.row >= 0).sum(axis=1), 1)
        bias[block.start : block.start + len(similarity)] = beta * similarity.sum(axis=1) / found
    return bias

"""A second look at the candidates of a search, with their vectors read from where they lie."""

import faiss
import numpy as np

from dinov2cli.search.plan import rerank_rows
from dinov2cli.search.vectors import Float32, Int64, Vectors


def rerank(vectors: Vectors, queries: Float32, candidates: Int64, k: int) -> tuple[Float32, Int64]:
    """The k candidates most similar to each query: cosine [n, k], row [n, k], most similar first.

    queries: [n, D]; candidates: rows [n, C], -1 where there is none. A row that several queries ask for is read once
    for all queries that are looked at together; memory stays at about 64 MB of candidates.
    """
    take = min(k, candidates.shape[1])
    similarity = np.empty((len(queries), take), dtype=np.float32)
    row = np.empty((len(queries), take), dtype=np.int64)
    step = max(1, rerank_rows(vectors.dim) // max(1, candidates.shape[1]))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        similarity[part], row[part] = _second_look(vectors, queries[part], candidates[part], take)
    return similarity, row


def _second_look(vectors: Vectors, queries: Float32, candidates: Int64, k: int) -> tuple[Float32, Int64]:
    there = candidates >= 0
    wanted, place = np.unique(candidates[there], return_inverse=True)
    products = np.full(candidates.shape, -np.inf, dtype=np.float32)
    if len(wanted):
        place_of = np.zeros(candidates.shape, dtype=np.int64)
        place_of[there] = place
        rows = vectors.gather(wanted)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
            faiss.swig_ptr(products),
            faiss.swig_ptr(queries),
            faiss.swig_ptr(rows),
            faiss.swig_ptr(place_of),
            vectors.dim,
            candidates.shape[0],
            candidates.shape[1],
        )
        products[~there] = -np.inf
    similarity: Float32 = products
    if k < candidates.shape[1]:
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        similarity, candidates = np.take_along_axis(similarity, best, 1), np.take_along_axis(candidates, best, 1)
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(candidates, order, 1)

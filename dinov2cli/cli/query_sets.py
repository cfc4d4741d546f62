"""The query sets of `dinov2 curate`: options of each behind its `?`, and the collections they name."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from dinov2cli.config.curate import QueryConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.curation.query_sets import QuerySet

OPTIONS = ("mode", "neighbours", "per_cluster", "per_set", "more_than", "include")
_DATA_KEYS = ("image", "label", "mask", "depth", "group", "is_query", "split", "stream", "config", "revision")
_DEMO_KEYS = ("split", "count", "size", "seed", "copies")


def parse_queries(texts: Sequence[str]) -> "list[QueryConfig]":
    """Query sets as given on the command line: `DATA?neighbours=4&label=name`; what is no option here belongs to DATA.

    Raises UserError naming every unknown option and every bad value of all sets together.
    """
    from pydantic import ValidationError

    from dinov2cli.config.curate import QueryConfig
    from dinov2cli.errors import UserError

    found, problems = [], []
    for text in texts:
        data, options, unknown = _split(text)
        problems += [f"{text}: {problem}" for problem in unknown]
        try:
            found.append(QueryConfig.model_validate({**options, "data": data}))
        except ValidationError as error:
            for detail in error.errors():
                expected = detail["msg"].removeprefix("Input ")
                problems.append(f"{text}: {detail['loc'][0]}: found {detail['input']!r}, {expected}")
    if problems:
        raise UserError("--query " + "\n  --query ".join(problems))
    return found


def _split(text: str) -> tuple[str, dict[str, str], list[str]]:
    """The DATA of a query, its options, and what is wrong with the rest behind the `?`."""
    import os

    from dinov2cli.data.spec import suggestion

    if "?" not in text or os.path.exists(text):
        return text, {}, []
    location, _, behind = text.rpartition("?")
    known = (*OPTIONS, *(_DEMO_KEYS if text.startswith("demo:") else _DATA_KEYS))
    options: dict[str, str] = {}
    rest, problems = [], []
    for part in filter(None, behind.split("&")):
        key, _, value = part.partition("=")
        if key in OPTIONS and value:
            options[key] = unquote(value)
        elif key in known:
            rest.append(part)
        else:
            hint = suggestion(key, known)
            problems.append(f"unknown option '{key}'{hint}; options of a query set: {', '.join(OPTIONS)}")
    return (f"{location}?{'&'.join(rest)}" if rest else location), options, problems


def identity(queries: "Sequence[QueryConfig]") -> list[dict[str, Any]]:
    """What shapes the result of each set but its images, which are among the inputs."""
    found = []
    for query in queries:
        content = query.model_dump(mode="json", exclude={"data"})
        for name in ("more_than", "per_cluster") if query.mode == "sample" else ("neighbours",):
            del content[name]
        found.append(content)
    return found


def budgets(query: "QueryConfig", images: int) -> str:
    """A set and what it may ask for, for a plan."""
    limit = "" if query.per_set is None else f", at most {query.per_set:,}"
    more = " and its own images" if query.include else ""
    if query.mode == "sample":
        asks = f"the {query.neighbours:,} nearest of each{limit}"
    else:
        asks = (
            f"up to {query.per_cluster:,} of each cluster with more than {query.more_than:,} of them"
            f"{limit or ', at most 1,000,000'}"
        )
    return f"{query.data} ({images:,} images): {query.mode}, {asks}{more}"


@contextlib.contextmanager
def naming(data: str) -> Iterator[None]:
    """Name the query set `data` in what is wrong with its images."""
    from dinov2cli.errors import InputError

    try:
        yield
    except InputError as error:
        if data in str(error):
            raise
        named = InputError(f"query set {data}: {error}")
        named.rank = error.rank
        raise named from error


def query_sets(queries: "Sequence[QueryConfig]", opened: "Sequence[Collection]") -> "list[QuerySet]":
    """The sets as the core takes them; `opened` are their collections, with vectors."""
    from dinov2cli.curation.query_sets import QuerySet, distinct_names

    names = distinct_names([query.data for query in queries])
    found = []
    for name, query, collection in zip(names, queries, opened, strict=True):
        assert collection.vectors is not None
        assert query.mode is not None
        assert query.neighbours is not None
        assert query.more_than is not None
        assert query.per_cluster is not None
        found.append(
            QuerySet(
                name,
                collection.vectors,
                collection.table().column("id"),
                mode=query.mode,
                k=query.neighbours,
                more_than=query.more_than,
                per_cluster=query.per_cluster,
                per_set=query.per_set,
            )
        )
    return found

"""The stages of `dinov2 dedup`: what each comparison is given."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.distributed import Ranks

if TYPE_CHECKING:
    import pyarrow as pa

    from dinov2cli.artifacts.parts import Parts
    from dinov2cli.cli.dedup_inputs import Work
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.curation.calibrate import Calibration
    from dinov2cli.curation.collection import Collection
    from dinov2cli.curation.fingerprints import Fingerprints
    from dinov2cli.curation.local import LocalMatcher
    from dinov2cli.curation.profile import SimilarityProfile
    from dinov2cli.curation.tables import Curated
    from dinov2cli.curation.thresholds import Thresholds
    from dinov2cli.curation.tiers import Reference
    from dinov2cli.search.recall import SearchReport
    from dinov2cli.search.vectors import Float32, Int64, Vectors


_UNITS = {"compare hashes": "hashes", "pairs": "pairs"}


@dataclass
class Result:
    """What was found, with what the report and the manifest say of it."""

    collection: "Collection"
    references: "list[Collection]"
    pool: "pa.Table"
    found: "Curated"
    profile: "SimilarityProfile | None"
    calibration: "Calibration | None"
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """What every stage is given."""

    config: "DedupConfig"
    talk: "Talk"
    ranks: Ranks
    parts: "Parts"
    progress: Callable[[str], Callable[[int, int], None]]

    def decoding(self) -> dict[str, Any]:
        """Arguments of whatever decodes images."""
        from dinov2cli.cli.frame import workers_for

        # Threads: the reading one waits most of the time.
        return {"workers": workers_for(self.config.workers) + 1, "ranks": self.ranks, "store": self.parts}


def found(work: "Work", path: Path, parts: "Parts", config: "DedupConfig", talk: "Talk", ranks: Ranks) -> Result:
    """Run all stages; what each finishes is kept in `parts`, embeddings beside them."""
    with talk.stages(_UNITS) as progress:
        return _found(work, path, _Run(config, talk, ranks, parts, progress))


def _found(work: "Work", path: Path, run: "_Run") -> Result:
    from dinov2cli.curation import dedup as core
    from dinov2cli.curation.profile import similarity_profile

    config, talk, ranks = run.config, run.talk, run.ranks
    given = work.collection
    work = _embedded(work, path, run)
    unreadable = _left_out(given, work.collection)
    collection = work.collection
    vectors = collection.vectors if "embedding" in work.tiers else None
    bias = _bias(work, run)
    calibration = _calibration(work, run)
    pool, prints = _fingerprinted(collection, work.tiers, run, "fingerprint")
    local = _local(collection, run) if "geometric" in work.tiers or config.verify == "geometric" else None
    known = []
    for number, reference in enumerate(work.references, start=1):
        theirs, ref_prints = _fingerprinted(reference, work.tiers, run, f"fingerprint reference {number}")
        if prints is not None and ref_prints is not None:
            prints, ref_prints = _pixels_of_both(collection, prints, reference, ref_prints, run, number)
        known.append(_known(reference, theirs, ref_prints, local, work.tiers))
    thresholds = _thresholds(collection, config, calibration)
    searches: list[SearchReport] = []
    chosen = core.dedup(
        pool,
        vectors=vectors,
        fingerprints=prints,
        local=local,
        confirm=config.verify == "geometric",
        exact="exact" in work.tiers,
        search_local="geometric" in work.tiers,
        unreadable=unreadable,
        thresholds=thresholds,
        k=config.neighbours,
        max_component=config.max_component,
        min_representative=config.min_representative,
        against=known,
        against_components=config.against_components,
        seed=config.seed,
        search={**_index(config), "bias": bias, "tell": searches.append},
        store=run.parts,
        progress=run.progress,
        ranks=ranks,
    )
    for line in [line for report in searches for line in report.lines()]:
        talk.say(line)
    facts: dict[str, Any] = {"thresholds": asdict(thresholds), "search": [report.record() for report in searches]}
    if calibration is not None:
        facts["calibration"] = calibration.facts()
    profile = None
    if vectors is not None and bias is None:
        profile = similarity_profile(vectors, thresholds.embedding, seed=config.seed, memory=config.memory, ranks=ranks)
    return Result(collection, work.references, pool, chosen, profile, calibration, facts)


def _index(config: "DedupConfig") -> dict[str, Any]:
    return {"index": config.index, "nprobe": config.nprobe, "recall": config.recall, "memory": config.memory}


def _embedded(work: "Work", path: Path, run: "_Run") -> "Work":
    """The collections with vectors where they are compared by them."""
    from dinov2cli.cli.selecting import with_vectors

    if "embedding" not in work.tiers:
        return work
    first = with_vectors(work.collection, run.config, run.talk, path / "embeddings", ranks=run.ranks)

    def like_first(other: "Collection", folder: str) -> "Collection":
        return with_vectors(other, run.config, run.talk, path / folder, like=first, ranks=run.ranks)

    references = [like_first(one, f"reference_embeddings_{i}") for i, one in enumerate(work.references)]
    background = like_first(work.background, "background_embeddings") if work.background else None
    return replace(work, collection=first, references=references, background=background)


def _left_out(given: "Collection", embedded: "Collection") -> list[str]:
    """Ids of images that could not be read when they were embedded just now, and so have no row."""
    if given.pool is not None or embedded.pool is None:
        return []
    there = set(embedded.pool.column("id").to_pylist())
    return [name for name in given.images().ids if name not in there]


def _bias(work: "Work", run: "_Run") -> Any:
    """What the background takes from the similarities of every row [N]; None without one."""
    from dinov2cli.search.normalise import background_bias

    if work.background is None:
        return None
    return background_bias(_vectors(work.collection), _vectors(work.background), **_normalising(run))


def _vectors(collection: "Collection | None") -> "Vectors":
    assert collection is not None and collection.vectors is not None
    return collection.vectors


def _normalising(run: "_Run") -> dict[str, Any]:
    config = run.config
    return {
        "n": config.background_neighbours,
        "beta": config.background_weight,
        "seed": config.seed,
        "memory": config.memory,
    }


def _calibration(work: "Work", run: "_Run") -> "Calibration | None":
    from dinov2cli.cli.calibrating import measured
    from dinov2cli.search.normalise import background_bias

    if not run.config.calibrate:
        return None
    background = work.background

    def bias(vectors: Any) -> Any:
        return background_bias(vectors, _vectors(background), **_normalising(run))

    given = bias if background is not None else None
    return measured(work.collection, work.tiers, run.config, run.talk, run.ranks, bias=given)


def _local(collection: "Collection", run: _Run) -> "LocalMatcher":
    """The images, compared by local features; features that do not fit into memory lie beside the parts."""
    from dinov2cli.curation.local import LocalMatcher
    from dinov2cli.curation.verify import Settings

    settings = Settings(
        seed=run.config.seed,
        memory=run.config.memory,
        scratch=run.parts.path.parent,
        key=_key(collection),
        progress=run.progress,
        **run.decoding(),
    )
    return LocalMatcher(collection.images(), settings)


def _key(collection: "Collection") -> str:
    return json.dumps(collection.fingerprint, sort_keys=True, default=str)


def _thresholds(collection: "Collection", config: "DedupConfig", calibration: "Calibration | None") -> "Thresholds":
    """Those asked for, else those measured, else those of the kind of model."""
    from dinov2cli.curation.thresholds import choose_thresholds

    tiers = {} if calibration is None else calibration.tiers
    return choose_thresholds(
        copy_detection=collection.copy_detection,
        embedding=config.threshold,
        against=config.against_threshold,
        hash_radius=config.hash_radius,
        measured=tiers["embedding"].threshold if "embedding" in tiers else None,
        measured_radius=int(tiers["perceptual"].threshold) if "perceptual" in tiers else None,
    )


def _known(
    reference: "Collection",
    pool: "pa.Table",
    prints: "Fingerprints | None",
    local: "LocalMatcher | None",
    tiers: list[str],
) -> "Reference":
    """What is known of a reference set."""
    from dinov2cli.curation.tiers import Reference

    def matched() -> "tuple[Float32, Int64]":
        assert local is not None
        return local.against(reference.images(), _key(reference))

    return Reference(
        ids=pool.column("id").to_pylist(),
        name=reference.spec,
        sha256=prints.sha256 if prints else _column(pool, "sha256"),
        pixels=prints.pixels if prints else None,
        hashes=prints.hashes if prints else None,
        vectors=reference.vectors if "embedding" in tiers else None,
        local=matched if local is not None and "geometric" in tiers else None,
    )


def _fingerprinted(
    collection: "Collection", tiers: list[str], run: _Run, label: str
) -> "tuple[pa.Table, Fingerprints | None]":
    """The pool table and, where the tiers need the pixels, the fingerprints of its images."""
    from dinov2cli.curation.fingerprints import fingerprint_images, pool_from_images
    from dinov2cli.data.bad import BadImages

    if "perceptual" not in tiers and collection.pool is not None:
        return collection.pool, None
    images = collection.images()
    prints = fingerprint_images(
        images,
        bad=BadImages(run.config.max_bad_fraction),
        progress=run.progress(label),
        name=label.replace(" ", "-"),
        **run.decoding(),
    )
    if "perceptual" not in tiers:
        prints = prints.exact_only()
    if collection.pool is None:
        return pool_from_images(images, prints), prints
    pool = collection.pool
    if "sharpness" not in pool.column_names:
        import pyarrow as pa

        pool = pool.append_column("sharpness", pa.array(prints.sharpness))
    return pool, prints


def _pixels_of_both(
    collection: "Collection",
    prints: "Fingerprints",
    reference: "Collection",
    theirs: "Fingerprints",
    run: _Run,
    number: int,
) -> "tuple[Fingerprints, Fingerprints]":
    """Both sets of fingerprints with the pixel digests of what may be in both."""
    from dinov2cli.curation.fingerprints import with_pixel_digests

    name = f"fingerprint-across-{number}"
    ours = with_pixel_digests(prints, collection.images(), other=theirs, name=name, **run.decoding())
    other = with_pixel_digests(theirs, reference.images(), other=prints, name=f"{name}-reference", **run.decoding())
    return ours, other


def _column(table: Any, name: str) -> Any:
    return table.column(name) if name in table.column_names else None

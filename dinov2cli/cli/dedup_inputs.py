"""What `dinov2 dedup` is given: its inputs, opened, and the comparisons that they allow."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.curation.collection import Collection


@dataclass
class Work:
    """What a command is about: the images, the reference sets, the background (None without), the tiers to run, and the
    inputs for the manifest."""

    collection: "Collection"
    references: "list[Collection]"
    background: "Collection | None"
    tiers: list[str]
    inputs: list[dict[str, Any]]


def opened(data: str, against: list[str], config: "DedupConfig", talk: "Talk") -> Work:
    """Open all inputs. Raises as `open_collection` does, and UserError for tiers that the input does not allow."""
    from dinov2cli.cli.selecting import embedding_model
    from dinov2cli.curation.collection import open_collection
    from dinov2cli.errors import UserError

    collection = open_collection(data)
    references = [open_collection(name) for name in against]
    tiers = _tiers(config, collection, talk)
    background = open_collection(config.background) if config.background else None
    if "embedding" not in tiers:
        _refuse_idle(config)
    if config.background and config.threshold is None and not config.calibrate:
        raise UserError(
            "--background changes the scale of similarities, so no threshold is known for them; give --calibrate, "
            "which measures one, or --threshold"
        )
    everything = [collection, *references, *([background] if background else [])]
    inputs = [c.fingerprint for c in everything]
    inputs += embedding_model(config, [*everything] if "embedding" in tiers else [])
    return Work(collection, references, background, tiers, inputs)


def plan(work: Work, config: "DedupConfig") -> dict[str, Any]:
    """The facts of a dry run; images without vectors are reckoned with 512 numbers each."""
    from dinov2cli.cli.costs import cost_facts, machines
    from dinov2cli.search.cost import estimate
    from dinov2cli.search.plan import plan_index

    facts: dict[str, Any] = {
        "images": work.collection.rows,
        "reference images": sum(reference.rows for reference in work.references),
        "tiers": work.tiers,
    }
    collection = work.collection
    rows = config.plan.images or collection.rows
    dim = collection.vectors.dim if collection.vectors is not None else 512
    stages = [stage for stage, runs in (
        ("hash", "perceptual" in work.tiers),
        ("embed", "embedding" in work.tiers and collection.vectors is None),
        ("edges", "embedding" in work.tiers),
        ("components", True),
    ) if runs]  # fmt: skip
    where = machines(config.plan)
    if "edges" in stages and not where.gpus:
        index = plan_index(
            rows, dim, queries=rows, k=config.neighbours, memory=config.memory, recall=config.recall,
            index=config.index, nprobe=config.nprobe,
        )  # fmt: skip
        facts["index"] = f"{index.factory}: {index.reason}"
    asks: dict[str, Any] = {"machines": where, "k": config.neighbours, "memory": config.memory}
    return facts | cost_facts(estimate(rows, dim, stages=tuple(stages), **asks), config.plan, rows)


def _refuse_idle(config: "DedupConfig") -> None:
    """Raise UserError for settings of the embedding tier where it does not run: they would do nothing."""
    from dinov2cli.errors import UserError

    asked = {
        "threshold": config.threshold,
        "background": config.background,
        "min_representative": config.min_representative,
    }
    idle = [name for name, value in asked.items() if value is not None]
    if idle:
        raise UserError(
            f"{', '.join(idle)}: of the embedding tier, which does not run here; give -m MODEL or the output of "
            "`dinov2 embed`, or leave it out"
        )


def _untrained(model: str | None) -> bool:
    """Whether a MODEL is the name of an architecture, and so has random weights."""
    from pathlib import Path

    from dinov2cli.models.registry import parse_architecture

    return model is not None and not Path(model).exists() and parse_architecture(model) is not None


def _tiers(config: "DedupConfig", collection: "Collection", talk: "Talk") -> list[str]:
    """The tiers to run: as asked, else those the input allows without decoding images that were decoded before."""
    from dinov2cli.errors import UserError

    embedded = collection.vectors is not None or config.model is not None
    if config.model is not None and collection.vectors is not None:
        talk.warn(f"{collection.spec} holds embeddings, which are used: the model of -m is not, except for other sets")
    if config.tiers is not None:
        if "embedding" in config.tiers and not embedded:
            raise UserError(
                f"--tiers embedding: {collection.spec} holds no embeddings; "
                "give -m MODEL, or the output of `dinov2 embed`"
            )
        return list(config.tiers)
    local = ["geometric"] if config.verify == "geometric" else []
    if not embedded:
        missed = "" if local else "; --verify geometric also finds crops and pages"
        talk.say(
            f"no model given: copies are found by bytes, pixels and perceptual hash{missed}; -m MODEL adds similarity"
        )
        return ["exact", "perceptual", *local]
    if collection.random or (collection.vectors is None and _untrained(config.model)):
        talk.warn(
            "embeddings of random weights tell copies from look-alikes badly; using hashes instead "
            "(--tiers embedding takes them nevertheless)"
        )
        return ["exact", "perceptual", *local]
    pixels = [] if collection.vectors is not None and not local else ["perceptual"]
    return ["exact", *pixels, *local, "embedding"]

"""What `dedup` and `curate` share: embeddings for inputs that come as images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.distributed import ALONE, Ranks

if TYPE_CHECKING:
    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import CurateConfig, DedupConfig
    from dinov2cli.curation.collection import Collection
    from dinov2cli.data.source import ImageSource


def embedding_model(
    config: "DedupConfig | CurateConfig", collections: "list[Collection | None]"
) -> list[dict[str, Any]]:
    """The manifest's entry of the model of `-m` where a collection needs it; a bad model fails here, early."""
    if config.model is None or all(c is None or c.vectors is not None for c in collections):
        return []
    from dinov2cli.cli.frame import canonical_model, model_input
    from dinov2cli.models.load import load_model

    spec = canonical_model(config.model)
    return [model_input(spec, load_model(spec, seed=config.seed).fingerprint)]


def with_vectors(
    collection: "Collection",
    config: "DedupConfig | CurateConfig",
    talk: "Talk",
    place: Path,
    *,
    like: "Collection | None" = None,
    ranks: Ranks = ALONE,
) -> "Collection":
    """Return `collection` with vectors, embedding its images into `place` when it has none (`ranks` share the work).

    `like` is the collection it will be compared with: its model is used, and embeddings of another model are refused.
    Raises UserError when there is neither a model nor embeddings.
    """
    from dinov2cli.cli.embed import run_embed
    from dinov2cli.config import EmbedConfig
    from dinov2cli.curation.collection import open_collection
    from dinov2cli.errors import InputError, UserError

    settings = None if like is None or like.embeddings is None else like.embeddings.manifest.config
    if collection.vectors is not None:
        _same_model(collection, collection.spec, like)
        if like is not None and like.vectors is not None and collection.vectors.dim != like.vectors.dim:
            raise InputError(
                f"{collection.spec} holds vectors of length {collection.vectors.dim}, {like.spec} of length "
                f"{like.vectors.dim}; expected the same: embed both with one model"
            )
        return collection
    if settings is not None:
        embed_config = EmbedConfig.model_validate({**settings, "workers": config.workers, "device": config.device})
    elif config.model is not None:
        embed_config = EmbedConfig(
            model=config.model, seed=config.seed, workers=config.workers, device=config.device,
            max_bad_fraction=config.max_bad_fraction,
        )  # fmt: skip
    else:
        raise UserError(
            f"{collection.spec} holds images without embeddings; give -m MODEL, or the output of `dinov2 embed`"
        )
    run_embed(collection.spec, place, embed_config, talk.inner(), ranks=ranks)
    embedded = open_collection(str(place))
    _same_model(embedded, collection.spec, like)
    return replace(embedded, spec=collection.spec, fingerprint=collection.fingerprint)


def _same_model(collection: "Collection", spec: str, like: "Collection | None") -> None:
    """Raise InputError unless both were embedded by one model: the weights behind a path may have changed since."""
    from dinov2cli.errors import InputError

    if like is None or like.embeddings is None or collection.embeddings is None:
        return
    ours, theirs = _made_by(collection), _made_by(like)
    if ours != theirs:
        raise InputError(
            f"{spec} was embedded by {ours}, {like.spec} by {theirs}; expected the same model: embed one of them again"
        )


def pictures(images: "Callable[[], ImageSource]", talk: "Talk") -> "ImageSource | None":
    """The images for a report; None, which the user is told, where they cannot be opened."""
    from dinov2cli.errors import InputError

    try:
        return images()
    except InputError as error:
        talk.say(f"the report has no pictures: {error}")
        return None


def _made_by(collection: "Collection") -> str:
    """Model and pooling of a collection's embeddings, in words that two of them can be compared by."""
    assert collection.embeddings is not None
    manifest = collection.embeddings.manifest
    weights = next((entry for entry in manifest.inputs if entry.get("kind") == "model"), {})
    named = {key: value for key, value in weights.items() if key not in ("spec", "kind", "file")}
    return f"{named or weights.get('spec')} with pool {manifest.config.get('pool')}"

"""`dinov2 dedup --calibrate`: thresholds measured on altered copies of the user's own images."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dinov2cli.distributed import Ranks

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.cli.talk import Talk
    from dinov2cli.config import DedupConfig
    from dinov2cli.curation.calibrate import Calibration
    from dinov2cli.curation.collection import Collection


def measured(
    collection: "Collection",
    tiers: list[str],
    config: "DedupConfig",
    talk: "Talk",
    ranks: Ranks,
    *,
    bias: "Callable[[np.ndarray], np.ndarray] | None" = None,
) -> "Calibration":
    """Calibrate the tiers that have a threshold; the main process measures, and all get what it found.

    `bias` gives what score normalisation subtracts from the similarities of vectors. The images behind the collection
    must be readable. Raises UserError for fewer images than calibration needs.
    """
    from dinov2cli.cli.frame import workers_for
    from dinov2cli.cli.talk import absolute
    from dinov2cli.curation.calibrate import calibrate
    from dinov2cli.data.bad import BadImages

    def measure() -> "Calibration":
        images = collection.images()
        with talk.progress("calibrate", 1) as advance:
            return calibrate(
                images,
                embed=array_embedder(collection, config, ranks) if "embedding" in tiers else None,
                bias=bias,
                perceptual="perceptual" in tiers,
                pool=collection.rows,
                false_merge=config.false_merge,
                images=config.calibrate_images,
                seed=config.seed,
                workers=workers_for(config.workers) + 1,
                bad=BadImages(config.max_bad_fraction),
                progress=absolute(advance),
            )

    found = ranks.first(measure)
    for line in found.messages():
        talk.say(line)
    return found


def array_embedder(
    collection: "Collection", config: "DedupConfig", ranks: Ranks
) -> "Callable[[list[Any]], np.ndarray]":
    """Turns images [H, W, 3] uint8 into vectors as the collection's own were made: same model, size and pooling."""
    import torch

    from dinov2cli.config import EmbedConfig
    from dinov2cli.device import choose_device, choose_precision
    from dinov2cli.evaluation.features import extract, view_of
    from dinov2cli.models.load import load_model

    assert collection.embeddings is not None
    settings = EmbedConfig.model_validate(collection.embeddings.manifest.config)
    assert settings.model is not None
    loaded = load_model(settings.model, img_size=settings.image_size, seed=settings.seed)
    device = choose_device(config.device, local_rank=ranks.local_rank)
    loaded.network.to(device)
    precision = choose_precision(settings.precision, device)[0]
    how = loaded.preprocess
    view = view_of(how)

    def embed(images: "list[np.ndarray]") -> "np.ndarray":
        batch = _Images(torch.stack([view(image, row) for row, image in enumerate(images)]))
        (features,) = extract(loaded.network, [batch], preprocess=how, pool=settings.pool, precision=precision)
        return features.pooled.numpy()

    return embed


class _Images:
    """A batch of uint8 images [n, 3, S, S]."""

    def __init__(self, images: Any) -> None:
        self.images = images

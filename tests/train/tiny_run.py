"""A small real run for the tests, here or as `python tiny_run.py RUN STEPS`: tiles of a photograph of scikit-learn."""

import sys
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image

from dinov2cli.data.augment import Augment
from dinov2cli.data.crops import MultiCrop
from dinov2cli.data.loader import CropLoader
from dinov2cli.data.source import open_source
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.loop import TrainResult, train
from dinov2cli.train.method import SelfDistillation
from dinov2cli.train.network import SSLModel, build_ssl_model
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import setup
from dinov2cli.train.phase import Phase
from dinov2cli.train.schedules import RunLength, Schedules
from dinov2cli.train.step import Settings

BATCH, SEED = 8, 7


class TileLoader:
    """Batches of crops of 64-pixel tiles of one photograph, keyed on the batch number alone."""

    def __init__(self) -> None:
        image = load_sample_image("china.jpg")
        self.tiles = [image[y : y + 64, x : x + 64] for y in range(0, 384, 64) for x in range(0, 640, 64)]
        self.crop = MultiCrop(global_size=32, local_size=16, local_number=2)
        self.position = 0

    def __iter__(self):
        while True:
            order = torch.randperm(len(self.tiles), generator=torch.Generator().manual_seed(self.position))[:BATCH]
            crops = [self.crop(self.tiles[i], SEED, self.position, i) for i in order.tolist()]
            epoch = torch.full((BATCH,), self.position)
            self.position += 1
            yield {
                "global_crops": torch.stack([c[0] for c in crops], dim=1),
                "local_crops": torch.stack([c[1] for c in crops], dim=1),
                "index": order,
                "epoch": epoch,
            }

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def tiny_model(*, centering: str = "sinkhorn", embed_dim: int = 32) -> SSLModel:
    backbone = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=embed_dim,
        depth=2,
        num_heads=2,
        layerscale=1.0,
        drop_path=0.3,
        generator=torch.Generator().manual_seed(SEED),
    )
    return build_ssl_model(backbone, prototypes=64, hidden=64, bottleneck=32, layers=2, centering=centering, seed=SEED)


def tiny_phase(steps: int = 0, *, lr: float = 2e-3, **changes) -> Phase:
    """A phase of `steps` steps, or of changes['length']."""
    defaults = {
        "schedules": Schedules(lr=lr, momentum=0.9),
        "length": RunLength(total=steps),
        "loader": TileLoader(),
        "batch_size": BATCH,
        "global_size": 32,
        "seed": SEED,
    }
    return Phase(**(defaults | changes))


def tiny_train(
    run: Path,
    steps: int,
    *,
    model: SSLModel | None = None,
    lr: float = 2e-3,
    phase: dict | None = None,
    step: dict | None = None,
    method: dict | None = None,
    **arguments,
) -> TrainResult:
    """Train to `steps` of a run laid out for `steps`; the other arguments change what `train` is given."""
    run.mkdir(parents=True, exist_ok=True)
    defaults = {
        "make_optimizer": partial(build_optimizer, depth=2, layerwise_decay=0.9),
        "phases": [tiny_phase(steps, lr=lr, **(phase or {}))],
        "method": SelfDistillation(**(method or {})),
        "settings": Settings(**({"seed": SEED} | (step or {}))),
        "augment": Augment(),
        "parallel": setup("cpu"),
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return train(run, models={"": model or tiny_model()}, **(defaults | arguments))


def worker_loader() -> CropLoader:
    """The product's own loader over demo tiles, with worker processes."""
    crop = MultiCrop(global_size=32, local_size=16, local_number=2)
    return CropLoader(open_source("demo:digits"), crop=crop, batch_size=BATCH, seed=SEED, workers=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loader = worker_loader() if sys.argv[3:] == ["workers"] else TileLoader()
    tiny_train(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        phase={"loader": loader},
        on_metrics=lambda line, total: print(line["step"], flush=True),
    )

"""Settings of the evaluations of frozen features."""

from typing import Annotated, Literal

from pydantic import Field

from dinov2cli.config.common import Amount, CommonConfig, Count, Share


class EvalConfig(CommonConfig):
    """Settings shared by the evaluations of frozen features."""

    image_size: Count | None = None
    batch_size: Count = 64
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    max_bad_fraction: Share = 0.01


class KnnConfig(EvalConfig):
    """Settings of `dinov2 eval knn`."""

    neighbours: list[Count] = Field([10, 20, 100, 200])
    temperature: Amount = 0.07
    pool: Literal["cls", "mean", "cls+mean"] = "cls"


class LinearConfig(EvalConfig):
    """Settings of `dinov2 eval linear`; learning rates are per 256 images, `steps` None is about ten passes."""

    learning_rates: list[Amount] = Field([1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1])
    blocks: list[Count] = Field([1, 4])
    steps: Count | None = None
    train_batch_size: Count = 128
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1

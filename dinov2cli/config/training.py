"""Settings that `dinov2 pretrain` and `dinov2 distill` have in common, a section for each part of the method."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dinov2cli.config.common import Amount, AmountOrZero, Auto, CommonConfig, Count, CountOrZero, Section, Share


class DataSection(Section):
    """`batch_size` counts images per rank; `global_batch_size` those of all ranks together, for any number of them.

    `scaled_decode` decodes large JPEG files at 1/2, 1/4 or 1/8 where every crop is still made smaller. `shuffle`: exact
    mixes all images of an epoch, blocks only those of `window` tar shards or Parquet row groups at a time, which are
    read together; auto is blocks for streams. A loader worker that dies is replaced, until `max_worker_deaths` have.
    """

    batch_size: Count = 64
    global_batch_size: Count | None = None
    max_bad_fraction: Share = 0.01
    scaled_decode: bool = False
    shuffle: Literal["auto", "exact", "blocks"] = "auto"
    window: Count = 16
    max_worker_deaths: CountOrZero = 10


class ModelSection(Section):
    """The backbone; None keeps the architecture's own value, `layerscale: 0` leaves LayerScale out.

    `init_from` continues from the weights of any MODEL; without it `init: structured` starts from positions, attention
    and patch projection that let a small model learn within minutes.
    """

    arch: str = "vits14"
    patch_size: Count | None = None
    embed_dim: Count | None = None
    depth: Count | None = None
    num_heads: Count | None = None
    registers: CountOrZero | None = None
    ffn: Literal["mlp", "swiglu"] | None = None
    layerscale: AmountOrZero | None = None
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path_uniform: bool = True
    init: Literal["standard", "structured"] = "standard"
    init_from: str | None = None


class HeadsSection(Section):
    """Projection heads; `untied` gives iBOT a head of its own. `auto`: from batch and number of images."""

    prototypes: Count | Auto = 65536
    ibot_prototypes: Count | None = None
    ibot_bottleneck: Count | None = None
    hidden: Count = 2048
    bottleneck: Count = 256
    layers: Count = 3
    untied: bool = True
    freeze_gain: bool = False


class CropsSection(Section):
    """Sizes in pixels (multiples of the patch size), scales as shares of the image's area."""

    global_size: Count = 224
    local_size: Count = 98
    local_number: CountOrZero = 8
    global_scale: tuple[Share, Share] = (0.32, 1.0)
    local_scale: tuple[Share, Share] = (0.05, 0.32)


class AugmentSection(Section):
    """Colour augmentation. `blur: released` repeats the inverted probabilities the released weights were trained with.

    `jitter` holds the strengths of brightness, contrast, saturation and hue; `blur_sigma` is in pixels of the crop.
    """

    jitter: tuple[AmountOrZero, AmountOrZero, AmountOrZero, AmountOrZero] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: Share = 0.8
    gray_probability: Share = 0.2
    blur: Literal["nominal", "released"] = "nominal"
    blur_sigma: tuple[Amount, Amount] = (0.1, 2.0)
    solarize_probability: Share = 0.2


class OptimSection(Section):
    """AdamW. `lr` belongs to a batch of `reference_batch` and is scaled by the square root of the batch ratio."""

    lr: Amount = 4e-3
    reference_batch: Count = 1024
    min_lr: AmountOrZero = 1e-6
    weight_decay: AmountOrZero = 0.04
    weight_decay_end: AmountOrZero = 0.4
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip: AmountOrZero = 3.0
    layerwise_decay: Share = 0.9
    patch_embed_lr: AmountOrZero = 0.2
    warmup: Share | Auto = 0.1
    freeze_last_layer: Share = 0.01


class TrainSection(Section):
    """Length of the run: `steps`, or a `budget` such as `100 epochs`, `20000 images`, `300 steps`, `30m`.

    `accumulate` splits each batch into that many parts for memory's sake; Sinkhorn and KoLeo then see a part at a time.
    `compile` compiles the blocks; `graphs` also replays them as CUDA graphs, for small models on one GPU.
    After `max_bad_steps` skipped steps in a row (loss or gradient not finite) the run stops.
    """

    steps: Count | None = None
    budget: str | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: Count = 1
    activation_checkpointing: bool = False
    compile: bool | Literal["graphs"] = False
    max_bad_steps: Count = 5


class PhaseSection(Section):
    """A further stretch of the run after `train`'s own, as the paper's last one at high resolution.

    Its length is `steps` or `budget`; sizes and batch left out stay as before. Every schedule of the run is repeated,
    compressed to this length, the learning rate times `lr_scale`. `batch_size` counts the images of a rank or, where
    data.global_batch_size is given, of all.
    """

    steps: Count | None = None
    budget: str | None = None
    global_size: Count | None = None
    local_size: Count | None = None
    batch_size: Count | None = None
    lr_scale: Amount = 0.1

    @model_validator(mode="after")
    def _one_length(self) -> "PhaseSection":
        if (self.steps is None) == (self.budget is None):
            raise ValueError("steps or budget, expected one of them")
        return self


class ScopeSection(Section):
    """Whether a thing is computed over the images of all ranks or, as in the paper, of each one's own."""

    scope: Literal["global", "rank"] = "global"


class ParallelSection(Section):
    """How a run is spread over the ranks of a launch; changes speed and memory, not the result.

    `auto` is what the launcher asks for, else ddp (a copy on every rank). `fsdp` shards weights, gradients, moments and
    teacher over all ranks, `hybrid` over `shard_ranks` neighbours (default: a node's). Without `reshard_after_forward`
    weights stay gathered between the passes: faster, more memory. `offload` keeps the shards in the host's memory.
    """

    sharding: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    shard_ranks: Count | None = None
    reshard_after_forward: bool | None = None
    offload: bool | None = None


class CheckpointSection(Section):
    """A checkpoint every `every` steps and at the end; the newest `keep` stay, and every multiple of `keep_every`.

    In the `background` it is written beside the training, from a copy in the host's memory.
    """

    every: Count = 1000
    keep: Count = 2
    keep_every: CountOrZero = 0
    background: bool = False


class LogSection(Section):
    """A line of metrics.jsonl every `every` steps; TensorBoard files when asked; pictures of crops and features."""

    every: Count = 10
    tensorboard: bool = False
    pictures: bool = True


class EvalSection(Section):
    """PCA maps of a few images, and k-NN where the training source has labels, every `every` steps; 0 = never."""

    every: CountOrZero = 0


class TrainingConfig(CommonConfig):
    """Settings of a training run."""

    # Two ways to say one thing: given by a flag, one replaces the other of a recipe.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("train.steps", "train.budget"),
        ("data.batch_size", "data.global_batch_size"),
    )
    # What a recipe says of its own architecture does not hold for another one that is asked for.
    details: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("model.arch", "students"),
        tuple(f"model.{key}" for key in ("patch_size", "embed_dim", "depth", "num_heads", "registers", "ffn")),
    )

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    heads: HeadsSection = HeadsSection()
    crops: CropsSection = CropsSection()
    augment: AugmentSection = AugmentSection()
    optim: OptimSection = OptimSection()
    koleo: ScopeSection = ScopeSection()
    parallel: ParallelSection = ParallelSection()
    train: TrainSection = TrainSection()
    phases: list[PhaseSection] = Field([])
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()

    @property
    @abstractmethod
    def moving_average(self) -> Any:
        """The section with `momentum` and `momentum_end` of the average of a student's weights."""

    def learners(self) -> dict[str, ModelSection]:
        """The students by name; one that is alone has the name ""."""
        return {"": self.model}

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.train.steps is not None and self.train.budget is not None:
            raise ValueError("train.steps and train.budget both set, expected one of them")
        batch, parts = self.data.batch_size, self.train.accumulate
        sizes = {"data": batch} | {f"phases[{i}]": phase.batch_size or 0 for i, phase in enumerate(self.phases)}
        for where, own in sizes.items():
            batch = own or batch
            if batch % parts or (parts > 1 and batch < 2 * parts):
                raise ValueError(
                    f"train.accumulate: found {parts} parts of {batch} images ({where}.batch_size), "
                    "expected a divisor that leaves 2 images or more"
                )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self.crops, name)
            if not 0 < low <= high:
                raise ValueError(f"crops.{name} is [{low}, {high}], expected 0 < low <= high <= 1")
        return self

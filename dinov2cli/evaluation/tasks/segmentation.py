"""`dinov2 eval segmentation`: semantic segmentation on frozen patch tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, MinLen

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Panel, Task, setting

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.evaluation.dense.maps import Seeing
    from dinov2cli.evaluation.segmentation.head import LinearSegmenter, Overlaps
    from dinov2cli.evaluation.segmentation.masks import Masks
    from dinov2cli.evaluation.segmentation.score import Scored
    from dinov2cli.evaluation.tasks.trial import Trial

_SIZE, _SIZE_MS = 512, 640  # pixels of the shorter side, paper §7.4
_EPOCHS, _LEAST, _MOST = 32, 1_000, 40_000  # 40,000 batches of 16 are 32 passes over ADE20K
_PANELS = 6
_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Semantic segmentation: a linear head on frozen patch tokens, mean IoU.

    Both sets need masks: files of one channel with a class number in every pixel, in the column that `?mask=COLUMN`
    names. 255 is ignored (see --ignore). The defaults are those of the paper for ADE20K (with reduce_zero_label=true).
    """

    name: ClassVar[str] = "segmentation"

    head: Literal["linear", "ms"] = setting(
        "linear", "linear: last block, one scale; ms: last 4 blocks, several scales and mirrored", flag="--head"
    )
    size: Annotated[int, Ge(-1)] = setting(
        -1, "shorter side of what the model sees, in pixels (-1: 512, or 640 for ms; 0: as images are)", flag="--size"
    )
    window: Annotated[int, Ge(0)] = setting(0, "side of the sliding window in pixels (0: the size)")
    stride: Annotated[int, Ge(0)] = setting(0, "step of the sliding window in pixels (0: two thirds of it)")
    classes: Annotated[int, Ge(0)] = setting(0, "number of classes (0: the highest in the training masks, and one)")
    ignore: Annotated[list[int], MinLen(0)] = setting(
        [255], "numbers in mask files, as stored, of pixels that do not count", flag="--ignore"
    )
    reduce_zero_label: bool = setting(False, "0 is no class, and 1 the first one (ADE20K)")
    resize_target: bool = setting(False, "masks of another size are brought to the image's by nearest pixels")
    augmentation: Literal["none", "flip", "crops"] = setting(
        "flip",
        "of training images; crops, the paper's (random scale 0.5 to 2, crop, flip), runs the model at every step",
    )
    steps: Annotated[int, Ge(0)] = setting(0, "training steps (0: 32 epochs, at least 1,000 and at most 40,000)")
    train_batch_size: Annotated[int, Gt(0)] = setting(16, "windows per training step, over all ranks")
    lr: Annotated[float, Gt(0)] = setting(1e-3, "highest learning rate")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "adamw, or sgd with momentum 0.9")
    weight_decay: Annotated[float, Ge(0)] = setting(1e-4, "weight decay")
    loss_stride: Annotated[int, Gt(0)] = setting(
        2, "the loss reads every n-th row and column of pixels (1: all, slower)"
    )
    memory: Annotated[float, Ge(0)] = setting(
        8.0, "GiB of token maps to hold, of all processes; more are computed again at every step"
    )
    scales: Annotated[list[Annotated[float, Gt(0)]], MinLen(0)] = setting(
        [], "factors on the size in the test (empty: 1, or 1 to 3 in five steps for ms)"
    )

    def check(self, trial: "Trial") -> None:
        from dinov2cli.data.dense import require_role

        assert trial.train is not None
        for source in (trial.train, trial.test):
            require_role(source, "mask")
        self._seeing(trial)

    def _seeing(self, trial: "Trial") -> "Seeing":
        from dinov2cli.evaluation.dense.maps import Seeing
        from dinov2cli.evaluation.dense.tokens import Sight, last_blocks

        default = _SIZE_MS if self.head == "ms" else _SIZE
        size = default if self.size < 0 else self.size
        window = self.window or size or default
        encoder = trial.model.encoder
        return Seeing(
            encoder=encoder.to(trial.device),
            normalize=trial.model.preprocess.normalize,
            sight=Sight(size or None, window, self.stride or max(1, window * 2 // 3), longest=4 * size or None),
            blocks=tuple(last_blocks(encoder, 4 if self.head == "ms" else 1)),
            device=trial.device,
            precision=trial.precision,
            batch_size=max(1, trial.batch_size // 4),
            mirrored=self.augmentation == "flip",
        )

    def collect(self, trial: "Trial") -> Any:
        from dinov2cli.evaluation.segmentation.labels import Labelling

        seeing = self._seeing(trial)
        labelling = Labelling(tuple(self.ignore), self.reduce_zero_label, self.classes or None)
        head, masks, settings = self._trained(trial, seeing, labelling)
        labelling = Labelling(labelling.ignore, labelling.reduce_zero_label, head.classifier.out_features)
        tested = self._tested(trial, seeing, labelling, head)
        return head, labelling, masks, settings, tested

    def _trained(
        self, trial: "Trial", seeing: "Seeing", labelling: Any
    ) -> "tuple[LinearSegmenter, Masks, dict[str, Any]]":
        """The head, trained on every rank alike."""
        import torch

        from dinov2cli.evaluation.dense.batches import StoredBatches
        from dinov2cli.evaluation.dense.training import group_of, train_head
        from dinov2cli.evaluation.segmentation.head import LinearSegmenter, learning_rate, segmentation_loss

        assert trial.train is not None
        batches, masks = self._batches(trial, seeing, labelling)
        trial.note_digests(trial.train, masks.digests)
        classes = self.classes or len(masks.pixels)
        generator = torch.Generator().manual_seed(trial.seed)
        channels = len(seeing.blocks) * seeing.encoder.embed_dim
        head = LinearSegmenter(channels, classes, generator=generator, group=group_of(trial.ranks)).to(trial.device)
        steps = self.steps or min(max(_EPOCHS * len(batches) // self.train_batch_size, _LEAST), _MOST)
        optimizer = (
            torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            if self.optimizer == "adamw"
            else torch.optim.SGD(head.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        )
        stage = None if trial.store is None else trial.store.stage("segmentation-head", self._key(trial, seeing))
        with trial.progress("training the head", steps, "steps") as advance:
            trained = train_head(
                head,
                optimizer,
                batches,
                lambda parts: segmentation_loss(head, parts, seeing, stride=self.loss_stride),
                steps=steps,
                rate=lambda step: learning_rate(step, steps),
                ranks=trial.ranks,
                stage=stage,
                every=_EVERY,
                on_step=advance,
            )
        kept = isinstance(batches, StoredBatches)
        settings: dict[str, Any] = {"steps": steps, "train_images": len(masks.rows), "train_examples": len(batches)}
        settings |= {"token_maps": "stored" if kept else "computed at every step"}
        return head, masks, settings | {"final_loss": float(trained.losses[-min(50, steps) :].mean())}

    def _batches(self, trial: "Trial", seeing: "Seeing", labelling: Any) -> Any:
        """(what a step is trained on, masks): from stored maps where they fit, else images as they are read."""
        from dinov2cli.evaluation.cache import features_key
        from dinov2cli.evaluation.dense.batches import Augmentation, ReadBatches, StoredBatches
        from dinov2cli.evaluation.dense.maps import map_set
        from dinov2cli.evaluation.segmentation.masks import masks_of_maps, masks_of_source

        source, ranks = trial.train, trial.ranks
        assert source is not None
        reading: dict[str, Any] = {"workers": trial.workers, "resize_target": self.resize_target, "ranks": ranks}
        bad = trial.bad_images(source)
        if self.augmentation != "crops" and self._fits(trial, seeing):
            stage = None
            if trial.cache is not None:
                stage = trial.cache.stage("token-maps", features_key(trial, source, None) | seeing.key())
            with trial.progress("token maps of the training images", len(source)) as advance:
                found = map_set(
                    source, seeing, bad=bad, workers=trial.workers, stage=stage, ranks=ranks, advance=advance
                )
            masks = masks_of_maps(source, found, seeing.sight, labelling, bad=bad, **reading)
            found = found.only(masks.rows)
            return StoredBatches(
                found, masks.targets, seeing.sight, batch_size=self.train_batch_size, seed=trial.seed
            ), masks
        masks = masks_of_source(source, labelling, bad=bad, **reading)
        one = (1.0, 1.0)
        augmentation = {"crops": Augmentation(), "flip": Augmentation(one), "none": Augmentation(one, 0.0)}

        def prepared(target: "np.ndarray", name: str) -> Any:
            import torch

            return torch.from_numpy(labelling.read(target, name))

        batches = ReadBatches(
            source, "mask", masks.rows, seeing.sight, prepared,
            augmentation=augmentation[self.augmentation], batch_size=self.train_batch_size, seed=trial.seed, **reading,
        )  # fmt: skip
        return batches, masks

    def _fits(self, trial: "Trial", seeing: "Seeing") -> bool:
        from dinov2cli.evaluation.dense.maps import expected_bytes

        assert trial.train is not None
        source = trial.train
        gib = trial.ranks.first(lambda: expected_bytes(source, seeing)) / 2**30
        if gib > self.memory:
            trial.say(
                f"token maps of {len(source):,} images would take {gib:.1f} GiB, memory is "
                f"{self.memory:g}: the model runs at every step instead"
            )
        return gib <= self.memory

    def _key(self, trial: "Trial", seeing: "Seeing") -> dict[str, Any]:
        """What the head depends on."""
        from dataclasses import asdict

        from dinov2cli.evaluation.cache import features_key

        assert trial.train is not None
        key = features_key(trial, trial.train, None) | seeing.key() | asdict(self)
        return key | {"masks": trial.train.spec, "seed": trial.seed}

    def _tested(self, trial: "Trial", seeing: "Seeing", labelling: Any, head: "LinearSegmenter") -> "Scored":
        from dinov2cli.evaluation.dense.training import digest_of
        from dinov2cli.evaluation.segmentation.score import score

        stage = None
        if trial.store is not None:
            key = self._key(trial, seeing) | {"head": digest_of(head), "test": trial.test.fingerprint()}
            stage = trial.store.stage("segmentation-test", key)
        with trial.progress("segmenting the test images", len(trial.test)) as advance:
            scored = score(
                head,
                seeing,
                trial.test,
                labelling,
                bad=trial.bad_images(trial.test),
                scales=self._scales,
                mirror=self.head == "ms",
                resize_target=self.resize_target,
                workers=trial.workers,
                stage=stage,
                ranks=trial.ranks,
                advance=advance,
            )
        trial.note_digests(trial.test, scored.digests)
        return scored

    @property
    def _scales(self) -> tuple[float, ...]:
        from dinov2cli.evaluation.segmentation.head import SCALES

        return tuple(self.scales) or (SCALES if self.head == "ms" else (1.0,))

    def judge(self, trial: "Trial", collected: Any) -> Judged:
        import numpy as np
        import pyarrow as pa

        from dinov2cli.evaluation.segmentation.head import constant_answer
        from dinov2cli.evaluation.statistics import ratio

        head, labelling, masks, settings, scored = collected
        counts: Overlaps = scored.overlaps
        ids = trial.test.ids
        units = [ids[row] for row in scored.rows]
        common = int(masks.pixels.argmax())
        floor = constant_answer(counts.truth, common)
        iou = ratio(counts.both, counts.unions)
        pixels = ratio(counts.both.sum(1), counts.truth.sum(1))
        absent = np.flatnonzero((counts.truth.sum(0) > 0) & (_padded(masks.pixels, counts.truth.shape[1]) == 0))
        seeing = self._seeing(trial)
        sight = seeing.sight
        settings |= {
            "head": "+ms" if self.head == "ms" else "linear",
            "blocks": list(seeing.blocks),
            "classes": counts.truth.shape[1],
            "ignore": self.ignore,
            "reduce_zero_label": self.reduce_zero_label,
            "size": sight.shorter or "as images are",
            "window": sight.window,
            "stride": sight.stride,
            "scales": list(self._scales),
            "mirrored": self.head == "ms",
            "augmentation": self.augmentation,
            "batch": self.train_batch_size,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "weight_decay": self.weight_decay,
            "loss_stride": self.loss_stride,
            "seed": trial.seed,
            "iou_by_class": [None if np.isnan(value) else round(float(value), 6) for value in counts.class_ious()],
            "most_frequent_class": {
                "class": common,
                "mIoU": ratio(floor.both, floor.unions).value(),
                "pixel_accuracy": ratio(floor.both.sum(1), floor.truth.sum(1)).value(),
            },
        }
        notes = []
        if len(absent):
            notes.append(
                f"classes {', '.join(map(str, absent[:10]))}{' …' if len(absent) > 10 else ''} of the test masks are "
                "in no training mask: no pixel can be found to be of them, and they count with 0"
            )
        table = pa.table({"id": units, "mIoU": counts.image_ious(), "pixel_accuracy": counts.image_accuracies()})
        return Judged(
            figures=[
                Figure("mIoU", iou),
                Figure("pixel_accuracy", pixels),
                Figure("mean_class_accuracy", ratio(counts.both, counts.truth)),
            ],
            units=units,
            predictions=table,
            settings=settings,
            notes=notes,
            panels=self._panels(trial, seeing, labelling, head, scored.rows),
        )

    def _panels(
        self, trial: "Trial", seeing: "Seeing", labelling: Any, head: "LinearSegmenter", rows: "np.ndarray"
    ) -> list[Panel]:
        import numpy as np

        from dinov2cli.data.dense import read_pair
        from dinov2cli.evaluation.segmentation.head import segment
        from dinov2cli.evaluation.segmentation.labels import coloured

        panels = []
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, _PANELS).astype(int))]:
            pair = read_pair(trial.test, int(row), "mask", resize_target=self.resize_target)
            (found,) = segment(head, seeing, [pair.image], scales=self._scales, mirror=self.head == "ms")
            images = [pair.image.permute(1, 2, 0).numpy(), coloured(found)]
            images.append(coloured(labelling.read(pair.target, pair.name)))
            panels.append(
                Panel(trial.test.ids[int(row)], [_small(image) for image in images], ["image", "found", "true"])
            )
        return panels


def _padded(pixels: "np.ndarray", classes: int) -> "np.ndarray":
    import numpy as np

    return np.pad(pixels, (0, classes - len(pixels)))


def _small(image: "np.ndarray") -> "np.ndarray":
    """At most 480 pixels a side, by leaving out rows and columns."""
    step = -(-max(image.shape[:2]) // 480)
    return image[::step, ::step].copy()

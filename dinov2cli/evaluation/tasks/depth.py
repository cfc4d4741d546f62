"""`dinov2 eval depth`: monocular depth from the tokens of a frozen backbone, by a linear or a DPT head."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Panel, Task, setting

if TYPE_CHECKING:
    import torch

    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.dense.maps import Seeing
    from dinov2cli.evaluation.depth.data import DepthScale, Survey
    from dinov2cli.evaluation.depth.prediction import DepthFindings, Predictor
    from dinov2cli.evaluation.depth.training import Recipe
    from dinov2cli.evaluation.tasks.trial import Trial


@dataclass(frozen=True)
class Collected:
    """What all ranks come to, and the main one judges."""

    predictor: "Predictor"
    found: "DepthFindings"
    train: "Survey"
    test: "Survey"
    recipe: "Recipe"
    losses: Any


@dataclass(frozen=True, kw_only=True)
class Depth(Task):
    """Train a head that predicts depth from patch tokens of a frozen backbone, and judge it on other images."""

    name: ClassVar[str] = "depth"

    head: Literal["lin1", "lin4", "dpt"] = setting(
        "lin1", "linear on the last block, linear on four blocks, or the DPT decoder on these", flag="--head"
    )
    units_per_metre: Annotated[float, Gt(0)] = setting(
        1.0, "stored number for one metre: 1000 for millimetres, 256 for KITTI", flag="--units-per-metre"
    )
    min_depth: Annotated[float, Gt(0)] = setting(1e-3, "metres; only depths above it count")
    max_depth: Annotated[float, Gt(0)] = setting(
        10.0, "metres; only depths below it count: 80 for KITTI", flag="--max-depth"
    )
    crop: Literal["none", "eigen", "garg"] = setting(
        "none", "part of a test image that counts: eigen for NYUd, garg for KITTI", flag="--crop"
    )
    size: Annotated[int, Ge(1)] | None = setting(
        None, "pixels of the shorter side as the model sees it; as stored if not set"
    )
    flip: bool = setting(True, "predict the mirror image of a test image too, and take the mean")
    bins: Annotated[int, Ge(2)] = setting(256, "depth bins of the linear heads")
    channels: Annotated[int, Ge(1)] = setting(256, "width of the DPT decoder")
    steps: Annotated[int, Ge(1)] | None = setting(
        None, "training steps; if not set 25 passes, but 1,000 at least and 38,400 at most"
    )
    train_batch_size: Annotated[int, Ge(1)] = setting(16, "images per training step, over all processes")
    lr: Annotated[float, Gt(0)] | None = setting(
        None, "peak learning rate of AdamW; if not set 3e-3 for the linear heads, 3e-4 for dpt"
    )
    weight_decay: Annotated[float, Ge(0)] = setting(0.01, "weight decay of AdamW")
    warmup: Annotated[float, Ge(0), Le(1)] = setting(1 / 3, "share of the steps during which the learning rate rises")
    gradient_loss: Annotated[float, Ge(0)] = setting(0.5, "weight of the multi-scale gradient loss")
    train_crop: Annotated[float, Gt(0), Le(1)] = setting(0.85, "share of each side that a training crop keeps")
    train_flip: Annotated[float, Ge(0), Le(1)] = setting(0.5, "probability of a mirror image in training")
    train_colour: Annotated[float, Ge(0), Le(1)] = setting(0.5, "probability of a change of colours in training")
    resize_target: bool = setting(False, "bring depth maps of another size than the image to its size")
    panels: Annotated[int, Ge(0)] = setting(6, "test images whose depth the report shows")

    def check(self, trial: "Trial") -> None:
        """A model with tokens, depth columns on both sides, and numbers that fit together."""
        from dinov2cli.data.dense import require_role
        from dinov2cli.evaluation.depth.measures import bin_depths

        assert trial.train is not None
        _ = trial.model.encoder
        self._scale()
        bin_depths(self.bins, self.min_depth, self.max_depth)
        for source in (trial.train, trial.test):
            require_role(source, "depth")

    def collect(self, trial: "Trial") -> Collected:
        """Look both sets through, train the head and measure its errors: the ranks share each of these."""
        from dinov2cli.evaluation.depth.prediction import Predictor

        assert trial.train is not None
        train, test = self._surveyed(trial, trial.train), self._surveyed(trial, trial.test)
        recipe = self._recipe(len(train.rows))
        seeing = self._seeing(trial)
        head, losses = self._trained(trial, train, recipe, seeing)
        predictor = Predictor(head, seeing, self.flip)
        return Collected(predictor, self._tested(trial, predictor, train, test), train, test, recipe, losses)

    def judge(self, trial: "Trial", collected: Collected) -> Judged:
        """Errors of each image, averaged over the images."""
        import pyarrow as pa

        from dinov2cli.evaluation.depth.data import doubts

        assert trial.train is not None
        found, errors = collected.found, collected.found.errors
        ids = [trial.test.ids[row] for row in found.rows]
        predictions = pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "rmse": errors.rmse,
                "abs_rel": errors.abs_rel,
                "delta1": errors.deltas[:, 0],
            }
        )
        sides = ((trial.train, collected.train), (trial.test, collected.test))
        notes = [note for source, side in sides for note in doubts(side, self._scale(), source.spec)]
        return Judged(
            figures=_figures(found),
            units=ids,
            predictions=predictions,
            settings=self._found(trial, collected),
            notes=[*_notes(trial, found), *dict.fromkeys(notes)],
            panels=self._panels(trial, collected),
        )

    def _scale(self) -> "DepthScale":
        from dinov2cli.evaluation.depth.data import DepthScale

        return DepthScale(self.units_per_metre, self.min_depth, self.max_depth, self.resize_target)

    def _recipe(self, images: int) -> "Recipe":
        from dinov2cli.evaluation.depth.training import Recipe, default_rate, default_steps

        return Recipe(
            steps=self.steps or default_steps(images, self.train_batch_size),
            batch_size=self.train_batch_size,
            lr=self.lr or default_rate(self.head),
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            gradient=self.gradient_loss,
            crop=self.train_crop,
            flip=self.train_flip,
            colour=self.train_colour,
        )

    def _seeing(self, trial: "Trial") -> "Seeing":
        from dinov2cli.evaluation.dense.maps import Seeing
        from dinov2cli.evaluation.dense.tokens import Sight
        from dinov2cli.evaluation.depth.heads import head_blocks
        from dinov2cli.evaluation.depth.training import WHOLE

        encoder = trial.model.encoder
        return Seeing(
            encoder.to(trial.device),
            trial.model.preprocess.normalize,
            Sight(self.size, WHOLE, WHOLE, longest=4 * self.size if self.size else None),
            tuple(head_blocks(self.head, encoder.depth)),
            trial.device,
            precision=trial.precision,
            batch_size=trial.batch_size,
            norm=False,
        )

    def _surveyed(self, trial: "Trial", source: "ImageSource") -> "Survey":
        from dataclasses import asdict

        from dinov2cli.evaluation.depth.data import survey

        key = {"data": source.content_hash(), "spec": source.spec, **asdict(self._scale())}
        with trial.progress(f"depths of {source.spec}", len(source)) as advance:
            found = survey(
                source,
                self._scale(),
                bad=trial.bad_images(source),
                workers=trial.workers,
                stage=None if trial.store is None else trial.store.stage("depth-survey", key),
                ranks=trial.ranks,
                progress=_by_steps(advance),
            )
        trial.note_digests(source, found.digests)
        return found

    def _trained(
        self, trial: "Trial", train: "Survey", recipe: "Recipe", seeing: "Seeing"
    ) -> "tuple[torch.nn.Module, Any]":
        """The head and its losses [steps]."""
        from dataclasses import asdict

        import torch

        from dinov2cli.evaluation.depth.heads import build_head
        from dinov2cli.evaluation.depth.training import train_depth

        assert trial.train is not None
        head = build_head(
            self.head,
            seeing.encoder.embed_dim,
            bins=self.bins,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
            channels=self.channels,
            start=train.mean,
            generator=torch.Generator().manual_seed(trial.seed),
        ).to(trial.device)
        key = {**self._key(trial), **asdict(recipe), "bins": self.bins, "channels": self.channels, "seed": trial.seed}
        with trial.progress(f"depth head {self.head}", recipe.steps, "steps") as advance:
            trained = train_depth(
                head,
                trial.train,
                train.rows,
                seeing,
                self._scale(),
                recipe,
                seed=trial.seed,
                workers=trial.workers,
                ranks=trial.ranks,
                stage=None if trial.store is None else trial.store.stage("depth-head", key),
                on_step=advance,
            )
        return head, trained.losses

    def _tested(self, trial: "Trial", predictor: "Predictor", train: "Survey", test: "Survey") -> "DepthFindings":
        from dinov2cli.evaluation.depth.prediction import errors_on

        key = {
            **self._key(trial),
            "test": [trial.test.content_hash(), trial.test.spec],
            "numbers": predictor.digest(),
            "crop": self.crop,
            "flip": self.flip,
        }
        with trial.progress(f"depth of {trial.test.spec}", len(test.rows)) as advance:
            return errors_on(
                predictor,
                trial.test,
                test.rows,
                self._scale(),
                train,
                crop=self.crop,
                workers=trial.workers,
                stage=None if trial.store is None else trial.store.stage("depth-errors", key),
                ranks=trial.ranks,
                progress=_by_steps(advance),
            )

    def _key(self, trial: "Trial") -> dict[str, Any]:
        """What a head depends on beside its recipe: model, pixels, numbers, training data."""
        from dataclasses import asdict

        assert trial.train is not None
        return {
            "model": trial.model.fingerprint,
            "preprocess": asdict(trial.model.preprocess),
            "precision": trial.precision,
            "device": trial.device.type,
            "train": [trial.train.content_hash(), trial.train.spec],
            "head": self.head,
            "size": self.size,
            **asdict(self._scale()),
        }

    def _found(self, trial: "Trial", collected: Collected) -> dict[str, Any]:
        train, test, found = collected.train, collected.test, collected.found
        return {
            "blocks": list(collected.predictor.seeing.blocks),
            "patch_size": trial.model.encoder.patch_size,
            "steps": collected.recipe.steps,
            "last_loss": float(collected.losses[-20:].mean()),
            "head_parameters": sum(value.numel() for value in collected.predictor.head.parameters()),
            "train_images": len(train.rows),
            "train_images_without_depth": len(train.empty),
            "test_images_without_depth": len(test.rows) + len(test.empty) - len(found.rows),
            "valid_pixels": {"train": round(train.valid, 4), "test": round(test.valid, 4)},
            "train_mean_depth": round(train.mean, 4),
            # What predicts without looking: the mean depth of the training set, and its mean at every place.
            "rmse_of_mean_depth": float(found.mean_errors.rmse.mean()),
            "rmse_of_mean_depth_map": float(found.cells_errors.rmse.mean()),
            "abs_rel_of_mean_depth": float(found.mean_errors.abs_rel.mean()),
            "abs_rel_of_mean_depth_map": float(found.cells_errors.abs_rel.mean()),
        }

    def _panels(self, trial: "Trial", collected: Collected) -> list[Panel]:
        """From the smallest error to the largest, evenly spread."""
        import numpy as np

        from dinov2cli.data.dense import read_pair
        from dinov2cli.evaluation.depth.pictures import depth_panel

        errors, rows = collected.found.errors.rmse, collected.found.rows
        order = np.argsort(errors, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, min(self.panels, len(order))).round().astype(int))]
        panels = []
        for at in chosen:
            pair = read_pair(trial.test, int(rows[at]), "depth", resize_target=self.resize_target)
            (predicted,) = collected.predictor.depths([pair.image])
            truth = self._scale().metres(pair.target)
            valid = self._scale().valid(truth)
            images, labels = depth_panel(pair.image.permute(1, 2, 0).numpy(), predicted, truth, valid)
            panels.append(Panel(f"{pair.name}: RMSE {errors[at]:.3f} m", images, labels))
        return panels


def _figures(found: "DepthFindings") -> list[Figure]:
    from dinov2cli.evaluation import statistics

    errors = found.errors
    lower = [
        ("rmse", statistics.mean(errors.rmse), "metres"),
        ("rmse_pooled", statistics.root_mean(errors.pooled_squares), "metres"),
        ("abs_rel", statistics.mean(errors.abs_rel), "number"),
        ("sq_rel", statistics.mean(errors.sq_rel), "metres"),
        ("log10", statistics.mean(errors.log10), "number"),
    ]
    figures = [Figure(metric, statistic, unit=unit, lower_is_better=True) for metric, statistic, unit in lower]
    return figures + [Figure(f"delta{power + 1}", statistics.mean(errors.deltas[:, power])) for power in range(3)]


def _notes(trial: "Trial", found: "DepthFindings") -> list[str]:
    """What keeps the figures from meaning what they seem to."""
    notes = []
    if trial.same_images:
        notes.append("train and test are the same images: the figures say how well their depth is remembered")
    reached, guess = found.errors.rmse.mean(), found.cells_errors.rmse.mean()
    if reached >= guess:
        notes.append(
            f"the RMSE of {reached:.3f} m is not below {guess:.3f} m, that of the train set's mean depth at each place "
            "of the picture: the features tell too little, or the head needs more steps or another lr"
        )
    return notes


def _by_steps(advance: Any) -> Any:
    """`advance(more)` as a callback that is told how much is done of how much."""
    done = 0

    def report(now: int, _total: int) -> None:
        nonlocal done
        advance(now - done)
        done = now

    return report

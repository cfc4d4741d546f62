"""`dinov2 eval linear`: a grid of linear classifiers on frozen features, one of them chosen on held-out images."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.linear.probe import LinearTraining, TrainedLinear
    from dinov2cli.evaluation.tasks.labelled import LabelledPair
    from dinov2cli.evaluation.tasks.trial import Trial

_Rates = Annotated[list[Annotated[float, Gt(0)]], MinLen(1)]
_Blocks = Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]


@dataclass(frozen=True, kw_only=True)
class Linear(Task):
    """Train linear classifiers on frozen features and judge the best, chosen on held-out training images."""

    name: ClassVar[str] = "linear"

    learning_rates: _Rates = setting(
        [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1],
        "rates to try, for 256 images per step",
    )
    blocks: _Blocks = setting([1, 4], "class tokens of how many last blocks to try, with and without averaged patches")
    epochs: Annotated[int, Ge(1)] = setting(10, "passes over the training images; never fewer than 1,000 steps")
    steps: Annotated[int, Ge(1)] | None = setting(None, "steps instead of what follows from epochs")
    train_batch_size: Annotated[int, Ge(1)] = setting(128, "images per step of the classifiers")
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "share of each class held out for the choice")
    augmentation: Literal["none", "crops"] = setting(
        "none",
        "what is trained on: the centre of each image, or a new random crop in every epoch",
        flag="--augmentation",
    )

    def check(self, trial: "Trial") -> None:
        """Labels of both sets, two or more classes, and something to hold out."""
        import numpy as np

        from dinov2cli.errors import InputError
        from dinov2cli.evaluation.linear.grid import split_validation
        from dinov2cli.evaluation.scores import align_labels

        train, test = trial.train, trial.test
        assert train is not None
        labels, _, names = align_labels(
            train.labels, train.label_names, test.labels, test.label_names, train_spec=train.spec, test_spec=test.spec
        )
        if len(names) < 2:
            raise InputError(
                f"{train.spec} has one class ({names[0]}), so there is nothing to tell apart; expected two or more"
            )
        split_validation(labels[np.flatnonzero(labels >= 0)], self.validation_fraction, seed=trial.seed)

    def collect(self, trial: "Trial") -> Any:
        """Features of both sets; with crops the heads are trained here, for all ranks compute what they train on."""
        assert trial.train is not None
        train, test = trial.features(trial.train), trial.features(trial.test)
        training = self._on_crops(trial, train, test) if self.augmentation == "crops" else None
        return train, test, training

    def judge(self, trial: "Trial", collected: "tuple[Features, Features, LinearTraining | None]") -> Judged:
        """Accuracies of the chosen head on the test set, which is read here for the first time."""
        from dinov2cli.evaluation.linear.training import Inputs

        assert trial.train is not None
        train, test, training = collected
        pair = _pair(trial, train, test)
        inputs = Inputs.of(*_rows(train, pair.train_rows), trial.train.spec, trial.device)
        if training is None:
            training = self._training(trial, inputs, pair)
            with trial.progress("linear classifiers", training.steps - training.step, "steps") as advance:
                training.run(inputs, advance=advance)
        return self._judged(trial, training.finish(inputs), test, pair)

    def _training(self, trial: "Trial", inputs: Any, pair: "LabelledPair") -> "LinearTraining":
        from dinov2cli.evaluation.cache import features_key
        from dinov2cli.evaluation.linear.probe import LinearTraining, linear_stage

        assert trial.train is not None
        settings: dict[str, Any] = {
            "n_classes": len(pair.class_names),
            "learning_rates": self.learning_rates,
            "blocks": self.blocks,
            "batch_size": self.train_batch_size,
            "epochs": self.epochs,
            "steps": self.steps,
            "validation_fraction": self.validation_fraction,
            "seed": trial.seed,
            "device": str(trial.device),
        }
        features = {**features_key(trial, trial.train, None), "augmentation": self.augmentation}
        return LinearTraining(
            pair.train_labels,
            available_blocks=inputs.blocks,
            dim=inputs.dim,
            has_patches=inputs.patches is not None,
            stage=linear_stage(trial.store, pair.train_labels, features, **settings),
            **settings,
        )

    def _on_crops(self, trial: "Trial", train: "Features", test: "Features") -> "LinearTraining | None":
        """Train on features of a new view in every epoch: all ranks extract, the main process trains (and returns)."""
        from dinov2cli.data.views import RandomCrop
        from dinov2cli.evaluation.linear.training import Inputs
        from dinov2cli.evaluation.linear.views import LatestView, same_rows, stretches

        assert trial.train is not None
        source, begun = trial.train, []

        def begin() -> list[tuple[int, int]]:
            pair = _pair(trial, train, test)
            inputs = Inputs.of(*_rows(train, pair.train_rows), source.spec)
            training = self._training(trial, inputs, pair)
            begun.append((training, pair.train_rows))
            return list(stretches(training.step, training.steps, self.epochs))

        for epoch, until in trial.ranks.first(begin):
            view = RandomCrop(trial.model.preprocess.crop, trial.seed, epoch)
            within = dataclasses.replace(trial, cache=None if trial.store is None else LatestView(trial.store))
            seen = within.features(source, view=view, keep=True)

            def learn(seen: "Features" = seen, until: int = until) -> None:
                training, rows = begun[0]
                same_rows(train.index, seen.index, source.spec)
                inputs = Inputs.of(*_rows(seen, rows), source.spec, trial.device)
                with trial.progress("linear classifiers", until - training.step, "steps") as advance:
                    training.run(inputs, until=until, advance=advance)

            trial.ranks.first(learn)
        return begun[0][0] if begun else None

    def _judged(self, trial: "Trial", trained: "TrainedLinear", test: "Features", pair: "LabelledPair") -> Judged:
        import numpy as np
        import pyarrow as pa
        import torch

        from dinov2cli.evaluation import statistics
        from dinov2cli.evaluation.scores import require_finite, true_class_ranks

        tokens, patches = _rows(test, pair.test_rows)
        for values in (tokens, patches):
            if values is not None:
                require_finite(torch.as_tensor(values), trial.test.spec)
        logits = trained.classifier.logits(tokens, patches, device=trial.device)
        ranks = true_class_ranks(logits, torch.from_numpy(pair.test_labels)).numpy()
        confidence, answers = (found.numpy() for found in logits.softmax(1).max(1))
        names, ids = np.asarray(pair.class_names), np.asarray(trial.test.ids)[test.index[pair.test_rows]].tolist()
        figures = [Figure("top1", statistics.mean(ranks < 1))]
        if len(names) > 5:
            figures.append(Figure("top5", statistics.mean(ranks < 5)))
        figures.append(Figure("mean_per_class", statistics.class_mean(ranks < 1, pair.test_labels)))
        notes = list(trained.notes)
        if trial.same_images:
            notes.insert(
                0, "train and test are the same images: the figures say how well they are remembered, not recognised"
            )
        predictions = pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "label": pa.array(names[pair.test_labels], pa.string()),
                "prediction": pa.array(names[answers], pa.string()),
                "correct": pa.array(ranks < 1, pa.bool_()),
                "confidence": pa.array(confidence, pa.float32()),
            }
        )
        return Judged(figures, ids, predictions, trained.settings(), notes)


def _pair(trial: "Trial", train: "Features", test: "Features") -> "LabelledPair":
    from dinov2cli.evaluation.tasks.labelled import labelled_pair

    assert trial.train is not None
    return labelled_pair(train, test, trial.train.spec, trial.test.spec)


def _rows(features: "Features", rows: "np.ndarray") -> "tuple[np.ndarray, np.ndarray | None]":
    """Class tokens and averaged patches of these rows; not copied where all rows are asked for."""
    tokens, patches = features.class_tokens, features.averaged_patches
    if len(rows) == len(tokens):
        return tokens, patches
    return tokens[rows], None if patches is None else patches[rows]

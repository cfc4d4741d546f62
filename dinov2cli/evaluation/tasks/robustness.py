"""`dinov2 eval robustness`: a linear classifier, trained once, on shifted sets and on corrupted test images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.data.corruptions import CorruptedView
    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.linear.probe import TrainedLinear
    from dinov2cli.evaluation.robustness.errors import Baseline
    from dinov2cli.evaluation.robustness.shifts import Answers, Classes, Seen, Units
    from dinov2cli.evaluation.tasks.trial import Trial
    from dinov2cli.search.blocks import Stage

_Rates = Annotated[list[Annotated[float, Gt(0)]], MinLen(1)]
_Blocks = Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
_Severities = Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]

_IMAGENET_CLASSES = 1000


@dataclass
class _Collected:
    """Features, and on the main process what the classifier said: the predicted class of every row of the features of
    the test set, under each (corruption, severity)."""

    test: "Features"
    shifted: "dict[str, Features]"
    trained: "list[TrainedLinear]" = field(default_factory=list)
    corrupted: "dict[tuple[str, int], np.ndarray]" = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Robustness(Task):
    """Train a linear classifier once and test it on clean, shifted (--shifted NAME=DATA) and corrupted images."""

    name: ClassVar[str] = "robustness"
    others: ClassVar[str | None] = "--shifted"

    corruptions: Annotated[list[str], MinLen(1)] = setting(
        ["all"], "corruptions of the test images, by name (gaussian_noise, ...), or all, or none"
    )
    severities: _Severities = setting([1, 2, 3, 4, 5], "how severe the corruptions are")
    restrict: Literal["subset", "all"] = setting(
        "subset", "what may be predicted on a shifted set: the classes in it (ImageNet-A, -R), or all trained ones"
    )
    unknown: Literal["error", "skip"] = setting("error", "what to do with classes of a shifted set that train lacks")
    baseline: str = setting(
        "auto",
        "whose errors mCE is normalised by: alexnet (published), a folder of results of this task, none, or auto "
        "(alexnet where there are 1,000 classes, else none)",
    )
    keep_features: bool = setting(False, "keep the features of corrupted images in the cache too")
    learning_rates: _Rates = setting(
        [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1],
        "rates to try, for 256 images per step",
    )
    blocks: _Blocks = setting([1, 4], "class tokens of how many last blocks to try, with and without averaged patches")
    epochs: Annotated[int, Ge(1)] = setting(10, "passes over the training images; never fewer than 1,000 steps")
    steps: Annotated[int, Ge(1)] | None = setting(None, "steps instead of what follows from epochs")
    train_batch_size: Annotated[int, Ge(1)] = setting(128, "images per step of the classifiers")
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "share of each class held out for the choice")

    def files(self) -> list[Path]:
        """The results of the baseline, if they are a folder's."""
        from dinov2cli.artifacts.results import FILE

        return [Path(self.baseline) / FILE]

    def check(self, trial: "Trial") -> None:
        """Names and numbers in the settings, labels of all sets, classes in common, and the baseline."""
        from dinov2cli.data.corruptions import LEAST_SIDE
        from dinov2cli.errors import UserError
        from dinov2cli.evaluation.linear.grid import split_validation

        kinds = self._kinds()
        if not kinds and not trial.others:
            raise UserError("nothing to test: there is no --shifted set and corruptions is none; give one of them")
        size = trial.model.preprocess.crop
        if kinds and size < LEAST_SIDE:
            raise UserError(
                f"corruptions need images of {LEAST_SIDE} pixels or more, this model sees {size}: "
                "raise --image-size, or --set corruptions=none"
            )
        labels, classes = _classes(trial)
        split_validation(labels[labels >= 0], self.validation_fraction, seed=trial.seed)
        _answers(trial, trial.test, classes)
        for source in trial.others.values():
            _answers(trial, source, classes, skip_unknown=self.unknown == "skip")
        self._baseline(len(classes))

    def collect(self, trial: "Trial") -> _Collected:
        """Features of all sets; the classifier is trained here, for what it says of each corruption is all that is kept
        of its images."""
        assert trial.train is not None
        train, test = trial.features(trial.train), trial.features(trial.test)
        found = _Collected(test, {name: trial.features(source) for name, source in trial.others.items()})
        trial.ranks.first(lambda: found.trained.append(self._train(trial, train)))
        for kind in self._kinds():
            for severity in self._levels():
                self._corrupted(trial, kind, severity, found)
        return found

    def judge(self, trial: "Trial", collected: _Collected) -> Judged:
        """Accuracies on each set and errors under each corruption, of the one classifier."""
        from dinov2cli.evaluation.robustness.shifts import Seen, Units

        _, classes = _classes(trial)
        (trained,) = collected.trained

        def seen(source: "ImageSource", features: "Features", skip_unknown: bool) -> Seen:
            answers = _answers(trial, source, classes, skip_unknown=skip_unknown)
            logits = _logits(trial, trained, features, source.spec)
            return Seen(features.index, source.ids, features.digests, logits, answers)

        test = seen(trial.test, collected.test, False)
        units, shifted = Units(test.ids, test.digests[test.rows]), []
        for name, source in trial.others.items():
            found = seen(source, collected.shifted[name], self.unknown == "skip")
            places = units.add([f"{name}:{id}" for id in found.ids], found.digests[found.rows])
            shifted.append((name, found, places))

        judged = Judged(
            [Figure("top1", units.share(units.test, test.right()))],
            units.names,
            test.table(classes),
            {**trained.settings(), "shifted": {}},
            list(trained.notes),
        )
        if trial.same_images:
            judged.notes.insert(0, "train and test are the same images: the figures say how well they are remembered")
        for name, found, places in shifted:
            self._judge_shifted(trial, name, found, places, test, units, len(classes), judged)
        if collected.corrupted:
            self._judge_corrupted(test, units, collected, len(classes), judged)
        return judged

    def _judge_shifted(
        self,
        trial: "Trial",
        name: str,
        seen: "Seen",
        places: "np.ndarray",
        test: "Seen",
        units: "Units",
        classes: int,
        judged: Judged,
    ) -> None:
        """Accuracy on one shifted set, and how much lower it is than on the test images of the same classes."""
        import numpy as np

        answers = seen.answers
        among = answers.present if self.restrict == "subset" else np.arange(classes)
        right, clean = seen.right(among), test.of(answers.present)
        about: dict[str, Any] = {
            "images": len(seen.rows),
            "classes": len(answers.present),
            "predicted_among": len(among),
            "unlabelled": answers.unlabelled,
            "unknown": answers.unknown,
        }
        judged.figures.append(Figure(f"top1_{name}", units.share(places, right), settings=about))
        if len(clean.rows):
            clean_right = clean.right(among)
            about["clean_images"], about["clean_top1"] = len(clean.rows), float(clean_right.mean())
            own = units.test[np.isin(test.rows, clean.rows)]
            drop = units.difference(own, clean_right, places, right)
            judged.figures.append(Figure(f"drop_{name}", drop, lower_is_better=True, settings=about))
        judged.settings["shifted"][name] = {"data": trial.others[name].spec, **about}
        if answers.unknown:
            judged.notes.append(
                f"{answers.unknown} images of {name} are left out: train lacks their {len(answers.unknown_names)} "
                f"classes ({', '.join(answers.unknown_names[:5])})"
            )
        assert trial.train is not None
        if shared := seen.shared_with(trial.digests.get(trial.train.spec)):
            judged.notes.append(
                f"{shared} of {len(seen.rows)} images of {name} are in the training set too: the figures say in part "
                "how well they are remembered"
            )

    def _judge_corrupted(
        self, test: "Seen", units: "Units", collected: _Collected, classes: int, judged: Judged
    ) -> None:
        """Mean corruption errors, and the error under each corruption and at each severity."""
        import numpy as np

        from dinov2cli.evaluation.robustness.errors import corruption_error, relative_corruption_error

        def add(metric: str, values: "np.ndarray", **settings: Any) -> None:
            share = units.share(units.test, values)
            judged.figures.append(Figure(metric, share, lower_is_better=True, settings=settings))

        kinds, levels = self._kinds(), self._levels()
        clean = ~test.right()
        answers = [[test.right_of(collected.corrupted[kind, level]) for level in levels] for kind in kinds]
        wrong = ~np.array(answers).transpose(2, 0, 1)
        baseline = self._baseline(classes)
        if baseline is not None:
            errors = [baseline.errors[kind] for kind in kinds]
            add("mce", corruption_error(wrong, errors), baseline=baseline.name)
            if unharmed := baseline.unharmed(kinds):
                judged.notes.append(
                    f"no relative mCE: the baseline {baseline.name} gets no worse by {', '.join(unharmed)}"
                )
            else:
                growth = relative_corruption_error(wrong, clean, errors, baseline.clean)
                add("relative_mce", growth, baseline=baseline.name)
            judged.settings["baseline"] = {"name": baseline.name, "clean": baseline.clean, "errors": baseline.errors}
            if baseline.name == "alexnet":
                judged.notes.append(
                    "mCE is normalised by AlexNet's published errors, but the corruptions are made here, and frost "
                    "differs: compare it with figures of this program, not with published ones"
                )
        add("mce_unnormalised", corruption_error(wrong))
        add("relative_mce_unnormalised", relative_corruption_error(wrong, clean))
        for number, kind in enumerate(kinds):
            add(f"error_{kind}", wrong[:, number].mean(axis=1))
        for number, level in enumerate(levels):
            add(f"error_severity_{level}", wrong[:, :, number].mean(axis=1))
        judged.settings["corruption_errors"] = dict(zip(kinds, wrong.mean(axis=0).tolist(), strict=True))
        judged.settings["corruption_severities"] = levels

    def _kinds(self) -> list[str]:
        """Names of the corruptions to make, in their usual order. Raises UserError for an unknown one."""
        from dinov2cli.data.corruptions import CORRUPTIONS, SEVERITIES
        from dinov2cli.errors import UserError

        asked = set(self.corruptions)
        unknown = sorted(asked - {*CORRUPTIONS, "all", "none"})
        if unknown or ("none" in asked and len(asked) > 1):
            raise UserError(
                f"corruptions {', '.join(map(repr, unknown)) or self.corruptions} not known: expected all, none, or "
                f"some of {', '.join(CORRUPTIONS)}"
            )
        if wrong := sorted(set(self.severities) - set(SEVERITIES)):
            raise UserError(f"severities {', '.join(map(str, wrong))} do not exist: expected some of 1 to 5")
        if asked == {"none"}:
            return []
        return [kind for kind in CORRUPTIONS if kind in asked or "all" in asked]

    def _levels(self) -> list[int]:
        return sorted(set(self.severities))

    def _baseline(self, classes: int) -> "Baseline | None":
        """Raises UserError for one that cannot be used, InputError for one that cannot be read."""
        from dinov2cli.evaluation.robustness.errors import alexnet, baseline_from

        kinds, levels = self._kinds(), self._levels()
        asked = self.baseline
        if asked == "auto":
            asked = "alexnet" if classes == _IMAGENET_CLASSES else "none"
        if asked == "none" or not kinds:
            return None
        found = alexnet(kinds, levels) if asked == "alexnet" else baseline_from(asked, self.name, kinds, levels)
        found.check(kinds)
        return found

    def _train(self, trial: "Trial", train: "Features") -> "TrainedLinear":
        import numpy as np

        from dinov2cli.evaluation.cache import features_key
        from dinov2cli.evaluation.linear.probe import train_linear

        assert trial.train is not None
        labels, classes = _classes(trial)
        labels = labels[train.index]
        rows = np.flatnonzero(labels >= 0)
        with trial.progress("linear classifiers", None, "steps") as advance:
            return train_linear(
                train.class_tokens[rows],
                None if train.averaged_patches is None else train.averaged_patches[rows],
                labels[rows],
                seed=trial.seed,
                device=trial.device,
                store=trial.store,
                features=features_key(trial, trial.train, None),
                advance=advance,
                name=trial.train.spec,
                n_classes=len(classes),
                learning_rates=self.learning_rates,
                blocks=self.blocks,
                epochs=self.epochs,
                steps=self.steps,
                batch_size=self.train_batch_size,
                validation_fraction=self.validation_fraction,
            )

    def _corrupted(self, trial: "Trial", kind: str, severity: int, found: _Collected) -> None:
        """Add what the classifier says of one corruption: from the store, else of features that all ranks make."""
        from dinov2cli.data.corruptions import CorruptedView
        from dinov2cli.errors import WorkError
        from dinov2cli.evaluation.features import view_of
        from dinov2cli.evaluation.robustness.shifts import predict

        fit = trial.model.preprocess
        view = CorruptedView(view_of(fit), kind, severity, trial.seed)
        rows = found.test.index

        def look() -> bool:
            stage = _stage(trial, view, found.trained[0])
            arrays = None if stage is None else stage.load(0)
            if arrays is not None and len(arrays["predictions"]) == len(rows):
                found.corrupted[kind, severity] = arrays["predictions"]
            return (kind, severity) in found.corrupted

        def answer() -> None:
            if not (len(rows) == len(features.index) and (rows == features.index).all()):
                raise WorkError(f"{trial.test.spec}: other images could be read under {kind} than before: run it again")
            predictions = predict(_logits(trial, found.trained[0], features, f"{trial.test.spec} under {kind}"))
            found.corrupted[kind, severity] = predictions
            stage = _stage(trial, view, found.trained[0])
            if stage is not None:
                stage.save(0, {"predictions": predictions})

        if trial.ranks.first(look):
            return
        features = trial.features(trial.test, view=view, keep=self.keep_features)
        trial.ranks.first(answer)


def _logits(trial: "Trial", trained: "TrainedLinear", features: "Features", name: str) -> "np.ndarray":
    """Logits float32 [n, C]. Raises WorkError where features hold NaN or infinity."""
    from dinov2cli.evaluation.scores import require_finite

    logits = trained.classifier.logits(features.class_tokens, features.averaged_patches, device=trial.device)
    require_finite(logits, name)
    return logits.numpy()


def _classes(trial: "Trial") -> "tuple[np.ndarray, Classes]":
    """Labels of the training images in 0..C-1 (-1: none), and the classes. Raises InputError."""
    import numpy as np

    from dinov2cli.evaluation.robustness.shifts import training_classes

    train = trial.train
    assert train is not None
    labels = np.full(len(train), -1) if train.labels is None else train.labels
    return training_classes(labels, train.label_names, train.spec)


def _answers(trial: "Trial", source: "ImageSource", classes: "Classes", *, skip_unknown: bool = False) -> "Answers":
    """Right answers for the images of a set. Raises InputError."""
    import numpy as np

    from dinov2cli.evaluation.robustness.shifts import Labels, match_labels

    assert trial.train is not None
    lists = source.label_lists
    if lists is not None:
        labels = Labels.several([found or [] for found in lists.lists], lists.names)
    else:
        single = np.full(len(source), -1) if source.labels is None else source.labels
        labels = Labels.single(single, source.label_names)
    return match_labels(labels, classes, spec=source.spec, train_spec=trial.train.spec, skip_unknown=skip_unknown)


def _stage(trial: "Trial", view: "CorruptedView", trained: "TrainedLinear") -> "Stage | None":
    """Where the answers under one corruption are kept."""
    import hashlib

    from dinov2cli.evaluation.cache import features_key

    if trial.store is None:
        return None
    head = trained.classifier
    digest = hashlib.sha256(head.weight.numpy().tobytes() + head.bias.numpy().tobytes()).hexdigest()
    key = {**features_key(trial, trial.test, view), "head": digest, "reads": [head.blocks, head.averaged_patches]}
    return trial.store.stage("corrupted", key)

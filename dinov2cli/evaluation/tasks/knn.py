"""`dinov2 eval knn`: the weighted vote of the nearest training images, also with a few images of each class."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, MinLen

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting

if TYPE_CHECKING:
    import pyarrow as pa

    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.knn import FewShotResult, KnnResult
    from dinov2cli.evaluation.tasks.labelled import LabelledPair
    from dinov2cli.evaluation.tasks.trial import Trial

_STORED_NEIGHBOURS = 5
_Counts = list[Annotated[int, Ge(1)]]


@dataclass(frozen=True, kw_only=True)
class Knn(Task):
    """Classify by the weighted vote of the nearest training images: no training, no choices."""

    name: ClassVar[str] = "knn"

    neighbours: Annotated[_Counts, MinLen(1)] = setting([10, 20, 100, 200], "numbers of neighbours", flag="--k")
    temperature: Annotated[float, Gt(0)] = setting(0.07, "a neighbour votes with exp(cosine / temperature)")
    pool: Literal["auto", "cls", "mean", "cls+mean"] = setting(
        "auto", "vector of an image: what the model is used by, its class token, mean of its patches, or both"
    )
    shots: _Counts = setting([], "few-shot besides: training images of each class, as 1,5,10", flag="--shots")
    tries: Annotated[int, Ge(1)] = setting(5, "draws of the few training images, whose mean is reported")

    def check(self, trial: "Trial") -> None:
        """Labels that match, two classes or more, and for few-shot a test set that is not the training set."""
        from dinov2cli.errors import UserError
        from dinov2cli.evaluation.scores import align_labels

        train, test = trial.train, trial.test
        assert train is not None
        align_labels(
            train.labels, train.label_names, test.labels, test.label_names, train_spec=train.spec, test_spec=test.spec
        )
        if self.shots and trial.same_images:
            raise UserError(
                "--shots with the same images for train and test: the few would be tested on themselves; "
                "give other images to --test"
            )

    def collect(self, trial: "Trial") -> "tuple[Features, Features]":
        """Features of both sets, from every process."""
        assert trial.train is not None
        return trial.features(trial.train), trial.features(trial.test)

    def judge(self, trial: "Trial", collected: "tuple[Features, Features]") -> Judged:
        """Accuracies at every k, those of the few-shot draws behind them."""
        from dinov2cli.evaluation.knn import few_shot_knn, knn_classify
        from dinov2cli.evaluation.scores import absent_note
        from dinov2cli.evaluation.tasks.labelled import labelled_pair

        assert trial.train is not None
        train, test = collected
        pair = labelled_pair(train, test, trial.train.spec, trial.test.spec)
        vectors = train.pool(self.pool)[pair.train_rows], test.pool(self.pool)[pair.test_rows]
        sets = (vectors[0], pair.train_labels, vectors[1], pair.test_labels)
        alone = trial.same_images
        common: dict[str, Any] = {"ks": self.neighbours, "temperature": self.temperature, "device": trial.device}
        notes = ["train and test are the same images: each is left out of its own neighbours"] if alone else []
        result = knn_classify(*sets, leave_one_out=alone, **common)
        few = [
            few_shot_knn(*sets, shots=shots, tries=self.tries, seed=trial.seed, **common)
            for shots in sorted(set(self.shots))
        ]
        notes += result.notes + [note for each in few for note in each.notes]
        return Judged(
            figures=_figures(result, few),
            units=[trial.test.ids[row] for row in test.index[pair.test_rows]],
            predictions=_table(trial, train, test, pair, result),
            settings={
                "similarity": "cosine",
                "temperature": self.temperature,
                "pool": self.pool,
                "classes": len(pair.class_names),
                "train_images": result.n_train,
                "leave_one_out": result.leave_one_out,
            },
            notes=notes + absent_note(pair.test_labels, pair.class_names),
        )


def _figures(result: "KnnResult", few: "list[FewShotResult]") -> list[Figure]:
    """`top1_k20` first, then `top1_k10`, `top5_k10`, ..., `top1_k10_shots5`, ...; top-5 for more than five classes."""
    from dinov2cli.evaluation import statistics

    tops = (1, 5) if result.n_classes > 5 else (1,)
    figures = [
        Figure(f"top{top}_k{k}", statistics.mean(result.correct(k, top=top)), settings={"k": k})
        for k in result.ks
        for top in tops
    ]
    headline = f"top1_k{result.headline_k}"
    figures.sort(key=lambda figure: figure.metric != headline)
    for each in few:
        given = {"shots": each.shots, "tries": each.tries, "train_images": each.n_train}
        figures += [
            Figure(
                f"top{top}_k{k}_shots{each.shots}",
                statistics.mean(each.shares[k, top]),
                settings={**given, "k": k, "spread": each.spread[k, top]},
            )
            for k in each.ks
            for top in tops
        ]
    return figures


def _table(
    trial: "Trial", train: "Features", test: "Features", pair: "LabelledPair", result: "KnnResult"
) -> "pa.Table":
    """One row per labelled test image, at the k that is quoted; its nearest training images as ids."""
    import numpy as np
    import pyarrow as pa

    assert trial.train is not None
    names, k = np.asarray(pair.class_names), result.headline_k
    near = result.neighbours[:, :_STORED_NEIGHBOURS]
    train_ids = trial.train.ids
    where = train.index[pair.train_rows]
    return pa.table(
        {
            "id": pa.array([trial.test.ids[row] for row in test.index[pair.test_rows]], pa.string()),
            "label": pa.array(names[pair.test_labels], pa.string()),
            "prediction": pa.array(names[result.predictions[k]], pa.string()),
            "correct": pa.array(result.correct(), pa.bool_()),
            "confidence": pa.array(result.confidences[k], pa.float32()),
            "neighbours": pa.array([[train_ids[where[j]] for j in row] for row in near], pa.list_(pa.string())),
            "neighbour_labels": pa.array(
                [names[pair.train_labels[row]].tolist() for row in near], pa.list_(pa.string())
            ),
            "similarities": pa.array(list(result.similarities[:, :_STORED_NEIGHBOURS]), pa.list_(pa.float32())),
        }
    )

"""`dinov2 eval finetune`: backbone and head trained together on the training set, judged on the test set."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Task, setting

if TYPE_CHECKING:
    from dinov2cli.evaluation.finetuning.loop import FineTuning, Recipe
    from dinov2cli.evaluation.finetuning.model import Classifier
    from dinov2cli.evaluation.finetuning.plan import Plan
    from dinov2cli.evaluation.finetuning.scores import Answers
    from dinov2cli.evaluation.tasks.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Finetune(Task):
    """Fine-tune the whole model on the training set with a linear head, and judge it on the test set."""

    name: ClassVar[str] = "finetune"

    epochs: Annotated[int, Ge(1)] = setting(50, "passes over the training images", flag="--epochs")
    train_batch_size: Annotated[int, Ge(2)] = setting(
        128, "images per step over all processes, a multiple of twice their number"
    )
    lr: Annotated[float, Gt(0)] = setting(5e-4, "peak learning rate of the head and last layer, for 256 images a step")
    min_lr: Annotated[float, Ge(0)] = setting(1e-6, "learning rate at the end")
    warmup: Annotated[float, Ge(0), Lt(1)] = setting(0.1, "share of all steps in which the learning rate rises")
    layer_decay: Annotated[float, Gt(0), Le(1)] = setting(0.75, "learning rate of each layer over that of the next one")
    weight_decay: Annotated[float, Ge(0)] = setting(0.05, "weight decay of AdamW")
    clip: Annotated[float, Ge(0)] = setting(3.0, "largest norm of the gradient; 0: as it is")
    drop_path: Annotated[float, Ge(0), Lt(1)] = setting(0.1, "stochastic depth of the last block, falling to 0")
    mixup: Annotated[float, Ge(0)] = setting(0.8, "alpha of mixup; 0: none")
    cutmix: Annotated[float, Ge(0)] = setting(1.0, "alpha of CutMix; 0: none")
    switch: Annotated[float, Ge(0), Le(1)] = setting(0.5, "how often CutMix rather than mixup")
    smoothing: Annotated[float, Ge(0), Lt(1)] = setting(0.1, "label smoothing")
    smallest_crop: Annotated[float, Gt(0), Le(1)] = setting(0.08, "least share of an image's area in a training crop")
    flip: Annotated[float, Ge(0), Le(1)] = setting(0.5, "how often a crop is mirrored")
    jitter: Annotated[float, Ge(0), Le(1)] = setting(0.3, "jitter of brightness, contrast and saturation")
    ema: Annotated[float, Ge(0), Lt(1)] = setting(0.9999, "decay of the moving average of the weights; 0: none")
    weights: Literal["raw", "ema"] = setting("raw", "which weights are reported: as trained, or their average")
    choose: Literal["last", "best"] = setting("last", "report the last epoch, or the best one on held-out images")
    held_out: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "share of each class held out of training for choose=best")
    averaged_patches: bool = setting(False, "the head reads the mean of the patches too, beside the class token")
    checkpointing: bool = setting(False, "compute blocks again in the backward pass, to save memory")
    checkpoint_every: Annotated[int, Ge(1)] = setting(100, "steps after which the state is kept, to continue from")
    save: bool = setting(False, "keep the fine-tuned model in the output")

    def check(self, trial: "Trial") -> None:
        """What can be trained, labels that fit, sizes that fit."""
        self._plan(trial)

    def collect(self, trial: "Trial") -> "tuple[Plan, FineTuning, Answers]":
        """Train, on all processes, and answer the test images."""
        from dinov2cli.evaluation.finetuning.scores import answer
        from dinov2cli.evaluation.finetuning.views import digests

        plan = self._plan(trial)
        tuning = self._tune(trial, plan)
        sets: dict[str, Any] = {"raw": {}, "ema": tuning.averages} if tuning.averages else {self.weights: {}}
        with trial.progress(f"answers to {trial.test.spec}", len(plan.test)) as advance:
            answers = answer(
                tuning.model,
                sets,
                plan.test,
                plan.test_labels,
                preprocess=plan.preprocess,
                device=trial.device,
                precision=trial.precision,
                batch_size=trial.batch_size,
                workers=trial.workers,
                bad=trial.bad_images(trial.test),
                ranks=trial.ranks,
                advance=advance,
            )
        if not trial.same_images:
            trial.note_digests(trial.test, answers.digests)
            if plan.train.spec not in trial.digests:
                trial.note_digests(plan.train, digests(plan.train, trial.ranks))
        return plan, tuning, answers

    def judge(self, trial: "Trial", collected: "tuple[Plan, FineTuning, Answers]") -> Judged:
        """Accuracies of the weights that the settings name, and beside them the top-1 accuracy of the others."""
        plan, tuning, answers = collected
        settings = self._found(trial, plan, tuning)
        notes = list(plan.notes)
        if self.save:
            folder = getattr(trial, "folder", None)
            if folder is None:
                notes.append("the fine-tuned model is not kept: nothing is written here that it could be kept in")
            else:
                self._keep(folder / "finetuned", plan, tuning)
                settings["saved"] = "finetuned"
        ids = plan.test.ids
        units = [ids[row] for row in answers.rows.tolist()]
        return Judged(
            self._figures(plan, answers), units, _predictions(plan, answers, self.weights, units), settings, notes
        )

    def _plan(self, trial: "Trial") -> "Plan":
        from dinov2cli.evaluation.finetuning.plan import make_plan

        assert trial.train is not None
        return make_plan(
            trial.model,
            trial.train,
            trial.test,
            batch=self.train_batch_size,
            held_out=self.held_out if self.choose == "best" else 0.0,
            averaged_patches=self.averaged_patches,
            drop_path=self.drop_path,
            checkpointing=self.checkpointing,
            has_average=self.ema > 0 or self.weights == "raw",
            precision=trial.precision,
            seed=trial.seed,
            world_size=trial.ranks.world_size,
            same_images=trial.same_images,
        )

    def _recipe(self, plan: "Plan") -> "Recipe":
        from dinov2cli.evaluation.finetuning.loop import Recipe
        from dinov2cli.evaluation.finetuning.mixing import Mixing
        from dinov2cli.evaluation.finetuning.views import Look

        seen = plan.preprocess
        return Recipe(
            look=Look(seen.crop, self.smallest_crop, self.flip, self.jitter, tuple(seen.mean), tuple(seen.std)),
            mixing=Mixing(self.mixup, self.cutmix, self.switch, self.smoothing),
            epochs=self.epochs,
            batch=plan.batch,
            lr=self.lr * plan.batch / 256,
            min_lr=min(self.min_lr, self.lr * plan.batch / 256),
            warmup=self.warmup,
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
            clip=self.clip,
            ema=self.ema,
        )

    def _tune(self, trial: "Trial", plan: "Plan") -> "FineTuning":
        from dinov2cli.evaluation.finetuning.loop import FineTuning
        from dinov2cli.evaluation.finetuning.scores import answer

        recipe = self._recipe(plan)
        model = self._model(trial, plan)
        tuning = FineTuning(
            model,
            plan.train,
            plan.train_labels,
            recipe,
            seed=trial.seed,
            precision=trial.precision,
            most=trial.batch_size,
            workers=trial.workers,
            bad=trial.bad_images(plan.train),
            ranks=trial.ranks,
        )
        stage = None if trial.store is None else trial.store.stage("finetune", self._key(trial, plan, recipe))

        def accuracy(weights: "dict[str, Any]") -> float:
            assert plan.held is not None
            found = answer(
                model,
                {"held": weights},
                plan.held,
                plan.held_labels,
                preprocess=plan.preprocess,
                device=trial.device,
                precision=trial.precision,
                batch_size=trial.batch_size,
                workers=trial.workers,
                bad=trial.bad_images(plan.train),
                ranks=trial.ranks,
            )
            return found.accuracy("held")

        with trial.progress("fine-tuning", tuning.total, "steps") as advance:
            tuning.run(
                stage=stage,
                every=self.checkpoint_every,
                held_out=None if plan.held is None else accuracy,
                which=self.weights,
                advance=advance,
            )
        if tuning.resumed:
            trial.say(f"fine-tuning went on from step {tuning.resumed} of {tuning.total}")
        return tuning

    def _model(self, trial: "Trial", plan: "Plan") -> "Classifier":
        import torch

        from dinov2cli.evaluation.finetuning.model import build_classifier

        return build_classifier(
            plan.network,
            len(plan.class_names),
            image_size=plan.preprocess.crop,
            averaged_patches=self.averaged_patches,
            drop_path=self.drop_path,
            checkpointing=self.checkpointing,
            device=trial.device,
            generator=torch.Generator().manual_seed(trial.seed),
        )

    def _key(self, trial: "Trial", plan: "Plan", recipe: "Recipe") -> dict[str, Any]:
        """All that the trained weights depend on."""
        from dinov2cli.evaluation.cache import features_key

        assert trial.train is not None
        return {
            "features": features_key(trial, trial.train, None),
            "recipe": asdict(recipe),
            "preprocess": asdict(plan.preprocess),
            "drop_path": self.drop_path,
            "averaged_patches": self.averaged_patches,
            "labels": plan.labels_digest(),
            "choose": [self.choose, self.held_out, self.weights] if plan.held is not None else None,
            "seed": trial.seed,
        }

    def _figures(self, plan: "Plan", answers: "Answers") -> list[Figure]:
        from dinov2cli.evaluation import statistics

        ranks, told = answers.ranks[self.weights], {"weights": self.weights}
        figures = [Figure("top1", statistics.mean(ranks < 1), settings=told)]
        if len(plan.class_names) > 5:
            figures.append(Figure("top5", statistics.mean(ranks < 5), settings=told))
        per_class = statistics.class_mean(ranks < 1, plan.test_labels[answers.rows])
        figures.append(Figure("mean_per_class", per_class, settings=told))
        for other in answers.ranks.keys() - {self.weights}:
            figures.append(
                Figure(f"top1_{other}", statistics.mean(answers.ranks[other] < 1), settings={"weights": other})
            )
        return figures

    def _found(self, trial: "Trial", plan: "Plan", tuning: "FineTuning") -> dict[str, Any]:
        recipe = tuning.recipe
        found: dict[str, Any] = {
            "image_size": recipe.look.size,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "steps": tuning.total,
            "train_images": len(plan.train),
            "classes": len(plan.class_names),
            "precision": trial.precision,
            "processes": trial.ranks.world_size,
            "head": "class token" + (" and mean of the patches" if self.averaged_patches else ""),
            "loss_by_epoch": [round(loss, 4) for loss in tuning.losses()],
        }
        if plan.held is not None:
            found |= {"held_out_images": len(plan.held), "chosen_epoch": tuning.course.best}
            found["held_out_top1_by_epoch"] = [round(accuracy, 4) for accuracy in tuning.course.held_out]
        return found

    def _keep(self, folder: Any, plan: "Plan", tuning: "FineTuning") -> None:
        from dinov2cli.evaluation.finetuning.export import save_classifier

        weights = tuning.averages if self.weights == "ema" and tuning.averages else {}
        save_classifier(tuning.model, folder, plan.class_names, plan.preprocess, weights=weights)


def _predictions(plan: "Plan", answers: "Answers", name: str, ids: list[str]) -> Any:
    import numpy as np
    import pyarrow as pa

    names: np.ndarray = np.asarray(plan.class_names)
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "label": pa.array(names[plan.test_labels[answers.rows]], pa.string()),
            "prediction": pa.array(names[answers.predictions[name]], pa.string()),
            "correct": pa.array(answers.ranks[name] == 0, pa.bool_()),
            "confidence": pa.array(answers.confidences[name], pa.float32()),
        }
    )

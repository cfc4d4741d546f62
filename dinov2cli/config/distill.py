"""Settings of `dinov2 distill`, beside those of every training run."""

import re
from collections import Counter
from typing import Any, Literal

from pydantic import Field, model_validator

from dinov2cli.config.common import Amount, AmountOrZero, Auto, Count, CountOrZero, Section, Share
from dinov2cli.config.training import DataSection, HeadsSection, ModelSection, OptimSection, TrainingConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("loss", "eval", "grad_norm")  # what keys of metrics begin with


class DistillDataSection(DataSection):
    """As in pretraining. `views`: an image is shown in that many ways, over and over, instead of anew in every epoch;
    what the teacher says of them can then be kept (teacher.cache)."""

    views: Count | None = None


class StudentSection(ModelSection):
    """One of several students: its name in the outputs (default: its architecture), and what it has of its own beside
    the `model` section, whose keys hold for all."""

    name: str = ""


class DistillHeadsSection(HeadsSection):
    """The students' projection heads. `prototypes: auto` is as many as the teacher's, where its heads are taken."""

    prototypes: Count | Auto = "auto"


class DistillLossSection(Section):
    """Weights of the terms. DINO compares class tokens by prototypes and iBOT patches, of each crop the share
    `ibot_share`; `feature_weight` compares both as they are, `gram_weight` how patches resemble each other. KoLeo
    spreads class tokens.

    The temperatures are those of the teacher's targets; auto: as its own training ended, else as in pretraining.
    """

    dino_weight: AmountOrZero = 1.0
    ibot_weight: AmountOrZero = 1.0
    koleo_weight: AmountOrZero = 0.1
    feature_weight: AmountOrZero = 0.0
    feature: Literal["cosine", "smooth_l1"] = "cosine"
    gram_weight: AmountOrZero = 0.0
    ibot_share: Share = 1.0
    centering: Literal["sinkhorn", "softmax", "none"] = "sinkhorn"
    sinkhorn_iterations: Count = 3
    student_temperature: Amount = 0.1
    teacher_temperature_start: Amount | Auto = "auto"
    teacher_temperature: Amount | Auto = "auto"
    teacher_temperature_warmup: Share = 0.3

    @property
    def needs_prototypes(self) -> bool:
        """Whether a term needs heads."""
        return self.dino_weight > 0 or self.ibot_weight > 0


class DistillOptimSection(OptimSection):
    """AdamW, with the paper's learning rate for distillation."""

    lr: Amount = 1e-3
    reference_batch: Count = 2048


class FrozenTeacherSection(Section):
    """Any MODEL, which is only looked at. `heads`: run takes those of its training run, auto does where they are there,
    learned trains heads with the students. `image_size` is the side in pixels that crops are brought to for it.

    `adapter`: a linear map from the students' tokens to the teacher's width, where they are compared. `cache` keeps its
    tokens of every view on disk (data.views) until the run ends; `precision` auto is that of the run.
    """

    model: str | None = None
    heads: Literal["auto", "run", "learned"] = "auto"
    image_size: Count | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    cache: bool = False
    adapter: Literal["linear", "none"] = "linear"


class AverageSection(Section):
    """Momentum of the student's exponential moving average, the final model: cosine from start to end."""

    momentum: Share | Auto = 0.992
    momentum_end: Share = 1.0


class ReportSection(Section):
    """What teacher and students are compared on at the end: that many images of the training source and of `test`,
    labelled DATA (None: the training images alone)."""

    images: CountOrZero = 2000
    test: str | None = None


class DistillConfig(TrainingConfig):
    """Settings of `dinov2 distill`: the paper's, with every schedule a fraction of the run."""

    data: DistillDataSection = DistillDataSection()
    students: list[StudentSection] = Field([])
    teacher: FrozenTeacherSection = FrozenTeacherSection()
    average: AverageSection = AverageSection()
    heads: DistillHeadsSection = DistillHeadsSection()
    loss: DistillLossSection = DistillLossSection()
    optim: DistillOptimSection = DistillOptimSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="before")
    @classmethod
    def _complete_students(cls, values: Any) -> Any:
        """Names as mappings, each with the keys that `model` sets for all."""
        students = values.get("students") if isinstance(values, dict) else None
        if not isinstance(students, list):
            return values
        common = values.get("model", {})
        common = common if isinstance(common, dict) else {}
        listed = [{"arch": one} if isinstance(one, str) else one for one in students]
        return values | {"students": [common | one if isinstance(one, dict) else one for one in listed]}

    @model_validator(mode="after")
    def _named_students(self) -> "DistillConfig":
        for student in self.students:
            student.name = student.name or student.arch
            if not _NAME.fullmatch(student.name) or student.name in _TAKEN:
                raise ValueError(
                    f"students: found the name {student.name!r}, expected letters, digits, - and _, and none of "
                    f"{', '.join(_TAKEN)}"
                )
        twice = [name for name, count in Counter(student.name for student in self.students).items() if count > 1]
        if twice:
            raise ValueError(
                f"students: found {twice[0]} twice, expected a name for each; give another one "
                f"(students: [{{arch: {twice[0]}, name: {twice[0]}-2}}, …] in a recipe)"
            )
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> "DistillConfig":
        loss = self.loss
        learning = ("dino_weight", "ibot_weight", "feature_weight", "gram_weight")
        if not any(getattr(loss, name) for name in learning):
            raise ValueError(
                f"loss: found no term that learns from the teacher, expected one of {', '.join(learning)} above 0"
            )
        if loss.ibot_weight and not loss.ibot_share:
            raise ValueError("loss.ibot_share is 0, expected a share of the patches (or loss.ibot_weight=0)")
        if self.teacher.cache and self.data.views is None:
            raise ValueError(
                "teacher.cache: found no data.views, expected a number: without it no view of an image comes twice"
            )
        if self.teacher.cache and self.phases:
            raise ValueError("teacher.cache: found phases, whose crops are others; expected a run of one phase")
        return self

    @property
    def moving_average(self) -> AverageSection:
        """The students'."""
        return self.average

    def learners(self) -> dict[str, ModelSection]:
        """The students by name; one that is alone has the name ""."""
        if len(self.students) > 1:
            return {student.name: student for student in self.students}
        return {"": self.students[0] if self.students else self.model}

    def identity(self) -> dict[str, Any]:
        """As of every command; how exactly the teacher computes may change where a run goes on, and the report's images
        shape no weights."""
        content = super().identity()
        del content["report"]
        for key in ("precision", "cache", "compile"):
            del content["teacher"][key]
        return content

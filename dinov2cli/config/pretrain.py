"""Settings of `dinov2 pretrain`, beside those of every training run."""

from typing import Literal

from pydantic import model_validator

from dinov2cli.config.common import Amount, AmountOrZero, Auto, Count, Section, Share
from dinov2cli.config.training import ScopeSection, TrainingConfig


class LossSection(Section):
    """Weights of the terms, the targets and their temperatures; the warm-up is a fraction of the run."""

    dino_weight: AmountOrZero = 1.0
    ibot_weight: AmountOrZero = 1.0
    koleo_weight: AmountOrZero = 0.1
    centering: Literal["sinkhorn", "softmax", "none"] = "sinkhorn"
    sinkhorn_iterations: Count = 3
    student_temperature: Amount = 0.1
    teacher_temperature_start: Amount = 0.04
    teacher_temperature: Amount | Auto = 0.07
    teacher_temperature_warmup: Share = 0.3


class MasksSection(Section):
    """Share of global crops that are masked, and the ladder of mask ratios over them."""

    probability: Share = 0.5
    ratio_min: Share = 0.1
    ratio_max: Share = 0.5


class TeacherSection(Section):
    """Momentum of the exponential moving average, cosine from start to end."""

    momentum: Share | Auto = 0.992
    momentum_end: Share = 1.0


class PretrainConfig(TrainingConfig):
    """Settings of `dinov2 pretrain`: the short recipe of the paper, with every schedule a fraction of the run."""

    loss: LossSection = LossSection()
    masks: MasksSection = MasksSection()
    teacher: TeacherSection = TeacherSection()
    drop_path: ScopeSection = ScopeSection()

    @property
    def moving_average(self) -> TeacherSection:
        """The teacher's."""
        return self.teacher

    @model_validator(mode="after")
    def _ladder(self) -> "PretrainConfig":
        if self.masks.ratio_min > self.masks.ratio_max:
            raise ValueError("masks.ratio_min is above masks.ratio_max, expected at most it")
        return self

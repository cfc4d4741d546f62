"""Watches a run for collapse: a few statistics of features and targets, and what they mean in words.

RankMe: Garrido et al. 2023 (arXiv 2210.02885). The other figures are plain batch statistics; all are computed on
detached tensors at log steps only, in float32, and never touch the training's random state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank of [n, D] features: exp of the entropy of normalised singular values (RankMe, equation 1)."""
    singular = torch.linalg.svdvals(features.float())
    share = singular / singular.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of L2-normalised [n, D] features: standard deviation over the batch times sqrt(D). 1 even, 0 collapsed."""
    unit = F.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0, unbiased=False).pow(2).mean().sqrt() * math.sqrt(features.shape[-1]))


@torch.no_grad()
def nearest_distance(features: Tensor) -> float:
    """Mean distance of L2-normalised [n, D] features to their nearest other one (what KoLeo spreads); 0 for n < 2."""
    if len(features) < 2:
        return 0.0
    unit = F.normalize(features.float(), dim=-1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2.0)
    return float((2.0 - 2.0 * similarity.max(dim=1).values.clamp(max=1.0)).clamp_min(0.0).sqrt().mean())


@torch.no_grad()
def target_entropy(targets: Tensor) -> float:
    """Mean entropy of the rows of [n, K] targets over log K: 1 uniform (says nothing), 0 one-hot."""
    probs = targets.float()
    entropy = -(probs * probs.clamp_min(1e-30).log()).sum(dim=-1).mean()
    return float(entropy) / math.log(targets.shape[-1])


@torch.no_grad()
def prototype_use(targets: Tensor) -> float:
    """Distinct winning prototypes among the rows of [n, K] targets over the most there could be, min(n, K)."""
    winners = targets.argmax(dim=-1).unique().numel()
    return winners / min(targets.shape)


def batch_statistics(*, class_tokens: Tensor, student_tokens: Tensor, targets: Tensor | None) -> dict[str, float]:
    """All figures of one step, by metric name.

    `class_tokens` [n, D] of the teacher (a frozen one: of the student) over both global crops, `student_tokens` [B, D]
    of the student on the first global crop, `targets` [n, K] of the DINO head, None where there is none.
    """
    of_targets = (
        {} if targets is None else {"target_entropy": target_entropy(targets), "prototype_use": prototype_use(targets)}
    )
    return of_targets | {
        "rankme": rankme(class_tokens),
        "feature_std": feature_std(class_tokens),
        "koleo_distance": nearest_distance(student_tokens),
    }


_FEW_DIRECTIONS = 2.0  # below it one direction says nearly all, however small the batch


@dataclass
class Monitor:
    """Turns the figures into findings. `rank_limit` = min(rows, D) of the class tokens, `clip` the gradient clip,
    `target_limit` the most prototypes that could win, min(rows, K) of the DINO targets (0: not known). With a
    `frozen_teacher` the class tokens are the student's.

    Nothing is said before `quiet_until` (a fraction of the run): at random initialisation class tokens are nearly
    alike and targets nearly uniform without anything being wrong.
    """

    rank_limit: int
    clip: float | None = None
    quiet_until: float = 0.2
    target_limit: int = 0
    frozen_teacher: bool = False
    _current: dict[str, str] = field(default_factory=dict)

    def findings(self, metrics: Mapping[str, float], progress: float) -> dict[str, str]:
        """Everything wrong in these metrics, as short key -> sentence with the setting to try."""
        found: dict[str, str] = {}
        if progress < self.quiet_until:
            return found
        std, rank = metrics["feature_std"], metrics["rankme"]
        if std < 0.1:
            found["collapse"] = (
                f"class tokens of different images are nearly the same (feature std {std:.3f}, 1 is even): "
                "the features have collapsed; lower optim.lr or "
                + ("look at the teacher's features" if self.frozen_teacher else "raise teacher.momentum")
            )
        elif rank < max(0.05 * self.rank_limit, _FEW_DIRECTIONS):
            found["rank"] = (
                f"class tokens fill few directions (RankMe {rank:.1f} of at most {self.rank_limit}): "
                "raise loss.koleo_weight or lower optim.lr"
            )
        if metrics["koleo_distance"] < 0.02:
            found["koleo"] = (
                f"nearest class tokens almost touch (distance {metrics['koleo_distance']:.3f}): "
                "raise loss.koleo_weight, or remove duplicates with dinov2 dedup"
            )
        entropy, use = metrics.get("target_entropy", 0.9), metrics.get("prototype_use", 1.0)  # without: nothing wrong
        if entropy > 0.98:
            found["uniform"] = (
                f"teacher targets are nearly uniform (entropy {entropy:.3f} of 1): they teach nothing; "
                "lower loss.teacher_temperature or train longer"
            )
        if entropy < 0.5 and self.target_limit and use * self.target_limit < 1.5:
            found["one prototype"] = (
                "one prototype wins for every image: teacher targets have collapsed, and a loss that falls to zero "
                "means nothing; use loss.centering sinkhorn or softmax, or raise loss.teacher_temperature"
            )
        elif use < 0.05:
            found["prototypes"] = (
                f"few prototypes win ({use:.0%} of those that could): use loss.centering sinkhorn, "
                "raise loss.teacher_temperature or lower heads.prototypes"
            )
        if self.clip and metrics["grad_norm"] > 30 * self.clip:
            found["gradient"] = (
                f"gradients are {metrics['grad_norm'] / self.clip:.0f} times the clip: "
                "lower optim.lr or lengthen optim.warmup"
            )
        return found

    def changes(self, metrics: Mapping[str, float], progress: float) -> list[str]:
        """Sentences for findings that are new since the last call, and for those that went away."""
        if "feature_std" not in metrics:  # a skipped step tells nothing of the features
            return []
        now = self.findings(metrics, progress)
        lines = [text for key, text in now.items() if key not in self._current]
        lines += [f"no longer: {text}" for key, text in self._current.items() if key not in now]
        self._current = now
        return lines

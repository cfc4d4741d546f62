"""The watch over collapse for every student of a run, and how their figures share a line of metrics."""

from collections.abc import Callable, Mapping

from dinov2cli.train.learner import Learner, StepResult
from dinov2cli.train.monitor import Monitor, batch_statistics
from dinov2cli.train.network import prototypes_of
from dinov2cli.train.tally import Tally

_OVERALL: dict[str, Callable[[list[float]], float]] = {
    "loss/total": lambda values: sum(values) / len(values),
    "grad_norm": max,
}
"""Figures that a line always has: over several students their mean, or the largest."""


class Watching:
    """A `Monitor` for each student; `rows` class tokens are seen of each at a time."""

    def __init__(
        self,
        learners: Mapping[str, Learner],
        *,
        rows: int,
        clip: float | None,
        quiet_until: float,
        frozen_teacher: bool = False,
    ) -> None:
        self._monitors: dict[str, Monitor] = {}
        for name, learner in learners.items():
            student = learner.model.student
            prototypes = 0 if student.dino_head is None else prototypes_of(student.dino_head)
            self._monitors[name] = Monitor(
                rank_limit=min(rows, student.backbone.embed_dim),
                clip=clip,
                quiet_until=quiet_until,
                target_limit=min(rows, prototypes),
                frozen_teacher=frozen_teacher,
            )

    def changes(self, own: Mapping[str, Mapping[str, float]], progress: float) -> list[str]:
        """`Monitor.changes` of every student, with its name where there are several."""
        return [
            f"{name}: {finding}" if name else finding
            for name, monitor in self._monitors.items()
            for finding in monitor.changes(own[name], progress)
        ]


def by_student(own: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One line out of the students' own: of one that is alone as it is, of several with the name in front of every
    key, and `loss/total` and `grad_norm` over all."""
    if "" in own:
        return dict(own[""])
    line = {key: over([one[key] for one in own.values()]) for key, over in _OVERALL.items()}
    return line | {f"{name}/{key}": value for name, one in own.items() for key, value in one.items()}


def own_line(result: StepResult, tally: Tally) -> dict[str, float]:
    """What a line of metrics says of one student: losses since the last line, and norms and features of this step."""
    norms, views = result.norms, result.views
    line = {f"loss/{term}": value for term, value in tally.losses().items()}
    line["grad_norm"] = float(norms["all"])
    line |= {f"grad_norm/{part}": float(norm) for part, norm in norms.items() if part != "all"}
    line["skipped"] = tally.skipped()
    if not bool(result.skipped):
        line |= batch_statistics(
            class_tokens=views.watched_tokens.flatten(0, 1),
            student_tokens=views.student_tokens[0],
            targets=None if views.targets is None else views.targets.rows(0, views.targets.shape[0]),
        )
    return line

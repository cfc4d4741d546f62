"""Several students on one line of metrics, and what is said of each."""

import pytest

from dinov2cli.train.learner import Learner
from dinov2cli.train.optim import build_optimizer
from dinov2cli.train.parallel import setup
from dinov2cli.train.watching import Watching, by_student
from tests.train.test_monitor import HEALTHY


def test_one_student_alone_bears_no_name_and_several_do():
    own = {"loss/total": 2.0, "grad_norm": 1.0, "rankme": 9.0}
    assert by_student({"": own}) == own
    line = by_student({"a": own, "b": {"loss/total": 4.0, "grad_norm": 3.0}})
    assert line["loss/total"] == 3.0  # the mean
    assert line["grad_norm"] == 3.0  # the largest
    assert (line["a/rankme"], line["b/loss/total"]) == (9.0, 4.0) and "rankme" not in line


@pytest.fixture
def learners(tiny):
    parallel = setup("cpu", "fp32")

    def learner():
        spread = parallel.spread(tiny.tiny_model())
        return Learner(spread, build_optimizer(spread.model.student, depth=2), parallel)

    return {"a": learner(), "b": learner()}


def test_findings_name_the_student_they_are_of(learners):
    watching = Watching(learners, rows=16, clip=3.0, quiet_until=0.1, frozen_teacher=True)
    said = watching.changes({"a": HEALTHY, "b": HEALTHY | {"feature_std": 0.01}}, 0.5)
    assert len(said) == 1
    assert said[0].startswith("b: class tokens of different images are nearly the same")
    assert said[0].endswith("lower optim.lr or look at the teacher's features")
    assert watching.changes({"a": HEALTHY, "b": HEALTHY}, 0.6)[0].startswith("b: no longer: ")


def test_limits_are_those_of_the_student_and_the_rows_seen(learners):
    """64 prototypes, of which 16 rows let 16 win: one that always wins has collapsed."""
    watching = Watching(learners, rows=16, clip=3.0, quiet_until=0.0)
    one = HEALTHY | {"prototype_use": 1 / 16, "target_entropy": 0.01}
    (said,) = watching.changes({"a": one, "b": HEALTHY}, 0.5)
    assert said.startswith("a: one prototype wins for every image")

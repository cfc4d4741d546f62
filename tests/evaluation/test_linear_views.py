import numpy as np
import pytest

from dinov2cli.artifacts.parts import Parts
from dinov2cli.errors import WorkError
from dinov2cli.evaluation.linear.views import LatestView, same_rows, stretches


def test_only_the_latest_view_is_kept(tmp_path):
    def stage(view):
        return LatestView(Parts(tmp_path)).stage("features", {"model": 1, "view": view})

    stage("a").save(0, {"index": np.arange(3)})
    stage("a").save(1024, {"index": np.arange(4)})
    assert np.array_equal(stage("a").load(0)["index"], np.arange(3)) and set(stage("a").load(0)) == {"index"}
    assert stage("b").load(0) is None
    stage("b").save(0, {"index": np.arange(5)})
    assert len(stage("b").load(0)["index"]) == 5 and stage("a").load(0) is None
    assert len(stage("a").load(1024)["index"]) == 4
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert LatestView(Parts(tmp_path)).stage("features", {"model": 2, "view": "b"}).load(0) is None


@pytest.mark.parametrize("steps, views", [(100, 10), (7, 3), (3, 7), (1, 1)])
def test_views_share_the_steps_and_any_step_knows_its_view(steps, views):
    whole = list(stretches(0, steps, views))
    assert whole[-1][1] == steps
    view_of = {}
    begin = 0
    for view, until in whole:
        view_of |= dict.fromkeys(range(begin, until), view)
        begin = until
    assert [view_of[step] for step in range(steps)] == [step * views // steps for step in range(steps)]
    for step in range(steps + 1):
        left = list(stretches(step, steps, views))
        assert left == [(view, until) for view, until in whole if until > step]


def test_other_images_in_another_pass_are_an_error():
    same_rows(np.arange(4), np.arange(4), "photos")
    with pytest.raises(WorkError, match=r"^photos: 1 images could be read in one pass and not in another"):
        same_rows(np.arange(4), np.array([0, 1, 3]), "photos")

"""Recording and replaying of the blocks, with CUDA graphs emulated on the CPU: a replay computes again, in place."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dinov2cli.config import PretrainConfig
from dinov2cli.errors import UserError
from dinov2cli.train import graphs


@pytest.fixture
def recorded(monkeypatch):
    """Emulates CUDA graphs; a list of (shape of x, whether it has a gradient) of every recording."""
    made = []
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)

    class Emulated(graphs.RecordedPasses):
        def __init__(self, run, x, index, parameters):
            made.append((tuple(x.shape), x.requires_grad))
            super().__init__(run, x, index, parameters)
            types = (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())

            def forward():
                with torch.set_grad_enabled(types[2]), torch.autocast("cpu", *types[:2], cache_enabled=False):
                    self.live = run(self.x, self.index)
                self.out.detach().copy_(self.live.detach())

            def backward():
                new = torch.autograd.grad(self.live, self.inputs, self.grad_out)
                for static, grad in zip(self.grads, new, strict=True):
                    static.copy_(grad)

            self.forward_graph.replay, self.backward_graph.replay = forward, backward

    monkeypatch.setattr(graphs, "RecordedPasses", Emulated)
    return made


def test_a_run_with_graphs_is_the_run_without(tiny, tmp_path, recorded):
    plain = tiny.tiny_train(tmp_path / "plain", 4)
    assert not recorded
    replayed = tiny.tiny_train(tmp_path / "graphs", 4, step={"graphs": True})
    # Once for the teacher, which sees 16 global crops of 17 tokens, and once for the student: 16 local ones of 5 more.
    assert recorded == [((16 * 17, 32), False), ((16 * 17 + 16 * 5, 32), True)]
    assert replayed.metrics["loss/total"] == plain.metrics["loss/total"]
    state = replayed.averages[""].state_dict()
    for name, value in plain.averages[""].state_dict().items():
        assert torch.equal(value, state[name]), name


def test_other_shapes_are_recorded_anew_and_nothing_outside_a_step(tiny, recorded):
    model = tiny.tiny_model()
    backbone = model.student.backbone
    stacked = graphs.BlockGraphs([backbone])
    generator = torch.Generator().manual_seed(0)

    def step(images):
        return backbone(torch.zeros(images, 3, 32, 32), generator=generator).cls

    with stacked.running():
        for images in (8, 8, 6, 6):
            step(images)
    assert recorded == [((8 * 17, 32), True), ((6 * 17, 32), True)]
    step(4)
    with pytest.raises(RuntimeError), stacked.running():
        raise RuntimeError
    assert backbone.runner is None and len(recorded) == 2


def test_other_numbers_kept_and_other_types_are_recorded_anew(tiny, recorded):
    backbone = tiny.tiny_model().student.backbone.train()
    stacked = graphs.BlockGraphs([backbone])

    def step(rate, dtype=None):
        backbone.set_drop_path(rate)
        with stacked.running(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            backbone(torch.zeros(8, 3, 32, 32), generator=torch.Generator().manual_seed(0))

    for number, rate in enumerate((0.0, 0.25, 0.5), start=1):
        step(rate)
        step(rate)
        assert len(recorded) == number
    step(0.5, torch.bfloat16)
    step(0.5, torch.bfloat16)
    assert len(recorded) == 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": torch.device("cpu")}, "CUDA graphs need an NVIDIA GPU, this is cpu"),
        ({"world_size": 2}, "found 2 processes, expected one"),
        ({"sharded": True}, "found 1 processes, sharded, expected one with its own copy"),
        ({"accumulate": 2}, r"found train\.accumulate=2, expected 1"),
        ({"recompute": True}, "found activation checkpointing, expected none"),
    ],
)
def test_where_graphs_cannot_work_they_are_refused(changes, text):
    fine = {"device": torch.device("cuda"), "world_size": 1, "sharded": False, "accumulate": 1, "recompute": False}
    graphs.check_graphs(**fine)
    with pytest.raises(UserError, match=f"train.compile=graphs: {text}"):
        graphs.check_graphs(**(fine | changes))


def test_the_setting_leaves_the_identity_of_older_runs_alone():
    def identity(value):
        return PretrainConfig.model_validate({"train": {"compile": value}}).identity()["train"]["compile"]

    assert identity(True) is True and identity(False) is False and identity("graphs") == "graphs"

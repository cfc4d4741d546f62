"""train.compile on a real GPU: compiled blocks and CUDA graphs give the losses of plain ones."""

import pytest
import torch

from dinov2cli.train.parallel import setup
from tests.train.tiny_run import tiny_model, tiny_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def losses(folder, *, compiled, graphs, precision):
    model, found = tiny_model(embed_dim=128), []
    if compiled:
        for network in (model.student, model.teacher):
            for block in network.backbone.blocks:
                block.compile(fullgraph=True)
    tiny_train(
        folder,
        5,
        model=model,
        step={"graphs": graphs},
        parallel=setup("cuda", precision),
        on_metrics=lambda line, _: found.append(line["loss/total"]),
    )
    return found


def test_graphs_replay_what_is_computed_without_them(tmp_path):
    """Not compiled the very same kernels run, so in float32 the losses differ by rounding at most."""
    plain = losses(tmp_path / "plain", compiled=False, graphs=False, precision="fp32")
    replayed = losses(tmp_path / "graphs", compiled=False, graphs=True, precision="fp32")
    assert len(plain) == 5
    assert replayed == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("graphs", [False, True], ids=["compiled", "compiled and graphs"])
def test_compiled_blocks_train_alike(tmp_path, graphs):
    plain = losses(tmp_path / "plain", compiled=False, graphs=False, precision="bf16")
    compiled = losses(tmp_path / "compiled", compiled=True, graphs=graphs, precision="bf16")
    assert compiled == pytest.approx(plain, rel=1e-2)

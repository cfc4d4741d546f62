"""The Triton kernels of stochastic depth on a real GPU."""

import pytest
import torch

from dinov2cli.bench import stochastic_depth as bench
from dinov2cli.kernels.dispatch import SETTING, choose
from dinov2cli.models.registry import build
from tests.kernels import depth_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_float32_equals_float64_autograd(shape, gain):
    out, grad = cases.worst(cases.make(*cases.SHAPES[shape], gain=gain, device="cuda"))
    assert out < 1e-6 and grad < 1e-5


@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["float32 residual", "16-bit residual"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_16_bit_equals_float64_autograd(dtype, bound, x_dtype):
    case = cases.make([(24, 257), (96, 50)], [14, 57], 768, dtype=dtype, x_dtype=x_dtype, device="cuda")
    out, grad = cases.worst(case)
    assert out < bound and grad < bound


def test_errors_are_those_of_torch():
    assert choose("stochastic depth", CUDA).backend == "triton"
    bench.check(CUDA, seed=0)


def test_nothing_waits_for_the_gpu_and_results_repeat_bitwise():
    case = cases.make([(8, 65), (16, 17)], [5, 9], 384, device="cuda")
    first = cases.found(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = cases.found(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_cuda_graphs_capture_both_passes():
    case = cases.make([(8, 65), (16, 17)], [5, 9], 384, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = cases.found(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cases.found(case)
    for tensor in (found[0], *found[1]):
        tensor.fill_(torch.nan)
    graph.replay()
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_backbone_trains_as_with_torch(monkeypatch, ffn, compiled):
    def gradients(backend):
        monkeypatch.setenv(SETTING, backend)
        model = build("vits14", depth=3, img_size=56, ffn=ffn, drop_path=0.4, layerscale=0.5, seed=1).to(CUDA).train()
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True)
        random = torch.Generator(CUDA).manual_seed(0)
        crops = [torch.randn(12, 3, side, side, generator=random, device=CUDA) for side in (56, 28)]
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model.forward_crops(crops, generator=torch.Generator().manual_seed(7))
        sum(out.cls.square().sum() + out.patches.sin().sum() for out in outputs).backward()
        return {"cls": outputs[1].cls.detach()} | {name: p.grad for name, p in model.named_parameters()}

    plain, fused = gradients("torch"), gradients("triton")
    for name, value in plain.items():
        if value is not None:
            assert cases.error(fused[name], value.double()) < 3e-2, name

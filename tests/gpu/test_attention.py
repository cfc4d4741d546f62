"""The attention kernels on a GPU: as exact as they claim for every length, repeatable, and usable where torch goes."""

import pytest
import torch

from dinov2cli.kernels import build
from dinov2cli.kernels.attention import attention, by_kernel, per_run, products
from dinov2cli.kernels.attention_baselines import implementations
from dinov2cli.kernels.attention_op import VARIANTS, short_attention
from dinov2cli.kernels.dispatch import choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda")
LENGTHS = (1, 2, 16, 17, 49, 50, 53, 54, 63, 64, 65, 255, 256, 257, 258, 261, 264, 272)
PACK = [(3, 257), (5, 50), (2, 261), (1, 64)]
BOUNDS = {torch.bfloat16: (5e-3, 6e-3), torch.float16: (1e-3, 1e-3)}
OVER_TORCH = 1.2  # times the error of plain products in the same type
SLACK = 1e-4  # where plain products are exact, as for one token


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The kernels built and loaded; a GPU that is too old has none."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert build.missing(DEVICE) is None


def make(groups, heads=2, dtype=torch.bfloat16, seed=0, peak=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    tokens = sum(b * n for b, n in groups)
    qkv = torch.randn(tokens, 3, heads, 64, device=DEVICE, generator=generator)
    qkv[:, :2] *= peak
    grad = torch.randn(tokens, heads * 64, device=DEVICE, generator=generator)
    return qkv.to(dtype), grad.to(dtype)


def both(function, qkv, grad):
    """Output [T, H * C] and the gradients of q, k and v."""
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
    return [out.detach(), *gradient.unbind(1)]


def plain(groups):
    return lambda qkv: per_run(qkv, groups, products)


def errors(found, exact):
    """Relative errors; of a gradient that is next to nothing, relative to a hundredth of the whole gradient."""
    whole = torch.stack(exact[1:]).norm()
    for index, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        size = theirs.norm() if index == 0 else theirs.norm().maximum(whole / 100)
        yield ((ours.double() - theirs).norm() / size).item()


def check(function, qkv, grad, groups, *, peaked=False):
    exact = both(plain(groups), qkv.double(), grad.double())
    found = both(function, qkv, grad)
    own = list(errors(both(plain(groups), qkv, grad), exact))
    forward, backward = BOUNDS[qkv.dtype]
    for index, (error, torchs) in enumerate(zip(errors(found, exact), own, strict=True)):
        bound = forward if index == 0 else float("inf") if peaked else backward
        # A single rounding of the output weighs more in delta, the fewer terms it has: at 2 tokens, one in four draws.
        short = max(tokens for _, tokens in groups) < 16
        allowed = 4 * bound if short else min(bound, OVER_TORCH * torchs + SLACK)
        assert error <= allowed, f"{('out', 'dq', 'dk', 'dv')[index]}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_every_length_is_exact_within_its_type(tokens, dtype):
    groups = [(3, tokens)]
    qkv, grad = make(groups, dtype=dtype, seed=tokens)
    check(lambda x: by_kernel(x, groups), qkv, grad, groups)


@pytest.mark.parametrize("heads", [1, 6, 12, 16, 24])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_a_pack_of_several_lengths(heads, dtype):
    qkv, grad = make(PACK, heads=heads, dtype=dtype, seed=heads)
    check(lambda x: by_kernel(x, PACK), qkv, grad, PACK)


@pytest.mark.parametrize("variant", range(max(len(known) for pair in VARIANTS.values() for known in pair)))
def test_every_variant(variant):
    qkv, grad = make(PACK, heads=3, seed=variant)
    check(lambda x: by_kernel(x, PACK, variant), qkv, grad, PACK)


@pytest.mark.parametrize("tokens", [17, 50, 64, 257, 272])
def test_peaked_softmax(tokens):
    """Queries and keys times 8: weights of nearly 0 and 1."""
    groups = [(3, tokens)]
    qkv, grad = make(groups, seed=tokens, peak=8)
    check(lambda x: by_kernel(x, groups), qkv, grad, groups, peaked=True)


@pytest.mark.parametrize("tokens", [50, 257, 272])
def test_equal_tokens_give_their_value(tokens):
    qkv = make([(1, 1)])[0].expand(2 * tokens, 3, 2, 64).contiguous()
    out = by_kernel(qkv, [(2, tokens)])
    torch.testing.assert_close(out, qkv[:, 2].flatten(1), rtol=8e-3, atol=0)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_logsumexp(tokens):
    qkv, _ = make([(2, tokens)], seed=tokens)
    _, lse = torch.ops.dinov2.short_attention(qkv, [2, tokens], 0.125)
    q, k, _ = qkv.double().view(2, tokens, 3, 2, 64).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) * 0.125).exp().sum(-1).log2().transpose(1, 2).reshape(-1, 2)
    assert (lse.double() - expected).abs().max() <= 1e-3


def test_everything_is_written_and_twice_the_same():
    """Outputs full of NaN before; no atomics, so that two runs agree to the bit."""
    qkv, grad = make(PACK, heads=4)
    launches = [number for b, n in PACK for number in (b, n, 0)]
    runs = []
    for _ in range(2):
        out, lse, dqkv = (
            torch.full_like(grad, torch.nan),
            torch.full((len(qkv), 4), torch.nan, device=DEVICE),
            torch.full_like(qkv, torch.nan),
        )
        torch.ops.dinov2_kernels.attention_forward(qkv, out, lse, launches, 0.125)
        torch.ops.dinov2_kernels.attention_backward(qkv, out, grad, lse, dqkv, launches, 0.125)
        runs.append((out, lse, dqkv))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


def test_samples_do_not_see_each_other():
    qkv, grad = make(PACK)
    other = qkv.clone()
    changed = slice(257, 2 * 257)
    other[changed] += 1
    for ours, theirs in zip(
        both(lambda x: by_kernel(x, PACK), qkv, grad), both(lambda x: by_kernel(x, PACK), other, grad), strict=True
    ):
        assert not torch.equal(ours[changed], theirs[changed])
        ours[changed] = theirs[changed] = 0
        assert torch.equal(ours, theirs)


def test_rows_that_lie_apart_and_a_gradient_across():
    qkv, grad = make(PACK)
    wide = torch.cat([qkv.flatten(1), qkv.flatten(1)], 1)
    apart = wide[:, : 3 * 128].unflatten(1, (3, 2, 64))
    assert not apart.is_contiguous()
    for ours, theirs in zip(
        both(lambda x: by_kernel(x, PACK), apart, grad.t().contiguous().t()),
        both(lambda x: by_kernel(x, PACK), qkv, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_empty_groups():
    qkv, grad = make([(2, 50)])
    for ours, theirs in zip(
        both(lambda x: by_kernel(x, [(0, 257), (2, 50), (0, 1)]), qkv, grad),
        both(lambda x: by_kernel(x, [(2, 50)]), qkv, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert by_kernel(qkv[:0], [(0, 257)]).shape == (0, 128)


def test_it_is_what_runs_here_and_longer_samples_fall_back(monkeypatch):
    monkeypatch.delenv("DINOV2_KERNELS", raising=False)
    assert choose("attention", DEVICE).backend == "cuda"
    qkv, grad = make(PACK)
    for ours, theirs in zip(
        both(lambda x: attention(x, PACK), qkv, grad), both(lambda x: by_kernel(x, PACK), qkv, grad), strict=True
    ):
        assert torch.equal(ours, theirs)
    mixed = [(1, 1370), (3, 50)]
    check(lambda x: attention(x, mixed), *make(mixed), mixed)
    qkv, grad = make(PACK, dtype=torch.float32)
    exact = both(plain(PACK), qkv.double(), grad.double())
    assert max(errors(both(lambda x: attention(x, PACK), qkv, grad), exact)) <= 5e-3


def test_what_the_kernels_do_not_take_is_an_error():
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        short_attention(make(PACK)[0].float(), [size for run in PACK for size in run])
    with pytest.raises(RuntimeError, match="273 tokens; expected 1 to 272"):
        short_attention(make([(1, 273)])[0], [1, 273])
    with pytest.raises(RuntimeError, match="groups of 50 tokens and qkv of 100"):
        short_attention(make([(2, 50)])[0], [1, 50])


def test_torch_accepts_the_operator():
    qkv, _ = make([(2, 17), (1, 257)])
    arguments = (qkv.requires_grad_(), [2, 17, 1, 257], 0.125, 0)
    torch.library.opcheck(torch.ops.dinov2.short_attention.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_without_a_break(backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    qkv, grad = make(PACK)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(x, PACK), fullgraph=True, backend=backend)
    for ours, theirs in zip(both(compiled, qkv, grad), both(lambda x: attention(x, PACK), qkv, grad), strict=True):
        assert torch.equal(ours, theirs)


def test_a_cuda_graph_captures_it():
    qkv, grad = make(PACK)
    static, gradient = qkv.clone(), grad.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            both(lambda x: attention(x, PACK), static, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(lambda x: attention(x, PACK), static, gradient)
    fresh, fresh_grad = make(PACK, seed=7)
    static.copy_(fresh)
    gradient.copy_(fresh_grad)
    graph.replay()
    for ours, theirs in zip(found, both(lambda x: attention(x, PACK), fresh, fresh_grad), strict=True):
        assert torch.equal(ours, theirs)


def test_it_runs_on_the_current_stream():
    qkv, _ = make([(64, 257)], heads=16)
    expected = by_kernel(qkv, [(64, 257)])
    source = torch.zeros_like(qkv)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        source.copy_(qkv)
        out = by_kernel(source, [(64, 257)])
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_its_tensors():
    qkv, _ = make(PACK)
    assert torch.equal(by_kernel(qkv.to("cuda:1"), PACK).cpu(), by_kernel(qkv, PACK).cpu())


def test_under_autocast_it_gets_what_the_linear_layer_gives():
    layer = torch.nn.Linear(128, 3 * 128, device=DEVICE)
    x = torch.randn(sum(b * n for b, n in PACK), 128, device=DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = attention(layer(x).unflatten(-1, (3, 2, 64)), PACK)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_every_baseline_agrees():
    groups = [(2, 257), (3, 50)]
    qkv, grad = make(groups)
    exact = both(plain(groups), qkv.double(), grad.double())
    found = implementations(DEVICE)
    assert {"cuda", "sdpa", "sdpa efficient", "varlen", "torch"} <= set(found)
    for name, attend in found.items():
        worst = max(errors(both(lambda x, attend=attend: attend(x, groups), qkv, grad), exact))
        assert worst <= 2e-2, f"{name}: {worst:.2e}"

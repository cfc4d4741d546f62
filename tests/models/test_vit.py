"""The backbone against float64 references written straight from the equations."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.errors import UserError
from dinov2cli.kernels.attention import attend
from dinov2cli.models.blocks import swiglu_hidden
from dinov2cli.models.depth import Share, add_residual, draw_kept


def reference(model, images, masks=None):
    """The forward pass in float64, one sample and one head at a time, from the state dict alone."""
    w = {key: value.double() for key, value in model.state_dict().items()}
    dim, heads, patch = model.embed_dim, model.num_heads, model.patch_size
    samples = []
    for i, image in enumerate(images.double()):
        cells = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
        tokens = cells @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
        if masks is not None:
            tokens[masks[i]] = w["mask_token"][0]
        x = torch.cat([w["cls_token"][0], tokens]) + w["pos_embed"][0]
        if "register_tokens" in w:
            x = torch.cat([x[:1], w["register_tokens"][0], x[1:]])
        for block in range(model.depth):
            p = f"blocks.{block}."
            y = layer_norm(x, w[p + "norm1.weight"], w[p + "norm1.bias"])
            qkv = (y @ w[p + "attn.qkv.weight"].T + w[p + "attn.qkv.bias"]).view(-1, 3, heads, dim // heads)
            out = []
            for h in range(heads):
                q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
                out.append(torch.softmax(q @ k.T / (dim // heads) ** 0.5, dim=-1) @ v)
            y = torch.cat(out, dim=-1) @ w[p + "attn.proj.weight"].T + w[p + "attn.proj.bias"]
            x = x + y * w[p + "ls1.gamma"]
            y = layer_norm(x, w[p + "norm2.weight"], w[p + "norm2.bias"])
            if model.ffn == "swiglu":
                y = y @ w[p + "mlp.w12.weight"].T + w[p + "mlp.w12.bias"]
                half = y.shape[1] // 2
                y = y[:, :half] * torch.sigmoid(y[:, :half]) * y[:, half:]
                y = y @ w[p + "mlp.w3.weight"].T + w[p + "mlp.w3.bias"]
            else:
                y = y @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"]
                y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
                y = y @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
            x = x + y * w[p + "ls2.gamma"]
        samples.append(x)
    prenorm = torch.stack(samples)
    return layer_norm(prenorm, w["norm.weight"], w["norm.bias"]), prenorm


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def bicubic(grid, out, scale):
    """Keys' cubic resampling (a = -0.75) of a [n, n, D] grid to out = (rows, columns), clamped at the border."""

    def weights(n, count, factor):
        matrix = np.zeros((count, n))
        for i in range(count):
            position = (i + 0.5) / factor - 0.5
            base = int(np.floor(position))
            for tap in range(base - 1, base + 3):
                d = abs(position - tap)
                near = 1.25 * d**3 - 2.25 * d**2 + 1
                far = -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
                matrix[i, min(max(tap, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0.0
        return matrix

    rows = weights(grid.shape[0], out[0], scale[0])
    columns = weights(grid.shape[1], out[1], scale[1])
    return np.einsum("ri,cj,ijd->rcd", rows, columns, grid)


@pytest.mark.parametrize(("ffn", "registers"), list(itertools.product(["mlp", "swiglu"], [0, 4])))
def test_forward_equals_a_float64_reference(small, ffn, registers):
    model = small(ffn=ffn, num_register_tokens=registers).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 56, 56, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 16, generator=generator) < 0.4
    for mask in (None, masks):
        out = model(images, mask)
        tokens, prenorm = reference(model, images, mask)
        found = torch.cat([out.cls[:, None], out.registers, out.patches], dim=1)
        torch.testing.assert_close(found, tokens, atol=1e-10, rtol=0)
        torch.testing.assert_close(out.prenorm, prenorm, atol=1e-10, rtol=0)
        assert out.registers.shape == (2, registers, 64)


def test_packed_crops_equal_separate_forwards(small):
    model = small(num_register_tokens=4)
    generator = torch.Generator().manual_seed(2)
    sizes = [(2, 56, 56), (3, 56, 56), (5, 28, 28), (1, 42, 70), (2, 56, 56)]
    crops = [torch.randn(b, 3, h, w, generator=generator) for b, h, w in sizes]
    masks = [
        torch.rand(2, 16, generator=generator) < 0.5,
        None,
        None,
        torch.rand(1, 15, generator=generator) < 0.5,
        None,
    ]
    packed = model.forward_crops(crops, masks)
    for images, mask, out in zip(crops, masks, packed, strict=True):
        for found, expected in zip(out, model(images, mask), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_follow_the_convention(small, offset):
    model = small(interpolate_offset=offset, interpolate_antialias=False, img_size=70)
    grid = model.pos_embed[0, 1:].detach().double().numpy().reshape(5, 5, 64)
    for rows, columns in [(2, 2), (3, 7), (9, 9)]:
        scale = ((rows + offset) / 5, (columns + offset) / 5)
        expected = bicubic(grid, (rows, columns), scale).reshape(-1, 64)
        found = model.position_embedding(rows * 14, columns * 14)
        assert found.shape == (1, 1 + rows * columns, 64)
        np.testing.assert_allclose(found[0, 1:].detach().numpy(), expected, atol=2e-5)
        torch.testing.assert_close(found[:, :1], model.pos_embed[:, :1])
    assert model.position_embedding(70, 70) is model.pos_embed


def test_the_two_conventions_differ_only_away_from_the_native_size(small):
    scaled, exact = small(interpolate_offset=0.1), small(interpolate_offset=0.0, interpolate_antialias=True)
    native, other = torch.randn(1, 3, 56, 56), torch.randn(1, 3, 28, 28)
    assert torch.equal(scaled(native).cls, exact(native).cls)
    assert (scaled(other).cls - exact(other).cls).abs().max() > 1e-3


def test_stochastic_depth_keeps_its_share_in_each_group_and_scales(small):
    block = small().blocks[1]
    groups = [(5, 3), (8, 2)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5 * 3 + 8 * 2, 64, generator=generator)
    (kept,) = draw_kept(groups, [0.3], generator, x.device)
    assert [len(index) for index in kept.attention] == [3, 5]  # floor(5 * 0.7), floor(8 * 0.7)
    assert all(len(set(index.tolist())) == len(index) for index in kept.attention + kept.ffn)
    found = block(x, groups, kept)

    expected = x
    for branch, indices in ((block.attention_branch, kept.attention), (block.ffn_branch, kept.ffn)):
        full, rows = branch(expected, groups), []
        for (b, n), index in zip(groups, indices, strict=True):
            gate = torch.zeros(b)
            gate[index] = b / len(index)
            rows.append(gate.repeat_interleave(n))
        expected = expected + torch.cat(rows)[:, None] * full
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_stochastic_depth_has_the_gradient_of_the_gated_sum(small):
    model = small()
    linear = model.blocks[0].mlp.fc1
    groups, index = [(4, 2)], [torch.tensor([3, 1])]
    x = torch.randn(8, 64, requires_grad=True)
    out = add_residual(lambda tokens, _: linear(tokens)[:, :64], x, groups, index, [2.0])
    (found,) = torch.autograd.grad(out.pow(2).sum(), x)
    gate = torch.tensor([0.0, 2.0, 0.0, 2.0]).repeat_interleave(2)[:, None]
    (expected,) = torch.autograd.grad((x + gate * linear(x)[:, :64]).pow(2).sum(), x)
    torch.testing.assert_close(found, expected)


def test_at_least_one_sample_is_kept_and_exact_shares_are_not_rounded_away():
    generator = torch.Generator().manual_seed(0)
    (kept,) = draw_kept([(1, 4), (2, 4), (20, 4)], [0.9], generator, torch.device("cpu"))
    assert [len(index) for index in kept.attention] == [1, 1, 2]  # 20 * (1 - 0.9) is 1.9999999999999996 in floats


def test_stochastic_depth_skips_the_work(small):
    images = torch.randn(10, 3, 56, 56)

    def flops(rate):
        model = small(drop_path=rate).train()
        with FlopCounterMode(display=False) as counter:
            model(images, generator=torch.Generator().manual_seed(0))
        return counter.get_total_flops()

    stem = 2 * 10 * 16 * 3 * 14 * 14 * 64
    assert (flops(0.5) - stem) / (flops(0.0) - stem) == pytest.approx(0.5)


def test_stochastic_depth_is_driven_by_its_generator_and_only_in_training(small):
    model = small(drop_path=0.5)
    images = torch.randn(6, 3, 56, 56)
    plain = model(images).cls
    torch.manual_seed(1)
    assert torch.equal(plain, model(images).cls)
    model.train()
    first, again, other = (model(images, generator=torch.Generator().manual_seed(s)).cls for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="stochastic depth is active: pass generator"):
        model(images)


def test_drop_rates_are_uniform_or_rise_from_zero(small):
    assert small(drop_path=0.3).drop_rates == [0.3, 0.3, 0.3]
    assert small(drop_path=0.3, drop_path_uniform=False).drop_rates == pytest.approx([0.0, 0.15, 0.3])
    model = small(drop_path=0.3, drop_path_uniform=False).train()
    kept = model.draw_depth([(10, 2)], torch.Generator(), torch.device("cpu"))
    assert kept[0] is None and len(kept[1].ffn[0]) == 8 and len(kept[2].ffn[0]) == 7


def test_intermediate_blocks(small):
    model = small(num_register_tokens=4)
    images = torch.randn(2, 3, 56, 28)
    out = model(images)
    (patches, cls), (raw_patches, raw_cls) = (
        model.intermediate(images, [2])[0],
        model.intermediate(images, [2], False)[0],
    )
    torch.testing.assert_close(cls, out.cls)
    torch.testing.assert_close(patches, out.patches)
    torch.testing.assert_close(raw_cls, out.prenorm[:, 0])
    torch.testing.assert_close(raw_patches, out.prenorm[:, 5:])
    two = model.intermediate(images, [2, 0])
    torch.testing.assert_close(two[0][1], out.cls)
    shallow = small(num_register_tokens=4)
    shallow.blocks = shallow.blocks[:1]
    shallow.depth = 1
    torch.testing.assert_close(two[1][0], shallow(images).patches)
    with pytest.raises(UserError, match=r"blocks \[3, -1\] do not exist: this backbone has blocks 0 to 2"):
        model.intermediate(images, [3, 0, -1])


def test_no_layerscale_equals_gains_of_one(small):
    without, ones = small(layerscale=None), small(layerscale=1.0)
    assert "blocks.0.ls1.gamma" not in without.state_dict()
    state = dict(without.state_dict())
    ones.load_state_dict(state | {k: torch.ones_like(v) for k, v in ones.state_dict().items() if "gamma" in k})
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(without(images).cls, ones(images).cls)


def test_swiglu_width_is_rounded_to_eight():
    assert swiglu_hidden(1536, 4) == 4096
    assert swiglu_hidden(384, 4) == 1024
    assert swiglu_hidden(192, 4) == 512
    assert swiglu_hidden(100, 4) == 272  # 2/3 of 400 is 266.7


def test_mixed_precision_stays_close(small):
    model = small()
    images = torch.randn(2, 3, 56, 56)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    similarity = F.cosine_similarity(out.cls.float(), model(images).cls, dim=-1)
    assert similarity.min() > 0.999
    assert out.prenorm.dtype == torch.float32  # the residual stream keeps full precision


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 60, 56), "image size 60x56 is not a multiple of the patch size 14: use 56 or 70"),
        ((1, 3, 56, 7), "image size 56x7 is not a multiple of the patch size 14: use 14"),
        ((1, 4, 56, 56), "images have 4 channels, this backbone takes 3"),
    ],
)
def test_wrong_images_are_explained(small, shape, message):
    with pytest.raises(UserError) as caught:
        small()(torch.zeros(shape))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"img_size": 100}, "img_size 100 is not a multiple of the patch size 14: use 98 or 112"),
        ({"num_heads": 5}, "embed_dim 64 is not a multiple of num_heads 5"),
        ({"ffn": "moe"}, "ffn is 'moe', expected 'mlp' or 'swiglu'"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected a rate from 0 up to but not including 1"),
    ],
)
def test_wrong_numbers_are_explained(small, numbers, message):
    with pytest.raises(UserError) as caught:
        small(**numbers)
    assert str(caught.value) == message


@pytest.mark.parametrize("tokens", [5, 50, 301])
def test_short_16_bit_attention_on_a_cpu_equals_the_fused_kernel(tokens):
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(3, 2, tokens, 16, generator=generator) for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    expected.backward(g.double())
    out = attend(*half)
    out.backward(g.bfloat16())
    for ours, theirs in zip([out, *(x.grad for x in half)], [expected, *(x.grad for x in exact)], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_processes_that_draw_alike_keep_together_what_one_keeps():
    """Three crops of each of 4 x 2 images, crop after crop: every process finds its own among those of the whole."""
    images, ranks, crops = 2, 4, 3
    (whole,) = draw_kept([(crops * images * ranks, 5)], [0.4], torch.Generator().manual_seed(1), torch.device("cpu"))
    found = []
    for rank in range(ranks):
        share = Share(rank, ranks, images)
        generator = torch.Generator().manual_seed(1)
        (kept,) = draw_kept([(crops * images, 5)], [0.4], generator, torch.device("cpu"), share)
        assert kept.scale == whole.scale == [24 / 14]
        crop, image = kept.attention[0] // images, kept.attention[0] % images
        found += (crop * images * ranks + rank * images + image).tolist()
    assert sorted(found) == sorted(whole.attention[0].tolist())

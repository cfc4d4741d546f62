"""Depth heads against the published order of operations and against transformers' DPT with the same weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.dpt.configuration_dpt import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

from dinov2cli.errors import UserError
from dinov2cli.evaluation.depth.heads import HEADS, DPTDepth, LinearDepth, build_head, head_blocks
from dinov2cli.evaluation.depth.measures import expected_depth

DIM, GRID = 32, (4, 6)


def tokens(blocks, *, grid=GRID, seed=0, batch=2):
    """Maps [B, L * D, h, w] and class tokens [B, L * D]."""
    generator = torch.Generator().manual_seed(seed)
    width = blocks * DIM
    return torch.randn(batch, width, *grid, generator=generator), torch.randn(batch, width, generator=generator)


@pytest.mark.parametrize(
    ("kind", "depth", "blocks"),
    [
        ("lin1", 12, [11]),
        ("lin4", 12, [2, 5, 8, 11]),
        ("lin4", 24, [4, 11, 17, 23]),
        ("dpt", 40, [9, 19, 29, 39]),
        ("dpt", 4, [0, 1, 2, 3]),
        ("lin4", 16, [3, 7, 11, 15]),
        ("lin4", 6, [1, 2, 4, 5]),
        ("lin4", 2, [0, 0, 1, 1]),
        ("lin4", 1, [0, 0, 0, 0]),
    ],
)
def test_blocks_are_those_of_the_paper_or_evenly_spread(kind, depth, blocks):
    assert head_blocks(kind, depth) == blocks


def test_unknown_head_is_refused():
    with pytest.raises(UserError, match="expected one of lin1, lin4, dpt"):
        head_blocks("linear", 12)


@pytest.mark.parametrize("blocks", [1, 4])
def test_linear_head_is_a_layer_on_upsampled_tokens_with_the_class_token(blocks):
    head = LinearDepth(DIM, blocks, bins=16, max_depth=8.0, generator=torch.Generator().manual_seed(1))
    maps, cls = tokens(blocks)
    both = torch.cat([maps, cls[:, :, None, None].expand_as(maps)], dim=1)
    big = F.interpolate(both, scale_factor=4, mode="bilinear", align_corners=False)
    weight = torch.cat([head.patch.weight, head.cls.weight[:, :, None, None]], dim=1)
    scores = F.conv2d(big, weight, head.patch.bias)
    found = head(maps, cls)
    assert found.shape == (2, 16, 24)
    torch.testing.assert_close(found, expected_depth(scores, head.depths), rtol=1e-5, atol=1e-5)


def transformers_dpt(head, channels):
    """transformers' neck and head with the weights of ours."""
    config = DPTConfig(
        hidden_size=DIM,
        num_attention_heads=4,
        neck_hidden_sizes=[DIM // 8, DIM // 4, DIM // 2, DIM],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=channels,
        readout_type="project",
        hidden_act="gelu",
        use_bias_in_fusion_residual=False,
        neck_ignore_stages=[],
        is_hybrid=False,
        add_projection=False,
        head_in_index=-1,
    )
    neck, last = DPTNeck(config).eval(), DPTDepthEstimationHead(config).eval()
    last.projection = head.project  # theirs has 256 channels whatever the rest has
    copies = []
    for index, stage in enumerate(head.reassemble):
        layer = neck.reassemble_stage.layers[index]
        copies += [(layer.projection, stage.project), (layer.resize, stage.resize)]
        copies += [(neck.reassemble_stage.readout_projects[index][0], stage.readout)]
        copies += [(neck.convs[index], head.narrow[index])]
    for theirs, ours in zip(neck.fusion_stage.layers, head.fuse, strict=True):
        copies.append((theirs.projection, ours.project))
        for residual, mine in ((theirs.residual_layer1, ours.join), (theirs.residual_layer2, ours.refine)):
            if mine is not None:
                copies += [(residual.convolution1, mine.first), (residual.convolution2, mine.second)]
    copies += [(last.head[0], head.first), (last.head[2], head.second), (last.head[4], head.last)]
    for theirs, ours in copies:
        theirs.load_state_dict(
            {name: value.reshape(theirs.state_dict()[name].shape) for name, value in ours.state_dict().items()}
        )
    return neck, last


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_dpt_agrees_with_transformers(grid):
    head = DPTDepth(DIM, channels=16, generator=torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        head.last.bias.fill_(0.05)  # some pixels below zero, some above
    neck, last = transformers_dpt(head, 16)
    maps, cls = tokens(4, grid=grid)
    joined = [
        torch.cat([token.unsqueeze(1), part.flatten(2).transpose(1, 2)], dim=1)
        for part, token in zip(maps.chunk(4, dim=1), cls.chunk(4, dim=1), strict=True)
    ]
    with torch.no_grad():
        expected = last(neck(joined, *grid)) + head.min_depth
        found = head(maps, cls)
    assert found.shape == (2, 32 * ((grid[0] + 1) // 2), 32 * ((grid[1] + 1) // 2))
    assert (expected > 0.01).any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dpt_starts_at_the_depth_asked_for():
    head = DPTDepth(DIM, channels=8, start=3.0, generator=torch.Generator().manual_seed(2))
    assert head(*tokens(4)).mean().item() == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_drawn_from_the_generator_and_every_weight_learns(kind):
    def made(seed):
        return build_head(kind, DIM, bins=8, channels=8, generator=torch.Generator().manual_seed(seed))

    first, again, other = made(5), made(5), made(6)
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    seen = tokens(len(head_blocks(kind, 12)))
    first(*seen).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in first.parameters())

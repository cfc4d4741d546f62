"""Token maps, windows, padding and upsampling, against the model's own tokens and torch's interpolation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2cli.errors import UserError
from dinov2cli.evaluation.dense.tokens import (
    Sight,
    Window,
    last_blocks,
    padding,
    sampled,
    seen_windows,
    slide,
    token_maps,
    tokens_of,
    upsampled,
)
from dinov2cli.models.encoder import Encoder, Seen
from dinov2cli.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_register_tokens=2)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


class Means(Encoder):
    """Mean colour of every patch, times one more than the number of the block."""

    embed_dim, depth, patch_size = 3, 2, 4

    def see(self, images, blocks, norm=True):
        means = F.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return Seen([(means * (block + 1), means.mean(1) * (block + 1)) for block in blocks], means.mean(1))

    def forward(self, images):
        return self.see(images, []).pooled


def test_maps_are_the_tokens_of_the_model_in_place(network):
    images = torch.randn(2, 3, 12, 20)
    tokens = tokens_of(network, images, [0, 2])
    assert tokens.maps.shape == (2, 16, 3, 5) and tokens.cls.shape == (2, 16)
    for place, (patches, cls) in enumerate(network.intermediate(images, [0, 2], norm=True)):
        own = slice(8 * place, 8 * place + 8)
        for row, column in ((0, 0), (1, 3), (2, 4)):
            assert torch.equal(tokens.maps[:, own, row, column], patches[:, 5 * row + column])
        assert torch.equal(tokens.cls[:, own], cls)
    raw = tokens_of(network, images, [2], norm=False)
    assert torch.equal(raw.cls, network.intermediate(images, [2], norm=False)[0][1])
    assert not tokens.maps.requires_grad and not tokens.maps.is_inference()


def test_encoders_of_others_serve_too():
    images = torch.randn(2, 3, 8, 12)
    maps = token_maps(Means(), images, [0, 1])
    assert torch.allclose(maps, torch.cat([F.avg_pool2d(images, 4), 2 * F.avg_pool2d(images, 4)], dim=1))
    assert last_blocks(Means(), 4) == [0, 1] and last_blocks(Means(), 1) == [1]


def test_padding_is_split_between_the_sides_with_the_odd_pixel_last(network):
    assert padding(10, 15, 4) == (0, 1, 1, 1) and padding(8, 12, 4) == (0, 0, 0, 0) and padding(9, 9, 4) == (1, 2, 1, 2)
    images = torch.randn(1, 3, 9, 10)
    whole = F.pad(images, (1, 1, 1, 2))
    assert torch.equal(token_maps(network, images, [1]), token_maps(network, whole, [1]))


def test_upsampled_values_lie_over_their_patches():
    # A linear ramp over the padded image is given back exactly, but for the half patch at the border.
    height, width, patch = 22, 31, 4
    left, right, top, bottom = padding(height, width, patch)
    rows = torch.arange(top + height + bottom).float() + 0.5
    ramp = rows.unflatten(0, (-1, patch)).mean(1)[None, None, :, None].expand(1, 2, -1, (width + left + right) // patch)
    found = upsampled(ramp, height, width, patch)
    assert found.shape == (1, 2, height, width)
    wanted = rows[top : top + height, None].expand(-1, width)
    assert torch.allclose(found[0, 0, 3:-3], wanted[3:-3], atol=1e-4)


@pytest.mark.parametrize("size", [(22, 31), (4, 9), (3, 3), (40, 40)])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_sampled_is_every_nth_pixel_of_upsampled(size, step):
    left, right, top, bottom = padding(*size, 4)
    maps = torch.randn(2, 3, (size[0] + top + bottom) // 4, (size[1] + left + right) // 4)
    whole = upsampled(maps, *size, 4)[..., step // 2 :: step, step // 2 :: step]
    assert torch.allclose(sampled(maps, *size, 4, step), whole, atol=1e-5)


@pytest.mark.parametrize("size", [(512, 700), (300, 200), (512, 512), (513, 1366)])
def test_windows_cover_the_image_as_in_the_released_tool(size):
    """mmsegmentation's slide_inference, written down once more."""
    sight = Sight(None, 512, 341)
    wanted = []
    rows, columns = (max(side - 512 + 341 - 1, 0) // 341 + 1 for side in size)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * 341 + 512, size[0]), min(column * 341 + 512, size[1])
            top, left = max(bottom - 512, 0), max(right - 512, 0)
            wanted.append(Window(top, left, bottom - top, right - left))
    assert sight.windows(*size) == wanted
    seen = torch.zeros(size)
    for window in sight.windows(*size):
        window.of(seen).add_(1)
    assert seen.min() >= 1


def test_sizes_at_which_images_are_seen():
    assert Sight(None, 64, 32).size(10, 20) == (10, 20)
    assert Sight(None, 64, 32, scale=1.5).size(10, 20) == (15, 30)
    assert Sight(40, 64, 32, longest=60).size(10, 20) == (30, 60)
    assert Sight(40, 64, 32, scale=0.5).resized(torch.zeros(3, 10, 20, dtype=torch.uint8)).shape == (3, 20, 40)
    for stride in (0, 65):
        with pytest.raises(UserError, match="expected 1 to 64"):
            Sight(None, 64, stride)


def test_windows_of_images_of_several_sizes_come_back_to_their_images(network):
    random = np.random.default_rng(0)
    images = [
        torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8)) for size in ((20, 30), (16, 16), (20, 30))
    ]
    sight = Sight(None, 16, 10)

    def normalize(pixels):
        return pixels.float() / 255

    found = seen_windows(
        network, images, sight, [2], normalize=normalize, device=torch.device("cpu"), batch_size=3, precision="fp32"
    )
    assert [len(one.maps) for one in found] == [6, 1, 6]
    for image, one in zip(images, found, strict=True):
        for number, window in enumerate(sight.windows(*image.shape[1:])):
            alone = tokens_of(network, normalize(window.of(image))[None], [2])
            assert torch.allclose(one.maps[number], alone.maps[0], atol=1e-5)
            assert torch.allclose(one.cls[number], alone.cls[0], atol=1e-5)


def test_sliding_averages_where_windows_overlap():
    image = torch.randn(5, 23, 37, dtype=torch.float64)
    sight = Sight(None, 16, 9)
    whole = slide(lambda windows: torch.stack([w.of(image) for w in windows]), (23, 37), sight, batch_size=4)
    assert torch.allclose(whole, image)
    windows = sight.windows(23, 37)
    answers = {window: torch.randn(2, 16, 16, dtype=torch.float64) for window in windows}
    found = slide(lambda some: torch.stack([answers[w] for w in some]), (23, 37), sight, batch_size=3)
    over = [w for w in windows if w.top <= 12 < w.top + 16 and w.left <= 13 < w.left + 16]
    wanted = torch.stack([answers[w][:, 12 - w.top, 13 - w.left] for w in over]).mean(0)
    assert len(over) == 4 and torch.allclose(found[:, 12, 13], wanted)

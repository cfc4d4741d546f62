"""Raw pixels and colour histograms, against their definitions in NumPy."""

import numpy as np
import pytest
import torch

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import Preprocess


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 56, 84), generator=torch.Generator().manual_seed(0)).byte()


def averaged(image_CHW):
    """Down to 8 x 8: place i is the mean of the rows floor(i h / 8) up to ceil((i + 1) h / 8), columns likewise."""
    _, height, width = image_CHW.shape
    rows = [slice(i * height // 8, -(-(i + 1) * height // 8)) for i in range(8)]
    columns = [slice(i * width // 8, -(-(i + 1) * width // 8)) for i in range(8)]
    return np.array([[[channel[r, c].mean() for c in columns] for r in rows] for channel in image_CHW]).ravel()


def histogram(image_CHW):
    bins = [range(0, 257, 64)] * 3
    return np.histogramdd(image_CHW.reshape(3, -1).T, bins=bins)[0].ravel() / image_CHW[0].size


@pytest.mark.parametrize(("name", "width", "define"), [("pixels", 192, averaged), ("histogram", 64, histogram)])
def test_patches_and_image_are_as_defined(pixels, name, width, define):
    loaded = load_model(f"baseline:{name}")
    encoder = loaded.encoder
    assert isinstance(encoder, Encoder)
    assert (loaded.name, loaded.random, encoder.embed_dim, encoder.depth, encoder.patch_size) == (
        f"baseline:{name}",
        False,
        width,
        1,
        14,
    )
    assert loaded.preprocess == Preprocess(256, 224, (0.0,) * 3, (1.0,) * 3)
    assert loaded.fingerprint == {"baseline": name, "width": width, "patch": 14}
    assert not list(encoder.parameters())
    assert encoder.device == torch.device("cpu") and encoder.to("meta").device.type == "meta"
    encoder = load_model(f"baseline:{name}").encoder
    images = loaded.preprocess.normalize(pixels)
    for norm in (True, False):
        seen = encoder.see(images, [0], norm)
        ((patches, cls),) = seen.tokens
        assert patches.shape == (2, 24, width) and patches.dtype == torch.float32
        torch.testing.assert_close(cls, seen.pooled)
        torch.testing.assert_close(cls, encoder(images))
    scale = 255 if name == "pixels" else 1
    for row in range(2):
        image = pixels[row].numpy().astype(np.float64)
        np.testing.assert_allclose(scale * cls[row].numpy(), define(image), atol=1e-4)
        for number in range(24):
            top, left = number // 6 * 14, number % 6 * 14
            expected = define(image[:, top : top + 14, left : left + 14])
            np.testing.assert_allclose(scale * patches[row, number].numpy(), expected, atol=1e-4)


def test_image_size_and_refusals():
    assert load_model("baseline:pixels", img_size=448).preprocess == Preprocess(512, 448, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UserError, match="image size 100 is not a multiple of the patch size 14: use 98 or 112"):
        load_model("baseline:pixels", img_size=100)
    encoder = load_model("baseline:histogram").encoder
    with pytest.raises(UserError, match="image size 28x30 is not a multiple"):
        encoder(torch.zeros(1, 3, 28, 30))
    encoder.check_size(28)
    with pytest.raises(UserError, match="image size 30x30"):
        encoder.check_size(30)
    with pytest.raises(UserError, match="block 1 is not served: expected 0 to 0 of this encoder"):
        encoder.see(torch.zeros(1, 3, 28, 28), [1])
    with pytest.raises(UserError, match="is only for comparisons"):
        _ = load_model("baseline:pixels").backbone
    with pytest.raises(InputError, match="'baseline:texture' not found: expected baseline:pixels or baseline:histo"):
        load_model("baseline:texture")


def test_without_weights_and_device():
    assert load_model("baseline:pixels", device="meta").encoder.device.type == "meta"

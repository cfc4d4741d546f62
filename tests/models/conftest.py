import pytest
import torch

from dinov2cli.models.registry import build


def randomise(model, seed=0):
    """Weights far from their initial values, biases and gains too, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            std = 0.5 if name.endswith(("token", "tokens", "pos_embed", "position_embeddings")) else 0.08
            noise = torch.randn(parameter.shape, generator=generator) * std
            centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.copy_(centre + noise)
    return model


@pytest.fixture(name="randomise")
def randomise_fixture():
    return randomise


@pytest.fixture
def small():
    """A backbone of a few thousand weights; keyword arguments override its numbers."""

    def make(seed=0, **overrides):
        numbers = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 56, "patch_size": 14} | overrides
        return randomise(build("vits14", **numbers), seed).eval()

    return make

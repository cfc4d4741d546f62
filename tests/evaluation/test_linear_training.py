import math

import numpy as np
import pytest
import torch

from dinov2cli.evaluation.linear.grid import head_grid
from dinov2cli.evaluation.linear.training import Heads, Inputs


@pytest.mark.parametrize(
    "blocks, patches", [([1, 4], [False, True]), ([1, 2, 3], [False, True]), ([2], [True]), ([1, 3], [False])]
)
def test_all_heads_move_as_float64_sgd_moves_each(blocks, patches):
    """By torch's own optimiser, schedule and derivative of cross-entropy, one head after the other."""
    generator = torch.Generator().manual_seed(1)
    tokens, averaged = torch.randn(64, 4, 6, generator=generator), torch.randn(64, 6, generator=generator)
    labels = torch.randint(0, 5, (64,), generator=generator)
    grid, _ = head_grid(4, learning_rates=[0.5, 8.0], blocks=blocks, averaged_patches=patches)
    heads = Heads(grid, available_blocks=4, dim=6, n_classes=5, device=torch.device("cpu"), seed=3)
    inputs = Inputs.of(tokens, averaged, "train")

    layers = {}
    for head in grid:
        layer = torch.nn.Linear((head.blocks + head.averaged_patches) * 6, 5, dtype=torch.float64)
        weight, bias = heads.weights(head)
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=head.learning_rate * 32 / 256, momentum=0.9)
        layers[head] = layer, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0)
    for step in range(20):
        rows = torch.randint(0, 64, (32,), generator=generator)
        with torch.inference_mode():
            heads.step(inputs.take(rows), labels[rows], 0.5 * (1 + math.cos(math.pi * step / 20)))
        for head, (layer, optimizer, schedule) in layers.items():
            own = [tokens[rows, block] for block in range(4 - head.blocks, 4)] + [
                averaged[rows]
            ] * head.averaged_patches
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(torch.cat(own, dim=1).double()), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    judged = heads.judge(inputs, torch.arange(10, 50), labels[10:50])
    for head, (layer, _, _) in layers.items():
        weight, bias = heads.weights(head)
        assert torch.allclose(weight.T.double(), layer.weight, atol=1e-5)
        assert torch.allclose(bias.double(), layer.bias, atol=1e-5)
        own = [tokens[10:50, block] for block in range(4 - head.blocks, 4)] + [averaged[10:50]] * head.averaged_patches
        logits = layer(torch.cat(own, dim=1).double())
        accuracy, loss = judged[head.id]
        assert accuracy == pytest.approx(float((logits.argmax(1) == labels[10:50]).double().mean()))
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[10:50]).item(), rel=1e-4)


def test_all_rates_of_one_input_begin_alike_and_small():
    grid, _ = head_grid(4)
    heads = Heads(grid, available_blocks=4, dim=64, n_classes=10, device=torch.device("cpu"), seed=0)
    first = {}
    for head in grid:
        weight, bias = heads.weights(head)
        assert torch.equal(first.setdefault(head.reads, weight), weight) and not bias.any()
        assert float(weight.std()) == pytest.approx(0.01, rel=0.1)
    whole, part = first[4, True], first[4, False]
    assert len(whole) == 5 * 64 and not torch.equal(whole[: 4 * 64], part)
    assert len(torch.unique(whole)) > 0.999 * whole.numel()  # no two columns have the same draws


def test_states_of_other_shapes_are_refused():
    grid, _ = head_grid(4)
    about = {"available_blocks": 4, "dim": 8, "device": torch.device("cpu"), "seed": 0}
    heads, other = Heads(grid, n_classes=3, **about), Heads(grid, n_classes=4, **about)
    before = {name: array.copy() for name, array in other.state().items()}
    assert not other.load(heads.state()) and not other.load({})
    assert all(np.array_equal(array, before[name]) for name, array in other.state().items())
    assert other.load(before)

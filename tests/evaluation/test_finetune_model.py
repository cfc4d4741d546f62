"""What learns how fast, and the average of the weights, against their closed forms."""

import copy
import re

import pytest
import torch
from torch import nn

from dinov2cli.errors import UserError
from dinov2cli.evaluation.finetuning.model import (
    average,
    average_decay,
    build_classifier,
    layered_adamw,
    make_moments,
    moments,
    set_rates,
    trained,
)
from dinov2cli.models.encoder import Encoder, Seen
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.load import load_model
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.optim import has_weight_decay, layer_id, parameter_groups

CPU = torch.device("cpu")


def backbone(**changes) -> VisionTransformer:
    numbers = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_register_tokens": 2}
    return VisionTransformer(**(numbers | changes), generator=torch.Generator().manual_seed(0)).eval()


def classifier(network=None, classes: int = 4, image_size: int = 16, **settings):
    generator = torch.Generator().manual_seed(0)
    network = backbone() if network is None else network
    return build_classifier(network, classes, image_size=image_size, device=CPU, generator=generator, **settings)


def rates(model, decay: float, lr: float = 1.0, weight_decay: float = 0.5) -> dict[str, tuple[float, float]]:
    optimizer = layered_adamw(model, layer_decay=decay)
    set_rates(optimizer, lr, weight_decay)
    return {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["names"]}


def test_every_layer_learns_at_its_closed_form_rate():
    found = rates(classifier(), 0.7, lr=0.02)
    expected = {
        "backbone.cls_token": 0.7**4,
        "backbone.pos_embed": 0.7**4,
        "backbone.register_tokens": 0.7**4,
        "backbone.patch_embed.proj.weight": 0.7**4,
        "backbone.blocks.0.attn.qkv.weight": 0.7**3,
        "backbone.blocks.1.norm1.weight": 0.7**2,
        "backbone.blocks.2.mlp.fc1.bias": 0.7,
        "backbone.norm.weight": 1.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    for name, scale in expected.items():
        assert found[name][0] == pytest.approx(0.02 * scale), name
    assert "backbone.mask_token" not in found  # no image of this task has hidden patches
    assert set(found) == set(trained(classifier()))


def test_biases_norms_and_gains_do_not_decay():
    found = rates(classifier(), 1.0)
    matrices = {name for name, weight in classifier().named_parameters() if weight.ndim > 1}
    for name, (_, decay) in found.items():
        assert decay == (0.5 if name in matrices else 0.0), name


class Wrapped(Encoder):
    """An encoder of transformers as a comparator holds it."""

    def __init__(self, network: nn.Module, depth: int) -> None:
        super().__init__()
        self.network, self.depth, self.patch_size, self.embed_dim = network, depth, 8, 8

    def see(self, images, blocks, norm=True) -> Seen:
        raise NotImplementedError

    def forward(self, images):
        return self.network(pixel_values=images).pooler_output


def transformer(kind: str) -> nn.Module:
    import transformers

    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return model(config(**sizes, image_size=16, patch_size=8))


@pytest.mark.parametrize("kind", ["CLIPVision", "ViT", "Beit", "SiglipVision"])
def test_other_encoders_have_layers_too(kind):
    model = classifier(Wrapped(transformer(kind), 2))
    found = rates(model, 0.5)
    seen = set()
    for name, (rate, decay) in found.items():
        inner = name.removeprefix("backbone.network.")
        if "embeddings." in inner or "pre_layrnorm" in inner:
            layer = 0
        elif "layers." in inner or "layer." in inner:
            layer = 1 + next(int(part) for part in inner.split(".") if part.isdigit())
        else:
            layer = 3
        seen.add(layer)
        assert rate == pytest.approx(0.5 ** (3 - layer)), name
        assert decay == (0.5 if dict(model.named_parameters())[name].ndim > 1 else 0.0), name
    assert seen == {0, 1, 2, 3}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model(images).sum().backward()
    assert all(p.grad is not None for name, p in model.backbone.named_parameters() if "layers." in name)


def test_pretraining_keeps_its_groups():
    """The rule of the released code on the student of a run: `has_weight_decay` alone decides, and our block names."""
    student = nn.Module()
    student.backbone = backbone()
    student.dino_head = ProjectionHead(8, 16, hidden=8, bottleneck=4)
    for group in parameter_groups(student, depth=3, layerwise_decay=0.9):
        for name in group["names"]:
            assert group["wd_scale"] == float(has_weight_decay(name)), name
            inner = name.removeprefix("backbone.")
            layer = layer_id(inner, 3) if name.startswith("backbone.") else 4
            patches = 0.2 if inner.startswith("patch_embed.") else 1
            assert group["lr_scale"] == 0.9 ** (4 - layer) * patches


def test_steps_are_those_of_adamw_written_out():
    """Three steps against the equations (Loshchilov & Hutter 2019, algorithm 2) in float64."""
    model = classifier(drop_path=0.0)
    weights = trained(model)
    plain = {name: weight.detach().double().clone() for name, weight in weights.items()}
    first = {name: torch.zeros_like(w) for name, w in plain.items()}
    second = {name: torch.zeros_like(w) for name, w in plain.items()}
    optimizer = layered_adamw(model, layer_decay=0.6)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for step in range(1, 4):
        lr, decay = 0.01 * step, 0.3
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        gradients = {name: weight.grad.double().clone() for name, weight in weights.items()}
        set_rates(optimizer, lr, decay)
        optimizer.step()
        for name, gradient in gradients.items():
            inner = name.removeprefix("backbone.")
            layer = 4 if inner.startswith(("norm", "head")) else int(inner[7]) + 1 if inner.startswith("blocks") else 0
            own = lr * 0.6 ** (4 - layer)
            plain[name] -= own * (decay if plain[name].ndim > 1 else 0) * plain[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            plain[name] -= own * corrected[0] / (corrected[1].sqrt() + 1e-8)
    for name, weight in weights.items():
        assert torch.allclose(weight.detach().double(), plain[name], atol=2e-6), name


def test_average_is_its_closed_form():
    history = [torch.randn(5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(40)]
    averages = [history[0].clone()]
    for step, weights in enumerate(history[1:], start=1):
        average(averages, [weights], average_decay(0.9, step))
    # The start and each of the weights count as much as is left of them after all later steps.
    decays = [min(0.9, (1 + step) / (10 + step)) for step in range(1, 40)]
    shares = [torch.tensor(decays).prod()]
    shares += [(1 - decays[i]) * torch.tensor(decays[i + 1 :], dtype=torch.float64).prod() for i in range(39)]
    expected = sum(share * weights for share, weights in zip(shares, history, strict=True))
    assert torch.allclose(averages[0], expected, atol=1e-7)
    assert float(sum(shares)) == pytest.approx(1)
    assert [average_decay(0.9999, step) for step in (1, 10**6)] == [pytest.approx(2 / 11), 0.9999]


@pytest.mark.parametrize("averaged", [False, True])
def test_head_reads_class_token_and_patches(averaged):
    network = backbone()
    model = classifier(network, averaged_patches=averaged).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = network(images)
        vector = torch.cat([tokens.cls, tokens.patches.mean(1)], 1) if averaged else tokens.cls
        expected = vector @ model.head.weight.T + model.head.bias
        assert torch.allclose(model(images), expected, atol=1e-6)


def test_the_model_given_is_left_alone_and_the_copy_takes_other_sizes():
    network = backbone()
    before = copy.deepcopy(network.state_dict())
    model = classifier(network, image_size=32)
    assert (model.backbone.img_size, model.backbone.grid, network.img_size) == (32, 4, 16)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model.eval().backbone(images).cls, network(images).cls, atol=1e-5)
    model(images).sum().backward()
    assert model.backbone.pos_embed.grad is not None and network.pos_embed.grad is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="use 16 or 24"):
        classifier(network, image_size=20)


def test_heads_are_drawn_from_the_seed_alone():
    network = backbone()
    state = torch.get_rng_state()
    one, other = classifier(network), classifier(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, other.head.weight)


def test_moments_can_be_taken_over():
    model = classifier()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    optimizers = layered_adamw(model, layer_decay=0.6), layered_adamw(model, layer_decay=0.6)
    model(images).square().sum().backward()
    set_rates(optimizers[0], 0.1, 0.1)
    optimizers[0].step()
    held = moments(optimizers[0])
    names = [name.removeprefix("first.") for name in held if name.startswith("first.")]
    made = make_moments(optimizers[1], names, 1)
    assert made.keys() == held.keys()
    for name, value in made.items():
        value.copy_(held[name])
    set_rates(optimizers[1], 0.1, 0.1)
    start = {name: weight.detach().clone() for name, weight in trained(model).items()}
    ends = []
    for optimizer in optimizers:
        with torch.no_grad():
            for name, weight in trained(model).items():
                weight.copy_(start[name])
        optimizer.step()
        ends.append({name: weight.detach().clone() for name, weight in trained(model).items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_stages_of_hierarchical_encoders_are_their_layers(kind, tmp_path):
    """Their depth is that of the one stage whose places they serve, not of what learns."""
    transformers = pytest.importorskip("transformers")
    configs = {
        "swin": transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
        ),
        "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    }
    transformers.AutoModel.from_config(configs[kind]).save_pretrained(tmp_path / kind)
    encoder = load_model(f"transformers:{tmp_path / kind}").encoder
    found = {name: rate for name, (rate, _) in rates(classifier(encoder, image_size=32), 0.5).items()}
    assert max(found.values()) == found["head.weight"] == 1.0
    first = [rate for name, rate in found.items() if re.search(r"(stages|layers)\.0\.", name)]
    last = [rate for name, rate in found.items() if re.search(r"encoder\.(stages|layers)\.1\.", name)]
    assert first and set(last) == {0.5} and 0.25 in first

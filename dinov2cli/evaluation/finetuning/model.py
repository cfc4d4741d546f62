"""What fine-tuning trains: a copy of a backbone with a linear head, in layers that learn at different speeds; and the
moving average of its weights.

Layer-wise decay: Clark et al. 2020 (arXiv 2003.10555), for vision transformers Bao et al. 2021 (BEiT, arXiv 2106.08254)
and He et al. 2021 (MAE, arXiv 2111.06377).
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.models.depth import Share
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.optim import build_optimizer, layer_id

_HEAD_STD = 0.01


class Classifier(nn.Module):
    """A backbone and a linear layer on its class token (of encoders that are not ours: on their pooled vector).

    With `averaged_patches` the mean of the last block's patch tokens joins the class token.
    """

    def __init__(
        self,
        backbone: VisionTransformer | Encoder,
        width: int,
        classes: int,
        *,
        averaged_patches: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """`width` is the length of the vector under the head. The head starts as N(0, 0.01), drawn from `generator`."""
        super().__init__()
        self.backbone, self.averaged_patches = backbone, averaged_patches
        # Its own initial values would be drawn from torch's common generator.
        self.head = nn.utils.skip_init(nn.Linear, width, classes)
        with torch.no_grad():
            self.head.weight.normal_(0, _HEAD_STD, generator=generator)
            self.head.bias.zero_()

    def forward(
        self, images: Tensor, *, generator: torch.Generator | None = None, share: Share | None = None
    ) -> Tensor:
        """Logits float32 [B, C] of normalised images [B, 3, S, S].

        `generator` and `share` are for the stochastic depth of our own backbones in training mode.
        """
        vector = self._vector(images, generator, share)
        # A few thousand products decide the answer: in float32, whatever the backbone computes in.
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.head(vector.float())
        return logits

    def _vector(self, images: Tensor, generator: torch.Generator | None, share: Share | None) -> Tensor:
        if not isinstance(self.backbone, VisionTransformer):
            pooled: Tensor = self.backbone(images)
            return pooled
        (tokens,) = self.backbone.forward_crops([images], generator=generator, share=share)
        if not self.averaged_patches:
            return tokens.cls
        return torch.cat([tokens.cls, tokens.patches.mean(dim=1)], dim=1)


def build_classifier(
    network: VisionTransformer | Encoder,
    classes: int,
    *,
    image_size: int,
    averaged_patches: bool = False,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    device: torch.device,
    generator: torch.Generator,
) -> Classifier:
    """A classifier around a copy of `network`, all of whose weights may move, on `device`.

    Position embeddings of our own backbones are resampled to images of `image_size` pixels; their stochastic depth
    rises linearly to `drop_path` in the last block. Raises UserError for a size that the network cannot serve.
    """
    backbone = copy.deepcopy(network).to(device)
    with torch.no_grad():
        if isinstance(backbone, VisionTransformer):
            if image_size != backbone.img_size:
                backbone.set_grid(image_size)
            width = backbone.embed_dim * (2 if averaged_patches else 1)
            backbone.set_drop_path(drop_path, uniform=False)
            backbone.activation_checkpointing = checkpointing
        else:
            width = backbone(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] != "mask_token")  # which no whole image ever meets
    # Drawn on the CPU, so that a seed means the same head everywhere.
    model = Classifier(backbone, width, classes, averaged_patches=averaged_patches, generator=generator)
    return model.to(device)


def layered_adamw(model: Classifier, *, layer_decay: float, beta2: float = 0.999) -> torch.optim.AdamW:
    """AdamW whose groups know their place: layer l of L + 1 learns at layer_decay^(L + 1 - l) of the rate of the head.

    Layer 0 is what comes before the blocks, layer i + 1 is block i (of a hierarchical encoder: stage i), the final norm
    and the head are the last. Biases, norms and gains do not decay. `set_rates` gives the rates.
    """
    depth = model.backbone.depth
    if not isinstance(model.backbone, VisionTransformer):  # whose depth may be that of the stages it serves
        depth = max((layer_id(name, 0) for name, _ in model.backbone.named_parameters()), default=0)
    return build_optimizer(model, depth=depth, layerwise_decay=layer_decay, patch_embed_lr=1.0, beta2=beta2)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write a step's learning rate and weight decay into every group, times the group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["wd_scale"]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, by name; the model's own memory."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def average_decay(decay: float, step: int) -> float:
    """The decay after `step` updates (from 1): (1 + step) / (10 + step) until that exceeds `decay`, so that the
    average of a short run is not made of its beginning."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * weights, in place."""
    torch._foreach_lerp_(list(averages), [weight.detach() for weight in weights], 1.0 - decay)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The two moments of every parameter that has been moved, as 'first.NAME' and 'second.NAME'; their own memory."""
    found: dict[str, Tensor] = {}
    for name, state in _states(optimizer).items():
        if state:
            found[f"first.{name}"], found[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    return found


def make_moments(optimizer: torch.optim.Optimizer, names: Iterable[str], step: int) -> dict[str, Tensor]:
    """Moments of zero for the parameters called `names`, moved `step` times before, to be filled; as `moments`."""
    wanted = set(names)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in wanted:
                # Adam counts in a tensor, which its fused kernel wants where the parameter is.
                counter = torch.tensor(float(step), device=parameter.device)
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": counter, **zeros}
    return moments(optimizer)


def _states(optimizer: torch.optim.Optimizer) -> Mapping[str, Mapping[str, Any]]:
    return {
        name: optimizer.state.get(parameter, {})
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }

"""How what a vision model of transformers returns becomes patch tokens, a class token and a pooled vector.

- Models with blocks of one width (ViT, DeiT, MAE, BEiT, CLIP, SigLIP, DINOv2, DINOv3, ...) serve every block. Their
  special tokens (class, distillation, registers) come first and are taken off. Without a class token (SigLIP) the mean
  of the patches stands for it, after the final norm of the last block the pooled vector, where it is as wide.
- Hierarchical and convolutional models (Swin, ConvNeXt, ResNet, RegNet, ...) serve their last stage as one block: each
  place of its map is a patch, the pooled vector is the class token; `norm` makes no difference.
- The pooled vector is what the model is used by: CLIP's projected vector, else what the model itself calls pooled
  (SigLIP: attention pooling, CLIP without projection: the normed class token, BEiT: normed mean of patches, Swin and
  convolutional models: global average), else the class token after the final norm, else the mean of the patches. The
  tanh layer that ViT and DeiT of transformers put on the class token is left out: most checkpoints do not hold it.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.encoder import Encoder, Seen

# What transformers calls the norm behind the last block.
_NORMS = ("layernorm", "post_layernorm", "norm", "layer_norm", "rms_norm")


class _Raw(NamedTuple):
    """What a network returned: last [B, T, D] or [B, D, h, w], hidden states of its blocks or (), pooled or None."""

    last: Tensor
    hidden: tuple[Tensor, ...]
    pooled: Tensor | None


class TransformersEncoder(Encoder):
    """A vision model of transformers as an `Encoder`, in eval mode.

    network: takes pixel_values; projection: what is behind its pooled vector (CLIP), if anything. It is tried at once
    on an empty image of `size` x `size` pixels to see what it returns: InputError if that is not tokens of an image.
    """

    def __init__(self, network: nn.Module, projection: nn.Module | None, size: int) -> None:
        super().__init__()
        self.network, self.projection, self.size = network.eval(), projection, size
        self.config: Any = network.config
        self.native = native_size(self.config)
        self._takes = set(inspect.signature(type(network).forward).parameters)
        # A tanh layer on the class token: most checkpoints have none, and transformers then draws it at random.
        self._pools = not hasattr(getattr(network, "pooler", None), "dense")
        with torch.no_grad():
            try:
                self._learn(self._raw(torch.zeros(1, 3, size, size, device=self.device), hidden=True))
            except UserError as error:
                raise InputError(str(error)) from None

    def norm(self, tokens: Tensor) -> Tensor:
        """The final norm of tokens [B, T, D], if the model has one."""
        return self.network.get_submodule(self._norm)(tokens) if self._norm else tokens

    def check_image(self, images: Tensor) -> None:
        """As `Encoder.check_image`; the size the model was opened for is always good."""
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            super().check_image(images)

    def check_size(self, size: int) -> None:
        """As `Encoder.check_size`, by trying it."""
        with torch.no_grad():
            self(torch.zeros(1, 3, size, size, device=self.device))

    def see(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> Seen:
        """As `Encoder.see`."""
        self.check_image(images)
        self.check_blocks(blocks)
        raw = self._raw(images, hidden=self._by_block)
        pooled = self._pooled(raw)
        if not self._by_block:
            return Seen([self._split(_tokens(raw.last), pooled) for _ in blocks], pooled)
        tokens = []
        for block in blocks:
            states = raw.hidden[block + 1]
            final = norm and block == self.depth - 1
            tokens.append(self._split(self.norm(states) if norm else states, pooled if final else None))
        return Seen(tokens, pooled)

    def forward(self, images: Tensor) -> Tensor:
        """The pooled vector [B, P], with gradients."""
        self.check_image(images)
        return self._pooled(self._raw(images, hidden=False))

    def _raw(self, images: Tensor, hidden: bool) -> _Raw:
        """One pass. UserError for a size the network does not take."""
        height, width = images.shape[2:]
        try:
            out = self.network(output_hidden_states=hidden, return_dict=True, **self._inputs(images))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError, IndexError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            kind = type(self.network).__name__
            takes = f"; its own size is {self.native}x{self.native}" if self.native else ""
            raise UserError(
                f"{kind} of transformers does not take images [3, {height}, {width}] ({reason}){takes}"
            ) from None
        states = getattr(out, "hidden_states", None) if hidden else None
        pooled = getattr(out, "pooler_output", None) if self._pools else None
        return _Raw(out.last_hidden_state, tuple(states or ()), None if pooled is None else pooled.flatten(1))

    def _inputs(self, images: Tensor) -> dict[str, Any]:
        batch, channels, height, width = images.shape
        inputs: dict[str, Any] = {"pixel_values": images}
        if "interpolate_pos_encoding" in self._takes and (height, width) != (self.native, self.native):
            inputs["interpolate_pos_encoding"] = True
        if "noise" in self._takes:  # MAE drops and shuffles patches by it: none are dropped, rising noise keeps order
            patches = math.prod(_grid(self.config, height, width))
            inputs["noise"] = torch.arange(patches, device=images.device).float().expand(batch, -1)
        if "spatial_shapes" in self._takes:  # SigLIP 2 of any aspect takes patches, channels last
            side, (rows, columns) = self.config.patch_size, _grid(self.config, height, width)
            split = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
            inputs["pixel_values"] = split.reshape(batch, rows * columns, side * side * channels)
            inputs["pixel_attention_mask"] = None  # every patch counts
            inputs["spatial_shapes"] = torch.tensor([[rows, columns]] * batch)
        return inputs

    def _learn(self, raw: _Raw) -> None:
        """Set what the class promises, from what came of an image of `self.size` pixels."""
        last = raw.last
        self.special, self.depth, self._by_block = 0, 1, False
        self._norm = ""
        self._last_is_normed = True
        if last.ndim == 4:
            self.embed_dim, self.patch_size = last.shape[1], _stride(self.size, last.shape[2])
            return
        grid = _grid(self.config, self.size, self.size)
        special = last.shape[1] - math.prod(grid) if last.ndim == 3 and grid else -1
        allowed = {0, 1, 1 + (getattr(self.config, "num_register_tokens", 0) or 0)}
        if hasattr(getattr(self.network, "embeddings", None), "distillation_token"):
            allowed.add(2)
        if special in allowed:
            self.special, self.embed_dim, self.patch_size = special, last.shape[2], _one_side(self.config.patch_size)
            self._learn_blocks(raw)
            return
        # A flattened map of the last stage; DINOv3's ConvNeXt puts the pooled vector in front of it.
        for first in (0, 1):
            side = math.isqrt(last.shape[1] - first) if last.ndim == 3 else 0
            if side and side * side + first == last.shape[1] and raw.pooled is not None:
                self.special, self.embed_dim, self.patch_size = first, last.shape[2], _stride(self.size, side)
                return
        raise InputError(
            f"{type(self.network).__name__} of transformers returns {list(last.shape)} for an image of {self.size} "
            "pixels; expected a token for every patch, or a map and a pooled vector: it is no image encoder"
        )

    def _learn_blocks(self, raw: _Raw) -> None:
        """Serve all blocks where their states and the final norm are what they should be; else the last alone."""
        if len(raw.hidden) < 2 or any(states.shape != raw.last.shape for states in raw.hidden):
            return
        named = dict(self.network.named_children())
        self._norm = next((name for name in _NORMS if name in named), "")
        # CLIP norms nothing but the class token: its last state comes out as it is.
        self._last_is_normed = raw.last.is_meta or _close(self.norm(raw.hidden[-1]), raw.last)
        if self._last_is_normed or _close(raw.hidden[-1], raw.last):
            self.depth, self._by_block = len(raw.hidden) - 1, True

    def _split(self, tokens: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor]:
        """(patches, class token) of all tokens [B, T, D]; `pooled` may stand for a class token that there is not."""
        patches = tokens[:, self.special :]
        if self.special:
            return patches, tokens[:, 0]
        if pooled is not None and pooled.shape[-1] == tokens.shape[-1]:
            return patches, pooled
        return patches, patches.mean(dim=1)

    def _pooled(self, raw: _Raw) -> Tensor:
        if raw.pooled is not None:
            return raw.pooled if self.projection is None else self.projection(raw.pooled)
        last = _tokens(raw.last)
        return self._split(last if self._last_is_normed else self.norm(last), None)[1]


def native_size(config: Any) -> int | None:
    """Side in pixels of the images a vision model of transformers was made for, if its configuration says."""
    size = getattr(config, "image_size", None)
    if size is None and getattr(config, "num_patches", None) and getattr(config, "patch_size", None):
        return math.isqrt(config.num_patches) * _one_side(config.patch_size)
    return None if size is None else _one_side(size)


def _tokens(last: Tensor) -> Tensor:
    """Tokens [B, T, D] of tokens, or of a map [B, D, h, w] in row order."""
    return last.flatten(2).transpose(1, 2) if last.ndim == 4 else last


def _grid(config: Any, height: int, width: int) -> tuple[int, ...]:
    """Rows and columns of patches; () where the configuration knows of no patches."""
    side = getattr(config, "patch_size", None)
    return () if side is None else (height // _one_side(side), width // _one_side(side))


def _one_side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _stride(size: int, side: int) -> int:
    """Pixels per place of a map of `side` places: halvings may round up, so a power of two."""
    return 2 ** round(math.log2(size / side))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)

"""Floating-point operations of an architecture and of a training step, in closed form.

One multiply-add counts as 2. Counted are convolutions, linear layers and attention products; norms, activations and
softmax, together below 2 % at the released sizes, are not.
"""

from itertools import pairwise
from typing import Any

from dinov2cli.models.blocks import swiglu_hidden
from dinov2cli.models.registry import architecture
from dinov2cli.models.vit import VisionTransformer


def backbone_flops(arch: str | VisionTransformer, image_size: int | None = None, **overrides: object) -> int:
    """Operations of one forward pass over one square image, `image_size` pixels wide (default: the architecture's)."""
    a = _numbers(arch, overrides)
    d, patch, channels = a["embed_dim"], a["patch_size"], a.get("in_chans", 3)
    patches = ((image_size or a["img_size"]) // patch) ** 2
    tokens = 1 + a["num_register_tokens"] + patches
    hidden, swiglu = _hidden(a)
    linear = 4 * d * d + (3 if swiglu else 2) * d * hidden  # weights of one block that meet every token
    block = 2 * tokens * linear + 4 * tokens * tokens * d  # q k^T and probabilities v
    return 2 * patches * channels * patch**2 * d + a["depth"] * block


def head_flops(in_dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> int:
    """Operations of one projection head on one token."""
    widths = [in_dim] + [hidden] * (layers - 1) + [bottleneck, prototypes]
    return 2 * sum(a * b for a, b in pairwise(widths))


def heads_flops(
    in_dim: int,
    *,
    prototypes: int,
    hidden: int = 2048,
    bottleneck: int = 256,
    layers: int = 3,
    ibot_prototypes: int | None = None,
    ibot_bottleneck: int | None = None,
) -> tuple[int, int]:
    """Operations of the DINO and of the iBOT head on one token; the second is like the first but for what is given."""
    dino = head_flops(in_dim, prototypes, hidden, bottleneck, layers)
    return dino, head_flops(in_dim, ibot_prototypes or prototypes, hidden, ibot_bottleneck or bottleneck, layers)


def frozen_teacher_flops(look: float, heads: tuple[int, int] | None, patches: float) -> dict[str, float]:
    """Operations of a frozen teacher in one step of distillation PER IMAGE, by part: `teacher`, `teacher heads`.

    `look`: of its pass over one crop. `heads`: of its own heads on one token (`heads_flops`), None without.
    `patches`: how many of both global crops meet the iBOT head.
    """
    of_heads = 0.0 if heads is None else 2 * heads[0] + patches * heads[1]
    return {"teacher": 2 * look, "teacher heads": of_heads}


def distilled_student_flops(
    backbone: str | VisionTransformer,
    *,
    global_size: int,
    local_size: int,
    local_number: int,
    heads: tuple[int, int] | None,
    classes: bool,
    patches: float,
    learned: bool = False,
) -> dict[str, float]:
    """Operations of a student in one step of distillation PER IMAGE, by part: `student`, `heads`.

    Forward and backward, three forward passes' worth; its moving average never looks at an image. `heads` as of
    `frozen_teacher_flops`; class tokens meet the DINO head if `classes`. With `learned` heads the moving average's make
    the targets of the global crops too.
    """
    own = 2 * backbone_flops(backbone, global_size)
    own += local_number * backbone_flops(backbone, local_size) if local_number else 0
    passes, of_heads = 4 if learned else 3, 0.0
    if heads is not None:
        of_heads = (3 * local_number + 2 * passes) * heads[0] * classes + passes * patches * heads[1]
    return {"student": 3.0 * own, "heads": of_heads}


def step_flops(
    backbone: VisionTransformer,
    *,
    prototypes: int,
    hidden: int = 2048,
    bottleneck: int = 256,
    layers: int = 3,
    ibot_prototypes: int | None = None,
    ibot_bottleneck: int | None = None,
    global_size: int,
    local_size: int,
    local_number: int,
    masked: float,
    drop_path: float = 0.0,
) -> dict[str, float]:
    """Operations of one pretraining step PER IMAGE: two global crops and `local_number` locals, sizes in pixels.

    `masked` is the mean number of masked patches of both global crops together. The student runs forward and backward
    (three forward passes' worth) on the share 1 - `drop_path` of its branches, the teacher forward on the global crops.
    The iBOT head is like DINO's but for what `ibot_…` say.
    Keys: teacher, student, heads, total.
    """
    big, small = backbone_flops(backbone, global_size), backbone_flops(backbone, local_size)
    dino, ibot = heads_flops(
        backbone.embed_dim,
        prototypes=prototypes,
        hidden=hidden,
        bottleneck=bottleneck,
        layers=layers,
        ibot_prototypes=ibot_prototypes,
        ibot_bottleneck=ibot_bottleneck,
    )
    parts: dict[str, float] = {
        "teacher": 2 * big,
        "student": 3 * (2 * big + local_number * small) * (1 - drop_path),
        "heads": (3 * (2 + local_number) + 2) * dino + 4 * masked * ibot,
    }
    return parts | {"total": sum(parts.values())}


def _numbers(arch: str | VisionTransformer, overrides: dict[str, object]) -> dict[str, Any]:
    """What the counts depend on, of a name or of a backbone."""
    if isinstance(arch, str):
        return architecture(arch, **overrides)
    names = ("embed_dim", "depth", "patch_size", "in_chans", "img_size", "num_register_tokens", "mlp_ratio", "ffn")
    return {name: getattr(arch, name) for name in (*names, "layerscale", "qkv_bias")} | overrides


def _hidden(a: dict) -> tuple[int, bool]:
    """Hidden width of the feed-forward layer and whether it is gated."""
    ratio, swiglu = a.get("mlp_ratio", 4.0), a["ffn"] == "swiglu"
    return (swiglu_hidden(a["embed_dim"], ratio) if swiglu else int(a["embed_dim"] * ratio)), swiglu

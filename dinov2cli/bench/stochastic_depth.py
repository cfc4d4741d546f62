"""`dinov2 bench stochastic-depth`: gather + LayerNorm and scaled add-back of the kept samples, checked and then timed.

The branch between them is left out, but for the conversion to 16 bit that its first linear layer makes under autocast.
With k the kept share, a float32 residual x and a bf16 branch, the fewest bytes per element of x are 8 + 8k going
forward (gather: read 4k, write 2k; add back: read 4 + 2k, write 4), and 16 + 22k forward and backward (what LayerNorm
keeps: 2k written, 2k read; add back: read 6k, write 2k; gather: read 4 + 2k, write 4). The floor is that over the rate
of a copy on this device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2cli.bench.device_time import copy_rate, first_wrong, median_seconds, named
from dinov2cli.device import choose_device
from dinov2cli.errors import WorkError
from dinov2cli.kernels.dispatch import choose
from dinov2cli.models.blocks import LayerNorm, LayerScale
from dinov2cli.models.depth import Groups, Kept, add_fused, add_residual, draw_kept

_DROP = 0.4


@dataclass(frozen=True)
class Shape:
    """A pack of crops, (samples, tokens) of each size, of a residual stream `width` wide."""

    name: str
    groups: tuple[tuple[int, int], ...]
    width: int


GPU_SHAPES = (
    Shape("ViT-L/14, 64 images", ((128, 257), (512, 50)), 1024),
    Shape("ViT-g/14, 24 images", ((48, 257), (192, 50)), 1536),
)
CPU_SHAPES = (Shape("ViT-S/14, 2 images", ((4, 257), (16, 50)), 384),)
CHECKED = Shape("checked", ((6, 37), (10, 13)), 1000)


class Residual(torch.nn.Module):
    """The parts of a block around a branch, and a batch for them: float32 residual x [T, D], samples kept, gradient."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, generator=generator)

        self.groups: Groups = list(shape.groups)
        tokens = sum(samples * length for samples, length in self.groups)
        self.norm = LayerNorm(shape.width, eps=1e-6, device=device)
        self.gain = LayerScale(shape.width, 1e-5).to(device)
        with torch.no_grad():
            self.norm.weight.add_(0.3 * draw(shape.width))
            self.norm.bias.add_(0.3 * draw(shape.width))
            self.gain.gamma.copy_(0.5 + 0.3 * draw(shape.width))
        self.x = torch.nn.Parameter(2 * draw(tokens, shape.width))
        self.grad = draw(tokens, shape.width)
        (kept,) = draw_kept(self.groups, [_DROP], torch.Generator().manual_seed(seed), device)
        assert kept is not None
        self.kept: Kept = kept

    def bytes(self, *, backward: bool) -> float:
        """The fewest bytes that must move."""
        pairs = zip(self.kept.attention, self.groups, strict=True)
        packed = sum(len(index) * tokens for index, (_, tokens) in pairs)
        rows, width = self.x.shape
        return width * (16 * rows + 22 * packed if backward else 8 * rows + 8 * packed)


Way = Callable[[Residual], Tensor]


def ours(part: Residual) -> Tensor:
    """The operators of kernels/depth.py: Triton on a GPU, torch on a CPU."""
    kept = part.kept
    with torch.autocast(part.x.device.type, torch.bfloat16):
        return add_fused(
            _branch, part.x, part.groups, kept.attention, kept.scale, norm=part.norm, gamma=part.gain.gamma
        )


def eager(part: Residual) -> Tensor:
    """What a block does in torch: index_select, LayerNorm, LayerScale, index_add."""
    kept = part.kept
    with torch.autocast(part.x.device.type, torch.bfloat16):
        return add_residual(
            lambda x, groups: part.gain(_branch(part.norm(x), groups)), part.x, part.groups, kept.attention, kept.scale
        )


def exact(part: Residual) -> Tensor:
    """The same in the type of the weights, float64 for the oracle: no autocast, no conversion."""
    kept = part.kept
    return add_residual(lambda x, _: part.gain(part.norm(x)), part.x, part.groups, kept.attention, kept.scale)


def run(device: str = "auto", seed: int = 0, rounds: int = 30) -> dict[str, Any]:
    """Errors, then times of ours, eager torch and (on a GPU) the same torch compiled, for packs of real size.

    `shapes`: for each pack a row per implementation with microseconds `forward_us` and `both_us` (forward and
    backward), `tb_per_s` and `of_floor` of both, `saved_mb` (kept for the backward pass, x apart). `seconds`,
    `speedup` (eager over ours) and `memory_ratio` (of what is saved) are those of the first pack. Raises WorkError if
    ours is wrong: it is not timed then.
    """
    where = choose_device(device)
    choice = choose("stochastic depth", where)
    errors = check(where, seed)
    rate = copy_rate(where)
    gpu = where.type == "cuda"
    ways: dict[str, Way] = {"ours": ours, "eager": eager}
    if gpu:
        ways["compiled"] = torch.compile(eager, fullgraph=True, dynamic=False)
    shapes = [measure(shape, ways, where, rate, seed, rounds) for shape in (GPU_SHAPES if gpu else CPU_SHAPES)]
    first = {row["name"]: row for row in shapes[0]["rows"]}
    return {
        "device": named(where),
        "ours": f"{choice.backend} ({choice.reason})",
        "triton": choice.backend == "triton",
        "seconds": first["ours"]["both_us"] / 1e6,
        "speedup": first["eager"]["both_us"] / first["ours"]["both_us"],
        "speedup_over_compiled": first["compiled"]["both_us"] / first["ours"]["both_us"] if gpu else None,
        "memory_ratio": first["ours"]["saved_mb"] / first["eager"]["saved_mb"],
        "copy_tb_per_s": rate / 1e12,
        "errors": errors,
        "shapes": shapes,
    }


def check(device: torch.device, seed: int) -> dict[str, dict[str, float]]:
    """Relative errors of ours and of eager torch against float64. Raises WorkError where ours is out of bounds."""
    part = Residual(CHECKED, device, seed)
    names = ("forward", "dx", "dweight", "dbias", "dgamma")
    found = {name: _both(way, part) for name, way in (("ours", ours), ("eager", eager))}
    part.double()
    part.grad = part.grad.double()
    true = _both(exact, part)
    errors = {
        name: {which: _error(a, b) for which, a, b in zip(names, values, true, strict=True)}
        for name, values in found.items()
    }
    wrong = first_wrong(errors["ours"], errors["eager"])
    if wrong is not None:
        raise WorkError(
            f"bench stochastic-depth: the kernels are wrong on {named(device)}: {wrong}; "
            "train with DINOV2_KERNELS=torch meanwhile"
        )
    return errors


def measure(
    shape: Shape, ways: dict[str, Way], device: torch.device, rate: float, seed: int, rounds: int
) -> dict[str, Any]:
    """One pack: a row per implementation."""
    parts = [Residual(shape, device, seed + i) for i in range(2)]
    floors = [parts[0].bytes(backward=backward) / rate for backward in (False, True)]
    rows = []
    for name, way in ways.items():
        forward, both = _times(way, parts, device, rounds)
        rows.append(
            {
                "name": name,
                "forward_us": forward * 1e6,
                "both_us": both * 1e6,
                "tb_per_s": parts[0].bytes(backward=True) / both / 1e12,
                "of_floor": floors[1] / both,
                "saved_mb": saved_bytes(way, parts[0]) / 1e6,
            }
        )
    return {
        "shape": shape.name,
        "groups": list(shape.groups),
        "width": shape.width,
        "drop": _DROP,
        "floor_forward_us": floors[0] * 1e6,
        "floor_both_us": floors[1] * 1e6,
        "rows": rows,
    }


def saved_bytes(way: Way, part: Residual) -> int:
    """Bytes of what autograd keeps for the backward pass, x and the weights apart."""
    held: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = way(part)
    del out
    return sum(held.values())


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as tables for people."""
    out = [f"{figures['device']}, copies at {figures['copy_tb_per_s']:.3g} TB/s; ours: {figures['ours']}"]
    if not figures["triton"]:
        out.append("Triton did not run: 'ours' is the same operators in torch, and its times say nothing of a GPU")
    for shape in figures["shapes"]:
        out += ["", f"{shape['shape']}, width {shape['width']}, drop {shape['drop']}"]
        floors = f"{shape['floor_forward_us']:.0f} us forward, {shape['floor_both_us']:.0f} us with backward"
        out.append(
            f"  {'':<10}{'forward us':>12}{'both us':>12}{'TB/s':>8}{'of floor':>10}{'saved MB':>10}  floor {floors}"
        )
        out += [
            f"  {row['name']:<10}{row['forward_us']:>12.0f}{row['both_us']:>12.0f}{row['tb_per_s']:>8.3f}"
            f"{row['of_floor']:>10.1%}{row['saved_mb']:>10.1f}"
            for row in shape["rows"]
        ]
    out += ["", "relative errors against float64 (eager torch in brackets)"]
    mine, torch_own = figures["errors"]["ours"], figures["errors"]["eager"]
    return [*out, "  " + ", ".join(f"{which} {mine[which]:.1e} ({torch_own[which]:.1e})" for which in mine)]


def _branch(y_TD: Tensor, _: Groups) -> Tensor:
    return y_TD.to(torch.bfloat16)


def _inputs(part: Residual) -> list[Tensor]:
    return [part.x, part.norm.weight, part.norm.bias, part.gain.gamma]


def _both(way: Way, part: Residual) -> tuple[Tensor, ...]:
    out = way(part)
    return out.detach(), *torch.autograd.grad(out, _inputs(part), part.grad)


def _times(way: Way, parts: Sequence[Residual], device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds of the forward pass alone, as with gradients, and of forward and backward together."""
    forward = median_seconds([lambda p=p: way(p) for p in parts], device, rounds=rounds)  # type: ignore[misc]
    both = median_seconds([lambda p=p: _both(way, p) for p in parts], device, rounds=rounds)  # type: ignore[misc]
    return forward, both


def _error(value: Tensor, true: Tensor) -> float:
    """||value - true|| / ||true||."""
    return float((value.double() - true).norm() / true.norm())

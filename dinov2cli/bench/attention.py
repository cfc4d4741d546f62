"""`dinov2 bench attention`: every implementation of the attention of packed crops, checked and then timed side by side.

The floor of a shape is its bytes over the copy rate of this device: reading q, k, v and writing the output going
forward; reading q, k, v, output and its gradient and writing three gradients going backward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2cli.bench.device_time import copy_rate, first_wrong, median_seconds, named
from dinov2cli.device import choose_device
from dinov2cli.errors import WorkError
from dinov2cli.kernels.attention import attention
from dinov2cli.kernels.attention_baselines import implementations
from dinov2cli.kernels.dispatch import choose

Groups = list[tuple[int, int]]
Attend = Callable[[Tensor, Groups], Tensor]

WIDTH = 64  # of a head
_OURS = ("ours", "cuda")
_ROTATED = 128 << 20  # bytes of inputs that are gone through before one comes again: beyond any L2


@dataclass(frozen=True)
class Shape:
    """A pack of crops: (samples, tokens) of each size, and heads of width 64."""

    name: str
    groups: tuple[tuple[int, int], ...]
    heads: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole pack."""
        return sum(samples * tokens for samples, tokens in self.groups)

    def bytes(self, *, backward: bool) -> int:
        """The fewest bytes that must move, in 16 bit (the logsumexp, 1 % more, left out)."""
        return (8 if backward else 4) * self.tokens * self.heads * WIDTH * 2


GPU_SHAPES = (
    Shape("ViT-L/14, 64 images", ((128, 257), (512, 50)), 16),
    Shape("ViT-L/14, 64 images, 0.6 of them kept", ((76, 257), (307, 50)), 16),
    Shape("ViT-L/14 with 4 registers, 64 images", ((128, 261), (512, 54)), 16),
    Shape("ViT-S/14, 128 images", ((256, 257), (1024, 50)), 6),
    Shape("ViT-L/14 at 518 pixels, 8 images", ((16, 1370),), 16),
)
CPU_SHAPES = (Shape("ViT-S/14, 2 images", ((4, 257), (16, 50)), 6),)
CHECKED = Shape("checked", ((2, 257), (3, 50), (2, 261)), 2)


def run(device: str = "auto", seed: int = 0, rounds: int = 30) -> dict[str, Any]:
    """Errors, times and shares of the floor of everything that can run on `device`, in bf16.

    `shapes`: for each pack a row per implementation with microseconds `forward` and `both` (forward and backward),
    `tb_per_s` and `of_floor` (floor over time, both directions), and the pack's `speedup`: the best of the others over
    ours ('ours' is what a model would run here). `speedup` is that of the first pack. `errors`: relative errors of
    each against float64, and of plain bf16 products. Raises WorkError if ours is wrong: a wrong kernel is not timed.
    """
    where = choose_device(device)
    rate = copy_rate(where)
    runners = {"ours": attention, **implementations(where)}
    errors = {name: checked(attend, where, seed) for name, attend in runners.items()}
    refuse_wrong(errors)
    kinds = GPU_SHAPES if where.type == "cuda" else CPU_SHAPES
    shapes = [measure(shape, runners, where, rate, seed, rounds) for shape in kinds]
    choice = choose("attention", where)
    return {
        "device": named(where),
        "dtype": "bf16",
        "ours": f"{choice.backend} ({choice.reason})",
        "copy_tb_per_s": rate / 1e12,
        "speedup": shapes[0]["speedup"],
        "errors": errors,
        "shapes": shapes,
    }


def measure(
    shape: Shape, runners: dict[str, Attend], device: torch.device, rate: float, seed: int, rounds: int
) -> dict[str, Any]:
    """One pack: a row per implementation, timed in turn, and how ours compares."""
    inputs = list(make_inputs(shape, device, seed))
    groups, floor = list(shape.groups), sum(shape.bytes(backward=b) for b in (False, True)) / rate
    rows: list[dict[str, Any]] = []
    for name, attend in runners.items():
        try:
            forward, both = _times(attend, inputs, groups, device, rounds)
        except Exception as error:  # somebody else's kernel that has nothing for this shape, or no memory
            if name.startswith(_OURS):
                raise
            rows.append({"name": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            continue
        moved = sum(shape.bytes(backward=b) for b in (False, True))
        rows.append(
            {
                "name": name,
                "forward_us": forward * 1e6,
                "both_us": both * 1e6,
                "tb_per_s": moved / both / 1e12,
                "of_floor": floor / both,
            }
        )
    times = {row["name"]: row["both_us"] for row in rows if "both_us" in row}
    others = [time for name, time in times.items() if not name.startswith(_OURS)]
    speedup = min(others) / times["ours"] if others and "ours" in times else None
    return {
        "shape": shape.name,
        "groups": groups,
        "heads": shape.heads,
        "floor_us": floor * 1e6,
        "speedup": speedup,
        "rows": rows,
    }


def checked(attend: Attend, device: torch.device, seed: int) -> dict[str, Any]:
    """Relative errors of output and of the gradients of q, k and v against float64, and those of plain bf16 products
    through autograd; `failed` in words where it cannot run."""
    groups = list(CHECKED.groups)
    (qkv, grad), *_ = make_inputs(CHECKED, device, seed)
    exact = _both(_plain, qkv.double(), grad.double(), groups)
    plain = _both(_plain, qkv, grad, groups)
    try:
        found = _both(attend, qkv, grad, groups)
    except Exception as error:  # told of ours by `refuse_wrong`, with the name
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    names = ("forward", "dq", "dk", "dv")
    return {
        "errors": {name: _error(a, b) for name, a, b in zip(names, found, exact, strict=True)},
        "plain": {name: _error(a, b) for name, a, b in zip(names, plain, exact, strict=True)},
    }


def refuse_wrong(errors: dict[str, dict[str, Any]]) -> None:
    """WorkError if a kernel of ours failed, or is further from float64 than its bounds allow."""
    for name, found in errors.items():
        if not name.startswith(_OURS):
            continue
        if "failed" in found:
            raise WorkError(f"bench attention: {name} does not run here: {found['failed']}")
        wrong = first_wrong(found["errors"], found["plain"])
        if wrong is not None:
            raise WorkError(f"bench attention: {name} is wrong: {wrong}")


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Enough pairs of random qkv [T, 3, H, C] and gradient [T, H * C] in bf16 that no cache holds them all."""
    generator = torch.Generator(device).manual_seed(seed)
    size = 4 * shape.tokens * shape.heads * WIDTH * 2
    for _ in range(min(8, 1 + _ROTATED // size) if device.type == "cuda" else 1):
        draw = torch.randn(4, shape.tokens, shape.heads, WIDTH, device=device, generator=generator)
        yield draw[:3].transpose(0, 1).bfloat16().contiguous(), draw[3].flatten(1).bfloat16()


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as tables for people."""
    out = [f"{figures['device']}, bf16, copies at {figures['copy_tb_per_s']:.3g} TB/s; ours: {figures['ours']}"]
    for shape in figures["shapes"]:
        speedup = "" if shape["speedup"] is None else f"; ours is {shape['speedup']:.2f}x the best of the others"
        out += ["", f"{shape['shape']} (floor {shape['floor_us']:.0f} us){speedup}"]
        out.append(f"  {'':<18}{'forward us':>12}{'both us':>12}{'TB/s':>8}{'of floor':>10}")
        for row in shape["rows"]:
            if "failed" in row:
                out.append(f"  {row['name']:<18}does not run: {row['failed']}")
                continue
            out.append(
                f"  {row['name']:<18}{row['forward_us']:>12.0f}{row['both_us']:>12.0f}"
                f"{row['tb_per_s']:>8.3f}{row['of_floor']:>10.1%}"
            )
    out += ["", "relative errors against float64 (plain bf16 products in brackets)"]
    for name, found in figures["errors"].items():
        if "failed" in found:
            out.append(f"  {name:<18}does not run: {found['failed']}")
            continue
        parts = [f"{part} {e:.1e} ({found['plain'][part]:.1e})" for part, e in found["errors"].items()]
        out.append(f"  {name:<18}{', '.join(parts)}")
    return out


def _times(
    attend: Attend, inputs: list[tuple[Tensor, Tensor]], groups: Groups, device: torch.device, rounds: int
) -> tuple[float, float]:
    """Seconds of the forward pass without gradients, and of forward and backward together."""

    def forward(qkv: Tensor) -> None:
        with torch.no_grad():
            attend(qkv, groups)

    one_way = median_seconds([lambda q=q: forward(q) for q, _ in inputs], device, rounds=rounds)  # type: ignore[misc]
    both = median_seconds(
        [lambda q=q, g=g: _both(attend, q, g, groups) for q, g in inputs],  # type: ignore[misc]
        device,
        rounds=rounds,
    )
    return one_way, both


def _both(attend: Attend, qkv: Tensor, grad: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Output [T, H * C] and the gradients of q, k and v."""
    leaf = qkv.detach().requires_grad_()
    out = attend(leaf, groups)
    (gradient,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), *gradient.unbind(1)


def _plain(qkv: Tensor, groups: Groups) -> Tensor:
    """Softmax attention by plain products, in the type of its input."""
    outputs = []
    for run, (samples, tokens) in zip(qkv.split([b * n for b, n in groups]), groups, strict=True):
        q, k, v = run.unflatten(0, (samples, tokens)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        outputs.append((weights @ v).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())

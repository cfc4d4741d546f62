"""Two gloo processes with a batch split between them give the losses and gradients of one process with all of it."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinov2cli.losses.center import SoftmaxCenter
from dinov2cli.losses.dino import dino_loss
from dinov2cli.losses.ibot import ibot_loss
from dinov2cli.losses.koleo import koleo_loss
from dinov2cli.losses.sinkhorn import sinkhorn_scalings, sinkhorn_targets

BATCH, TOKENS, CLASSES, DIM = 6, 11, 19, 8
SPLIT = 4  # masked tokens of rank 0: 4 of 11, so ranks hold different numbers
LARGE = 40.0  # logits far beyond what exp(x / 0.04) can hold


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "student_cls": normal(2, BATCH, CLASSES),
        "student_local": normal(3, BATCH, CLASSES),
        "teacher_cls": normal(2, BATCH, CLASSES) * LARGE,
        "student_patch": normal(TOKENS, CLASSES),
        "teacher_patch": normal(TOKENS, CLASSES),
        "weights": torch.rand(TOKENS, generator=generator) + 0.1,
        "tokens": normal(2, BATCH, DIM),
    }


def outputs(x: dict[str, torch.Tensor], group: dist.ProcessGroup | None, pad: int = 0) -> dict[str, torch.Tensor]:
    """All losses of this process's part, each with its gradients; `pad` garbage rows are added to the tokens."""
    batch = x["teacher_cls"].shape[1]
    leaves = {name: x[name].clone().requires_grad_() for name in ("student_cls", "student_local", "tokens")}
    cls_targets = sinkhorn_targets(x["teacher_cls"].flatten(0, 1), 0.04, group=group).view(2, batch, CLASSES)
    dino_local, dino_global = dino_loss(torch.cat([leaves["student_cls"], leaves["student_local"]]), cls_targets)
    garbage = torch.full((pad, CLASSES), float("nan"))
    valid = torch.arange(len(x["student_patch"]) + pad) < len(x["student_patch"])
    leaves["student_patch"] = torch.cat([x["student_patch"], garbage]).requires_grad_()
    teacher_patch = torch.cat([x["teacher_patch"], garbage])
    patch_targets = sinkhorn_scalings(teacher_patch, 0.07, valid=valid, group=group)
    weights = torch.cat([x["weights"], torch.zeros(pad)])
    ibot = ibot_loss(leaves["student_patch"], patch_targets, weights, 2 * batch)
    koleo = koleo_loss(leaves["tokens"], group=group)
    center = SoftmaxCenter(CLASSES)
    center(teacher_patch, 0.07, valid=valid, group=group)
    (dino_local + dino_global + ibot + 0.1 * koleo).backward()
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    gradients["grad_student_patch"] = gradients["grad_student_patch"][: len(x["student_patch"])]
    losses = {"dino_local": dino_local, "dino_global": dino_global, "ibot": ibot, "koleo": koleo}
    return (
        {name: loss.detach() for name, loss in losses.items()}
        | gradients
        | {"cls_targets": cls_targets, "patch_targets": patch_targets.materialize()[valid], "center": center.center}
    )


def part(x: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What of the whole batch rank 0 or 1 holds: half of the images, an uneven share of the masked tokens."""
    crops = slice(0, BATCH // 2) if rank == 0 else slice(BATCH // 2, BATCH)
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, TOKENS)
    return {
        name: t[rows] if name in ("student_patch", "teacher_patch", "weights") else t[:, crops] for name, t in x.items()
    }


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    result = outputs(part(inputs(), rank), dist.group.WORLD, pad=3 * rank)
    alone = sinkhorn_targets(
        torch.zeros(0 if rank else 5, CLASSES), 0.05, group=dist.group.WORLD
    )  # a rank without rows
    result["empty"] = torch.tensor(alone.shape)
    torch.save(result, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    directory: Path = tmp_path_factory.mktemp("gloo")
    commands = [[sys.executable, __file__, str(rank), str(directory)] for rank in (0, 1)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return outputs(inputs(), None)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dino_local", "dino_global", "ibot", "koleo"])
def test_mean_of_the_ranks_losses_is_the_loss_of_the_whole(ranks, whole, name):
    assert ranks[0][name] != ranks[1][name]
    close((ranks[0][name] + ranks[1][name]) / 2, whole[name])


@pytest.mark.parametrize("name", ["student_cls", "student_local", "student_patch", "tokens"])
def test_gradients_of_the_mean_are_those_of_the_whole(ranks, whole, name):
    """Data parallelism averages gradients over the two ranks: half of each rank's gradient on its own rows."""
    dim = 0 if name == "student_patch" else 1
    joined = torch.cat([rank[f"grad_{name}"] for rank in ranks], dim=dim) / 2
    close(joined, whole[f"grad_{name}"])


def test_targets_are_those_of_the_whole(ranks, whole):
    close(torch.cat([rank["cls_targets"] for rank in ranks], dim=1), whole["cls_targets"])
    close(torch.cat([rank["patch_targets"] for rank in ranks]), whole["patch_targets"])


def test_targets_differ_from_each_rank_on_its_own(ranks):
    """Else the test above would pass without any communication."""
    own = outputs(part(inputs(), 0), None)
    assert (own["patch_targets"] - ranks[0]["patch_targets"]).abs().max() > 1e-3
    assert (own["koleo"] - ranks[0]["koleo"]).abs() > 1e-3


def test_center_is_that_of_the_whole_on_both(ranks, whole):
    for rank in ranks:
        close(rank["center"], whole["center"])


def test_a_rank_without_rows_takes_part(ranks):
    assert ranks[0]["empty"].tolist() == [5, CLASSES]
    assert ranks[1]["empty"].tolist() == [0, CLASSES]


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])

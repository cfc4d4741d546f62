"""The memory model against the real modules: parameters exactly, what autograd keeps by counting saved storages."""

import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2cli.data.masks import make_masks
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.registry import build
from dinov2cli.train.distill import DistillObjective, build_distill_model
from dinov2cli.train.distillation import Distillation
from dinov2cli.train.footprint import footprint
from dinov2cli.train.memory import _autocast_weights, activations, distillation_memory, memory
from dinov2cli.train.method import Company, Crops
from dinov2cli.train.network import build_heads, build_ssl_model
from dinov2cli.train.parallel import setup
from dinov2cli.train.schedules import StepValues
from dinov2cli.train.sharding import Spread
from dinov2cli.train.sizes import Batch, Layout, shard_of, sizes_of
from dinov2cli.train.ssl import Objective, ssl_losses
from dinov2cli.train.teacher import FrozenTeacher

IMAGES, LOCALS, LOCAL_SIZE = 4, 4, 42
PLAIN = {"fp32": 0, "bf16": 300}  # short 16-bit sequences write out their attention matrix on a CPU


@pytest.mark.parametrize("arch", ["vits14", "vitb14", "vitl14", "vitg14", "vits14_reg4"])
@pytest.mark.parametrize("untied", [True, False])
def test_parameters_are_those_of_the_modules(arch, untied):
    with torch.device("meta"):
        backbone = build(arch, device="meta")
        dino = ProjectionHead(backbone.embed_dim, 131072, bottleneck=384)
        ibot = ProjectionHead(backbone.embed_dim, 65536) if untied else None
    network = sizes_of(backbone, dino, ibot)
    parts = [module for module in (backbone, dino, ibot) if module is not None]
    assert network.parameters() == sum(p.numel() for module in parts for p in module.parameters())
    held = memory(network, Batch(1), Layout("ddp", 8))
    assert held["weights"] == held["teacher"] == held["moments"] // 2 == 4 * network.parameters()
    sharded = memory(network, Batch(1), Layout("fsdp", 8))
    assert 1 <= 8 * sharded["weights"] / held["weights"] < 1.01


def test_shards_are_padded_to_whole_rows():
    assert shard_of([(8, 3)], 4) == 6
    assert shard_of([(9, 3)], 4) == 9
    assert shard_of([(1, 257, 10)], 64) == 2570  # a single row is whole on every rank


@pytest.mark.parametrize(
    ("precision", "ffn", "drop", "size"),
    list(itertools.product(["fp32", "bf16"], ["mlp", "swiglu"], [0.0, 0.3], [98, 252])),
)
def test_activations_are_what_autograd_keeps(precision, ffn, drop, size):
    """252 pixels make 325 tokens, longer than the longest sequence written out: there bf16 is as on a GPU."""
    backbone = build("vits14", embed_dim=128, num_heads=2, depth=3, ffn=ffn, img_size=size, drop_path=drop).train()
    crops = [torch.randn(2 * IMAGES, 3, size, size), torch.randn(LOCALS * IMAGES, 3, LOCAL_SIZE, LOCAL_SIZE)]
    masks = [torch.rand(2 * IMAGES, (size // 14) ** 2) < 0.3, None]
    seen = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*backbone.parameters(), *crops]}
    kept = {}

    def pack(tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in seen:
            kept[key] = tensor.untyped_storage()  # held, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=precision == "bf16"):
        backbone.forward_crops(crops, masks, generator=torch.Generator().manual_seed(0))
    head = ProjectionHead(4, 4, hidden=4, bottleneck=4)
    network = sizes_of(backbone, head, head)
    batch = Batch(IMAGES, size, LOCAL_SIZE, LOCALS, precision=precision, plain_tokens=PLAIN[precision])
    modelled = activations(network, batch) + _autocast_weights(network, batch, Layout())
    assert modelled == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.03)


class Live(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there, and the most there ever were."""

    def __init__(self, given):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata: None for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        del self.known[key]
        self.now -= size


@pytest.mark.parametrize(
    ("precision", "drop", "checkpointing", "low"),
    [
        ("fp32", 0.0, False, 0.85),
        ("bf16", 0.3, False, 0.85),
        ("fp32", 0.3, True, 0.95),
        ("bf16", 0.0, True, 0.95),
    ],
)
def test_the_whole_step_needs_about_what_the_model_says(precision, drop, checkpointing, low):
    """Peak of one real step. The model leaves temporaries of single operations out and takes moments together that do
    not quite coincide under checkpointing, hence the band."""
    batch = Batch(6, 98, 42, 6, precision=precision, checkpointing=checkpointing, plain_tokens=PLAIN[precision])
    backbone = build("vits14", embed_dim=192, num_heads=3, depth=6, img_size=98, drop_path=drop)
    model = build_ssl_model(backbone, prototypes=2048, hidden=256, bottleneck=64)
    model.student.backbone.activation_checkpointing = checkpointing
    crops = {"global_crops": torch.randn(2, 6, 3, 98, 98), "local_crops": torch.randn(6, 6, 3, 42, 42)}
    masks = make_masks(12, (7, 7), rng=np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    with Live([*model.parameters(), *crops.values(), masks]) as live:
        with torch.autocast("cpu", enabled=precision == "bf16"):
            step = ssl_losses(model, Objective(), **crops, masks=masks, teacher_temperature=0.05, generator=generator)
        step.total.backward()
    network = sizes_of(backbone, model.student.dino_head, model.student.ibot_head)
    needed = memory(network, replace(batch, masked=float(masks.sum()) / 6), Layout())
    beyond = needed["total"] - sum(needed[name] for name in ("weights", "moments", "teacher", "crops"))
    assert low < beyond / live.peak < 1.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["paper", "features"])
def test_a_step_of_distillation_needs_about_what_the_model_says(form, precision):
    """Peak of one real step: the teacher's pass is over before, and all patches meet the prototypes."""
    features = {"dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0, "feature_weight": 1}
    objective = DistillObjective(**(features if form == "features" else {}))
    heads = {"prototypes": 2048, "hidden": 256, "bottleneck": 64}
    network = build("vits14", depth=4, img_size=98)
    owned = build_heads(384, **heads) if form == "paper" else (None, None)
    looked_at = FrozenTeacher(network, dino_head=owned[0], ibot_head=owned[1])
    backbone = build("vits14", embed_dim=192, num_heads=3, depth=6, img_size=98)
    made = {"teacher_has_heads": form == "paper", "adapter": form != "paper", "heads": heads}
    model = build_distill_model(backbone, 384, objective, **made)
    batch = Batch(6, 98, 42, 6 if form == "paper" else 0, 98, precision, plain_tokens=PLAIN[precision])
    crops = torch.randn(2, 6, 3, 98, 98), torch.randn(6, 6, 3, 42, 42)
    parallel, method = setup("cpu", precision), Distillation(looked_at, objective)
    method.place(parallel)
    piece = Crops(*crops, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    values = StepValues(1e-3, 1e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.05)
    spread = Spread(model, model.student, torch.device("cpu"))
    with Live([*model.parameters(), *looked_at.parameters(), *looked_at.buffers(), *crops]) as live:
        seen = method.look(piece, parallel)
        with parallel.autocast():
            chosen = torch.ones(12, 49, dtype=torch.bool)
            step = method.losses(spread, seen, piece, chosen, values, Company(torch.Generator()))
        step.total.backward()
    needed = distillation_memory(
        [sizes_of(backbone, model.student.dino_head, model.student.ibot_head)],
        [batch],
        Layout(),
        teacher=0,
        teacher_tokens=2 * 384 * 50,
    )
    beyond = needed["total"] - sum(needed[name] for name in ("weights", "moments", "averages", "crops"))
    assert 0.85 < beyond / live.peak < 1.25


def test_checkpointing_and_parts_and_shards_save_memory():
    with torch.device("meta"):
        backbone = build("vitl14", device="meta", drop_path=0.4)
        head = ProjectionHead(1024, 131072)
    network = sizes_of(backbone, head, head)
    whole = Batch(32, masked=77)
    bytes_of = {
        "plain": memory(network, whole, Layout("fsdp", 64))["total"],
        "parts": memory(network, replace(whole, accumulate=4), Layout("fsdp", 64))["total"],
        "checkpointing": memory(network, replace(whole, checkpointing=True), Layout("fsdp", 64))["total"],
        "hybrid": memory(network, whole, Layout("hybrid", 64))["total"],
        "kept": memory(network, whole, Layout("fsdp", 64, reshard=False))["total"],
        "ddp": memory(network, whole, Layout("ddp", 64))["total"],
    }
    assert max(bytes_of["parts"], bytes_of["checkpointing"]) < bytes_of["plain"] < bytes_of["hybrid"] < bytes_of["ddp"]
    assert bytes_of["plain"] < bytes_of["kept"] < bytes_of["ddp"]
    facts = footprint(network, whole, Layout("hybrid", 64))
    assert facts["memory per rank (GiB, modelled)"] == round(bytes_of["hybrid"] / 2**30, 2)
    assert facts["traffic in reduce-scatter (MiB)"] > 0
    assert not any("traffic" in name for name in footprint(network, whole, Layout()))

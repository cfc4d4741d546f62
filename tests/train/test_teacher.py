"""The frozen teacher: its tokens against transformers and torch, its heads, and what does not fit."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov2cli.errors import UserError
from dinov2cli.models.encoder import Encoder, Seen
from dinov2cli.models.heads import ProjectionHead
from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, preprocessor_config
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.open_teacher import open_teacher
from dinov2cli.train.teacher import FrozenTeacher, TeacherTokens, resample_patches


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(patch=8, *, size=32, width=16, registers=0, **changes):
    """A backbone whose every parameter is far from its initial value, so that each one shows in the tokens."""
    sizes = {"embed_dim": width, "depth": 2, "num_heads": 2, "num_register_tokens": registers, "layerscale": 1.0}
    network = VisionTransformer(img_size=size, patch_size=patch, **(sizes | changes))
    generator = torch.Generator().manual_seed(patch + registers)
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def head(width=16, prototypes=24, seed=0):
    return ProjectionHead(width, prototypes, hidden=20, bottleneck=12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("size", [56, 84])
def test_tokens_are_those_of_transformers(tmp_path, registers, size):
    transformers = pytest.importorskip("transformers")
    numbers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    if registers:
        numbers["num_register_tokens"] = registers
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{family}Config")(**numbers)
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data.add_(0.2 * draw(*parameter.shape, seed=i))
    theirs.save_pretrained(tmp_path)
    processor = preprocessor_config(Preprocess(resize=56, crop=56))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    crops = draw(3, 3, size, size)
    with torch.no_grad():
        expected = theirs(crops).last_hidden_state
    for spec in (str(tmp_path), f"transformers:{tmp_path}"):
        opened = open_teacher(spec, heads="auto")
        found = opened.teacher.tokens(crops, size // 14)
        torch.testing.assert_close(found.cls, expected[:, 0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.patches, expected[:, 1 + registers :], atol=2e-5, rtol=1e-4)
        assert opened.heads is None and "not a run" in opened.reason
        assert opened.teacher.embed_dim == 32


def test_crops_come_in_the_teachers_own_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 1.0)
    network = vit()
    colours = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def normalized(mean, std):
        return ((colours - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).float()

    crops, own = normalized(IMAGENET_MEAN, IMAGENET_STD), normalized(mean, std)
    teacher = FrozenTeacher(network, mean=mean, std=std)
    torch.testing.assert_close(teacher.images(crops), own, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(teacher.tokens(crops, 4).patches, network(own).patches, atol=1e-4, rtol=1e-4)
    same = FrozenTeacher(network)
    assert same.images(crops) is crops
    assert (same.tokens(crops, 4).cls - teacher.tokens(crops, 4).cls).abs().max() > 0.01


def test_mean_and_std_are_those_of_the_models_files(tmp_path):
    from dinov2cli.models.export import save_hf

    save_hf(vit(), tmp_path, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.125), resize=32, crop=32)
    teacher = open_teacher(tmp_path).teacher
    assert teacher.renormalizes
    black = -torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(teacher.images(black).flatten(), torch.tensor([-2.0, -1.0, -4.0]))


@pytest.mark.parametrize("size", [24, 64])
def test_image_size_resizes_the_crops(size):
    network, crops = vit(), draw(2, 3, 32, 32)
    teacher = FrozenTeacher(network, image_size=size)
    resized = F.interpolate(crops.double(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(teacher.images(crops).double(), resized, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        expected = network(resized.float())
    found = teacher.tokens(crops, size // 8)
    torch.testing.assert_close(found.cls, expected.cls, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-4, rtol=1e-4)
    assert FrozenTeacher(network, image_size=32).images(crops) is crops


@pytest.mark.parametrize(("side", "grid"), [(16, 14), (14, 16), (4, 7), (6, 3), (1, 5), (5, 1)])
def test_patches_are_resampled_bilinearly(side, grid):
    patches = draw(2, side * side, 6)
    maps = patches.double().transpose(1, 2).reshape(2, 6, side, side)
    expected = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    found = resample_patches(patches, grid)
    torch.testing.assert_close(found.double(), expected.flatten(2).transpose(1, 2), atol=5e-6, rtol=1e-5)
    # A ramp along the rows stays one along the rows: row order, not column order.
    ramp = torch.arange(side).repeat_interleave(side).view(1, -1, 1).float()
    assert (resample_patches(ramp, grid).view(grid, grid).diff(dim=1).abs() < 1e-5).all()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = resample_patches(patches.bfloat16(), grid)
    assert rounded.dtype == torch.bfloat16
    wanted = resample_patches(patches.bfloat16().float(), grid).bfloat16()
    assert torch.equal(rounded, wanted)  # rounded once, at the end


def test_a_grid_of_its_own_is_left_alone_and_none_is_refused():
    patches = draw(2, 9, 4)
    assert resample_patches(patches, 3) is patches
    with pytest.raises(UserError, match="gives 8 patches of a square image"):
        resample_patches(patches[:, :8], 3)


def test_a_teacher_of_another_patch_gives_the_students_grid():
    network, crops = vit(patch=4), draw(2, 3, 32, 32)
    teacher = FrozenTeacher(network)
    teacher.check(32, 8)
    found = teacher.tokens(crops, 4)
    with torch.no_grad():
        seen = network(crops)
    assert found.patches.shape == (2, 16, 16)
    assert torch.equal(found.cls, seen.cls)
    assert torch.equal(found.patches, resample_patches(seen.patches, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_heads_give_the_logits_of_the_asked_patches(tied):
    network, crops = vit(), draw(3, 3, 32, 32)
    dino, ibot = head(), None if tied else head(prototypes=30, seed=1)
    teacher = FrozenTeacher(network, dino_head=dino, ibot_head=ibot)
    tokens, indices = teacher.tokens(crops, 4), torch.tensor([0, 47, 17, 17])
    class_logits, patch_logits = teacher.logits(tokens, indices)
    with torch.no_grad():
        seen = network(crops)
        assert torch.equal(class_logits, dino(seen.cls))
        chosen = torch.stack([seen.patches[i // 16, i % 16] for i in indices.tolist()])
        assert torch.equal(patch_logits, (dino if tied else ibot)(chosen))
    assert teacher.tied is tied and teacher.patch_head is (dino if tied else ibot)
    assert not class_logits.requires_grad and not patch_logits.requires_grad


def test_without_heads_there_are_no_logits():
    teacher = FrozenTeacher(vit())
    assert teacher.patch_head is None and not teacher.tied
    with pytest.raises(ValueError, match="no heads"):
        teacher.logits(teacher.tokens(draw(1, 3, 32, 32), 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="without a DINO head"):
        FrozenTeacher(vit(), ibot_head=head())


def test_it_never_trains():
    network = vit(drop_path=0.9)
    outer = nn.ModuleDict({"teacher": FrozenTeacher(network, dino_head=head())}).train()
    teacher = outer["teacher"]
    assert outer.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    crops = draw(2, 3, 32, 32).requires_grad_()
    tokens = teacher.tokens(crops, 4)
    assert not tokens.cls.requires_grad and not tokens.patches.requires_grad
    assert torch.equal(tokens.cls, teacher.tokens(crops, 4).cls)
    # Only weights are its state: a checkpoint or a shard holds no statistics of images.
    assert set(teacher.state_dict()) == {name for name, _ in teacher.named_parameters()}


def test_autocast_keeps_the_weights():
    teacher, crops = FrozenTeacher(vit()), draw(2, 3, 32, 32)
    exact = teacher.tokens(crops, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.tokens(crops, 4)
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())
    agreement = F.cosine_similarity(exact.patches.flatten(0, 1), rounded.patches.flatten(0, 1).float())
    assert 0.99 < agreement.min() < 1
    assert not torch.equal(exact.patches, rounded.patches)


@pytest.mark.parametrize(("size", "student", "own"), [(32, 8, 8), (32, 4, 8), (32, 16, 8), (56, 14, 8), (56, 7, 28)])
def test_sizes_that_both_patches_divide_are_fine(size, student, own):
    FrozenTeacher(vit(own, size=own)).check(size, student)


@pytest.mark.parametrize(("size", "student", "own"), [(224, 14, 16 * 3), (48, 8, 14), (96, 16, 14), (8, 8, 14)])
def test_grids_that_cannot_be_matched_come_with_sizes_that_can(size, student, own):
    network = vit(own, size=own)
    with pytest.raises(UserError, match=rf"patch size {own} does not divide the {size} pixels it would see") as raised:
        FrozenTeacher(network).check(size, student)
    told = str(raised.value)
    crops, sides = told.split("crops.global_size ")[1].split("teacher.image_size ")
    for crop in numbers(crops):
        FrozenTeacher(network).check(crop, student)
    assert len(numbers(sides)) >= 2
    for side in numbers(sides):
        FrozenTeacher(network, image_size=side).check(size, student)
    assert numbers(sides)[0] // own == size // student  # the first gives the student's own grid


def numbers(text):
    return [int(word) for word in text.replace(",", " ").split() if word.isdigit()]


def test_a_crop_that_the_student_cannot_see_is_refused():
    with pytest.raises(UserError, match=r"crops.global_size 36 is not a multiple of the patch size 8: use 32 or 40"):
        FrozenTeacher(vit(4, size=8)).check(36, 8)
    with pytest.raises(UserError, match="takes images of 1 channels, expected 3"):
        FrozenTeacher(vit(in_chans=1)).check(32, 8)


class Fixed(Encoder):
    """An encoder that takes images of 40 pixels only, though its patch of 8 would divide others."""

    embed_dim, depth, patch_size = 5, 3, 8

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.see(images, []).pooled

    def see(self, images, blocks, norm=True):
        assert norm
        means = F.avg_pool2d(images, 8).flatten(2).mean(1)[..., None] * torch.ones(5)
        return Seen([(means * block, means.mean(1) * block) for block in blocks], means.mean(1))

    def check_image(self, images):
        if images.shape[-1] != 40:
            raise UserError(f"takes 40x40, found {images.shape[-1]}")


def test_any_encoder_with_tokens_teaches():
    crops = draw(2, 3, 40, 40)
    teacher = FrozenTeacher(Fixed())
    teacher.check(40, 8)
    found = teacher.tokens(crops, 5)
    # The last of three blocks, counted from 0.
    torch.testing.assert_close(found.patches[..., 0], 2 * F.avg_pool2d(crops, 8).flatten(2).mean(1))
    torch.testing.assert_close(found.cls, found.patches.mean(1))
    with pytest.raises(UserError, match=r"takes 40x40, found 48; set teacher.image_size"):
        teacher.check(48, 8)
    FrozenTeacher(Fixed(), image_size=40).check(48, 8)


def test_tokens_do_not_depend_on_the_rest_of_the_batch():
    teacher, crops = FrozenTeacher(vit(registers=2)), draw(4, 3, 32, 32)
    together = teacher.tokens(crops, 4)
    alone = [teacher.tokens(crop[None], 4) for crop in crops]
    assert isinstance(together, TeacherTokens)
    for i, one in enumerate(alone):
        np.testing.assert_allclose(one.patches[0], together.patches[i], atol=1e-5)
    assert math.isclose(float(together.cls.std()), float(torch.cat([one.cls for one in alone]).std()), rel_tol=1e-5)

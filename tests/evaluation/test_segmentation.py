"""Labels, head, loss, inference and counts of segmentation, each against a plain definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from dinov2cli.data.bad import BadImages
from dinov2cli.data.source import open_source
from dinov2cli.errors import InputError
from dinov2cli.evaluation.dense.batches import Part
from dinov2cli.evaluation.dense.maps import Seeing
from dinov2cli.evaluation.dense.tokens import Sight, TokenMaps
from dinov2cli.evaluation.segmentation.head import (
    LinearSegmenter,
    constant_answer,
    learning_rate,
    overlaps,
    segment,
    segmentation_loss,
)
from dinov2cli.evaluation.segmentation.labels import IGNORED, Labelling, coloured
from dinov2cli.evaluation.segmentation.masks import masks_of_source
from dinov2cli.evaluation.segmentation.score import score
from dinov2cli.evaluation.statistics import ratio
from dinov2cli.models.encoder import Encoder, Seen
from tests.evaluation.dense_sets import colour_set


class Means(Encoder):
    """Mean colour of every patch of 4 pixels."""

    embed_dim, depth, patch_size = 3, 1, 4

    def see(self, images, blocks, norm=True):
        means = F.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return Seen([(means, means.mean(1)) for _ in blocks], means.mean(1))

    def forward(self, images):
        return self.see(images, []).pooled


def seeing_of(sight=None):
    return Seeing(Means(), lambda pixels: pixels.float() / 255, sight or Sight(None, 16, 12), (0,), torch.device("cpu"))


def head_of(channels=3, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = LinearSegmenter(channels, classes, generator=generator)
    nn.init.normal_(head.classifier.weight, generator=generator)
    nn.init.normal_(head.classifier.bias, generator=generator)
    head.norm.running_mean.uniform_(0.3, 0.6, generator=generator)
    head.norm.running_var.uniform_(0.05, 0.1, generator=generator)
    return head


def picture(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


# --- Labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "float32"])
def test_labels_as_they_are(dtype):
    stored = np.array([[0, 1, 7], [255, 39, 3]]).astype(dtype)
    wanted = [[0, 1, 7], [IGNORED, IGNORED, 3]]
    assert Labelling(ignore=(39, 255), classes=8).read(stored, "x").tolist() == wanted
    assert Labelling(ignore=(39, 255)).read(stored, "x").tolist() == wanted


def test_zero_label_of_ade20k():
    stored = np.array([[0, 1, 150, 255]], np.uint8)
    found = Labelling(reduce_zero_label=True, classes=150).read(stored, "x")
    assert found.tolist() == [[IGNORED, 0, 149, IGNORED]]
    with pytest.raises(InputError, match=r"x: its mask holds 151, expected 1 to 150 of the 150 classes"):
        Labelling(reduce_zero_label=True, classes=150).read(np.array([[151]], np.uint8), "x")


@pytest.mark.parametrize(
    "stored, text",
    [
        (np.array([[3, 8]], np.uint8), r"a/1: its mask holds 8, expected 0 to 7 .*ignored number \(255\)"),
        (np.array([[-1]], np.int32), "a/1: its mask holds -1, expected 0 to 7"),
        (np.array([[70_000]], np.int32), "a/1: its mask holds 70000, expected 0 to 7"),
        (np.array([[0.5]], np.float32), "a/1: its mask holds fractions or NaN"),
        (np.array([[np.nan]], np.float32), "a/1: its mask holds fractions or NaN"),
        (np.array([[np.inf]], np.float32), "a/1: its mask holds"),
    ],
)
def test_numbers_out_of_range(stored, text):
    with pytest.raises(InputError, match=text):
        Labelling(classes=8).read(stored, "a/1")
    assert Labelling(ignore=(-1,), classes=8).read(np.array([[-1, 2]]), "x").tolist() == [[IGNORED, 2]]


def test_instance_numbers_are_no_classes():
    with pytest.raises(InputError, match=r"holds 26001, .*more would be instances or colours"):
        Labelling().read(np.array([[26001]], np.uint16), "x")


def test_colours_are_fixed_and_ignored_pixels_grey():
    few, many = coloured(np.array([[0, 2, IGNORED]], np.int16)), coloured(np.array([[0, 2, IGNORED, 149]], np.int16))
    assert np.array_equal(few[0], many[0, :3]) and few.dtype == np.uint8
    assert few[0, 2].tolist() == [128, 128, 128]
    all_of_them = coloured(np.arange(150, dtype=np.int16)[None])[0]
    assert len({tuple(colour) for colour in all_of_them.tolist()}) == 150
    assert coloured(np.full((1, 2), IGNORED, np.int16)).tolist() == [[[128] * 3] * 2]


# --- Head and loss ------------------------------------------------------------------------------------------------


def test_the_head_is_a_batch_norm_and_a_one_by_one_convolution():
    head = head_of(8).train()
    norm, convolution = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    convolution.load_state_dict(
        {"weight": head.classifier.weight[:, :, None, None], "bias": head.classifier.bias}, strict=True
    )
    norm.load_state_dict(head.norm.state_dict())
    maps = torch.randn(3, 8, 5, 6)
    assert torch.allclose(head(maps), convolution(norm(maps)), atol=1e-5)
    assert torch.allclose(head.norm.running_var, norm.running_var)
    assert torch.allclose(head.eval()(maps), convolution(norm.eval()(maps)), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 3])
def test_loss_over_labelled_pixels_of_parts_of_several_sizes(stride):
    head, seeing = head_of().train(), seeing_of()
    random = torch.Generator().manual_seed(0)
    parts = []
    for count, height, width in ((2, 16, 16), (1, 10, 14)):
        tokens = torch.randn(count, 3, -(-height // 4), -(-width // 4), generator=random)
        targets = torch.randint(-1, 4, (count, height, width), generator=random).to(torch.int16)
        parts.append(Part(targets, TokenMaps(tokens, tokens.mean((2, 3)))))
    total, count = segmentation_loss(head, parts, seeing, stride=stride)
    flat = torch.cat([part.tokens.maps.movedim(1, -1).flatten(0, 2) for part in parts])
    mean, variance = flat.mean(0)[:, None, None], flat.var(0, unbiased=False)[:, None, None]
    wanted, number = 0.0, 0
    for part, (top, left) in zip(parts, ((0, 0), (1, 1)), strict=True):
        normed = (part.tokens.maps - mean) / (variance + 1e-5).sqrt()
        logits = F.conv2d(normed, head.classifier.weight[:, :, None, None], head.classifier.bias)
        full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        height, width = part.targets.shape[1:]
        full = full[..., top : top + height, left : left + width].log_softmax(1)
        for example in range(len(full)):
            for row in range(stride // 2, height, stride):
                for column in range(stride // 2, width, stride):
                    label = int(part.targets[example, row, column])
                    if label >= 0:
                        wanted, number = wanted - float(full[example, label, row, column].detach()), number + 1
    assert int(count) == number and float(total.detach()) == pytest.approx(wanted, rel=1e-4)


def test_a_rank_without_an_example_can_still_go_backward():
    head = head_of().eval()  # as on a rank of a launch, where the norm gets its moments from the others
    total, count = segmentation_loss(head, [], seeing_of(), stride=1)
    total.backward()
    assert float(total.detach()) == 0 == int(count) and head.classifier.weight.grad is not None


def test_learning_rate_rises_and_falls():
    rates = np.array([learning_rate(step, 40_000) for step in range(40_000)])
    assert rates[0] == pytest.approx(1e-6) and rates.argmax() == 1500 and rates[-1] == pytest.approx(1 / 40_000)
    assert rates[1500] == pytest.approx(1 - 1500 / 40_000) and rates[20_000] == pytest.approx(0.5)


# --- Inference ----------------------------------------------------------------------------------------------------


def logits_of(head, image, height, width):
    """Logits of one window by definition, [K, H, W]."""
    top, left = (-height % 4) // 2, (-width % 4) // 2
    padded = F.pad(image.float() / 255, (left, -width % 4 - left, top, -height % 4 - top))
    means = F.avg_pool2d(padded[None], 4)
    norm = (means - head.norm.running_mean[:, None, None]) / (head.norm.running_var[:, None, None] + 1e-5).sqrt()
    logits = F.conv2d(norm, head.classifier.weight[:, :, None, None], head.classifier.bias)
    full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    return full[0, :, top : top + height, left : left + width].detach()


def test_a_single_window_is_the_definition():
    head, image = head_of(classes=20).eval(), picture(14, 15)
    (found,) = segment(head, seeing_of(), [image])
    wanted = logits_of(head, image, 14, 15).argmax(0)
    assert found.shape == (14, 15) and found.dtype == np.int16
    assert (found == wanted.numpy()).all()


def test_windows_are_averaged_and_brought_to_the_size_of_the_image():
    head, image = head_of().eval(), picture(20, 30)
    seeing = seeing_of(Sight(30, 16, 10))
    (found,) = segment(head, seeing, [image])
    resized = seeing.sight.resized(image)
    assert resized.shape == (3, 30, 45)
    total, count = torch.zeros(4, 30, 45), torch.zeros(30, 45)
    for window in seeing.sight.windows(30, 45):
        window.of(total).add_(logits_of(head, window.of(resized), 16, 16))
        window.of(count).add_(1)
    wanted = F.interpolate((total / count)[None], (20, 30), mode="bilinear", align_corners=False)[0].argmax(0)
    assert (found == wanted.numpy()).mean() > 0.999


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    head, image = head_of().eval(), picture(20, 28)
    seeing = seeing_of(Sight(None, 64, 42))
    (found,) = segment(head, seeing, [image], scales=(1.0, 1.5), mirror=True)
    total = torch.zeros(4, 20, 28)
    for scale in (1.0, 1.5):
        resized = Sight(None, 64, 42, scale=scale).resized(image)
        for turned in (False, True):
            seen = resized.flip(2) if turned else resized
            logits = logits_of(head, seen, *seen.shape[1:])
            logits = F.interpolate(logits[None], (20, 28), mode="bilinear", align_corners=False)[0]
            total += (logits.flip(2) if turned else logits).softmax(0)
    assert (found == total.argmax(0).numpy()).mean() > 0.999
    # A picture that is its own mirror image gets an answer that is its own too.
    both = torch.cat([image, image.flip(2)], dim=2)
    (twice,) = segment(head, seeing, [both], mirror=True)
    assert (twice == twice[:, ::-1]).mean() > 0.99


def test_several_images_at_once_are_as_one_by_one():
    head, images = head_of().eval(), [picture(20, 30, 1), picture(16, 16, 2), picture(20, 30, 3)]
    together = segment(head, seeing_of(), images)
    for image, found in zip(images, together, strict=True):
        assert np.array_equal(found, segment(head, seeing_of(), [image])[0])


# --- Counts -------------------------------------------------------------------------------------------------------


def test_figures_against_scikit_learn():
    random = np.random.default_rng(0)
    truths = [random.integers(-1, 5, (9, 11)).astype(np.int16) for _ in range(7)]
    answers = [np.where(random.random((9, 11)) < 0.5, t.clip(0), random.integers(0, 6, (9, 11))) for t in truths]
    counts = overlaps(truths, [answer.astype(np.int16) for answer in answers], 8)  # classes 6 and 7 are nowhere
    truth, answer = np.concatenate([t.ravel() for t in truths]), np.concatenate([a.ravel() for a in answers])
    truth, answer = truth[truth >= 0], answer[truth >= 0]
    wanted = jaccard_score(truth, answer, average=None, labels=range(6))
    assert np.allclose(counts.class_ious()[:6], wanted) and np.isnan(counts.class_ious()[6:]).all()
    assert ratio(counts.both, counts.unions).value() == pytest.approx(wanted.mean())
    matrix = confusion_matrix(truth, answer, labels=range(8))
    assert np.array_equal(counts.truth.sum(0), matrix.sum(1)) and np.array_equal(counts.predicted.sum(0), matrix.sum(0))
    assert np.array_equal(counts.both.sum(0), matrix.diagonal())
    first = truths[0] >= 0
    own = jaccard_score(truths[0][first], answers[0][first], average="macro")
    assert counts.image_ious()[0] == pytest.approx(own)
    assert counts.image_accuracies()[0] == pytest.approx((truths[0] == answers[0])[first].mean())


def test_an_image_of_ignored_pixels_counts_for_nothing():
    nothing = np.full((4, 4), IGNORED, np.int16)
    counts = overlaps([nothing], [np.zeros((4, 4), np.int16)], 3)
    assert not counts.unions.any() and np.isnan(counts.image_ious()).all() and np.isnan(counts.image_accuracies()).all()


def test_the_floor_takes_everything_for_one_class():
    truths = [np.array([[0, 1, 1, IGNORED]], np.int16), np.array([[2, 2, 1, 1]], np.int16)]
    wanted = overlaps(truths, [np.ones((1, 4), np.int16)] * 2, 3)
    found = constant_answer(wanted.truth, 1)
    assert np.array_equal(found.both, wanted.both) and np.array_equal(found.unions, wanted.unions)


# --- Sets ---------------------------------------------------------------------------------------------------------


def surveyed(data, labelling=None):
    from dinov2cli.distributed import ALONE

    return masks_of_source(
        open_source(data), labelling or Labelling(), bad=BadImages(), workers=0, resize_target=False, ranks=ALONE
    )


def test_masks_are_counted(tmp_path):
    data = colour_set(tmp_path / "x.parquet", 5, classes=4)
    found = surveyed(data)
    assert found.rows.tolist() == list(range(5)) and found.pixels.sum() == 5 * 24 * 32 and len(found.pixels) == 4


def test_sets_that_cannot_be_learnt_from(tmp_path):
    with pytest.raises(InputError, match="its masks hold only class 0; expected two classes or more"):
        surveyed(colour_set(tmp_path / "a.parquet", 3, changed=lambda mask, _: mask * 0))
    with pytest.raises(InputError, match="its masks hold no class: every pixel is ignored"):
        surveyed(colour_set(tmp_path / "b.parquet", 3, changed=lambda mask, _: mask * 0 + 255))
    head, source = head_of().eval(), open_source(f"{tmp_path / 'b.parquet'}?mask=mask")
    with pytest.raises(InputError, match=r"b\.parquet\?mask=mask: every pixel of its masks is ignored"):
        score(head, seeing_of(), source, Labelling(classes=4), bad=BadImages())

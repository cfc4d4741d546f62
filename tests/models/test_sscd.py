"""SSCD from every kind of file, against transformers' ResNet and the equations in float64."""

import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.load import load_model
from dinov2cli.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2cli.models.resnet import ResNet
from dinov2cli.models.sscd import SSCD, gem, sscd_architecture, sscd_state

SIZE = 64


def randomised(trunk, seed=0):
    """Weights with statistics of their own in every batch norm, so that none of the four numbers is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trunk.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.ndim == 4:
                tensor.copy_((noise - 0.5) * (6 / tensor[0].numel()) ** 0.5 * 2)
            else:
                tensor.copy_(0.5 + noise if name.endswith("weight") and tensor.ndim == 1 else (noise - 0.5) / 5)
    return trunk.eval()


@pytest.fixture(scope="module")
def trunk():
    return randomised(ResNet())


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(trunk, images):
    """Vectors in float64: transformers' trunk, then the equations."""
    features = reference(trunk).double()(images.double()).last_hidden_state.detach().numpy()
    pooled = np.cbrt((np.maximum(features, 1e-6) ** 3).mean(axis=(2, 3)))
    vectors = pooled @ trunk.fc.weight.detach().double().numpy().T + trunk.fc.bias.detach().double().numpy()
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def reference(trunk):
    """transformers' ResNet-50 with the weights of ours; its stride lies on the 3x3 convolution too."""
    model = ResNetModel(ResNetConfig(downsample_in_bottleneck=False)).eval()
    layers = {"conv1": "layer.0.convolution", "bn1": "layer.0.normalization", "conv2": "layer.1.convolution"}
    layers |= {"bn2": "layer.1.normalization", "conv3": "layer.2.convolution", "bn3": "layer.2.normalization"}
    layers |= {"downsample.0": "shortcut.convolution", "downsample.1": "shortcut.normalization"}
    state = {}
    for name, value in trunk.state_dict().items():
        match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)\.(\w+)", name)
        if match:
            stage, block, layer, last = match.groups()
            state[f"encoder.stages.{int(stage) - 1}.layers.{block}.{layers[layer]}.{last}"] = value
        elif not name.startswith("fc."):
            module, last = name.split(".")
            state[f"embedder.embedder.{'convolution' if module == 'conv1' else 'normalization'}.{last}"] = value
    model.load_state_dict(state)
    return model


def torchvision_names(trunk):
    return {f"backbone.{name}": value for name, value in trunk.state_dict().items()}


def classy_names(trunk, block="block{0}-{1}"):
    """The names of the `.classy.pt` files."""
    inner = {"conv1": "convolutional_block.0", "bn1": "convolutional_block.1", "conv2": "convolutional_block.3"}
    inner |= {"bn2": "convolutional_block.4", "conv3": "convolutional_block.6", "bn3": "bn"}
    state = {}
    for name, value in trunk.state_dict().items():
        match = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.+)", name)
        if match:
            stage, number = int(match[1]) - 1, match[2]
            place = f"backbone.blocks.{stage}.{block.format(stage, number)}.{inner.get(match[3], match[3])}.{match[4]}"
        elif name.startswith("fc."):
            place = f"embeddings.1.{name[3:]}"
        else:
            place = name.replace("conv1.", "backbone.initial_block._module.0.")
            place = place.replace("bn1.", "backbone.initial_block._module.1.")
        state[place] = value
    return state


def vectors_of(file, images, **options):
    loaded = load_model(f"sscd:{file}", img_size=SIZE, **options)
    with torch.inference_mode():
        return loaded.network(images)


def refusal(spec, error=InputError, **options):
    with pytest.raises(error) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_trunk_is_that_of_transformers(trunk, images):
    with torch.inference_mode():
        ours, theirs = trunk(images), reference(trunk)(images).last_hidden_state
    assert ours.shape == (3, 2048, SIZE // 32, SIZE // 32)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_generalised_mean_is_its_equation():
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    by_hand = [[np.mean([max(x, 1e-6) ** 3 for x in plane.ravel()]) ** (1 / 3) for plane in im] for im in features]
    np.testing.assert_allclose(gem(features), by_hand, rtol=1e-6)
    huge = torch.full((1, 1, 2, 2), 100.0, dtype=torch.float16)  # its cube is beyond half precision
    np.testing.assert_allclose(gem(huge), [[100.0]], rtol=1e-6)


def test_grouped_convolutions_are_dense_ones_with_zeros_between_the_groups():
    grouped = randomised(ResNet((1, 1, 1, 1), groups=32, group_width=4, dim=8))
    dense = ResNet((1, 1, 1, 1), group_width=128, dim=8).eval()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("conv2.weight")]:
        state[name] = torch.stack([_spread(row, number, 32) for number, row in enumerate(state[name])])
    dense.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(grouped(images), dense(images), rtol=1e-4, atol=1e-4)


def _spread(row, number, groups):
    """One output channel of a grouped convolution [w, 3, 3] among the inputs of all groups."""
    width = len(row)
    full = torch.zeros(groups * width, 3, 3)
    first = number // width * width
    full[first : first + width] = row
    return full


def test_every_kind_of_file_gives_the_vectors_of_the_equations(trunk, images, expected, tmp_path):
    plain = torchvision_names(trunk)
    torch.save(plain, tmp_path / "a.torchvision.pt")
    torch.save(dict(trunk.state_dict()), tmp_path / "bare.pth")
    torch.save({"state_dict": {f"model.{k}": v for k, v in plain.items()}, "epoch": 3}, tmp_path / "lightning.pt")
    torch.save({"model_state_dict": plain}, tmp_path / "wrapped.pth")
    torch.save(classy_names(trunk), tmp_path / "a.classy.pt")
    torch.save({"model": classy_names(trunk, "{1}")}, tmp_path / "old.classy.pt")
    save_file(plain, tmp_path / "a.safetensors")
    save_file({k: v for k, v in plain.items() if not k.endswith("_tracked")}, tmp_path / "few.safetensors")
    scripted(SSCD(trunk, SIZE)).save(tmp_path / "a.torchscript.pt")
    for file in sorted(tmp_path.iterdir()):
        found = vectors_of(file, images)
        assert (found.shape, found.dtype) == ((3, 512), torch.float32), file.name
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6, msg=file.name)


def scripted(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(network.eval(), torch.zeros(2, 3, SIZE, SIZE))


def test_batches_larger_than_a_chunk_and_other_sizes(trunk, tmp_path):
    torch.save(torchvision_names(trunk), tmp_path / "a.pt")
    network = load_model(f"sscd:{tmp_path}/a.pt").network
    images = torch.randn(11, 3, 40, 72)
    with torch.inference_mode():
        together, one = network(images), torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(11))


def test_under_bfloat16_the_vectors_stay_close_and_of_unit_length(trunk, images, expected, tmp_path):
    torch.save(torchvision_names(trunk), tmp_path / "a.pt")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vectors_of(tmp_path / "a.pt", images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    assert (found.double() * expected).sum(dim=1).min() > 0.99


def test_what_the_model_says_of_itself(trunk, tmp_path):
    torch.save(torchvision_names(trunk), tmp_path / "sscd_disc_mixup.torchvision.pt")
    spec = f"sscd:{tmp_path}/sscd_disc_mixup.torchvision.pt"
    loaded = load_model(spec)
    assert (loaded.name, loaded.random, loaded.copy_detection) == ("sscd_disc_mixup", False, True)
    assert (loaded.network.embed_dim, loaded.network.size, loaded.network.training) == (512, 320, False)
    assert loaded.preprocess == Preprocess(320, 320, IMAGENET_MEAN, IMAGENET_STD, "bilinear", square=True)
    assert set(loaded.fingerprint) == {"file", "sha256", "size"}
    assert load_model(f"{spec}?size=288").preprocess.crop == 288
    assert load_model(f"{spec}?size=288").fingerprint["size"] == 288
    assert load_model(spec, img_size=256).network.size == 256
    assert load_model("tiny", device="meta").copy_detection is False
    with pytest.raises(UserError, match=r"sscd_disc_mixup gives one vector per image and has no tokens; expected a"):
        _ = loaded.backbone


def test_the_large_model_is_told_by_its_shapes():
    with torch.device("meta"):
        large = ResNet((3, 4, 23, 3), groups=32, group_width=4, dim=1024)
    state = sscd_state(classy_names(large), "x")
    assert set(state) == {name for name in large.state_dict() if not name.endswith("_tracked")}
    expected = {"depths": [3, 4, 23, 3], "groups": 32, "group_width": 4, "dim": 1024}
    assert sscd_architecture(state, "x") == expected


def test_refusals(trunk, tmp_path):
    file = tmp_path / "a.pt"
    spec = f"sscd:{file}"
    assert refusal(spec) == f"model '{spec}': found nothing at {file}; expected a file"
    assert refusal(f"sscd:{tmp_path}") == f"model 'sscd:{tmp_path}': found a directory at {tmp_path}; expected a file"
    assert refusal("sscd:", UserError) == "model 'sscd:' names no file; expected sscd:FILE"
    file.write_bytes(b"not weights at all")
    assert refusal(spec).startswith(f"{file} ")

    def refused(state):
        torch.save(state, file)
        return refusal(spec)

    state = torchvision_names(trunk)
    assert refused({"layer.weight": torch.zeros(2), "epoch": 3}) == (
        f"{file}: no SSCD model among 1 weights (layer.weight); expected a ResNet trunk (backbone.conv1.weight of "
        "shape [64, 3, 7, 7], ...) and backbone.fc: fetch NAME.torchvision.pt of SSCD"
    )
    assert refused({k: v for k, v in state.items() if ".fc." not in k}) == (
        f"{file} holds a ResNet without the linear layer of a descriptor; expected backbone.fc.weight or "
        "embeddings.1.weight of shape [D, 2048]"
    )
    assert refused({k: v for k, v in state.items() if ".conv3." not in k and "layer4" not in k}) == (
        f"{file} holds a trunk with blocks [0, 0, 0, 0] of three convolutions in its four stages; expected those of a "
        "ResNet-50 (3, 4, 6, 3) or ResNeXt-101 (3, 4, 23, 3)"
    )
    assert refused({k: v for k, v in state.items() if "layer2.1.bn" not in k} | {"backbone.odd": torch.zeros(1)}) == (
        f"{file} does not fit this model of 320 weights; 12 missing: layer2.1.bn1.weight, layer2.1.bn1.bias, "
        "layer2.1.bn1.running_mean and 9 more; 1 unexpected: odd"
    )
    assert refused(state | {"backbone.fc.weight": torch.zeros(512, 1024)}) == (
        f"{file} does not fit this model of 320 weights; 1 of another shape: fc.weight [512, 1024] instead of "
        "[512, 2048]"
    )
    assert refused(state | {"backbone.fc.bias": torch.full((512,), torch.nan)}) == (
        f"{file} holds weights that are NaN or infinite; expected finite ones: fetch it again"
    )
    for option in ("size=big", "size=8", "square=1", "size", ""):
        assert refusal(f"{spec}?{option}", UserError) == (
            f"model '{spec}?{option}': found {option!r} after the question mark; expected size=PIXELS, 32 or more"
        )
    message = refusal(f"{spec}?size=288", UserError, img_size=320)
    assert message == f"model '{spec}?size=288': found --image-size 320 beside ?size=288; give only one"
    assert refusal(spec, UserError, img_size=16) == "image size 16 is too small for a descriptor: use at least 32"


class _Map(torch.nn.Module):
    def forward(self, x):
        return x * 2


class _Nan(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3)) / 0


def test_torchscript_files_that_are_no_descriptor(tmp_path):
    file = tmp_path / "a.torchscript.pt"
    spec = f"sscd:{file}?size=64"
    scripted(_Map()).save(file)
    assert refusal(spec) == (f"{file}: 2 images gave shape [2, 3, 64, 64]; expected one vector per image, [2, D]")
    scripted(_Nan()).save(file)
    assert refusal(spec) == (f"{file}: the network gives NaN or infinite vectors; expected finite ones: fetch it again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(5, 4)).save(file)
    assert refusal(spec).startswith(f"{file} does not take images [2, 3, 64, 64] (")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert refusal(spec).startswith(f"{file} ")


def test_a_question_mark_may_be_part_of_the_name(trunk, tmp_path):
    torch.save(torchvision_names(trunk), tmp_path / "a?size=288")
    assert load_model(f"sscd:{tmp_path}/a?size=288").network.size == 320


def test_features_are_normalised(trunk, images, tmp_path):
    torch.save(torchvision_names(trunk), tmp_path / "a.pt")
    found = vectors_of(tmp_path / "a.pt", images)
    torch.testing.assert_close(F.normalize(found), found)

"""SSCD, the copy-detection descriptor of Pizzi et al. 2022 (arXiv 2202.10261), from the files of its release.

ResNet-50 (or ResNeXt-101 32x4d), generalised-mean pooling with p = 3, a linear layer to 512 (1024) numbers, L2
normalisation. Opens `NAME.torchvision.pt`, `NAME.classy.pt`, the same as safetensors, and `NAME.torchscript.pt`. The
last is a program that runs when it is loaded: open only what you trust. Weights files run nothing.
"""

import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.errors import InputError
from dinov2cli.models.descriptors import Descriptor, check_vectors
from dinov2cli.models.files import read_pth, read_safetensors
from dinov2cli.models.resnet import STEM, ResNet
from dinov2cli.models.weights import StateDict, load_strict

GEM_POWER = 3.0
GEM_FLOOR = 1e-6
_CPU_CHUNK = 8  # images at a time on a CPU: as fast as more, and 8 times less memory than a batch of 64

_STEMS = ("conv1.weight", "initial_block._module.0.weight")
_INNER: dict[int, str] = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3"}
# Classy Vision names its blocks "block0-0" from 0; before that it numbered them.
_CLASSY: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"^initial_block\._module\.0\."), "conv1."),
    (re.compile(r"^initial_block\._module\.1\."), "bn1."),
    (re.compile(r"^blocks\.(\d+)\.(?:block\d+-)?(\d+)\."), lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
    (re.compile(r"^(layer\d+\.\d+)\.bn\."), r"\1.bn3."),
    (re.compile(r"\.convolutional_block\.(\d+)\."), lambda m: f".{_INNER.get(int(m[1]), m[0])}."),
)


def gem(features: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised-mean pooling (Radenovic et al. 2018, eq. 3): [B, C, h, w] -> (mean of x^p)^(1/p), float32 [B, C]."""
    # In float32 whatever the trunk computes in: cubes overflow half precision.
    return features.float().clamp(min=GEM_FLOOR).pow(power).mean(dim=(2, 3)).pow(1 / power)


class SSCD(Descriptor):
    """The descriptor around a trunk; images [B, 3, S, S], ImageNet-normalised -> unit vectors [B, D] in float32."""

    def __init__(self, trunk: ResNet, size: int) -> None:
        super().__init__(trunk.fc.out_features, size)
        self.backbone = trunk

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        images = images.contiguous(memory_format=torch.channels_last)
        chunks = images.split(_CPU_CHUNK) if images.device.type == "cpu" else (images,)
        return torch.cat([self._described(chunk) for chunk in chunks])

    def _described(self, images: Tensor) -> Tensor:
        pooled = gem(self.backbone(images))
        # The last layer costs nothing and decides the third digit of a similarity: float32 under autocast too.
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.backbone.fc(pooled), dim=1)

    def optimised(self) -> "SSCD":
        """Fold the batch norms and lay out channels last, in place: the same vectors, about three times faster."""
        self.eval().backbone.fold()
        for weight in self.requires_grad_(False).parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return self


class ScriptedDescriptor(Descriptor):
    """A TorchScript file; its output is normalised again, which changes nothing for SSCD's own."""

    def __init__(self, path: Path, size: int) -> None:
        script = _load_script(path)
        super().__init__(_probe(script, path, size), size)
        self._path, self.script = path, script

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, D] in float32."""
        chunks = images.split(_CPU_CHUNK) if images.device.type == "cpu" else (images,)
        found = [check_vectors(self.script(chunk), len(chunk), self._path).float() for chunk in chunks]
        return F.normalize(torch.cat(found), dim=1)


def open_sscd(path: Path, *, size: int) -> Descriptor:
    """Open a file of SSCD for squares of `size` pixels, in eval mode.

    What the file is is read off its contents. Raises InputError for a file that is neither TorchScript nor weights, and
    for weights that are not those of an SSCD, with the count and the first names of what does not fit.
    """
    if is_torchscript(path):
        return ScriptedDescriptor(path, size).eval()
    checkpoint = _read(path)
    state = sscd_state(checkpoint, str(path))
    arguments = sscd_architecture(state, str(path))
    with torch.device("meta"):
        network = SSCD(ResNet(**arguments), size)
    network.to_empty(device="cpu")
    counters = {key: value for key, value in network.backbone.state_dict().items() if key.endswith("_tracked")}
    load_strict(network.backbone, {**counters, **state}, str(path))
    if not all(torch.isfinite(weight).all() for weight in network.state_dict().values()):
        raise InputError(f"{path} holds weights that are NaN or infinite; expected finite ones: fetch it again")
    return network.optimised()


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return read_pth(path)
    except (LookupError, AttributeError, TypeError, AssertionError, struct.error) as error:
        # What torch's reader does with bytes that only happen to begin as a pickle.
        raise InputError(
            f"{path} is neither TorchScript nor a weights file ({type(error).__name__}): fetch it again"
        ) from None


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with code in it. Nothing of it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def sscd_state(checkpoint: Mapping[str, Any], source: str) -> StateDict:
    """Weights of an SSCD file under the names of `ResNet`.

    Takes torchvision's names (`backbone.conv1.weight` .. `backbone.fc.weight`) and Classy Vision's
    (`backbone.initial_block._module.0.weight` .., `embeddings.1.weight`), without or behind any prefix, and inside
    `model_state_dict`, `state_dict` or `model`. Counters of batches are left out; other names stay as they are.
    Raises InputError where there is no trunk of that kind.
    """
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            return sscd_state(checkpoint[wrapper], source)
    weights = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    prefix = _prefix(weights, source)
    root = prefix.removesuffix("backbone.")
    last = re.compile(re.escape(root) + r"embeddings\.(?:\d+\.)?(weight|bias)")
    state: StateDict = {}
    for key, value in weights.items():
        match = last.fullmatch(key)
        name = f"fc.{match[1]}" if match else key.removeprefix(prefix)
        for pattern, new in _CLASSY:
            name = pattern.sub(new, name)
        if not name.endswith("num_batches_tracked"):
            state[name] = value
    return state


def _prefix(weights: Mapping[str, Tensor], source: str) -> str:
    """What stands before the trunk's names, found by its first convolution."""
    for key, value in weights.items():
        for stem in _STEMS:
            before = key.removesuffix(stem)
            if key.endswith(stem) and (not before or before.endswith(".")) and value.shape == (STEM, 3, 7, 7):
                return before
    names = ", ".join(list(weights)[:3]) or "none"
    raise InputError(
        f"{source}: no SSCD model among {len(weights)} weights ({names}); expected a ResNet trunk "
        f"(backbone.conv1.weight of shape [{STEM}, 3, 7, 7], ...) and backbone.fc: fetch NAME.torchvision.pt of SSCD"
    )


def sscd_architecture(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of `ResNet`, read off the names and shapes that `sscd_state` gives. Raises InputError."""
    found = [re.match(r"layer(\d+)\.(\d+)\.conv3\.", key) for key in state]
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    depths = [sum(stage == number for stage, _ in blocks) for number in range(1, 5)]
    inner, last = state.get("layer1.0.conv2.weight"), state.get("fc.weight")
    if inner is None or inner.ndim != 4 or 0 in depths:
        raise InputError(
            f"{source} holds a trunk with blocks {depths} of three convolutions in its four stages; "
            "expected those of a ResNet-50 (3, 4, 6, 3) or ResNeXt-101 (3, 4, 23, 3)"
        )
    if last is None or last.ndim != 2:
        raise InputError(
            f"{source} holds a ResNet without the linear layer of a descriptor; expected backbone.fc.weight or "
            "embeddings.1.weight of shape [D, 2048]"
        )
    width, group_width = inner.shape[:2]
    return {"depths": depths, "groups": width // group_width, "group_width": group_width, "dim": last.shape[0]}


def _load_script(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit: it is what the released files are
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as TorchScript ({reason}): fetch it again") from None


def _probe(script: Any, path: Path, size: int) -> int:
    """The length of the vectors, from two grey images: a program says nothing else about itself."""
    try:
        with torch.inference_mode():
            vectors = script(torch.zeros(2, 3, size, size))
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(
            f"{path} does not take images [2, 3, {size}, {size}] ({reason}); expected a descriptor such as SSCD"
        ) from None
    return check_vectors(vectors, 2, path).shape[1]

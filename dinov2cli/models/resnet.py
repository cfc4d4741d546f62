"""ResNet and ResNeXt with bottleneck blocks (He et al. 2016; Xie et al. 2017), with torchvision's parameter names.

The variant whose 3x3 convolution carries the stride ("v1.5"). Inference only: batch norm uses its stored statistics.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

EXPANSION = 4
STEM = 64


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3 in `groups` groups with the stride, 1x1 to `outputs`; added to the shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3: nn.Module = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return cast(Tensor, self.relu(self.bn3(self.conv3(x)).add_(shortcut)))

    def fold(self) -> None:
        """Work every batch norm into the convolution before it."""
        self.conv1, self.bn1 = _folded(self.conv1, self.bn1), nn.Identity()
        self.conv2, self.bn2 = _folded(self.conv2, self.bn2), nn.Identity()
        self.conv3, self.bn3 = _folded(self.conv3, self.bn3), nn.Identity()
        if self.downsample is not None:
            self.downsample = nn.Sequential(_folded(self.downsample[0], self.downsample[1]))


class ResNet(nn.Module):
    """The trunk up to the last feature map, and the linear layer `fc` that whoever pools applies.

    `depths`: blocks of the four stages, (3, 4, 6, 3) for ResNet-50, (3, 4, 23, 3) for the 101-layer ones. `groups` and
    `group_width`: 1 and 64 for ResNet, 32 and 4 for ResNeXt 32x4d. `dim`: outputs of `fc`.
    """

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), *, groups: int = 1, group_width: int = 64, dim: int = 512):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 7, 2, 3, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = STEM
        for stage, depth in enumerate(depths):
            planes = STEM * 2**stage
            width, outputs = groups * group_width * 2**stage, planes * EXPANSION
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(inputs, width, outputs, stride=stride, groups=groups))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.fc = nn.Linear(inputs, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> feature map [B, C, H / 32, W / 32] (sides rounded up), not negative."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return cast(Tensor, x)

    def fold(self) -> None:
        """Work every batch norm into the convolution before it: the same function of the images, computed faster.

        The model must be in eval mode; its parameters are other ones afterwards.
        """
        self.conv1, self.bn1 = _folded(self.conv1, self.bn1), nn.Identity()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.fold()


def _folded(convolution: nn.Module, norm: nn.Module) -> nn.Conv2d:
    return fuse_conv_bn_eval(cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm))

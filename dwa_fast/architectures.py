"""Networks by name: torchvision's ResNets, with the CIFAR stem on request, and the two small ones that the field uses beside them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dwa_fast.config import check_choice, check_integer


class ConvNet(nn.Module):
    """ConvNet-128 of the distillation literature: blocks of 3×3 convolution, BatchNorm, ReLU, 2×2 mean pooling; one linear layer."""

    def __init__(self, classes: int, channels: int, size: int, width: int = 128) -> None:
        super().__init__()
        depth = max(1, min(3 if size <= 32 else size.bit_length() - 3, size.bit_length() - 1))
        blocks: list[nn.Module] = []
        for index in range(depth):
            blocks += [
                nn.Conv2d(channels if index == 0 else width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, classes]
        """Logits."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class SmallResNet(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels, two of them with a stride-2 skip: for images of 8 to 32 pixels."""

    def __init__(self, classes: int, channels: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        from torchvision.models.resnet import BasicBlock, conv1x1  # here: torchvision loads Triton, which importing dwa_fast must not

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        blocks, before = [], widths[0]
        for width in widths:
            skip = None if width == before else nn.Sequential(conv1x1(before, width, 2), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(before, width, stride=1 if skip is None else 2, downsample=skip))
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, classes]
        """Logits."""
        logits: Tensor = self.fc(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


def _resnet(depth: int, *, cifar_stem: bool) -> Callable[[int, int, int], nn.Module]:
    def make(classes: int, channels: int, size: int) -> nn.Module:
        import torchvision.models

        network: nn.Module = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
        if cifar_stem:  # 3×3 stride 1 and no max-pool, for 32 and 64 pixels
            network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif channels != 3:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        return network

    return make


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    **{f"resnet{depth}": _resnet(depth, cifar_stem=False) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}-cifar": _resnet(depth, cifar_stem=True) for depth in (18, 34, 50, 101)},
    "convnet128": ConvNet,
    "small-resnet": lambda classes, channels, size: SmallResNet(classes, channels),
}


def build(name: str, *, classes: int, channels: int = 3, size: int = 224) -> nn.Module:
    """A network with fresh weights, which take [N, channels, size, size] to [N, classes].

    Raises:
        InputError: no architecture of that name, or a size that it cannot have.
    """
    check_choice("architecture", name, list(ARCHITECTURES))
    check_integer("classes", classes, 1)
    check_integer("channels", channels, 1)
    check_integer("size", size, 1)
    return ARCHITECTURES[name](classes, channels, size)

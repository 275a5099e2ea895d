"""A backbone: any module whose output is a tensor; its width is found by passing one sample through it."""

from torch import Tensor, nn


class SmallBackbone(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

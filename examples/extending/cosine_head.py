"""A head: any module that is made from the numbers of features and of classes, and gives logits (b, C)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineHead(nn.Module):
    def __init__(self, num_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, num_features))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T

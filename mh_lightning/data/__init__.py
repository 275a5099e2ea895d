"""Data: scenarios, data sets as streams of tasks, and what feeds them to the trainer."""

from mh_lightning.data.blurry import BlurryBorders, GaussianSchedule, IBlurry, SiBlurry
from mh_lightning.data.cars196 import Cars196
from mh_lightning.data.cifar import CIFAR10, CIFAR100
from mh_lightning.data.cub200 import CUB200
from mh_lightning.data.digits import Digits
from mh_lightning.data.domain_folder import DomainFolder
from mh_lightning.data.domainnet import DomainNetSketch
from mh_lightning.data.fashion_mnist import FashionMNIST
from mh_lightning.data.image_folder import ImageFolder
from mh_lightning.data.imagenet import ImageNet100, ImageNet1000
from mh_lightning.data.imagenet_r import ImageNetR
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.mini_imagenet import MiniImageNet
from mh_lightning.data.perturbations import GaussianNoise, Occlusion, Perturbation, Unperturbed
from mh_lightning.data.resisc45 import RESISC45
from mh_lightning.data.splits import Splits
from mh_lightning.data.stream import StreamDataModule
from mh_lightning.data.tensors import TensorFile, Tensors
from mh_lightning.data.two_dimensional import Modes, Moons

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CUB200",
    "RESISC45",
    "BlurryBorders",
    "Cars196",
    "Digits",
    "DomainFolder",
    "DomainNetSketch",
    "FashionMNIST",
    "GaussianNoise",
    "GaussianSchedule",
    "IBlurry",
    "ImageFolder",
    "ImageNet100",
    "ImageNet1000",
    "ImageNetR",
    "Labelled",
    "MiniImageNet",
    "Modes",
    "Moons",
    "Occlusion",
    "Perturbation",
    "SiBlurry",
    "Splits",
    "StreamDataModule",
    "TensorFile",
    "Tensors",
    "Unperturbed",
]

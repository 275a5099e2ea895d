"""Data: scenarios, data sets as streams of tasks, and what feeds them to the trainer."""

from mh_lightning.data.digits import Digits
from mh_lightning.data.fashion_mnist import FashionMNIST
from mh_lightning.data.image_folder import ImageFolder
from mh_lightning.data.stream import Splits, StreamDataModule
from mh_lightning.data.tensors import TensorFile, Tensors

__all__ = ["Digits", "FashionMNIST", "ImageFolder", "Splits", "StreamDataModule", "TensorFile", "Tensors"]

"""Images to train on: digits, folders of images, tensors and torch Datasets, all as float32 in [-1, 1]."""

from ddpm_ext.training.data.choice import as_images, load_images
from ddpm_ext.training.data.dataset import DatasetImages
from ddpm_ext.training.data.folder import FolderImages
from ddpm_ext.training.data.sklearn_digits import digits
from ddpm_ext.training.data.source import DamagedImage, ImageSource
from ddpm_ext.training.data.tensor import TensorImages

__all__ = [
    "DamagedImage",
    "DatasetImages",
    "FolderImages",
    "ImageSource",
    "TensorImages",
    "as_images",
    "digits",
    "load_images",
]

"""Training data: digits, shapes, folders of images, tensors and torch Datasets, all in [-1, 1]; and latents."""

from ddpm_ext.training.data.choice import as_images, digits, load_images
from ddpm_ext.training.data.dataset import DatasetImages, TensorImages
from ddpm_ext.training.data.folder import FolderImages
from ddpm_ext.training.data.latents import Latents, read_latents
from ddpm_ext.training.data.shapes import Shapes
from ddpm_ext.training.data.source import DamagedImage, ImageSource, Labels, labels_of

__all__ = [
    "DamagedImage",
    "DatasetImages",
    "FolderImages",
    "ImageSource",
    "Labels",
    "Latents",
    "Shapes",
    "TensorImages",
    "as_images",
    "digits",
    "labels_of",
    "load_images",
    "read_latents",
]

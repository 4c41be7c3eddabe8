"""Whole networks: ours, one file each, and a loader for timm, torchvision and files."""

from convette.models.cifar_resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56, resnet110
from convette.models.loader import MODELS, create_model

__all__ = ["MODELS", "CifarResNet", "create_model", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

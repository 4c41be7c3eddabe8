"""Whole networks: ours, one file each, and a loader for timm, torchvision, the user's own modules and files."""

from convette.models._normalisation import known_preprocessing
from convette.models._weights import load_weights
from convette.models.binary_networks import (
    BinaryNIN,
    BinaryVGG,
    BiRealNet,
    binary_nin,
    binary_vgg11,
    birealnet,
)
from convette.models.cifar_resnet import CifarResNet, resnet8, resnet20, resnet32, resnet44, resnet56, resnet110
from convette.models.loader import CONSTRUCTORS, MODELS, build_from_origin, create_model, load, save
from convette.models.mobilenet_v2 import (
    DeepLabV3MobileNetV2,
    InvertedResidual,
    MobileNetV2,
    SSDLiteMobileNetV2,
    deeplabv3_mobilenet_v2,
    mobilenet_v2,
    ssdlite_mobilenet_v2,
)
from convette.models.poincare_resnet import poincare_resnet
from convette.models.simplenet import (
    SimpleNet,
    simplenet_5m,
    simplenet_9m,
    simplenet_cifar_5m,
    simplenet_cifar_5m_extra_pool,
    simplenet_cifar_310k,
    simplenet_cifar_460k,
)

__all__ = [
    "CONSTRUCTORS",
    "MODELS",
    "BiRealNet",
    "BinaryNIN",
    "BinaryVGG",
    "CifarResNet",
    "DeepLabV3MobileNetV2",
    "InvertedResidual",
    "MobileNetV2",
    "SSDLiteMobileNetV2",
    "SimpleNet",
    "binary_nin",
    "binary_vgg11",
    "birealnet",
    "build_from_origin",
    "create_model",
    "deeplabv3_mobilenet_v2",
    "known_preprocessing",
    "load",
    "load_weights",
    "mobilenet_v2",
    "poincare_resnet",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "save",
    "simplenet_5m",
    "simplenet_9m",
    "simplenet_cifar_5m",
    "simplenet_cifar_5m_extra_pool",
    "simplenet_cifar_310k",
    "simplenet_cifar_460k",
    "ssdlite_mobilenet_v2",
]

"""Residual networks of any widths and depths: what the search ends with. They live with the other networks."""

from convette.models.shaped_resnet import Shape, ShapedBlock, ShapedResNet, shape_macs

__all__ = ["Shape", "ShapedBlock", "ShapedResNet", "shape_macs"]

"""Layers that act in training only and are nothing at inference."""

from convette.layers.regularization.maxdropout import (
    MaxDropout,
    WideResNet,
    drop_mask,
    insert_after_stages,
    max_dropout,
    replace_dropout,
)

__all__ = ["MaxDropout", "WideResNet", "drop_mask", "insert_after_stages", "max_dropout", "replace_dropout"]

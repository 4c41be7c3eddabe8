"""Layers that gate or gather by what they see of the rest of the map."""

from convette.layers.attention.higher_order_operations import HigherOrderBlock, insert_higher_order, local_filter
from convette.layers.attention.light_nonlocal import (
    LightNonLocal2d,
    autonl_s,
    insert_nonlocal,
    nonlocal_macs,
    orders_macs,
)
from convette.layers.attention.soag import SoAG, add_soag
from convette.layers.attention.token_reduction import TokenReduction, insert_token_reduction, match_tokens, merge_tokens

__all__ = [
    "HigherOrderBlock",
    "LightNonLocal2d",
    "SoAG",
    "TokenReduction",
    "add_soag",
    "autonl_s",
    "insert_higher_order",
    "insert_nonlocal",
    "insert_token_reduction",
    "local_filter",
    "match_tokens",
    "merge_tokens",
    "nonlocal_macs",
    "orders_macs",
]

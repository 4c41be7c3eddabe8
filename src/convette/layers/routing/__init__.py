"""Layers that send features along one of several ways."""

from convette.layers.routing.cross_connections import (
    CrossConnection,
    PathMean,
    Paths,
    StaticRouting,
    balance_loss,
    collect_routes,
    freeze_routing,
    multipath,
    route_report,
)

__all__ = [
    "CrossConnection",
    "PathMean",
    "Paths",
    "StaticRouting",
    "balance_loss",
    "collect_routes",
    "freeze_routing",
    "multipath",
    "route_report",
]

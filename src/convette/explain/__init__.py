"""Explanations: where a network looks (Eigen-CAM), what speaks for a class (Grad-CAM), how both move by a change."""

from convette.explain._explanation import Explanation, ExplanationWarning
from convette.explain._overlay import overlay
from convette.explain.drift import Drift, box_of, box_overlap, explanation_drift, rank_correlation
from convette.explain.eigen_cam import EigenCAM, PrincipalMaps, eigen_cam, principal_maps
from convette.explain.grad_cam import GradCAM, grad_cam
from convette.explain.layers import LayerChoice, target_layer

# Name of an explainer (as recipes and the command line spell it) -> where it is.
EXPLAINERS: dict[str, str] = {
    "grad_cam": "convette.explain.grad_cam:GradCAM",
    "eigen_cam": "convette.explain.eigen_cam:EigenCAM",
}

__all__ = [
    "EXPLAINERS",
    "Drift",
    "EigenCAM",
    "Explanation",
    "ExplanationWarning",
    "GradCAM",
    "LayerChoice",
    "PrincipalMaps",
    "box_of",
    "box_overlap",
    "eigen_cam",
    "explanation_drift",
    "grad_cam",
    "overlay",
    "principal_maps",
    "rank_correlation",
    "target_layer",
]

"""Eigen-CAM: the first principal component of the features, no gradient, no class (Bany Muhammad & Yeasin 2020).

It shows what the features attend to, not why a class was chosen: it does not depend on the classifier at all.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images
from convette.errors import UsageError
from convette.explain._explanation import Explanation, ExplanationWarning, enlarge, normalise, similarity
from convette.explain._run import channels_first, run_with_tap
from convette.explain.layers import resolve_layer

Solver = Literal["gram", "power", "svd"]
# The power method stops when the vector stands still: its error then is this small, relative to its length.
_STILL, _MOST_STEPS = 1e-10, 1000
# Subspace iteration: from which side on it pays, products between two looks, looks, and the relative residual to reach.
_SMALL_SIDE, _STEPS, _ROUNDS = 64, 3, 8
_CONVERGED = {torch.float32: 3e-6, torch.float64: 1e-8}


@dataclass(frozen=True)
class PrincipalMaps:
    """The first maps of each image, and their part in the features.

    Attributes:
        maps: signed, the first component first; the length of each is its singular value.
        share: squared singular value over the sum of all, 0 to 1.
        gap: first over second singular value; infinite for features of rank one. Of large maps the second value is
            estimated: a gap near 1 is right, a large one may be given up to a third too large.
    """

    maps: Float[Tensor, "n m i j"]
    share: Float[Tensor, "n m"]
    gap: Float[Tensor, " n"]


class EigenCAM:
    """Class activation map without a class: the features projected on their first principal component.

    ``A = U S V^T``, ``map = A v_1``, with A the layer's output as (positions, channels), not centred; then what is
    positive (or all, where nothing is), scaled to 0..1 in each image and interpolated to its size.

    Args:
        model: any network with maps (n, c, h, w) inside; pruned, folded and quantised ones too. Left exactly as it was.
        layer: name or module; None: the last spatial stage, chosen from a run on the first images.
        center: subtract each channel's mean first (as common libraries do; the paper does not).
        components: how many maps; deeper components separate objects and background.
        solver: see `principal_maps`.

    Cost: one forward, and for n positions and C channels O(n² C + n³) an image with the smaller of both as n.

    Not class evidence: call it "attention of the features". It fails the sanity check of class sensitivity by
    construction.

    Source: Eigen-CAM: Class Activation Map using Principal Components, arXiv 2008.00299.
    """

    method = "eigen_cam"

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        center: bool = False,
        components: int = 1,
        solver: Solver = "gram",
    ) -> None:
        if components < 1:
            raise UsageError(f"Eigen-CAM: {components} components; give at least 1.")
        self.model, self.layer, self.center, self.components = model, layer, center, components
        self.solver: Solver = solver

    def __call__(self, images: Images, class_index: int | Tensor | None = None) -> Float[Tensor, "n *m h w"]:
        """Return the maps of `images`, 0 to 1: (n, h, w), or (n, components, h, w) for more than one component.

        There are no classes here: `class_index` is ignored with a warning.
        """
        return self.explain(images, class_index).maps

    def explain(self, images: Images, class_index: int | Tensor | None = None) -> Explanation:
        """Return the maps with layer, explained share and spectral gap."""
        if class_index is not None:
            warnings.warn("Eigen-CAM knows no classes; class_index is ignored.", ExplanationWarning, stacklevel=3)
        choice = resolve_layer(self.model, self.layer, images)
        with torch.no_grad():
            tap = run_with_tap(self.model, choice.name, images, gradient=False)
            features = channels_first(tap.features, choice.name)
            found = principal_maps(features, center=self.center, components=self.components, solver=self.solver)
            raw = found.maps[:, 0] if self.components == 1 else found.maps
            return Explanation(
                method=self.method,
                layer=choice.name,
                reason=choice.reason,
                maps=enlarge(normalise(_lifted(raw)), (images.shape[2], images.shape[3])),
                raw=raw,
                share=found.share[:, 0] if self.components == 1 else found.share,
                gap=found.gap,
                similarity=similarity(found.maps[:, 0], choice.name),
            )


def _lifted(maps: Tensor) -> Tensor:
    """Lift maps without anything positive (signed features) to start at 0: their order is all they say."""
    return torch.where(maps.amax((-2, -1), keepdim=True) <= 0, maps - maps.amin((-2, -1), keepdim=True), maps)


def eigen_cam(
    model: nn.Module,
    images: Images,
    layer: str | nn.Module | None = None,
    center: bool = False,
    components: int = 1,
) -> Float[Tensor, "n *m h w"]:
    """Return the Eigen-CAM maps of `images`; see `EigenCAM`."""
    return EigenCAM(model, layer, center, components)(images)


def principal_maps(
    features: Float[Tensor, "n c i j"], *, center: bool = False, components: int = 1, solver: Solver = "gram"
) -> PrincipalMaps:
    """Return the first principal maps of feature maps, which may come from anywhere (an exported file too).

    Sign: for features that are not negative and not centred, v_1 is taken not negative, so the map is too. Otherwise
    the sign that makes the map correlate with the mean over channels; where that is nothing (below 1e-6), the one
    whose maximum is larger than its minimum.

    Args:
        features: any float type, scaled by the largest value first; computed in double precision, or in single
            precision for one component of features that are not doubles.
        center: subtract each channel's mean over the positions.
        components: number of maps; those past the rank are 0.
        solver: "gram", the eigenvectors of the smaller Gram matrix (default); "power", the power method on it (one
            component); "svd", a full singular value decomposition, the slow reference.

    Raises:
        UsageError: features that are not finite, an unknown solver, or "power" for several components.
    """
    if not bool(torch.isfinite(features.detach()).all()):
        raise UsageError("Eigen-CAM: the features are not finite.")
    count, _, rows, columns = features.shape
    # Transposed views are cheap; (positions, channels) is the matrix of the equation.
    matrix = features.detach().to(_precision(features, components, solver)).flatten(2).transpose(1, 2)
    scale = matrix.abs().amax((1, 2), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, 1.0)
    nonnegative = matrix.amin((1, 2)) >= 0
    mean = matrix.mean(2)
    if center:
        matrix = matrix - matrix.mean(1, keepdim=True)
        nonnegative = torch.zeros_like(nonnegative)
    top, energies = _solve(matrix, components, solver)
    total = matrix.square().sum((1, 2))
    # `size`: how long the mean over channels would be if the channels agreed.
    size = (total / matrix.shape[2]).sqrt()
    top = _signed(top, mean, nonnegative, size)
    missing = components - top.shape[1]
    if missing > 0:
        top = torch.cat([top, top.new_zeros(count, missing, top.shape[2])], 1)
        energies = torch.cat([energies, energies.new_zeros(count, missing)], 1)
    share = energies[:, :components] / torch.where(total > 0, total, 1.0)[:, None]
    second = energies[:, 1] if energies.shape[1] > 1 else (total - energies[:, 0])
    # A second value below rounding is none.
    second = torch.where(second > 10 * torch.finfo(matrix.dtype).eps * energies[:, 0], second, 0.0)
    gap = torch.where(energies[:, 0] > 0, (energies[:, 0] / second).sqrt(), 1.0)
    maps = (top * scale).reshape(count, components, rows, columns)
    return PrincipalMaps(maps.float(), share.clamp(0, 1).float(), gap.float())


def _precision(features: Tensor, components: int, solver: Solver) -> torch.dtype:
    # The Gram matrix squares the condition number, which only smaller components feel. Apple's GPUs have no doubles.
    single = solver == "gram" and components == 1 and features.dtype != torch.float64
    return torch.float32 if single or features.device.type == "mps" else torch.float64


def _solve(matrix: Tensor, components: int, solver: Solver) -> tuple[Tensor, Tensor]:
    """Return maps ``s_k u_k`` (n, m, positions) and squared singular values (n, at least m and 2 where there are)."""
    positions, channels = matrix.shape[1:]
    if solver == "svd":
        u, s, _ = torch.linalg.svd(matrix, full_matrices=True)
        kept = min(components, positions, channels)
        return (u[:, :, :kept] * s[:, None, :kept]).transpose(1, 2), s.square()
    if solver == "power":
        if components != 1:
            raise UsageError("Eigen-CAM: the power method finds one component; use solver 'gram' for more.")
        return _power(matrix)
    if solver != "gram":
        raise UsageError(f"Eigen-CAM solver {solver!r}: 'gram', 'power' or 'svd'.")
    if positions <= channels:
        values, vectors = _leading(matrix @ matrix.transpose(1, 2), components)
        maps = vectors[:, :, :components] * values[:, None, :components].sqrt()
    else:
        values, vectors = _leading(matrix.transpose(1, 2) @ matrix, components)
        maps = matrix @ vectors[:, :, :components]
    return maps.transpose(1, 2), values


def _leading(gram: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (n, k) and their vectors (n, side, k) of Gram matrices, at least `components`.

    Large ones by subspace iteration: the first component of features stands out, so that a few products with a thin
    matrix find it. Those that do not converge, and small ones, by a whole decomposition.
    """
    side, thin = gram.shape[1], components + 4
    if side <= _SMALL_SIDE or side <= 4 * thin:
        return _all_eigenvalues(gram)
    generator = torch.Generator().manual_seed(0)  # not the user's random state
    start = torch.randn(side, thin, generator=generator, dtype=torch.float64).to(gram)
    basis = gram @ start.expand(len(gram), -1, -1)
    residual = gram.new_full((len(gram),), float("inf"))
    enough = _CONVERGED[gram.dtype]
    values, vectors = gram.new_zeros(len(gram), thin), basis
    for look in range(_ROUNDS):
        for _ in range(_STEPS):
            basis = gram @ basis
        basis, _ = torch.linalg.qr(basis)
        image = gram @ basis
        values, turn = _all_eigenvalues(basis.transpose(1, 2) @ image)
        vectors = basis @ turn
        difference = (image @ turn - vectors * values[:, None])[:, :, :components]
        residual = difference.norm(dim=1).amax(1) / values[:, 0].clamp_min(torch.finfo(gram.dtype).tiny)
        if look and float(residual.max()) < enough:  # the first look knows the second value too roughly
            return values, vectors
        basis = image / values[:, :1, None].clamp_min(torch.finfo(gram.dtype).tiny)
    hard = ~(residual < enough)
    all_values, all_vectors = _all_eigenvalues(gram[hard])
    values[hard], vectors[hard] = all_values[:, :thin], all_vectors[:, :, :thin]
    return values, vectors


def _all_eigenvalues(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues, the largest first, and their vectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(1).clamp_min(0), vectors.flip(2)


def _power(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The first component by the power method on the smaller Gram matrix, from the mean over the longer side."""
    wide = matrix.shape[1] <= matrix.shape[2]
    gram = matrix @ matrix.transpose(1, 2) if wide else matrix.transpose(1, 2) @ matrix
    # Row lengths instead of means: they cannot cancel out.
    vector = gram.diagonal(dim1=1, dim2=2).sqrt()[:, :, None] + gram.sum(2, keepdim=True)
    tiny = torch.finfo(matrix.dtype).tiny
    vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(tiny)
    for _ in range(_MOST_STEPS):
        following = gram @ vector
        following = following / following.norm(dim=1, keepdim=True).clamp_min(tiny)
        moved = (following - vector).norm(dim=1).amax()
        vector = following
        if float(moved) < _STILL:
            break
    value = (vector.transpose(1, 2) @ gram @ vector).squeeze(2).clamp_min(0)
    top = vector * value[:, :, None].sqrt() if wide else matrix @ vector
    return top.transpose(1, 2), value


def _signed(maps: Tensor, mean: Tensor, nonnegative: Tensor, size: Tensor) -> Tensor:
    """Choose the sign of each map (n, m, positions); `mean` is the mean over channels (n, positions)."""
    # For features that are not negative, sum(v_1) has the sign of map . mean, for v_1 = A^T map / s_1².
    overlap = (maps * mean[:, None]).sum(2)
    a, b = maps - maps.mean(2, keepdim=True), (mean - mean.mean(1, keepdim=True))[:, None]
    lengths = (a.norm(dim=2) * b.norm(dim=2)).clamp_min(torch.finfo(maps.dtype).tiny)
    correlation = (a * b).sum(2) / lengths
    # Layer norm makes the mean over channels 0 but for rounding: nothing to correlate with.
    flat = b.norm(dim=2) < 1e-5 * size[:, None]
    peak = maps.amax(2) + maps.amin(2)
    by_correlation = torch.where(flat | (correlation.abs() < 1e-6), peak, correlation)
    first = torch.zeros_like(overlap, dtype=torch.bool)
    first[:, 0] = nonnegative
    sign = torch.where(torch.where(first, overlap, by_correlation) < 0, -1.0, 1.0)
    return maps * sign[:, :, None].to(maps.dtype)

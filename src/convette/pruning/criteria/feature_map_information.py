"""Information of feature maps about what the network says: of units, and of whole layers that can be left out.

After Soltani et al., On the Information of Feature Maps and Pruning of Deep Neural Networks, ICPR 2020, and its sequel
with energy statistics, arXiv 2201.11209. The papers' abstracts give the idea (layers whose maps share little
information with the output go); the estimators are the usual ones of matrix-based information (Giraldo et al., arXiv
1211.2459) and of distance correlation (Szekely et al., arXiv 0803.4101), the decision rule is ours.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import StructureError, UsageError
from convette.layers._watching import hooked
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.pruning.criteria.discriminant_information import pooled_features
from convette.surgery import ChannelGraph

ALPHA = 1.01
_AT_ONCE = 32  # units whose n x n matrices are held together


def feature_map_information(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    measure: Literal["renyi", "energy", "binned"] = "energy",
    target: Literal["output", "label"] = "output",
    pool: int = 4,
    bandwidth: float | int | None = None,
) -> dict[str, Tensor]:
    r"""Score units by how much their feature maps depend on the network's output, as their readers see them.

    .. math:: s_u = \frac1R \sum_r D(T_{r,u}, O)

    T the maps of unit u at reader r, average-pooled to `pool` x `pool`; O the class probabilities, or with
    ``target="label"`` the labels. D is one of

    - ``measure="energy"`` (default): distance correlation, 0..1, without any bandwidth;
    - ``measure="renyi"``: matrix-based mutual information in bits, see `renyi_information` and, for `bandwidth`, `gram`
      (None: the median distance; with a narrow one all Gram matrices of wide maps are nearly diagonal and say nothing);
    - ``measure="binned"``: mutual information (bits) of the unit's mean, in ten quantiles, with the predicted class.

    Returns one score a unit, CPU float32, larger = keep; a unit that never changes scores 0. Raises `UsageError`
    without calibration data, `StructureError` for activations that are not finite. Values depend on the number of
    images: compare only what was scored together. Costs one forward pass and n^2 a unit (renyi: n^3).
    """
    check_values("criterion feature_map_information", feature_map_information, measure=measure, target=target)
    _check_bandwidth(bandwidth)
    batches = batches_of(calibration, "feature_map_information")
    features, labels = pooled_features(model, graph, batches, pool, "feature_map_information")
    if target == "label":
        output = functional.one_hot(labels.long()).double()
    else:
        with scoring(model), torch.no_grad():
            output = torch.cat([_probabilities(run(model, images)) for images, _ in batches])
    scores = {}
    for name, found in features.items():
        each = [_of_units(values.double().transpose(0, 1), output, measure, bandwidth) for values in found]
        scores[name] = torch.stack(each).mean(dim=0)
    return finite_scores(scores, "feature_map_information", graph)


def layer_information(
    model: nn.Module,
    layers: Sequence[str],
    calibration: Iterable[Any] | None,
    *,
    measure: Literal["renyi", "energy", "binned"] = "renyi",
    rule: Literal["value", "gain"] = "value",
    target: Literal["output", "label"] = "output",
    pool: int = 4,
    bandwidth: float | int | None = None,
) -> dict[str, float]:
    r"""Return what each of the blocks called `layers` adds to the information about the network's output.

    With x what a block reads and T = block(x) - x what it adds to that: ``rule="value"`` gives I(T; O), ``rule="gain"``
    the conditional gain I([x, T]; O) - I(x; O). `measure`, `target`, `pool` and `bandwidth` as in
    `feature_map_information` (no gain with "binned"). 0 for a block that changes nothing. Of a layer that reads a list
    of feature maps, as DenseNet's do, x is all of them and T what it gives.

    Raises `UsageError` without calibration data, `StructureError` for a block that changes the shape of what it reads.
    Costs one forward pass and n^2 d (renyi: n^3) a block.
    """
    check_values("layer_information", layer_information, measure=measure, rule=rule, target=target)
    _check_bandwidth(bandwidth)
    if rule == "gain" and measure == "binned":
        raise UsageError("layer_information: rule='gain' needs measure='renyi' or 'energy'.")
    inputs, added, output = pooled_maps(model, layers, batches_of(calibration, "layer_information"), target, pool)
    found = {}
    for name in layers:
        x, t = inputs[name], added[name]
        if not t.any():
            found[name] = 0.0
        elif rule == "value":
            found[name] = float(_of_units(t.unsqueeze(0), output, measure, bandwidth)[0])
        elif measure == "renyi":
            both, out = gram(x, bandwidth) * gram(t, bandwidth), gram(output, bandwidth)
            joint = _information(both / both.trace(), out)
            found[name] = float(joint) - renyi_information(x, output, bandwidth)
        else:
            together = torch.cat([x, t], dim=1)
            found[name] = float(distance_correlation(together, output) - distance_correlation(x, output))
    return found


def _check_bandwidth(bandwidth: float | int | None) -> None:
    if bandwidth is not None and not bandwidth > 0:
        raise UsageError(f"feature_map_information: bandwidth={bandwidth} must be above 0, or None for the median.")


# -- dependence of two samples ------------------------------------------------------------------------------------


def renyi_entropy(gram_matrix: Float[Tensor, "*b n n"], alpha: float = ALPHA) -> Float[Tensor, "*b"]:
    r"""Return :math:`S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \sum_i \lambda_i(A)^\alpha`, bits, of matrices of trace 1.

    0 for a constant sample, :math:`\log_2 n` for n samples that have nothing to do with one another.
    """
    values = torch.linalg.eigvalsh(gram_matrix).clamp_min(0)
    return values.pow(alpha).sum(dim=-1).log2() / (1 - alpha)


def renyi_information(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], bandwidth: float | int | None = None) -> float:
    r"""Return the matrix-based mutual information :math:`S(A) + S(B) - S(A \circ B / \operatorname{tr})`, in bits."""
    return float(_information(gram(x, bandwidth), gram(y, bandwidth)))


def distance_correlation(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> float:
    r"""Return the distance correlation :math:`\sqrt{dCov^2 / \sqrt{dVar_x dVar_y}}`, in 0..1; 0 for a constant.

    dCov^2 is the mean product of the double-centred distance matrices.
    """
    return float(_distance_correlation(_distances(x.double()), _distances(y.double())))


def binned_information(codes: Int64[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Return the plug-in mutual information of two discrete samples, in bits."""
    table = functional.one_hot(codes).double().T @ functional.one_hot(labels).double() / len(codes)
    independent = table.sum(dim=1, keepdim=True) * table.sum(dim=0, keepdim=True)
    seen = table > 0
    return float((table[seen] * (table[seen] / independent[seen]).log2()).sum())


def gram(x: Float[Tensor, "*b n d"], bandwidth: float | int | None = None) -> Float[Tensor, "*b n n"]:
    r"""Return the Gaussian Gram matrix of trace 1.

    Its width is the median distance between two samples, or with a `bandwidth` :math:`\sigma_0` that of n samples in d
    dimensions, :math:`\sigma_0 n^{-1/(4+d)}`, in the unit of x.
    """
    distances = _distances(x.double())
    n = distances.shape[-1]
    if bandwidth is not None:
        return torch.exp(-((distances / (bandwidth * n ** (-1 / (4 + x.shape[-1])))) ** 2) / 2) / n
    above = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
    middle = distances[..., above].median(dim=-1).values if n > 1 else distances.new_ones(distances.shape[:-2])
    # More than half of the distances are 0: the mean still tells the others apart.
    spread = torch.where(middle > 0, middle, distances.mean(dim=(-2, -1))).clamp_min(1e-30)
    return torch.exp(-((distances / spread[..., None, None]) ** 2) / 2) / n


def _information(a: Tensor, b: Tensor) -> Tensor:
    joint = a * b
    joint = joint / joint.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    return (renyi_entropy(a) + renyi_entropy(b) - renyi_entropy(joint)).clamp_min(0)


def _distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _double_centred(distances: Tensor) -> Tensor:
    rows, columns = distances.mean(dim=-1, keepdim=True), distances.mean(dim=-2, keepdim=True)
    return distances - rows - columns + rows.mean(dim=-2, keepdim=True)


def _distance_correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = _double_centred(a), _double_centred(b)
    shared = (a * b).mean(dim=(-2, -1)).clamp_min(0)
    alone = ((a * a).mean(dim=(-2, -1)) * (b * b).mean(dim=(-2, -1))).sqrt()
    return torch.where(alone > 1e-24, shared / alone.clamp_min(1e-24), 0.0).sqrt()


def _of_units(units: Tensor, output: Tensor, measure: str, bandwidth: float | int | None = None) -> Tensor:
    """Return the dependence of each of (units, images, entries) on `output` (images, classes)."""
    if measure == "binned":
        labels = output.argmax(dim=1)
        return torch.tensor([binned_information(_codes(unit), labels) for unit in units], dtype=torch.float64)
    found = []
    for chunk in units.split(_AT_ONCE):
        if measure == "renyi":
            found.append(_information(gram(chunk, bandwidth), gram(output, bandwidth)))
        else:
            found.append(_distance_correlation(_distances(chunk), _distances(output)))
    return torch.cat(found)


def _codes(unit: Tensor, bins: int = 10) -> Tensor:
    """Return the quantile of each image's mean entry, for vectors of several channels their cluster."""
    if unit.shape[1] <= 16:
        means = unit.mean(dim=1)
        edges = torch.quantile(means, torch.arange(1, bins, dtype=means.dtype) / bins).unique()
        return torch.bucketize(means, edges)
    from sklearn.cluster import KMeans

    means = KMeans(min(bins, len(unit)), random_state=0)
    found = means.fit_predict(unit.numpy())
    return torch.as_tensor(found, dtype=torch.int64)


# -- running ------------------------------------------------------------------------------------------------------


def _probabilities(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise UsageError("feature_map_information needs a network with one output of (images, classes).")
    return outputs.double().softmax(dim=1).cpu()


def pooled_maps(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Any], target: str, pool: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return what each block reads and what it adds to it, pooled, (images, entries), and the output."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    added: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: list[Tensor] = []
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            read = args[0] if args else None
            if isinstance(read, list) and isinstance(output, Tensor):  # a dense layer: what it gives joins the list
                inputs[name].append(torch.cat([_pooled(one, pool) for one in read], dim=1))
                added[name].append(_pooled(output, pool))
                return
            if not isinstance(read, Tensor) or not isinstance(output, Tensor) or read.shape != output.shape:
                raise StructureError(f"layer_information: {name} does not give the shape it reads.")
            inputs[name].append(_pooled(read, pool))
            added[name].append(_pooled(output - read, pool))

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    with hooked(handles), scoring(model), torch.no_grad():
        for images, labels in batches:
            found = _probabilities(run(model, images))
            classes = found.shape[1]
            outputs.append(found if target == "output" else functional.one_hot(labels.long().cpu(), classes))
    joined = ({name: torch.cat(values) for name, values in kept.items()} for kept in (inputs, added))
    before, after = joined
    return before, after, torch.cat(outputs).double()


def _pooled(values: Tensor, pool: int) -> Tensor:
    if values.ndim == 4 and max(values.shape[-2:]) > pool:
        values = functional.adaptive_avg_pool2d(values, (min(pool, values.shape[-2]), min(pool, values.shape[-1])))
    return values.flatten(1).double().cpu()

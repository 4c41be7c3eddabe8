"""Blending criteria: cluster what agrees, weigh what predicts, evolve the mix (He et al., arXiv 2107.05033).

Reconstructed from the abstract of Blending Pruning Criteria for Convolutional Neural Networks: clustering by rank a
layer, calibration within clusters, evolution of the blend by the accuracy of the pruned network. The formulas are ours.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import BudgetError, ConvetteError, UsageError
from convette.pruning._options import check_values
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.pruning.criteria.loss_increase import loss_without
from convette.surgery import ChannelGraph, apply

POOL = "l1, geometric_median, bn_scale, taylor, fisher, apoz, activation_rank"
_SMALL = 8  # units below which a group's own rank correlations say too little
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def blend(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    pool: str = POOL,
    clusters: int = 3,
    probe: int = 16,
    generations: int = 8,
    population: int = 12,
    keep: float | int = 0.5,
    scale: Literal["rank", "sum"] = "rank",
    fitness: Literal["loss", "accuracy"] = "loss",
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Score units by a mix of criteria, found for each layer by clustering, a probe, and evolution.

    .. math:: s_u = \sum_{m=1}^{M} \frac{w_{l,m}\, c_{k_m}}{\sum_j w_{l,j}\, c_{k_j}} \;
        \frac{\operatorname{rank}_{k_m}(u)}{n_l}

    In every group l the criteria of `pool` (names with commas) are clustered by the Spearman correlation of their ranks
    into at most `clusters` (0: as many, from 2 to 5, as part best by silhouette); a blend takes one criterion
    :math:`k_m` from each. :math:`c_k` in 0.05..1 is the Spearman correlation of criterion k with the loss increase of
    up to `probe` single units (0 where it is negative; with ``probe=0`` the share of its cluster). ``scale="sum"``
    blends scores divided by their sum instead of ranks. Picks and weights w evolve for `generations` of `population`
    blends; the `fitness` is the "loss" (or the "accuracy") on one half of the calibration images of the network cut
    evenly to the share `keep` of its units, batch-norm statistics taken anew on the other half. All single criteria are
    in the first generation and the best survives: the blend is as good as any of them there. ``generations=0`` takes
    the best-calibrated pick of each cluster with equal weights.

    Scores are ranks and compare within a layer: use an allocation that cuts layers evenly or measures them ("uniform",
    "per_layer"). Criteria that a network has no layers for are left out. `blend_search` tells what was found.

    Returns one score in 0..1 a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, for an
    unknown criterion, or where no criterion of the pool works. Costs all of `pool` once, `probe` forward passes a
    group, and a cut and two passes a blend.
    """
    return blend_search(
        model,
        graph,
        calibration,
        pool=pool,
        clusters=clusters,
        probe=probe,
        generations=generations,
        population=population,
        keep=keep,
        scale=scale,
        fitness=fitness,
        seed=seed,
    ).scores


@dataclass(frozen=True)
class Blend:
    """What a search found: scores, and for every group the criteria picked with their shares.

    `fitness` is minus the held-out loss of the best blend of each generation, `singles` that of each criterion alone,
    `clusters` the criteria of each group that order its units alike.
    """

    scores: dict[str, Tensor]
    shares: Mapping[str, Mapping[str, float]]
    clusters: Mapping[str, tuple[tuple[str, ...], ...]]
    fitness: tuple[float, ...] = ()
    singles: Mapping[str, float] = field(default_factory=dict)


def blend_search(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None,
    *,
    pool: str = POOL,
    clusters: int = 3,
    probe: int = 16,
    generations: int = 8,
    population: int = 12,
    keep: float | int = 0.5,
    scale: Literal["rank", "sum"] = "rank",
    fitness: Literal["loss", "accuracy"] = "loss",
    seed: int = 0,
) -> Blend:
    """Search for a blend; see `blend` for the options, errors and costs."""
    check_values("criterion blend", blend, scale=scale, fitness=fitness)
    if clusters < 0 or probe < 0 or generations < 0 or population < 2 or not 0 < keep <= 1:
        raise UsageError(
            f"criterion blend: clusters={clusters}, probe={probe}, generations={generations}, population={population},"
            f" keep={keep}: at least 0, 0, 0 and 2, and a share above 0 are needed."
        )
    batches = batches_of(calibration, "blend")
    found = _score_all(model, graph, batches, pool, seed)
    groups = _prepare(model, graph, batches, found, clusters, probe, scale, seed)
    if not generations:
        return _blend(groups, {name: group.plain() for name, group in groups.items()})
    fit, held = _halves(batches)
    judge = _Judge(model, graph, fit, held, float(keep), fitness)
    return _evolve(groups, judge, list(found), generations, population, np.random.default_rng(seed))


def criteria_agreement(scores: Mapping[str, Tensor]) -> Float[np.ndarray, "k k"]:
    """Return the Spearman correlations of the criteria's `scores` of one group, in their order."""
    ranks = np.stack([_ranks(score) for score in scores.values()])
    spread = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(spread, axis=1)
    scale = np.outer(norms, norms)
    agreement = np.divide(spread @ spread.T, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(agreement, 1.0)
    return agreement


def cluster_criteria(agreement: Float[np.ndarray, "k k"], clusters: int) -> list[list[int]]:
    """Return at most `clusters` sets of criteria by average linkage of ``1 - agreement``; equal ranks stay together.

    With 0 `clusters` as many, from 2 to 5, as have the largest silhouette: sets that are close within and far apart.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(agreement) == 1:
        return [[0]]
    distance = np.clip(1 - (agreement + agreement.T) / 2, 0, 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    labels = fcluster(tree, clusters, "maxclust") if clusters else _best_silhouette(tree, distance)
    return [np.flatnonzero(labels == label).tolist() for label in sorted(set(labels))]


def _best_silhouette(tree: np.ndarray, distance: np.ndarray) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster
    from sklearn.metrics import silhouette_score

    offered = [fcluster(tree, count, "maxclust") for count in range(2, 6)]
    offered = [labels for labels in offered if 2 <= len(set(labels)) < len(distance)]
    if not offered:  # two criteria, or all alike
        return fcluster(tree, 2, "maxclust")
    return max(offered, key=lambda labels: silhouette_score(distance, labels, metric="precomputed"))


@dataclass
class _Group:
    """One group's criteria: names, ranks in 0..1 (or what else is blended), clusters of their indices, factors."""

    names: list[str]
    ranks: np.ndarray
    clusters: list[list[int]]
    factors: np.ndarray

    def plain(self) -> "_Genes":
        """Pick the best of each cluster, all with equal weights."""
        picks = [max(cluster, key=lambda k: self.factors[k]) for cluster in self.clusters]
        return _Genes(picks, np.full(len(picks), 1 / len(picks)))

    def pure(self, name: str) -> "_Genes":
        """Return the genes that are one criterion, the plain ones where this group has no score of it."""
        if name not in self.names:
            return self.plain()
        wanted = self.names.index(name)
        picks = [wanted if wanted in cluster else cluster[0] for cluster in self.clusters]
        return _Genes(picks, np.array([float(wanted in cluster) for cluster in self.clusters]))

    def shares(self, genes: "_Genes") -> np.ndarray:
        """Return what each pick counts: weights times factors, summing to 1."""
        found = genes.weights * self.factors[genes.picks]
        # All weight on criteria that predict nothing: they are what the genes ask for.
        return found / found.sum() if found.sum() > 0 else genes.weights / genes.weights.sum()


@dataclass
class _Genes:
    picks: list[int]
    weights: np.ndarray


def _score_all(
    model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], pool: str, seed: int
) -> dict[str, dict[str, Tensor]]:
    from convette.pruning.criteria import find_criterion, score_units

    names = [name.strip() for name in pool.split(",") if name.strip()]
    found: dict[str, dict[str, Tensor]] = {}
    reasons = []
    for name in dict.fromkeys(names):
        find_criterion(name)
        if name == "blend":
            raise UsageError("criterion blend cannot be one of its own pool.")
        try:
            found[name] = score_units(name, model, graph, batches, seed=seed)
        except UsageError as error:
            reasons.append(str(error))
    if not found:
        raise UsageError(f"criterion blend: no criterion of the pool {pool!r} works here. {' '.join(reasons)}")
    return found


def _prepare(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[Any],
    found: Mapping[str, Mapping[str, Tensor]],
    clusters: int,
    probe: int,
    scale: str,
    seed: int,
) -> dict[str, _Group]:
    generator = torch.Generator().manual_seed(seed)
    here = {g.name: {k: s[g.name] for k, s in found.items() if g.name in s} for g in graph.groups if g.size}
    here = {name: scores for name, scores in here.items() if scores}
    agreements = {name: criteria_agreement(scores) for name, scores in here.items()}
    large = [agreements[n] for n, s in here.items() if graph[n].size >= _SMALL and len(s) == len(found)]
    groups = {}
    with scoring(model), torch.no_grad():
        for name, scores in here.items():
            agreement = agreements[name]
            if graph[name].size < _SMALL and large and len(scores) == len(found):
                agreement = np.mean(large, axis=0)
            sets = cluster_criteria(agreement, clusters)
            ranks = np.stack([_ranks(score) / len(score) for score in scores.values()])
            if probe:
                units = torch.randperm(graph[name].size, generator=generator)[:probe].tolist()
                losses = [loss_without(model, graph, graph[name], u, batches, functional.cross_entropy) for u in units]
                factors = _factors(ranks[:, units], np.array(losses))
            else:
                sizes = {k: len(cluster) for cluster in sets for k in cluster}
                factors = np.array([sizes[k] / len(scores) for k in range(len(scores))])
            values = ranks if scale == "rank" else np.stack([_shares_of(score) for score in scores.values()])
            groups[name] = _Group(list(scores), values, sets, factors)
    return groups


def _factors(ranks: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return how well each criterion's order of the probed units predicts their loss, 0 where it is the wrong way."""
    rows = {str(k): torch.from_numpy(row) for k, row in enumerate(ranks)}
    agreement = criteria_agreement({**rows, "loss": torch.from_numpy(losses)})[-1, :-1]
    return np.where(agreement < 0, 0.0, np.clip(agreement, 0.05, 1.0))


def _shares_of(score: Tensor) -> np.ndarray:
    """Return scores divided by their sum, from their least on where one is negative."""
    values = score.numpy().astype(np.float64)
    values = values - min(0.0, float(values.min()))
    return values / max(float(values.sum()), 1e-30)


def _ranks(score: Tensor) -> np.ndarray:
    """Return ranks 1..n, equal scores sharing their mean."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(score.numpy()), dtype=np.float64)


def _blend(
    groups: Mapping[str, _Group],
    genome: Mapping[str, _Genes],
    fitness: Sequence[float] = (),
    singles: Mapping[str, float] | None = None,
) -> Blend:
    scores, shares = {}, {}
    for name, group in groups.items():
        each = group.shares(genome[name])
        scores[name] = torch.from_numpy(each @ group.ranks[genome[name].picks]).float()
        shares[name] = {group.names[k]: float(s) for k, s in zip(genome[name].picks, each, strict=True)}
    sets = {name: tuple(tuple(g.names[k] for k in c) for c in g.clusters) for name, g in groups.items()}
    return Blend(scores, shares, sets, tuple(fitness), singles or {})


class _Judge:
    """Minus the loss (or the accuracy) on held-out images of the network cut to the better share of every group."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        fit: list,
        held: list,
        keep: float,
        fitness: str = "loss",
    ) -> None:
        self.model, self.graph, self.fit, self.held, self.keep, self.fitness = model, graph, fit, held, keep, fitness

    def __call__(self, scores: Mapping[str, Tensor]) -> float:
        from convette.pruning.allocation import build_ladders

        selection = {}
        for ladder in build_ladders(scores, self.graph):
            wanted = max(1, round(self.keep * ladder.size))
            rung = min(i for i, width in enumerate(ladder.widths) if width >= wanted)
            if rung < len(ladder.widths) - 1:
                selection[ladder.name] = ladder.kept(rung)
        network = copy.deepcopy(self.model).eval()
        try:
            if selection:
                apply(network, self.graph.shrink(selection))
        except ConvetteError as error:
            raise BudgetError(f"criterion blend: the network cannot be cut to keep={self.keep}: {error}") from error
        with torch.no_grad():
            _recalibrate(network, self.fit)
            total = sum(self._worth(run(network, images), labels) for images, labels in self.held)
        worth = total / sum(len(labels) for _, labels in self.held)
        return worth if np.isfinite(worth) else -1e30

    def _worth(self, logits: Tensor, labels: Tensor) -> float:
        if self.fitness == "accuracy":
            return float((logits.argmax(dim=1) == labels).sum())
        return -float(functional.cross_entropy(logits, labels, reduction="sum"))


def _recalibrate(network: nn.Module, batches: Sequence[Any]) -> None:
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images, _ in batches:
        if len(images) > 1:
            run(network, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _halves(batches: Sequence[Any]) -> tuple[list, list]:
    """Split the images in two: every second one to each side; a single image serves as both."""
    fit, held = [], []
    for images, labels in batches:
        if len(labels) < 2 or not isinstance(images, Tensor):
            fit.append((images, labels))
            held.append((images, labels))
        else:
            fit.append((images[::2], labels[::2]))
            held.append((images[1::2], labels[1::2]))
    return fit, held


def _evolve(
    groups: Mapping[str, _Group],
    judge: Callable[[Mapping[str, Tensor]], float],
    criteria: Sequence[str],
    generations: int,
    population: int,
    random: np.random.Generator,
) -> Blend:
    singles = {name: {g: group.pure(name) for g, group in groups.items()} for name in criteria}
    genomes = [{g: group.plain() for g, group in groups.items()}, *singles.values()]
    while len(genomes) < population:
        genomes.append(_mutated(groups, genomes[int(random.integers(len(genomes)))], random))
    fitness = [judge(_blend(groups, genome).scores) for genome in genomes]
    alone = dict(zip(criteria, fitness[1 : 1 + len(criteria)], strict=True))
    history = [max(fitness)]
    for _ in range(generations):
        order = np.argsort(fitness)[::-1]
        elite = max(1, population // 10)
        following = [genomes[i] for i in order[:elite]]
        while len(following) < population:
            parents = [genomes[_tournament(fitness, random)] for _ in range(2)]
            child = {g: parents[int(random.random() < 0.5)][g] for g in groups}
            following.append(_mutated(groups, child, random))
        fitness = [*(fitness[i] for i in order[:elite]), *(judge(_blend(groups, g).scores) for g in following[elite:])]
        genomes = following
        history.append(max(fitness))
    return _blend(groups, genomes[int(np.argmax(fitness))], history, alone)


def _tournament(fitness: Sequence[float], random: np.random.Generator) -> int:
    return max(random.integers(len(fitness), size=3).tolist(), key=fitness.__getitem__)


def _mutated(
    groups: Mapping[str, _Group], genome: Mapping[str, _Genes], random: np.random.Generator
) -> dict[str, _Genes]:
    found = {}
    for name, genes in genome.items():
        picks = [
            int(random.choice(cluster)) if random.random() < 0.1 else pick
            for pick, cluster in zip(genes.picks, groups[name].clusters, strict=True)
        ]
        logs = np.log(np.clip(genes.weights, 1e-3, None)) + 0.3 * random.standard_normal(len(picks))
        weights = np.exp(logs - logs.max())
        found[name] = _Genes(picks, weights / weights.sum())
    return found

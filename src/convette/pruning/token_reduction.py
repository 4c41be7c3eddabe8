"""OPTIN for tokens: which block of a vision transformer loses how many, by what that does to all that comes later.

Khaki and Plataniotis, The Need for Speed: Pruning Transformers with One Recipe, ICLR 2024, arXiv 2403.17921: the error
of a removal is the one that `convette.pruning.trajectory` gives units. Tokens are merged rather than dropped (Bolya et
al., Token Merging, arXiv 2210.09461; `convette.layers.attention.TokenReduction`). The paper's vision code is not
public: that a token which is gone is compared as the one it went into, and the search for the schedule, are ours.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette._progress import progress
from convette.cost import Budget, count, unreachable
from convette.errors import StructureError, UsageError
from convette.layers._watching import hooked
from convette.layers.attention import match_tokens, merge_tokens
from convette.layers.attention.token_reduction import prefix_of, sequences
from convette.pruning.criteria._observing import scoring
from convette.pruning.criteria.optin import balancing_scale, distillation, relation_distance
from convette.surgery import Install, apply

_PLACING = "convette.layers.attention.token_reduction:insert_token_reduction"


@dataclass(frozen=True)
class TokenTrajectory:
    """What the removal of tokens in front of each block does to everything later.

    Attributes:
        blocks: name of the sequence of blocks.
        tokens: how many tokens the blocks take, with the prefix.
        width: how wide they are.
        prefix_tokens: how many in front are never merged (class token).
        removals: the numbers of tokens that were tried, ascending, from 0.
        errors: (blocks, removals), at least 0, CPU float64; the column of removal 0 is 0.
    """

    blocks: str
    tokens: int
    width: int
    prefix_tokens: int
    removals: tuple[int, ...]
    errors: Tensor


def reduce_tokens(
    model: nn.Module,
    images: Float[Tensor, "n ..."],
    budget: Budget | str,
    *,
    step: int | None = None,
    prefix_tokens: int | None = None,
    seed: int = 0,
) -> nn.Module:
    r"""Return a copy of a vision transformer that merges tokens on its way until its MACs fit `budget`.

    .. math:: \min_r \sum_l E_l(r_l) \quad \text{s.t.} \quad \text{MACs}(r) \le B, \qquad T_{l+1} = T_l - r_l

    E of `token_trajectory`, measured one block at a time on `images` (preprocessed; the first 32 to 128 do). The MACs
    are exact, the merging's own included, for every length the sequence can have in front of each block (a head that
    attends to all tokens is counted at full length); the best schedule is a path through those lengths, found and
    proven by HiGHS. `step`: tokens go by multiples of it (None: a sixteenth of the patches); `prefix_tokens` as in
    `insert_token_reduction`.

    The copy's structure log holds one edit, so that it is saved, loaded and exported; a budget that is met already
    gives a plain copy. Nothing is trained: do that afterwards. Raises `UsageError` where the network has no transformer
    blocks or the budget limits anything but macs, `BudgetError` with the least MACs in reach, `StructureError` where it
    does not run with fewer tokens. Costs a run of `images` for every block and number tried (96 for ViT-B).
    """
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    other = next((limit for limit in limits.limits if limit.metric != "macs"), None)
    if other is not None:
        raise UsageError(f"reduce_tokens: fewer tokens save macs; the budget '{other}' limits something else.")
    start = count(model, images[:1])
    resolved = limits.resolve(start)
    network = copy.deepcopy(model)
    if resolved.met(start):
        return network
    found = token_trajectory(model, images, step=step, prefix_tokens=prefix_tokens, seed=seed)
    costs = TokenCosts(model, found, images[:1], start.macs)
    schedule = choose_schedule(found, costs, float(resolved.limits[0].value))
    _install(network, found, least_schedule(found, costs) if schedule is None else schedule)
    end = count(network, images[:1])
    if not resolved.met(end):
        raise unreachable(resolved, end, "Fewer tokens alone do not do it: prune heads and neurons too.")
    return network


def token_trajectory(
    model: nn.Module,
    images: Float[Tensor, "n ..."],
    *,
    step: int | None = None,
    prefix_tokens: int | None = None,
    balance: float | int = 10.0,
    temperature: float | int = 4.0,
    rows: int = 768,
    seed: int = 0,
) -> TokenTrajectory:
    r"""Return what merging r tokens in front of each block does to the features behind it and later, and the output.

    .. math:: E_l(r) = \sum_{m \ge l} \lVert R_m - R'_m \rVert_F^2 + s\, \tau^2\, KL(p_\tau \,\|\, p'_\tau), \qquad
        R_m = F_m F_m^\top

    F_m are up to `rows` tokens of all images behind block m, of unit length, the same ones with and without; one that
    was merged stands for itself with the token it became part of. `balance`, `temperature` and s as in
    `convette.pruning.trajectory`, one s for the whole model. `step`, `prefix_tokens` as in `reduce_tokens`.

    Raises `UsageError` for a network without transformer blocks, one whose output is not (images, classes), and numbers
    that are not positive; `StructureError` where the network does not run with fewer tokens, or gives no numbers.
    """
    prefix = prefix_of(model) if prefix_tokens is None else prefix_tokens
    if min(rows, temperature, balance, 1 if step is None else step) <= 0 or prefix < 0:
        raise UsageError("token trajectory: step, rows, balance and temperature must be positive, the prefix not less.")
    name, shape = find_blocks(model, images)
    tokens, width = shape[1:]
    patches = max(0, tokens - prefix)
    removals = tuple(range(0, patches // 2 + 1, step or max(1, patches // 16)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(shape[0] * tokens, generator=generator)[:rows]
    blocks = sequences(model)[name]
    bend, shift = torch.zeros(2, len(blocks), len(removals), dtype=torch.float64)
    with scoring(model), torch.no_grad(), progress("tokens: trajectory", bend.numel(), "run") as advance:
        features, output = _run(model, blocks, images, chosen)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UsageError("token trajectory needs a network with one output of (images, classes).")
        for place in range(len(blocks)):
            for column, removal in enumerate(removals):
                if removal:
                    moved, changed = _run(model, blocks, images, chosen, (place, removal, prefix))
                    each = [relation_distance(f, g) for f, g in zip(features[place:], moved[place:], strict=True)]
                    bend[place, column] = torch.stack(each).sum().cpu()
                    shift[place, column] = distillation(output, changed, float(temperature)).cpu()
                advance()
    errors = bend + balancing_scale(bend.flatten(), shift.flatten(), float(balance)) * shift
    if not bool(errors.isfinite().all()):
        raise StructureError("token trajectory: features or outputs of the network are not finite numbers.")
    return TokenTrajectory(name, tokens, width, prefix, removals, errors)


def find_blocks(model: nn.Module, images: Float[Tensor, "n ..."]) -> tuple[str, tuple[int, int, int]]:
    """Return the transformer blocks of a network, and the shape (n, tokens, width) of what each takes and gives.

    They are the parts of its longest sequence of blocks of one class that take such tokens, nothing else, and give the
    same shape. Raises `UsageError` where there is none. Costs a run of the network.
    """
    seen: dict[int, list[Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        plain = len(args) == 1 and not kwargs and all(isinstance(x, Tensor) and x.ndim == 3 for x in (*args, output))
        seen.setdefault(id(module), []).append(tuple(args[0].shape) if plain and args[0].shape == output.shape else 0)

    known = sequences(model)
    handles = [
        part.register_forward_hook(keep, with_kwargs=True)
        for part in {id(part): part for parts in known.values() for part in parts}.values()
    ]
    with hooked(handles), scoring(model), torch.no_grad():
        model(images)
    found = {}
    for name, parts in known.items():
        shapes = [seen.get(id(part), [0]) for part in parts]
        first = shapes[0][0]
        if first and first[0] == len(images) and all(shape == [first] for shape in shapes):
            found[name] = first
    if not found:
        raise UsageError(
            f"token reduction: {type(model).__name__} has no transformer blocks: no sequence of equal blocks that take"
            " tokens (n, tokens, width), nothing else, and give as many."
        )
    name = max(found, key=lambda name: len(known[name]))
    return name, found[name]


def _run(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    images: Tensor,
    rows: Tensor,
    reduction: tuple[int, int, int] | None = None,
) -> tuple[list[Tensor], Any]:
    """Return the chosen rows of the tokens behind every block, and the output; `reduction`: (block, tokens, prefix)."""
    found: list[Tensor] = []
    groups: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if groups:
            output = output.gather(1, groups[0].unsqueeze(2).expand(-1, -1, output.shape[2]))
        found.append(output.flatten(0, 1)[rows.to(output.device)])

    def merge(module: nn.Module, args: Any) -> tuple[Tensor]:
        assert reduction is not None
        groups.append(match_tokens(args[0], *reduction[1:]))
        return (merge_tokens(args[0], groups[0], args[0].shape[1] - reduction[1]),)

    handles = [block.register_forward_hook(keep) for block in blocks]
    if reduction is not None:
        handles.append(blocks[reduction[0]].register_forward_pre_hook(merge))
    with hooked(handles):
        try:
            return found, model(images)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            if reduction is None:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StructureError(
                f"{type(model).__name__} does not run with fewer tokens from block {reduction[0]} on: {reason}"
            ) from error


def _install(network: nn.Module, found: TokenTrajectory, schedule: Sequence[int]) -> None:
    arguments: Mapping[str, Any] = {
        "remove": [int(removal) for removal in schedule],
        "blocks": found.blocks,
        "prefix_tokens": found.prefix_tokens,
    }
    apply(network, Install(_PLACING, arguments))


# The schedule ---------------------------------------------------------------------------------------------------------


class _Edge(NamedTuple):
    """Block `block` comes upon `tokens` tokens and `removal` of them go first."""

    block: int
    tokens: int
    removal: int
    macs: int
    error: float


class TokenCosts:
    """The multiply-accumulates of one image by schedule: of blocks at every length, of merging, and of the rest."""

    def __init__(self, model: nn.Module, found: TokenTrajectory, images: Tensor, total: int) -> None:
        self.found, self.model, self.like = found, model, images
        self.parts = sequences(model)[found.blocks]
        self.known: dict[tuple[int, int], int] = {}
        self.rest = total - sum(self.block(index, found.tokens) for index in range(len(self.parts)))

    def block(self, index: int, tokens: int) -> int:
        """MACs of a block on so many tokens."""
        if (index, tokens) not in self.known:
            weight = next(self.parts[index].parameters(), self.like)
            example = torch.zeros(1, tokens, self.found.width, dtype=weight.dtype, device=weight.device)
            self.known[index, tokens] = count(self.parts[index], example).macs
        return self.known[index, tokens]

    def edges(self) -> list[_Edge]:
        """All that can happen at all blocks, in their order."""
        found, edges, lengths = self.found, [], {self.found.tokens}
        for block in range(len(self.parts)):
            behind = set()
            for tokens in sorted(lengths, reverse=True):
                patches = max(0, tokens - found.prefix_tokens)
                for column, removal in enumerate(found.removals):
                    if removal > patches // 2:
                        break
                    merging = (patches // 2) * (patches - patches // 2) * found.width if removal else 0
                    macs = merging + self.block(block, tokens - removal)
                    edges.append(_Edge(block, tokens, removal, macs, float(found.errors[block, column])))
                    behind.add(tokens - removal)
            lengths = behind
        return edges

    def macs(self, schedule: Sequence[int]) -> int:
        """MACs of the whole network with a schedule."""
        chosen, tokens = {(e.block, e.tokens, e.removal): e.macs for e in self.edges()}, self.found.tokens
        macs = self.rest
        for block, removal in enumerate(schedule):
            macs += chosen[block, tokens, removal]
            tokens -= removal
        return macs


def choose_schedule(found: TokenTrajectory, costs: TokenCosts, limit: float) -> list[int] | None:
    """Return the schedule of least error whose MACs are at most `limit`; None where there is none.

    One binary variable for each block, length in front of it and number that goes; they have to form a path.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    edges = costs.edges()
    nodes = {key: row for row, key in enumerate(sorted({(edge.block, edge.tokens) for edge in edges}))}
    flow = lil_array((len(nodes), len(edges)))
    for column, edge in enumerate(edges):
        flow[nodes[edge.block, edge.tokens], column] += 1
        behind = nodes.get((edge.block + 1, edge.tokens - edge.removal))
        if behind is not None:
            flow[behind, column] -= 1
    source = np.zeros(len(nodes))
    source[nodes[0, found.tokens]] = 1
    room = limit - costs.rest
    if room <= 0:
        return None
    # The solver wants numbers near one, and works to a tolerance; the budget does not.
    errors = np.array([edge.error for edge in edges])
    macs = np.array([edge.macs for edge in edges], dtype=float) / room
    ends: Any = source
    path = LinearConstraint(flow.tocsr(), ends, ends)
    slack = 0.0
    for _ in range(4):
        within = LinearConstraint(macs[None], -np.inf, 1 - slack)
        result = milp(
            errors / (errors.max() or 1.0),
            integrality=np.ones(len(edges)),
            bounds=Bounds(0, 1),
            constraints=[path, within],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        taken = sorted(edge for edge, share in zip(edges, result.x, strict=True) if share > 0.5)
        if costs.rest + sum(edge.macs for edge in taken) <= limit:
            return [edge.removal for edge in taken]
        slack = max(2 * slack, 2e-6)
    return None


def least_schedule(found: TokenTrajectory, costs: TokenCosts) -> list[int]:
    """Return the schedule with the fewest MACs there is."""
    best: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for edge in sorted(costs.edges(), key=lambda edge: -edge.block):
        later = best.get((edge.block + 1, edge.tokens - edge.removal), (0, []))
        here = (edge.macs + later[0], [edge.removal, *later[1]])
        key = (edge.block, edge.tokens)
        best[key] = min(here, best.get(key, here))
    return best[0, found.tokens][1]

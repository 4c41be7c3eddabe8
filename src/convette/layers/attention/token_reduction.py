"""Fewer tokens from some depth on: the most similar ones of a transformer are averaged in front of a block.

The matching is that of Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461, on the tokens themselves
instead of the keys of an attention, and without the sizes that the paper carries along: a merged token counts as one.
Which block loses how many is OPTIN's to say (`convette.pruning.reduce_tokens`, arXiv 2403.17921).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._folding import Stays


class TokenReduction(nn.Module):
    r"""Merge the `remove` most similar tokens into others: (n, tokens, width) -> (n, tokens - remove, width).

    .. math:: y_g = \frac{1}{|g|} \sum_{i \in g} x_i

    Behind the first `prefix_tokens` (class token, registers), which pass unchanged, every second token is paired with
    the one of the others that is most like it (cosine); of these pairs the `remove` most alike become one token, their
    average. Several may join the same token. The rest pass unchanged, in order. At most half of the tokens behind the
    prefix (rounded down) can go at one place; each image chooses its own. No parameters; folds to nothing simpler,
    except with `remove` 0, the identity. Costs floor(t / 2) * ceil(t / 2) * width MACs, t the tokens behind the prefix.

    Raises `UsageError` for negative numbers, an input that is not (n, tokens, width), and more than half of the tokens.
    """

    def __init__(self, remove: int, prefix_tokens: int = 1) -> None:
        """Say how many tokens go, and how many in front are left alone."""
        super().__init__()
        if remove < 0 or prefix_tokens < 0:
            raise UsageError(f"TokenReduction: remove {remove} and prefix_tokens {prefix_tokens} must be at least 0.")
        self.remove, self.prefix_tokens = remove, prefix_tokens

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n fewer width"]:
        """Return the tokens that are left."""
        if x.ndim != 3:
            raise UsageError(f"TokenReduction: expected tokens (n, tokens, width), got {tuple(x.shape)}.")
        if not self.remove:
            return x
        return merge_tokens(x, match_tokens(x, self.remove, self.prefix_tokens), x.shape[1] - self.remove)

    def folded(self) -> nn.Module:
        """Return the identity where nothing is removed; raises `Stays` otherwise."""
        if self.remove:
            raise Stays("which tokens are merged depends on the image; there is no plain layer that does it.")
        return nn.Identity()

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"remove={self.remove}, prefix_tokens={self.prefix_tokens}"


@torch.no_grad()
def match_tokens(x: Float[Tensor, "n tokens width"], remove: int, prefix_tokens: int = 1) -> Int64[Tensor, "n tokens"]:
    """Return for every token the number of the token it is part of, once the `remove` most alike have been merged.

    Raises `UsageError` where more than half of the tokens behind the prefix would go.
    """
    n, tokens, _ = x.shape
    most = max(0, tokens - prefix_tokens) // 2
    if remove > most:
        raise UsageError(
            f"TokenReduction: {remove} of {tokens} tokens cannot be merged here; {most} at the most (half of those"
            f" behind the first {prefix_tokens})."
        )
    unit = functional.normalize(x[:, prefix_tokens:], dim=-1)
    likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (n, tokens that may go, tokens that stay)
    nearest, partner = likeness.max(dim=2)
    gone = nearest.topk(remove, dim=1).indices
    goes_to = prefix_tokens + 1 + 2 * partner.gather(1, gone)
    position = torch.arange(tokens, device=x.device).expand(n, tokens)
    target = position.scatter(1, prefix_tokens + 2 * gone, goes_to)
    number = (target == position).to(torch.int64).cumsum(dim=1) - 1
    return number.gather(1, target)


def merge_tokens(
    x: Float[Tensor, "n tokens width"], groups: Int64[Tensor, "n tokens"], left: int
) -> Float[Tensor, "n left width"]:
    """Return the averages of the `left` groups of tokens; a group of one comes out as it is."""
    n, tokens, width = x.shape
    total = x.new_zeros(n, left, width).scatter_add(1, groups.unsqueeze(2).expand(n, tokens, width), x)
    size = x.new_zeros(n, left).scatter_add(1, groups, x.new_ones(n, tokens))
    return total / size.unsqueeze(2)


def insert_token_reduction(
    model: nn.Module, remove: int | Sequence[int], blocks: str = "blocks", prefix_tokens: int | None = None
) -> nn.Module:
    """Put a `TokenReduction` in front of transformer blocks: block i of the sequence `blocks` loses ``remove[i]``.

    `remove`: a number for every block, or one for all. `prefix_tokens`: the tokens in front that stay; None: as the
    network says (``num_prefix_tokens`` of timm's), else 1. Each such block becomes ``nn.Sequential(TokenReduction(...),
    block)``; where nothing goes, nothing is placed. Changes `model` in place and returns it. Raises `UsageError` where
    the network has no sequence of that name whose parts are all of one class, or not as many as `remove`.
    """
    parts = sequences(model).get(blocks)
    if parts is None:
        known = ", ".join(sequences(model)) or "none"
        raise UsageError(
            f"token reduction: {type(model).__name__} has no sequence {blocks!r} of equal blocks; it has: {known}."
        )
    counts = [remove] * len(parts) if isinstance(remove, int) else list(remove)
    if len(counts) != len(parts):
        raise UsageError(f"token reduction: {len(counts)} numbers for the {len(parts)} blocks of {blocks!r}.")
    prefix = prefix_of(model) if prefix_tokens is None else prefix_tokens
    layers = [TokenReduction(count, prefix) for count in counts]
    owner = model.get_submodule(blocks)
    placed = dict(zip(map(id, parts), layers, strict=True))
    for key, block in list(owner._modules.items()):
        layer = placed.get(id(block))
        if block is not None and layer is not None and layer.remove:
            owner._modules[key] = nn.Sequential(layer, block).train(block.training)
    return model


def sequences(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the sequences and lists of a network whose two or more parts are blocks of one class, by name.

    An identity, where a block was removed, is left out.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        parts = [part for part in module.children() if not isinstance(part, nn.Identity)]
        if len(parts) < 2:
            continue
        if len({type(part) for part in parts}) == 1 and all(list(part.children()) for part in parts):
            found[name] = parts
    return found


def prefix_of(model: nn.Module) -> int:
    """Return how many tokens of a network are no patches: what it says (``num_prefix_tokens``), else 1."""
    known = getattr(model, "num_prefix_tokens", 1)
    return known if isinstance(known, int) else 1

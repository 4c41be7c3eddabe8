"""A network that is sparse already and is cut: its zeros stay zeros."""

from dataclasses import dataclass

from torch import Tensor, nn

from convette.pruning.frameworks import FRAMEWORKS
from convette.pruning.methods.keep_sparsity import KeepSparsity
from convette.pruning.settings import PruneSettings
from convette.pruning.sparsity import apply_masks, n_m_mask, pattern_of, sparsity_in_words, zeros_of
from convette.training import Method


@dataclass(frozen=True)
class Sparsity:
    """Which weights of a run's start are sparse, in which pattern (None: unstructured), said in `words`."""

    names: frozenset[str]
    pattern: tuple[int, int] | None
    words: str

    def zeros(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the masks that the zeros of `network` say, of the weights that were sparse at the start."""
        return {name: mask for name, mask in zeros_of(network).items() if name in self.names}

    def restore(self, network: nn.Module) -> None:
        """Complete the pattern of a network that was just cut, in place: the smallest weights beyond it go."""
        if self.pattern is not None:
            apply_masks(network, self._masks(network))

    def methods(self, network: nn.Module) -> tuple[Method, ...]:
        """Return what keeps the zeros of `network` while it is trained."""
        masks = self._masks(network)
        pattern = "unstructured" if self.pattern is None else f"{self.pattern[0]}:{self.pattern[1]}"
        return (KeepSparsity(masks, pattern=pattern),) if masks else ()

    def _masks(self, network: nn.Module) -> dict[str, Tensor]:
        zeros = self.zeros(network)
        if self.pattern is None:
            return zeros
        # Neighbours that a cut brought together may all be zero: by size, so that as many as the pattern allows learn.
        weights = dict(network.named_parameters())
        return {name: n_m_mask(weights[name].detach().abs(), *self.pattern) for name in zeros}


def sparsity_to_keep(model: nn.Module, settings: PruneSettings) -> Sparsity | None:
    """Return what to keep of the zeros of `model`, None where it has none or `settings` do not ask for it."""
    masks = zeros_of(model) if settings.keep_zeros and settings.schedule not in FRAMEWORKS else {}
    if not masks:
        return None
    words = f"{sparsity_in_words(masks)}, and stay so (prune.keep_zeros)"
    return Sparsity(frozenset(masks), pattern_of(masks), words)

"""The state of a pruning run on disk, so that it can be stopped anywhere and go on."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convette._files import replacing
from convette.errors import FileFormatError, UsageError
from convette.surgery import edit_from_json, replay, structure_log
from convette.training import distributed

_KEY = "convette_prune"


@dataclass(frozen=True)
class StoredState:
    """What was kept: `step` and whether it was ``finished`` or only ``cut``, the facts beside the tensors, the file."""

    step: int
    finished: bool
    facts: dict[str, Any]
    path: Path


class StateStore:
    """One file in `directory`: edits and facts as JSON in its header, all tensors of the network.

    Written under a temporary name and renamed, so a crash leaves the state before. `fingerprint` tells runs apart.
    """

    def __init__(self, directory: Path | str | None, fingerprint: str) -> None:
        self.directory = Path(directory) if directory is not None else None
        self.fingerprint = fingerprint

    @property
    def _path(self) -> Path:
        assert self.directory is not None
        return self.directory / "prune-state.safetensors"

    def training_dir(self, step: int) -> Path | None:
        """Return where the training of `step` keeps its checkpoints."""
        return None if self.directory is None else self.directory / f"step-{step:02d}"

    def save(self, network: nn.Module, edits_before: int, step: int, finished: bool, facts: Mapping[str, Any]) -> None:
        """Keep `network` (its edits after the first `edits_before`, its tensors) and `facts`; rank 0 writes."""
        if self.directory is None:
            return
        if distributed.is_main():
            edits = [edit.to_json() for edit in structure_log(network).edits[edits_before:]]
            header = {
                "fingerprint": self.fingerprint,
                "step": step,
                "finished": finished,
                "facts": dict(facts),
                "edits": edits,
            }
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(network).items()}
            with replacing(self._path) as temporary:
                save_file(tensors, temporary, metadata={_KEY: json.dumps(header, allow_nan=False)})
            if finished and (done := self.training_dir(step)) is not None:
                shutil.rmtree(done, ignore_errors=True)
        distributed.barrier()

    def load(self, network: nn.Module) -> StoredState | None:
        """Bring `network` (a copy of the start) to the kept state, in place; None if nothing was kept.

        Raises `UsageError` if the state is of another run, `FileFormatError` if it cannot be read.
        """
        if self.directory is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise FileFormatError(
                f"{self._path}: not a readable pruning state ({error}); delete it to start anew."
            ) from error
        if header["fingerprint"] != self.fingerprint:
            raise UsageError(
                f"{self._path}: holds the state of a pruning run with another model, budget, data set or settings;"
                " give another checkpoint folder, or delete this one to start anew."
            )
        replay(network, [edit_from_json(edit) for edit in header["edits"]])
        _copy_tensors(tensors, network, self._path)
        return StoredState(header["step"], header["finished"], header["facts"], self._path)


def fingerprint(model: nn.Module, parts: Sequence[Any]) -> str:
    """Return a digest of the model's tensors and of the JSON-ready `parts` that a run depends on."""
    digest = hashlib.sha256(json.dumps(list(parts), sort_keys=True, default=str).encode())
    for name, tensor in sorted(_tensors(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # Shared parameters appear once: safetensors refuses two names for one memory.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _copy_tensors(tensors: Mapping[str, Tensor], network: nn.Module, path: Path) -> None:
    own = _tensors(network)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise FileFormatError(f"{path}: its tensors do not fit the network; delete it to start anew.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])

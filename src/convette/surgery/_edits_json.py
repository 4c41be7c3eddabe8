"""Reading edits back from JSON: which kind is which class."""

from typing import Any

from convette.errors import FileFormatError, did_you_mean
from convette.surgery._absorb import Absorb
from convette.surgery._append import Append
from convette.surgery._convert import Convert
from convette.surgery._edits import Edit, Shrink
from convette.surgery._fold import Fold
from convette.surgery._fold_layer import FoldLayer
from convette.surgery._fold_more import FoldConvs, FoldScale, Merge, Reparameterize
from convette.surgery._grow import Grow, Scale
from convette.surgery._insert import Insert
from convette.surgery._install import Install
from convette.surgery._remove import Remove
from convette.surgery._untie import Untie

_KINDS = {
    Shrink.kind: Shrink.from_json,
    Fold.kind: Fold.from_json,
    Grow.kind: Grow.from_json,
    Scale.kind: Scale.from_json,
    Convert.kind: Convert.from_json,
    Append.kind: Append.from_json,
    Absorb.kind: Absorb.from_json,
    Insert.kind: Insert.from_json,
    Install.kind: Install.from_json,
    Remove.kind: Remove.from_json,
    FoldConvs.kind: FoldConvs.from_json,
    FoldScale.kind: FoldScale.from_json,
    FoldLayer.kind: FoldLayer.from_json,
    Merge.kind: Merge.from_json,
    Reparameterize.kind: Reparameterize.from_json,
    Untie.kind: Untie.from_json,
}


def edit_from_json(value: Any) -> Edit:
    """Return the edit a JSON object describes; raises `FileFormatError` where it is malformed or of unknown kind."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise FileFormatError(f"unknown kind of edit {kind!r}.{did_you_mean(str(kind), _KINDS)}")
    return _KINDS[kind](value)

"""Surgery: which channels of a network go together, and edits of its structure that are data.

`trace` labels every channel of any PyTorch model by running it once; `ChannelGraph.shrink` turns a choice of units
into a `Shrink` edit; `apply` carries edits out on a live model; `save_model` and `load_model` write and read a model as
where it came from, what was done to it, and its tensors: one ``.safetensors`` file without code.
"""

from convette.surgery._absorb import Absorb, absorb_edits
from convette.surgery._append import Append
from convette.surgery._apply import StructureChange, apply, replay
from convette.surgery._calls import raised_at
from convette.surgery._constraints import WidthConstraints
from convette.surgery._constructing import trusting
from convette.surgery._conversion import Conversion, check_words, conversion_edits, convert_by
from convette.surgery._convert import Convert
from convette.surgery._converting import Replacement, convert, convert_edits
from convette.surgery._edits import Edit, ParameterChange, Rewrite, Shrink
from convette.surgery._edits_json import edit_from_json
from convette.surgery._file import Header, file_size, load_model, read_header, save_model
from convette.surgery._fold import Fold, fold, fold_edits
from convette.surgery._fold_layer import FoldLayer
from convette.surgery._fold_more import FoldConvs, FoldScale, Merge, Nothing, Reparameterize
from convette.surgery._folding_more import fold_further, fold_layers, further_folds, reparameterize
from convette.surgery._graph import ChannelGraph, Selection
from convette.surgery._groups import Constraints, Group, Member
from convette.surgery._grow import Grow, Scale
from convette.surgery._growing import grow, ungrow
from convette.surgery._guessing import first_that_runs
from convette.surgery._insert import Insert, ZeroGammaBlock, insert
from convette.surgery._install import Install
from convette.surgery._log import ModelCard, Origin, StructureLog, card_of, set_card, set_origin, structure_log
from convette.surgery._masked import masked
from convette.surgery._records import FrozenOperator
from convette.surgery._remove import Remove, removable, remove
from convette.surgery._remove_features import removable_features, remove_features
from convette.surgery._showing import group_line, units_svg, units_text
from convette.surgery._stitch import Stitch, Stitched, build_stitched
from convette.surgery._stitching import stitch
from convette.surgery._trace import trace
from convette.surgery._untie import Gather, Scatter, Site, Untie
from convette.surgery._untying import untie
from convette.surgery._what_stays import what_stays

__all__ = [
    "Absorb",
    "Append",
    "ChannelGraph",
    "Constraints",
    "Conversion",
    "Convert",
    "Edit",
    "Fold",
    "FoldConvs",
    "FoldLayer",
    "FoldScale",
    "FrozenOperator",
    "Gather",
    "Group",
    "Grow",
    "Header",
    "Insert",
    "Install",
    "Member",
    "Merge",
    "ModelCard",
    "Nothing",
    "Origin",
    "ParameterChange",
    "Remove",
    "Reparameterize",
    "Replacement",
    "Rewrite",
    "Scale",
    "Scatter",
    "Selection",
    "Shrink",
    "Site",
    "Stitch",
    "Stitched",
    "StructureChange",
    "StructureLog",
    "Untie",
    "WidthConstraints",
    "ZeroGammaBlock",
    "absorb_edits",
    "apply",
    "build_stitched",
    "card_of",
    "check_words",
    "conversion_edits",
    "convert",
    "convert_by",
    "convert_edits",
    "edit_from_json",
    "file_size",
    "first_that_runs",
    "fold",
    "fold_edits",
    "fold_further",
    "fold_layers",
    "further_folds",
    "group_line",
    "grow",
    "insert",
    "load_model",
    "masked",
    "raised_at",
    "read_header",
    "removable",
    "removable_features",
    "remove",
    "remove_features",
    "reparameterize",
    "replay",
    "save_model",
    "set_card",
    "set_origin",
    "stitch",
    "structure_log",
    "trace",
    "trusting",
    "ungrow",
    "units_svg",
    "units_text",
    "untie",
    "what_stays",
]

"""Block-wise, then channel-wise pruning of YOLOv3, and of any network with residual blocks.

Compression of YOLOv3 via Block-Wise and Channel-Wise Pruning for Real-Time and Complicated Autonomous Driving
Environment Sensing Applications, J. Li and others, ICPR 2020 (no arXiv id, no code: weights, loss and schedule are
reconstructed). `SparseFactors` trains one factor a residual branch and the batch-norm scales towards zero;
`block_then_channel` drops blocks, then channels, round by round; `YOLOv3` is the detector, `class_weights` the balance
of its classes.
"""

from convette.pruning.yolov3_block_channel.detector import ANCHORS, YOLOv3, class_weights, decode
from convette.pruning.yolov3_block_channel.factors import SparseFactors, branch_norms, fold_factors, soft_threshold
from convette.pruning.yolov3_block_channel.rounds import BlockChannelResult, BlockChannelSettings, block_then_channel

__all__ = [
    "ANCHORS",
    "BlockChannelResult",
    "BlockChannelSettings",
    "SparseFactors",
    "YOLOv3",
    "block_then_channel",
    "branch_norms",
    "class_weights",
    "decode",
    "fold_factors",
    "soft_threshold",
]

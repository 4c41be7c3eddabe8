"""Block-wise, then channel-wise pruning of YOLOv3, and of any network with residual blocks.

Compression of YOLOv3 via Block-Wise and Channel-Wise Pruning for Real-Time and Complicated Autonomous Driving
Environment Sensing Applications, J. Li and others, ICPR 2020 (no arXiv id, no code: weights, loss and schedule are
reconstructed). `SparseFactors` trains one factor a residual branch and the batch-norm scales towards zero;
`block_then_channel` drops blocks, then channels, round by round; `YOLOv3` is the detector, `YOLOLoss` what it is
trained by, `class_weights` the balance of its classes, `mean_average_precision` what it is judged by.
"""

from convette.pruning.yolov3_block_channel.detection import (
    YOLOLoss,
    assigned_anchors,
    box_overlap,
    detections,
    mean_average_precision,
)
from convette.pruning.yolov3_block_channel.detector import ANCHORS, YOLOv3, class_weights, decode
from convette.pruning.yolov3_block_channel.factors import SparseFactors, branch_norms, fold_factors, soft_threshold
from convette.pruning.yolov3_block_channel.rounds import BlockChannelResult, BlockChannelSettings, block_then_channel

__all__ = [
    "ANCHORS",
    "BlockChannelResult",
    "BlockChannelSettings",
    "SparseFactors",
    "YOLOLoss",
    "YOLOv3",
    "assigned_anchors",
    "block_then_channel",
    "box_overlap",
    "branch_norms",
    "class_weights",
    "decode",
    "detections",
    "fold_factors",
    "mean_average_precision",
    "soft_threshold",
]

"""Edge split: a network cut in two, its head on the device, its tail on a server, a narrow bottleneck between them.

A bottleneck of a few channels, sent in 8 bits, takes the place of an early stage and is trained to imitate it
(`inject`, `distil_head`); a small filter on the device says when there is nothing worth sending (`NeuralFilter`); `cut`
makes head and tail of any network at any edge where one tensor crosses; `EdgeServer` and `EdgeClient` run them over a
loopback socket, and `ShapedLink` gives that link a rate and a delay. When the link fails, the client answers by itself.

Source: Y. Matsubara, M. Levorato, Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
Challenged Networks, ICPR 2020, arXiv 2007.15818.
"""

from convette.runtime.edge_split.bottleneck import Bottleneck, NeuralFilter, distil_head, inject, pick_threshold
from convette.runtime.edge_split.codec import decode, dequantize, encode, quantize
from convette.runtime.edge_split.cutting import Cut, CutPoint, cut, cut_points
from convette.runtime.edge_split.delay import EdgeDelay
from convette.runtime.edge_split.jpeg import from_jpeg, to_jpeg
from convette.runtime.edge_split.link import ShapedLink
from convette.runtime.edge_split.serving import Answer, EdgeClient, EdgeServer

__all__ = [
    "Answer",
    "Bottleneck",
    "Cut",
    "CutPoint",
    "EdgeClient",
    "EdgeDelay",
    "EdgeServer",
    "NeuralFilter",
    "ShapedLink",
    "cut",
    "cut_points",
    "decode",
    "dequantize",
    "distil_head",
    "encode",
    "from_jpeg",
    "inject",
    "pick_threshold",
    "quantize",
    "to_jpeg",
]

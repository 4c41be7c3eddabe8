"""Names for the array shapes that many rooms share: n images, c channels, h rows, w columns."""

from typing import TypeAlias

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

ImageBytes: TypeAlias = UInt8[Tensor, "n c h w"]
Images: TypeAlias = Float[Tensor, "n c h w"]
Logits: TypeAlias = Float[Tensor, "n classes"]
Labels: TypeAlias = Int64[Tensor, " n"]

"""An ``nn.MultiheadAttention`` whose number of heads does not follow from its width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FreeHeadAttention(nn.MultiheadAttention):
    """Multi-head attention after heads or channels were removed: same parameters, sizes taken from their shapes.

    ``in_proj_weight`` is (3 · heads · d, width), ``out_proj.weight`` is (width, heads · d). Made by changing the class
    of an ``nn.MultiheadAttention``, never constructed.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values and, if asked for, the attention weights."""
        if self.batch_first or query.dim() == 2:
            parts = (query, key, value)
        else:
            parts = tuple(tensor.transpose(0, 1) for tensor in (query, key, value))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.unflatten(0, (3, -1)).unbind(0)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.unflatten(0, (3, -1)).unbind(0)
        else:
            biases = (None, None, None)
        q, k, v = (
            F.linear(tensor, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for tensor, weight, bias in zip(parts, weights, biases, strict=True)
        )
        mask = _joined_mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores + mask
            attention = scores.softmax(-1)
            out = F.dropout(attention, self.dropout, self.training) @ v
        else:
            attention = None
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        out = F.linear(out.transpose(-2, -3).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not self.batch_first and query.dim() == 3:
            out = out.transpose(0, 1)
        if attention is not None and average_attn_weights:
            attention = attention.mean(-3)
        return out, attention


def _joined_mask(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Return one additive mask of both, in a shape that broadcasts to (batch, heads, queries, keys)."""
    result = None
    if mask is not None:
        result = _additive(mask, query)
        if result.dim() == 3 and query.dim() == 4:
            result = result.unflatten(0, (query.shape[0], -1))
    if padding is not None:
        extra = _additive(padding, query)
        extra = extra[:, None, None, :] if query.dim() == 4 else extra[None, None, :]
        result = extra if result is None else result + extra
    return result


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(query.dtype)

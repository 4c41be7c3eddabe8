"""Tensors as bytes for the wire: eight bits a number, a header with checked sizes, nothing that could be executed."""

import struct

import numpy as np

from convette.errors import DataError

MAGIC = b"CVZ1"
_HEADER = struct.Struct("<4sBBHff")  # magic, kind, dimensions, reserved, scale, zero
_KINDS: dict[int, str] = {0: "u1", 1: "<f4", 2: "<f2"}
_MOST_DIMENSIONS = 4
MOST_BYTES = 1 << 26


def quantize(values: np.ndarray, clip: float | int = 0.0) -> tuple[np.ndarray, float, float]:
    r"""Return `values` as bytes with their scale and smallest value: :math:`q = \mathrm{round}((z - z_0)/s)`.

    .. math:: s = (\max - \min) / 255, \qquad |z - \hat z| \le s/2

    `clip`: the share of the values on each side that is cut off first (0.001 makes single outliers harmless). Raises
    `DataError` for values that are not finite.
    """
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise DataError("the tensor to send holds values that are not finite (NaN or infinity).")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if clip:
        low, high = (float(x) for x in np.quantile(values, [clip, 1 - clip]))
    scale = (high - low) / 255 or 1.0
    return np.clip(np.rint((values - low) / scale), 0, 255).astype(np.uint8), scale, low


def dequantize(q: np.ndarray, scale: float | int, low: float | int) -> np.ndarray:
    """Return the values that `quantize` rounded."""
    return q.astype(np.float32) * np.float32(scale) + np.float32(low)


def encode(values: np.ndarray, bits: int = 8, clip: float | int = 0.0) -> bytes:
    """Return `values` as a message: header (16 bytes and 4 a dimension), then 1, 2 or 4 bytes a number.

    `bits` 8: `quantize`; 16 and 32: as floats; uint8 arrays go as they are.
    """
    values = np.asarray(values)
    scale, low = 1.0, 0.0
    if values.dtype == np.uint8:
        kind, payload = 0, values
    elif bits == 8:
        kind, (payload, scale, low) = 0, quantize(values, clip)
    elif bits in (16, 32):
        kind = 2 if bits == 16 else 1
        payload = values.astype(_KINDS[kind])
    else:
        raise DataError(f"bits = {bits}: 8, 16 and 32 can be sent.")
    if values.ndim > _MOST_DIMENSIONS:
        raise DataError(f"a tensor of {values.ndim} dimensions cannot be sent; {_MOST_DIMENSIONS} at most.")
    shape = struct.pack(f"<{values.ndim}I", *values.shape)
    return _HEADER.pack(MAGIC, kind, values.ndim, 0, scale, low) + shape + np.ascontiguousarray(payload).tobytes()


def decode(message: bytes) -> np.ndarray:
    """Return the tensor in a message (uint8 stays uint8 where it was sent so, that is with scale 1 from 0).

    Everything is checked before a number is read. Raises `DataError` for what is no message of ours, a size that does
    not fit its bytes, or a scale that is not finite.
    """
    if len(message) < _HEADER.size or message[:4] != MAGIC:
        raise DataError("the message is no tensor of convette's: it does not begin with its sign.")
    _, kind, dimensions, _, scale, low = _HEADER.unpack_from(message)
    if kind not in _KINDS or dimensions > _MOST_DIMENSIONS or len(message) < _HEADER.size + 4 * dimensions:
        raise DataError(f"the message's header is damaged (kind {kind}, {dimensions} dimensions).")
    shape = struct.unpack_from(f"<{dimensions}I", message, _HEADER.size)
    dtype, start = np.dtype(_KINDS[kind]), _HEADER.size + 4 * dimensions
    count = 1
    for side in shape:
        count *= side
    if count * dtype.itemsize > MOST_BYTES or len(message) - start != count * dtype.itemsize:
        raise DataError(f"the message's size does not fit its shape {shape}: {len(message) - start} bytes follow.")
    if not (np.isfinite(scale) and np.isfinite(low) and scale > 0):
        raise DataError("the message's scale is not a positive number.")
    values = np.frombuffer(message, dtype, count, start).reshape(shape)
    if kind == 0:
        return values.copy() if (scale, low) == (1.0, 0.0) else dequantize(values, scale, low)
    return values.astype(np.float32)

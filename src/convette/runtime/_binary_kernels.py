"""Kernels of the binary engine, written as loops for Numba; see `convette.runtime._compiling`."""

import numpy as np

_ODD, _PAIRS, _NIBBLES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_SUM, _TOP = np.uint64(0x0101010101010101), np.uint64(56)
_ONE, _TWO, _FOUR = np.uint64(1), np.uint64(2), np.uint64(4)


def pack_signs(x, threshold, pad_rows, pad_columns, filling, words):  # type: ignore[no-untyped-def]
    """Return the signs of ``x`` (n c h w) as words of 64 channels (n rows columns words), padded by `filling`."""
    n, c, h, w = x.shape
    packed = np.zeros((n, h + 2 * pad_rows, w + 2 * pad_columns, words), np.uint64)
    if filling:
        for image in range(n):
            for row in range(packed.shape[1]):
                for column in range(packed.shape[2]):
                    inside = pad_rows <= row < h + pad_rows and pad_columns <= column < w + pad_columns
                    if not inside:
                        for channel in range(c):
                            packed[image, row, column, channel >> 6] |= np.uint64(1) << np.uint64(channel & 63)
    line = np.zeros(w, np.uint64)
    for image in range(n):
        for row in range(h):
            for word in range(words):
                line[:] = 0
                for channel in range(word * 64, min(c, word * 64 + 64)):
                    bit, least = np.uint64(channel & 63), threshold[channel]
                    for column in range(w):
                        line[column] |= np.uint64(x[image, channel, row, column] - least >= 0) << bit
                for column in range(w):
                    packed[image, row + pad_rows, column + pad_columns, word] = line[column]
    return packed


def convolve(packed, weights, size, pads, strides, dilations, channels, skip_padding, out):  # type: ignore[no-untyped-def]
    """Fill `out` (n rows columns filters, int32) with ``n - 2 popcount(x xor w)`` of the signs.

    `packed` (n rows columns words) as `pack_signs` gives it, `weights` (taps words filters): the filters run fastest,
    so that eight are counted at once. With `skip_padding` taps outside the image count nothing.
    """
    n, rows, columns, filters = out.shape
    words = packed.shape[3]
    height, width = packed.shape[1] - 2 * pads[0], packed.shape[2] - 2 * pads[1]
    counts = np.zeros(filters, np.uint64)
    for image in range(n):
        for row in range(rows):
            for column in range(columns):
                counts[:] = 0
                taps = 0
                for i in range(size[0]):
                    y = row * strides[0] + i * dilations[0]
                    if skip_padding and not (pads[0] <= y < height + pads[0]):
                        continue
                    for j in range(size[1]):
                        x = column * strides[1] + j * dilations[1]
                        if skip_padding and not (pads[1] <= x < width + pads[1]):
                            continue
                        taps += 1
                        tap = i * size[1] + j
                        for word in range(words):
                            bits = packed[image, y, x, word]
                            for f in range(filters):
                                # The number of set bits, in the form that compilers make one instruction of.
                                differing = bits ^ weights[tap, word, f]
                                differing = differing - ((differing >> _ONE) & _ODD)
                                differing = (differing & _PAIRS) + ((differing >> _TWO) & _PAIRS)
                                differing = (differing + (differing >> _FOUR)) & _NIBBLES
                                counts[f] += (differing * _SUM) >> _TOP
                total = taps * channels
                for f in range(filters):
                    out[image, row, column, f] = total - 2 * np.int64(counts[f])

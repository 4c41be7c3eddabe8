"""Kernels of the sparse engine, written as loops for Numba; see `convette.runtime._compiling`.

Positions of an image run fastest, and are what the vector units take. Non-zeros are taken four at a time, so that what
is added up stays in registers or the first cache.
"""

import numpy as np

STRIP = 128  # positions worked on at once


def multiply(x, first, deltas, counts, values, low, high, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (filters positions) with the sparse product of packed weights and ``x`` (channels positions).

    The channel moves on by `deltas`, one for each non-zero; `counts` says how many non-zeros a filter has, `values`
    holds its bias and them. What comes out is clamped to ``low ... high``.
    """
    positions = x.shape[1]
    total = np.empty(STRIP, np.float32)
    start = 0
    while start < positions:
        # The last strip overlaps the one before: the same values once more, in whole vectors.
        begin = max(0, min(start, positions - STRIP))
        size = min(STRIP, positions - begin)
        channel, k, v = first, 0, 0
        for f in range(counts.shape[0]):
            count = counts[f]
            bias = values[v]
            v += 1
            for q in range(STRIP):
                total[q] = bias
            done = 0
            while done + 4 <= count:
                a = channel
                b = a + deltas[k]
                c = b + deltas[k + 1]
                d = c + deltas[k + 2]
                channel = d + deltas[k + 3]
                va, vb, vc, vd = values[v], values[v + 1], values[v + 2], values[v + 3]
                if size == STRIP:  # a length known beforehand makes faster code
                    for q in range(STRIP):
                        total[q] += (
                            va * x[a, begin + q] + vb * x[b, begin + q] + vc * x[c, begin + q] + vd * x[d, begin + q]
                        )
                else:
                    for q in range(size):
                        total[q] += (
                            va * x[a, begin + q] + vb * x[b, begin + q] + vc * x[c, begin + q] + vd * x[d, begin + q]
                        )
                k += 4
                v += 4
                done += 4
            while done < count:
                value = values[v]
                for q in range(size):
                    total[q] += value * x[channel, begin + q]
                channel += deltas[k]
                k += 1
                v += 1
                done += 1
            for q in range(size):
                out[f, begin + q] = min(max(total[q], low), high)
        start += STRIP


def multiply_blocks(x, first, deltas, counts, values, block, low, high, out):  # type: ignore[no-untyped-def]
    """`multiply` for blocks of `block` filters that share their non-zeros' places; see `pack_sparse_1x1`."""
    positions, filters = x.shape[1], out.shape[0]
    total = np.empty((4, STRIP), np.float32)
    start = 0
    while start < positions:
        begin = max(0, min(start, positions - STRIP))
        size = min(STRIP, positions - begin)
        channel, k, v, f = first, 0, 0, 0
        for group in range(counts.shape[0]):
            rows = block if f + block <= filters else 1
            for r in range(rows):
                for q in range(STRIP):
                    total[r, q] = values[v + r]
            v += rows
            for _ in range(counts[group]):
                if rows == 4 and size == STRIP:
                    va, vb, vc, vd = values[v], values[v + 1], values[v + 2], values[v + 3]
                    for q in range(STRIP):
                        here = x[channel, begin + q]
                        total[0, q] += va * here
                        total[1, q] += vb * here
                        total[2, q] += vc * here
                        total[3, q] += vd * here
                elif rows == 2 and size == STRIP:
                    va, vb = values[v], values[v + 1]
                    for q in range(STRIP):
                        here = x[channel, begin + q]
                        total[0, q] += va * here
                        total[1, q] += vb * here
                else:
                    for r in range(rows):
                        value = values[v + r]
                        for q in range(size):
                            total[r, q] += value * x[channel, begin + q]
                channel += deltas[k]
                k += 1
                v += rows
            for r in range(rows):
                for q in range(size):
                    out[f + r, begin + q] = min(max(total[r, q], low), high)
            f += rows
        start += STRIP


def depthwise(x, weights, bias, stride, low, high, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (channels rows columns) with each channel of `x` convolved by its own filter, padded to the same."""
    channels, height, width = x.shape
    size = weights.shape[1]
    pad = size // 2
    rows, columns = out.shape[1], out.shape[2]
    line = np.empty(columns, np.float32)
    for c in range(channels):
        for y in range(rows):
            for column in range(columns):
                line[column] = bias[c]
            for i in range(size):
                row = y * stride + i - pad
                if row < 0 or row >= height:
                    continue
                for j in range(size):
                    shift, weight = j - pad, weights[c, i, j]
                    begin = 0 if shift >= 0 else (stride - 1 - shift) // stride
                    end = min(columns, (width - 1 - shift) // stride + 1)
                    # Slices, because an index that might be negative is looked at each time.
                    here = x[c, row, begin * stride + shift :]
                    there = line[begin:end]
                    if stride == 1:
                        for column in range(end - begin):
                            there[column] += weight * here[column]
                    else:
                        for column in range(end - begin):
                            there[column] += weight * here[2 * column]
            for column in range(columns):
                out[c, y, column] = min(max(line[column], low), high)

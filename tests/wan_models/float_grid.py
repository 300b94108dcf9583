"""Small float formats by their definition, in float64: the reference of the quantisation tests."""

from __future__ import annotations

import bisect
import functools
import math


@functools.cache
def values(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """The non-negative values of a format, by code: 0, 1, 2, ... up to ``largest``."""
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                found.append(fraction * 2.0 ** (1 - bias))
            else:
                found.append((1 + fraction) * 2.0 ** (exponent - bias))
    return [value for value in found if value <= largest]


def e4m3() -> list[float]:
    return values(4, 3, 7, 448.0)


def e5m2() -> list[float]:
    return values(5, 2, 15, 57344.0)


def e2m1() -> list[float]:
    return values(2, 1, 1, 6.0)


def nearest_code(x: float, grid: list[float]) -> int:
    """Code of the value nearest to |x|: of two as near the even one, beyond the end the last."""
    size = min(abs(x), grid[-1])
    above = bisect.bisect_left(grid, size)
    if above == 0 or grid[above] == size:
        return above
    below = above - 1
    to_below, to_above = size - grid[below], grid[above] - size
    if to_below == to_above:
        return below if below % 2 == 0 else above
    return below if to_below < to_above else above


def rounded(x: float, grid: list[float]) -> float:
    """``x`` rounded to the format, with its sign."""
    return math.copysign(grid[nearest_code(x, grid)], x)

"""Arithmetic on every number of an array, fused into few passes: on a CPU, MLX computes `exp` one number at a time.

Fused where a C++ compiler is at hand; without one the same operations run one after the other.
"""

import logging
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

logger = logging.getLogger(__name__)

_ROUND = 1.5 * 2**23  # added to a small float32 it leaves the nearest integer in the low bits
_LOG2_E = 1.4426950408889634
LARGEST_EXPONENT = 126.0  # of what `exp2` takes, either way
# 2^f for f in [-1/2, 1/2]: the polynomial of degree 5 whose largest relative error is least, 7.5e-8, as the product
# C (f + R) (f^2 + A0 f + B0) (f^2 + A1 f + B1), which has the fewest steps one after the other.
_C, _R = 0.0013276471520, 3.1719636441150
_A0, _B0 = -0.6816276875410, 20.3613574894253
_A1, _B1 = 4.7973995807821, 11.6622523087491


def exp2(x: mx.array) -> mx.array:
    """2^x for float32 between -126 and 126; nothing sensible beyond."""
    shifted, rest = _fused(_split)(x)
    power = _fused(_power)(rest)
    bits: mx.array = _fused(_add_exponent)(shifted.view(mx.int32), power.view(mx.int32))
    return bits.view(mx.float32)


def clamp(x: mx.array) -> mx.array:
    """x, moved into the range of `exp2`."""
    result: mx.array = _fused(_clamp)(x)
    return result


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    result: mx.array = _fused(_gated)(gate, up, exp2(_fused(_negative_log2)(gate)))
    return result


def rotate(x: mx.array, swapped: mx.array, factor: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """(x*cos + swapped*sin) * factor."""
    result: mx.array = _fused(_rotate)(x, swapped, factor, cos, sin)
    return result


def scale(x: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """x*rows*columns, which have a number for each row and for each column."""
    result: mx.array = _fused(_scale)(x, rows, columns)
    return result


# MLX joins at most eleven operations, and counts every broadcast of a number as one: each function below is as much as
# goes into one pass. Comparisons with `where` become vector instructions, `maximum` does not.


def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    shifted = x + _ROUND
    return shifted, x - (shifted - _ROUND)


def _power(f: mx.array) -> mx.array:
    square = mx.square(f)
    return ((square + _A0 * f) + _B0) * ((square + _A1 * f) + _B1) * (_C * f + _C * _R)


def _add_exponent(shifted: mx.array, power: mx.array) -> mx.array:
    """power * 2^n, by adding n, which stands in the low bits of `shifted`, to the exponent."""
    return mx.left_shift(shifted, 23) + power


def _clamp(x: mx.array) -> mx.array:
    x = mx.where(x < -LARGEST_EXPONENT, -LARGEST_EXPONENT, x)
    return mx.where(x > LARGEST_EXPONENT, LARGEST_EXPONENT, x)


def _negative_log2(gate: mx.array) -> mx.array:
    return _clamp(gate * -_LOG2_E)


def _gated(gate: mx.array, up: mx.array, exponential: mx.array) -> mx.array:
    return gate * up / (1.0 + exponential)


def _rotate(x: mx.array, swapped: mx.array, factor: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + swapped * sin) * factor


def _scale(x: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    return x * rows * columns


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return mx.compile(function, shapeless=True) if _can_compile() else function


@cache
def _can_compile() -> bool:
    """Whether MLX can build kernels here: a compiler that cannot be used would fail in the middle of a request."""
    if shutil.which("g++") is None:
        return False
    try:
        mx.eval(mx.compile(_gated, shapeless=True)(mx.ones(2), mx.ones(2), mx.ones(2)))
    except RuntimeError as error:
        logger.warning("MLX cannot build fused kernels, requests take a little longer: %s", error)
        return False
    return True

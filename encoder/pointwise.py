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
# 2^f for f in [-1/2, 1/2]: the polynomial of degree 5 whose largest relative error is least, 7.5e-8.
_P0, _P1, _P2 = 1.0000000716546, 0.6931469670639, 0.2402211972393
_P3, _P4, _P5 = 0.0555071327496, 0.0096755413307, 0.0013276471520


def exp2(x: mx.array) -> mx.array:
    """2^x for x <= 0, float32; below 2^-126 it is 2^-126, which no sum notices."""
    shifted, power = _fused(_exp2_parts)(x)
    return _scale(shifted, power)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    shifted, power = _fused(_exp2_negated)(gate)
    result: mx.array = _fused(_gated)(gate, up, _scale(shifted, power))
    return result


def rotate(x: mx.array, swapped: mx.array, factor: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """(x*cos + swapped*sin) * factor."""
    result: mx.array = _fused(_rotate)(x, swapped, factor, cos, sin)
    return result


def _exp2_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    x = mx.maximum(x, -126.0)
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    square = f * f
    return shifted, (_P0 + _P1 * f) + square * ((_P2 + _P3 * f) + square * (_P4 + _P5 * f))


def _exp2_negated(gate: mx.array) -> tuple[mx.array, mx.array]:
    return _exp2_parts(mx.minimum(gate * -_LOG2_E, 126.0))


def _scale(shifted: mx.array, power: mx.array) -> mx.array:
    """power * 2^n, by adding n, which stands in the low bits of `shifted`, to the exponent."""
    bits: mx.array = _fused(_add_exponent)(shifted.view(mx.int32), power.view(mx.int32))
    return bits.view(mx.float32)


def _add_exponent(shifted: mx.array, power: mx.array) -> mx.array:
    return mx.left_shift(shifted, 23) + power


def _gated(gate: mx.array, up: mx.array, exponential: mx.array) -> mx.array:
    return gate * up / (1.0 + exponential)


def _rotate(x: mx.array, swapped: mx.array, factor: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + swapped * sin) * factor


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

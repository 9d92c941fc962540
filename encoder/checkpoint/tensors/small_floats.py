"""Floats of 4, 6 and 8 bits as float32.

Source: OCP Microscaling Formats (MX) 1.0, 5.3; OCP 8-bit Floating Point (OFP8) 1.0.
"""

import mlx.core as mx

FLOAT8 = ("F8_E4M3", "F8_E5M2")  # dtypes as safetensors spells them
EXPONENTS = ("U8", "F8_E8M0")  # of powers of two; the first where a writer's library does not know the second

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M3 = (*(m / 8 for m in range(8)), *((1 + m / 8) * 2**e for e in range(3) for m in range(8)))


def float4_e2m1(codes: mx.array) -> mx.array:
    """From codes in [0, 16), the sign in the highest bit."""
    return _with_negatives(_E2M1)[codes]


def float6_e2m3(codes: mx.array) -> mx.array:
    """From codes in [0, 64), the sign in the highest bit."""
    return _with_negatives(_E2M3)[codes]


def float8(data: mx.array, dtype: str) -> mx.array:
    """From bytes. A NaN among exponents, 255, becomes infinity, which the loader finds too.

    Args:
        data: uint8.
        dtype: one of FLOAT8, or F8_E8M0, a power of two without a sign.
    """
    if dtype == "F8_E4M3":
        return mx.from_fp8(data, dtype=mx.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (data.astype(mx.uint16) << 8).view(mx.float16).astype(mx.float32)
    assert dtype == "F8_E8M0"
    exponents = data.astype(mx.uint32) << 23
    return mx.where(data == 0, mx.array(0x00400000, mx.uint32), exponents).view(mx.float32)  # 2 ** -127 is subnormal


def _with_negatives(table: tuple[float, ...]) -> mx.array:
    return mx.array([*table, *(-value for value in table)], mx.float32)

"""The operations of a Qwen3 layer that MLX has no single kernel for: as CUDA kernels, and in MLX's own operations.

`MlxKernels` runs everywhere and is the reference that `CudaKernels` is tested against. The CUDA sources lie beside this
file. Knows nothing of weights and jobs.

Shape letters: T rows, D hidden size, H attention heads, K key-value heads, d head_dim, F intermediate size.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from encoder.qwen3.config import Qwen3Config

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
DTYPE = mx.bfloat16  # rows before their norm overflow float16
HEAD_DIMS = (64, 128)
SIZE_MULTIPLE = 8  # of hidden_size and intermediate_size: a thread reads so many numbers at once
QUERY_BLOCK_ROWS = 64  # queries of one thread block


class Kernels(Protocol):
    """The part of a layer between its matrix products.

    The products take rows x (T, D) before their RMSNorm, whose weight is in the matrices; these operations divide by
    the RMS of x. `traceable` says whether mx.compile can trace them: they read no number while they are described.
    """

    traceable: bool

    def finish_heads(
        self, x: mx.array, qkv: mx.array, q_norm: mx.array, k_norm: mx.array, cos_sin: mx.array
    ) -> mx.array:
        """Apply the norm of x to all heads, then RMSNorm and RoPE to queries and keys: (T, (H+2K)*d) to the same.

        Args:
            q_norm, k_norm: (d,) weights.
            cos_sin: (T, d) float32, the cosine of RoPE's angle for each pair of a head, then the sine.
        """

    def attend(self, qkv: mx.array, query_blocks: mx.array) -> mx.array:
        """Attention: (T, (H+2K)*d) to (T, H*d).

        Args:
            query_blocks: (n, 5) int32, up to QUERY_BLOCK_ROWS queries each: first row, rows, first key, keys, and the
                position of the first row in its sequence. A row at position i attends to the keys up to i; a row
                without keys gets zeros.
        """

    def swiglu(self, x: mx.array, gate_up: mx.array) -> mx.array:
        """Apply the norm of x to gate and up, then silu(gate) * up: (T, 2F) to (T, F)."""


class MlxKernels:
    """In MLX's own operations, computed in float32."""

    traceable = False  # `attend` reads its query blocks

    def __init__(self, config: Qwen3Config) -> None:
        self.config = config

    def finish_heads(
        self, x: mx.array, qkv: mx.array, q_norm: mx.array, k_norm: mx.array, cos_sin: mx.array
    ) -> mx.array:
        c, (cos, sin) = self.config, mx.split(cos_sin[:, None], 2, axis=-1)  # (T, 1, d/2)
        heads = (qkv * self._inverse_rms(x)).reshape(len(qkv), -1, c.head_dim)  # (T, H+2K, d)
        q, k, v = mx.split(heads, [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads], axis=1)
        normed = [
            mx.fast.rms_norm(q, None, c.rms_norm_eps) * q_norm,
            mx.fast.rms_norm(k, None, c.rms_norm_eps) * k_norm,
        ]
        first, second = mx.split(mx.concatenate(normed, axis=1), 2, axis=-1)
        rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return mx.concatenate([rotated, v], axis=1).reshape(qkv.shape).astype(qkv.dtype)

    def attend(self, qkv: mx.array, query_blocks: mx.array) -> mx.array:
        c, heads = self.config, qkv.reshape(len(qkv), -1, self.config.head_dim).swapaxes(0, 1).astype(mx.float32)
        q, k, v = mx.split(heads, [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads])
        out = mx.zeros((len(qkv), c.num_attention_heads * c.head_dim), qkv.dtype)
        for row, rows, key, keys, position in np.array(query_blocks).tolist():
            if keys == 0:
                continue
            hidden = mx.arange(keys) > position + mx.arange(rows)[:, None]
            attended = mx.fast.scaled_dot_product_attention(
                q[None, :, row : row + rows],
                k[None, :, key : key + keys],
                v[None, :, key : key + keys],
                scale=c.head_dim**-0.5,
                mask=~hidden,
            )
            out[row : row + rows] = attended[0].swapaxes(0, 1).reshape(rows, -1)
        return out

    def swiglu(self, x: mx.array, gate_up: mx.array) -> mx.array:
        gate, up = mx.split(gate_up * self._inverse_rms(x), 2, axis=-1)
        return (gate * mx.sigmoid(gate) * up).astype(gate_up.dtype)

    def _inverse_rms(self, x: mx.array) -> mx.array:
        squares = mx.square(x.astype(mx.float32)).mean(axis=-1, keepdims=True)
        return mx.rsqrt(squares + self.config.rms_norm_eps)  # (T, 1) float32


class CudaKernels:
    """As CUDA kernels in bfloat16, compiled when they first run.

    Errors: RuntimeError when the result of a kernel that cannot be compiled is evaluated.
    """

    traceable = True

    def __init__(self, config: Qwen3Config) -> None:
        self.width = config.num_attention_heads * config.head_dim
        self.qkv_width = self.width + 2 * config.num_key_value_heads * config.head_dim
        self.heads = config.num_attention_heads
        self.intermediate_size = config.intermediate_size
        constants = (
            f"using T = __nv_bfloat16; constexpr float EPS = {config.rms_norm_eps:e}f;"
            f"constexpr int HIDDEN = {config.hidden_size}, F = {config.intermediate_size}, D = {config.head_dim},"
            f"H = {config.num_attention_heads}, K = {config.num_key_value_heads};\n"
        )
        self._finish_heads = cuda_kernel("finish_heads", ["x", "qkv", "q_norm", "k_norm", "cos_sin"], constants)
        self._attend = cuda_kernel("attend", ["qkv", "query_blocks"], constants)
        self._swiglu = cuda_kernel("swiglu", ["x", "gate_up"], constants)

    def finish_heads(
        self, x: mx.array, qkv: mx.array, q_norm: mx.array, k_norm: mx.array, cos_sin: mx.array
    ) -> mx.array:
        rows = x.shape[0]
        return self._finish_heads(  # type: ignore[no-any-return]
            inputs=[x, qkv, q_norm, k_norm, cos_sin],
            grid=(512 * rows, 1, 1),
            threadgroup=(512, 1, 1),
            output_shapes=[(rows, self.qkv_width)],
            output_dtypes=[DTYPE],
        )[0]

    def attend(self, qkv: mx.array, query_blocks: mx.array) -> mx.array:
        threads = 2 * QUERY_BLOCK_ROWS
        return self._attend(  # type: ignore[no-any-return]
            inputs=[qkv, query_blocks],
            grid=(threads * self.heads, query_blocks.shape[0], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(qkv.shape[0], self.width)],
            output_dtypes=[DTYPE],
        )[0]

    def swiglu(self, x: mx.array, gate_up: mx.array) -> mx.array:
        rows = x.shape[0]
        parts = max(1, min(4, 512 // rows))  # with few rows, one block for each would leave most of the GPU idle
        return self._swiglu(  # type: ignore[no-any-return]
            inputs=[x, gate_up],
            grid=(256 * rows, parts, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[(rows, self.intermediate_size)],
            output_dtypes=[DTYPE],
        )[0]


def build_kernels(config: Qwen3Config) -> CudaKernels | None:
    """Compile the kernels, which takes some seconds; None where they do not support the dims or cannot be compiled."""
    if (
        config.head_dim not in HEAD_DIMS
        or config.hidden_size % SIZE_MULTIPLE
        or config.intermediate_size % SIZE_MULTIPLE
    ):
        return None
    kernels = CudaKernels(config)
    x, norm = mx.zeros((1, config.hidden_size), DTYPE), mx.zeros(config.head_dim, DTYPE)
    qkv = mx.zeros((1, kernels.qkv_width), DTYPE)
    try:
        qkv = kernels.finish_heads(x, qkv, norm, norm, mx.zeros((1, config.head_dim)))
        attended = kernels.attend(qkv, mx.array([[0, 1, 0, 1, 0]], mx.int32))
        mx.eval(attended, kernels.swiglu(x, mx.zeros((1, 2 * config.intermediate_size), DTYPE)))
    except RuntimeError as error:
        logger.warning("MLX cannot build CUDA kernels, requests take about twice as long: %s", error)
        return None
    return kernels


def cuda_kernel(name: str, inputs: list[str], constants: str = "", call: str | None = None) -> Any:
    """The kernel in the file of that name beside this one. It writes `out` and is compiled when it first runs.

    The source is included by path: MLX would copy and hash a source text in every call.

    Args:
        constants: definitions that the source needs.
        call: the arguments before `out`, as an expression; None means the inputs.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SOURCES.glob("*.cuh")))).hexdigest()
    version = f"// {digest}: so that a change of the sources is a new kernel to any cache of compiled ones\n"
    return mx.fast.cuda_kernel(
        name=f"qwen3_{name}",
        input_names=inputs,
        output_names=["out"],
        header=f'{version}{constants}#include "{(SOURCES / name).as_posix()}.cuh"\n',
        source=f"{name}({call or ', '.join(inputs)}, out);",
    )

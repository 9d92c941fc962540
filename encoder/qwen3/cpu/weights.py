"""A loaded model's layers, prepacked for the CPU kernels."""

import ctypes
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.kernels.library import Dims, Kernels, Layer, Matrix
from encoder.qwen3.model import DecoderLayer, Qwen3


class CpuWeights:
    """Takes the layers of a model over: the model's own list is empty afterwards.

    No more than one layer is in memory twice.

    Args:
        model: loaded; matrices all float32 or all bfloat16, norms float32, no biases, no attention sinks.
        kernels: that will run them.
        threads: that share the work.
    Attributes:
        dims: of all layers.
    Errors: ValueError where matrices have several dtypes.
    """

    def __init__(self, model: Qwen3, kernels: Kernels, threads: int) -> None:
        self.dims = _dims(model)
        self._layers = (Layer * len(model.layers))()
        self._arrays: list[Any] = []  # what the layers point to
        for index in range(len(self._layers)):
            self._layers[index] = self._prepack(model.layers.pop(0), model.config, kernels, threads)
            mx.clear_cache()  # else MLX keeps the memory of the layer

    def from_layer(self, first: int) -> Any:
        """A pointer to the layers from `first` on."""
        return ctypes.byref(self._layers, first * ctypes.sizeof(Layer))

    def _prepack(self, layer: DecoderLayer, config: Qwen3Config, kernels: Kernels, threads: int) -> Layer:
        # The kernels compute softmax with powers of two, so the factor of the scores is in log2.
        scale = np.float32(math.log2(math.e) / math.sqrt(config.head_dim))
        q, k, v, o, gate, up, down = matrices = [_numbers(projection) for projection in layer.projections]
        if any((matrix.dtype == np.uint16) != bool(self.dims.bfloat16) for matrix in matrices):
            raise ValueError(
                f"matrices of a layer: found {[str(m.dtype) for m in matrices]}, expected one dtype in all."
            )
        arrays = (
            kernels.prepack([q, k, v], threads),
            kernels.prepack([o], threads),
            kernels.prepack([gate, up], threads, interleave=True),
            kernels.prepack([down], threads),
            _numbers(layer.input_layernorm).copy(),
            _numbers(layer.post_attention_layernorm).copy(),
            _numbers(layer.self_attn.q_norm) * scale,
            _numbers(layer.self_attn.k_norm).copy(),
        )
        self._arrays.append(arrays)
        return Layer(*(array.ctypes.data for array in arrays))


def _dims(model: Qwen3) -> Dims:
    config = model.config
    bfloat16 = bool(model.layers) and model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
    return Dims(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bfloat16=bfloat16,
        rms_norm_eps=config.rms_norm_eps,
    )


def _numbers(module: nn.Module) -> Matrix:
    """A module's weight where it lies; bfloat16 as its bits."""
    weight = module.weight
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)

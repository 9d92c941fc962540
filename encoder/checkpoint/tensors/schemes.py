"""The quantizations that safetensors files hold, as schemes (see assemble.py), in the order in which they are asked."""

from encoder.checkpoint.tensors.assemble import Scheme
from encoder.checkpoint.tensors.comfy_quant import comfy_quant
from encoder.checkpoint.tensors.mlx_quantized import mlx_quantized
from encoder.checkpoint.tensors.scaled import scaled
from encoder.checkpoint.tensors.unsupported import unsupported

SCHEMES: tuple[Scheme, ...] = (mlx_quantized, comfy_quant, scaled, unsupported)

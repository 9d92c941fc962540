"""The schemes by which safetensors files hold quantized weights, in the order in which they are asked."""

from encoder.checkpoint.assemble import Scheme
from encoder.checkpoint.comfy_quant import comfy_quant
from encoder.checkpoint.foreign import foreign
from encoder.checkpoint.mlx_quantized import mlx_quantized
from encoder.checkpoint.scaled import scaled

SCHEMES: tuple[Scheme, ...] = (mlx_quantized, comfy_quant, scaled, foreign)

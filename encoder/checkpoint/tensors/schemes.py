"""The quantizations that safetensors files hold, as schemes (see assemble.py), in the order in which they are asked."""

from encoder.checkpoint.tensors.assemble import Scheme
from encoder.checkpoint.tensors.awq import awq
from encoder.checkpoint.tensors.bitsandbytes import bitsandbytes_4bit, llm_int8
from encoder.checkpoint.tensors.comfy_quant import comfy_quant
from encoder.checkpoint.tensors.gptq import gptq
from encoder.checkpoint.tensors.mlx_quantized import mlx_quantized
from encoder.checkpoint.tensors.scaled import scaled
from encoder.checkpoint.tensors.unsupported import unsupported

SCHEMES: tuple[Scheme, ...] = (
    mlx_quantized,
    bitsandbytes_4bit,
    llm_int8,
    awq,
    gptq,
    comfy_quant,
    scaled,
    unsupported,
)

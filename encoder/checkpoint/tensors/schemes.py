"""The quantizations that safetensors files hold, as schemes (see assemble.py), in the order in which they are asked."""

from encoder.checkpoint.tensors.assemble import Scheme
from encoder.checkpoint.tensors.awq import awq
from encoder.checkpoint.tensors.bitsandbytes import bitsandbytes_4bit, llm_int8
from encoder.checkpoint.tensors.comfy_quant import comfy_quant
from encoder.checkpoint.tensors.compressed_tensors import compressed_tensors
from encoder.checkpoint.tensors.gptq import gptq
from encoder.checkpoint.tensors.mlx_quantized import mlx_quantized
from encoder.checkpoint.tensors.modelopt import modelopt
from encoder.checkpoint.tensors.quanto import quanto
from encoder.checkpoint.tensors.scaled import scaled
from encoder.checkpoint.tensors.sdnq import sdnq
from encoder.checkpoint.tensors.torchao import torchao
from encoder.checkpoint.tensors.unsupported import unsupported

SCHEMES: tuple[Scheme, ...] = (
    mlx_quantized,
    bitsandbytes_4bit,
    llm_int8,
    awq,
    gptq,
    comfy_quant,
    modelopt,
    compressed_tensors,
    quanto,
    torchao,
    sdnq,
    scaled,
    unsupported,
)

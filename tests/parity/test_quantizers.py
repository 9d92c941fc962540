"""Checkpoints that quantization libraries wrote, against transformers with the weights that the same library decodes.

Each library is optional:
pip install auto-round bitsandbytes compressed-tensors nvidia-modelopt optimum-quanto sdnq torchao
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encoder import ModelOptions, TextEncoder
from tests.checkpoints import write_json, write_tokenizer
from tests.parity.random_weights import randomize
from tests.parity.test_transformers import CLOSE, PAD_TOKEN_ID, our_hidden_states, random_prompts, their_hidden_states
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

pytestmark = pytest.mark.parity

DIMS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 300,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
WINDOW = 24
Floats = dict[str, Any]  # the linear layers' weights, as the library decodes them in float32, by parameter name
Write = Callable[[Path, Path], Floats]  # from a folder with the plain model to one with the quantized model


def load(plain: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(plain, **{"dtype": torch.float32, **options})


def linear(model: Any, decode: Callable[[Any], Any]) -> Floats:
    """What `decode` makes of the linear layers."""
    return {
        f"{name}.weight": decode(module).detach().float().clone()
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }


def bitsandbytes(**options: Any) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        functional = pytest.importorskip("bitsandbytes").functional
        config = transformers.BitsAndBytesConfig(**options)
        model = load(plain, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
        if config.load_in_8bit:
            return linear(model, lambda module: functional.int8_vectorwise_dequant(module.weight, module.weight.SCB))
        return linear(model, lambda module: functional.dequantize_4bit(module.weight.data, module.weight.quant_state))

    return write


def auto_round(bits: int, packing: str) -> Write:
    """AutoRound's layer in GPTQ's layout, filled with rounded weights. It decodes by a product with the unit matrix."""

    def write(plain: Path, folder: Path) -> Floats:
        layers = pytest.importorskip(f"auto_round_extension.torch.qlinear_torch{'_zp' if 'gptq' in packing else ''}")
        model = load(plain)
        for name, module in list(model.named_modules()):
            if name.endswith("_proj"):
                layer = layers.QuantLinear(bits, 32, module.in_features, module.out_features, False)
                layer.device = "cpu"  # which one of the two classes reads and never sets
                layer.pack(module, *_scales_and_zeros(module.weight.data, bits), None, device="cpu")
                model.set_submodule(name, layer.eval())
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "auto-round", "packing_format": packing, "bits": bits}
        write_json(folder / "config.json", config)
        for layer in (layer for layer in model.modules() if isinstance(layer, layers.QuantLinear)):
            layer.post_init()
            layer.scales = layer.scales.float()
        return linear(model, lambda layer: layer(torch.eye(layer.infeatures)).T)

    return write


def _scales_and_zeros(weight: Any, bits: int) -> tuple[Any, Any]:
    groups = weight.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


def compressed_tensors(preset: str | None = None, **weights: Any) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor, ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
            preset_name_to_scheme,
        )

        own = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        scheme = preset_name_to_scheme(preset, ["Linear"]) if preset else own
        model = load(plain)
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        quantized = [module for module in model.modules() if getattr(module, "quantization_scheme", None)]
        for module in quantized:
            _calibrate(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

        def decode(module: Any) -> Any:
            state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
            format = module.quantization_scheme.format.value
            if format == "nvfp4-pack-quantized":  # which the library decodes in bfloat16 alone
                return _decode_nvfp4(state)
            return BaseCompressor.get_value_from_registry(format).decompress(state, module.quantization_scheme)[
                "weight"
            ]

        return linear(model, decode)

    return write


def _calibrate(module: Any) -> None:
    """Fill in scales and zero points from the smallest and the largest weights."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, args = module.weight.data, module.quantization_scheme.weights
    whole = None
    if args.strategy == "tensor_group":
        whole = module.weight_global_scale.data = (448 * 6 / weight.abs().max()).reshape(1)
    match args.strategy:
        case "group" | "tensor_group":
            parts, dim = weight.unflatten(-1, (-1, args.group_size)), -1
        case "channel":
            parts, dim = weight.unsqueeze(-2), -1
        case _:
            parts, dim = weight.reshape(1, -1), -1
    scale, zero = calculate_qparams(parts.amin(dim), parts.amax(dim), args, global_scale=whole)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape).to(module.weight_zero_point.dtype)


def _decode_nvfp4(state: Any) -> Any:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    rows, packed = state["weight_packed"].shape
    numbers = unpack_fp4_from_uint8(state["weight_packed"], rows, packed * 2, dtype=torch.float32)
    scales = state["weight_scale"].float() / state["weight_global_scale"].float()
    return numbers * scales.repeat_interleave(16, dim=1)


def modelopt(config: str) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        mtq = pytest.importorskip("modelopt.torch.quantization")
        export = pytest.importorskip("modelopt.torch.export")
        from safetensors.torch import load_file

        tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
        model = mtq.quantize(load(plain), getattr(mtq, config), lambda model: model(input_ids=tokens))
        export.export_hf_checkpoint(model, export_dir=folder)
        state = load_file(folder / "model.safetensors")
        return {key: _decode_modelopt(key, state) for key in state if key.endswith("_proj.weight")}

    return write


def _decode_modelopt(key: str, state: Any) -> Any:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    weight, scale, whole = state[key], state[f"{key}_scale"], state.get(f"{key}_scale_2")
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        if whole is not None:
            tensor = NVFP4QTensor(shape, torch.float32, weight)
            return tensor.dequantize(dtype=torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
        return MXFP4QTensor(shape, torch.float32, weight).dequantize(
            dtype=torch.float32, scale=scale, block_sizes={-1: 32}
        )
    columns = state.get(key.replace("weight", "pre_quant_scale"), torch.ones(1))
    return weight.float() * (scale[:, None] if scale.ndim == 1 else scale) * columns.float()


def quanto(weights: str) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        quanto = pytest.importorskip("optimum.quanto")
        model = load(plain)
        wrapped = quanto.QuantizedModelForCausalLM.quantize(model, weights=getattr(quanto, weights), exclude="lm_head")
        wrapped.save_pretrained(folder)
        return linear(model, lambda module: module.weight.dequantize())

    return write


def torchao(config: Callable[[], Any], dtype: Any = torch.float32) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        pytest.importorskip("torchao")
        model = load(plain, quantization_config=transformers.TorchAoConfig(config()), device_map="cpu", dtype=dtype)
        model.save_pretrained(folder)
        return linear(model, lambda module: module.weight.dequantize())

    return write


def int8_of_torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def float8_of_torchao() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def groups_of_torchao() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def nvfp4_of_torchao() -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


def mxfp8_of_torchao() -> Any:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

    return MXDynamicActivationMXWeightConfig()


def sdnq(**options: Any) -> Write:
    def write(plain: Path, folder: Path) -> Floats:
        config = pytest.importorskip("sdnq").SDNQConfig(**options)
        model = load(plain, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
        return linear(
            model, lambda module: (module.dequantize() if hasattr(module, "sdnq_dequantizer") else module).weight
        )

    return write


GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
WRITERS = [
    pytest.param(bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), id="bitsandbytes-nf4"),
    pytest.param(
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        id="bitsandbytes-nf4-double",
    ),
    pytest.param(bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"), id="bitsandbytes-fp4"),
    pytest.param(bitsandbytes(load_in_8bit=True), id="bitsandbytes-int8"),
    *(
        pytest.param(auto_round(bits, packing), id=f"{packing}-{bits}")
        for bits in (2, 3, 4, 8)
        for packing in ("auto_round:auto_gptq", "auto_round:exllamav2")
    ),
    pytest.param(compressed_tensors(**GROUP), id="compressed-tensors-int4"),
    pytest.param(compressed_tensors(**GROUP, symmetric=False), id="compressed-tensors-int4-zeros"),
    pytest.param(compressed_tensors(num_bits=3, strategy="group", group_size=64), id="compressed-tensors-int3"),
    pytest.param(compressed_tensors(num_bits=8, strategy="channel", symmetric=False), id="compressed-tensors-int8"),
    pytest.param(compressed_tensors(num_bits=8, type="float", strategy="channel"), id="compressed-tensors-float8"),
    pytest.param(compressed_tensors("NVFP4"), id="compressed-tensors-nvfp4"),
    pytest.param(compressed_tensors("MXFP4A16"), id="compressed-tensors-mxfp4"),
    pytest.param(compressed_tensors("MXFP8A16"), id="compressed-tensors-mxfp8"),
    pytest.param(compressed_tensors("MXFP6A16"), id="compressed-tensors-mxfp6"),
    pytest.param(modelopt("NVFP4_DEFAULT_CFG"), id="modelopt-nvfp4"),
    pytest.param(modelopt("MXFP4_DEFAULT_CFG"), id="modelopt-mxfp4"),
    pytest.param(modelopt("FP8_DEFAULT_CFG"), id="modelopt-float8"),
    pytest.param(modelopt("INT8_SMOOTHQUANT_CFG"), id="modelopt-smoothquant"),
    *(pytest.param(quanto(name), id=f"quanto-{name}") for name in ("qint2", "qint4", "qint8", "qfloat8")),
    pytest.param(torchao(int8_of_torchao), id="torchao-int8"),
    pytest.param(torchao(groups_of_torchao), id="torchao-int4-groups"),
    pytest.param(torchao(float8_of_torchao), id="torchao-float8"),
    pytest.param(torchao(nvfp4_of_torchao), id="torchao-nvfp4"),
    pytest.param(torchao(mxfp8_of_torchao, torch.bfloat16), id="torchao-mxfp8"),  # exact: eight bits times 2 ** n
    *(
        pytest.param(sdnq(weights_dtype=name), id=f"sdnq-{name}")
        for name in ("int2", "uint3", "uint4", "int5", "int6", "uint7", "int8", "float8_e4m3fn", "float6_e3m2fn")
    ),
    pytest.param(sdnq(weights_dtype="uint4", use_svd=True), id="sdnq-svd"),
    pytest.param(sdnq(weights_dtype="int8", use_quantized_matmul=True), id="sdnq-transposed"),
    pytest.param(sdnq(weights_dtype="uint4", scale_dtype="float8_e4m3fn"), id="sdnq-small-scales"),
    pytest.param(sdnq(weights_dtype="int4", use_hadamard=True), id="sdnq-rotated"),
]


@pytest.mark.parametrize("write", WRITERS)
def test_hidden_states_are_those_of_the_weights_that_the_library_decodes(tmp_path: Path, write: Write) -> None:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DIMS))
    randomize(model)
    model.bfloat16().save_pretrained(tmp_path / "plain")  # so that every library reads the same numbers
    floats = write(tmp_path / "plain", tmp_path / "quantized")
    write_tokenizer(tmp_path / "quantized")
    encoder = TextEncoder.open(ModelOptions(str(tmp_path / "quantized"), compute_dtype="float32"))
    reference = load(tmp_path / "plain").eval()
    missing = reference.load_state_dict(floats, strict=False).unexpected_keys
    prompts = random_prompts([WINDOW, 7])
    theirs = their_hidden_states(reference, prompts, WINDOW, PAD_TOKEN_ID)

    assert len(floats) == 7 * DIMS["num_hidden_layers"] and not missing
    assert relative_error(our_hidden_states(encoder, prompts, WINDOW), theirs) < CLOSE

"""Reads how weights are quantized, where a quantizer has written that to a file of its own beside config.json.

hf_quant_config.json       ModelOpt: the fields are under `quantization`
quantization_config.json   SDNQ: the section itself
quantize_config.json       AutoGPTQ and GPTQModel: the section without `quant_method`
"""

from pathlib import Path
from typing import Any

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import QUANTIZATION_FILES, is_there

SECTION = "quantization_config"  # of config.json


def with_quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The parsed config.json, with the quantization of the first other file in `folder` if it does not have one itself.

    Errors: CheckpointError for a file that is no JSON object.
    """
    beside = next((folder / name for name in QUANTIZATION_FILES if is_there(folder / name)), None)
    if SECTION in config or beside is None:
        return config
    described = read_json_object(beside)
    match beside.name:
        case "hf_quant_config.json":
            section = described.get("quantization")
            described = {**section, "quant_method": "modelopt"} if isinstance(section, dict) else {}
        case "quantize_config.json":
            described = {"quant_method": "gptq", **described}
    return {**config, SECTION: described}

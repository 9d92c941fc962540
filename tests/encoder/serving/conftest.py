"""A checkpoint of six layers, which opens much faster than the demo's 36."""

import pytest

from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(
        folder,
        num_hidden_layers=6,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        dtype="bfloat16",
    )
    return ModelOptions(str(folder))

"""The files that checkpoints consist of: where they are, how they are fetched, and what stands in their headers."""

import os

# A variable that is set and empty means "not set". huggingface_hub reads its own when it is imported, and would cache
# in the working folder for `HF_HOME=`.
for _name in [name for name, value in os.environ.items() if not value.strip()]:
    if _name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "OLLAMA_", "XDG_")) or _name.lower().endswith(
        "_proxy"
    ):
        del os.environ[_name]

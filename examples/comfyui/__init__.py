"""A node for ComfyUI: prompts to CONDITIONING by a qwen3-encoder service, with no text encoder loaded in ComfyUI."""

from .nodes import Qwen3EncoderRemote

NODE_CLASS_MAPPINGS = {"Qwen3EncoderRemote": Qwen3EncoderRemote}
NODE_DISPLAY_NAME_MAPPINGS = {"Qwen3EncoderRemote": "Qwen3 Encoder (remote)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

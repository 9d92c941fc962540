"""Reads the demo checkpoint, by the word `demo`. It is written as a Hugging Face folder, and read as one."""

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.demo_files import write_demo
from encoder.checkpoint.readers.huggingface import open_folder
from encoder.checkpoint.request import Request


def recognizes(request: Request) -> bool:
    """The word `demo`."""
    return request.source == "demo"


def open_request(request: Request) -> Checkpoint:
    """Describe the demo checkpoint. Writes it first where it is missing."""
    return open_folder(write_demo(request.options.cache_dir), request)

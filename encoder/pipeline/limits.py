"""What one request may ask for, and what the queue and a batch may hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from encoder.errors import InvalidField, RequestTooLarge
from encoder.pipeline.tokenizer import count_chars
from encoder.presets.preset import Preset
from encoder.types import Job

BYTES_PER_NUMBER = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request, of the queue, and of a batch.

    Attributes:
        max_prompts: prompts in a request.
        max_prompt_chars: characters in a prompt, template included.
        max_sequence_length: tokens in a window.
        max_output_bytes: bytes of all hidden states of a request.
        max_tokenizing_chars: characters that may wait to be tokenized, templates included.
        max_queue_tokens: tokens that may wait for the model, padding included.
        max_batch_tokens: tokens in one forward pass, padding included; a longer prompt runs alone.
    """

    max_prompts: int = 64
    max_prompt_chars: int = 32_000
    max_sequence_length: int = 8192
    max_output_bytes: int = 256 * 2**20
    max_tokenizing_chars: int = 8_000_000
    max_queue_tokens: int = 65_536
    max_batch_tokens: int = 4096

    def check_prompts(self, prompts: Sequence[str], preset: Preset) -> list[int]:
        """Check a request before it is tokenized, and count the characters of each prompt with its template.

        Errors: RequestTooLarge, InvalidField.
        """
        if not prompts:
            raise InvalidField("prompts", "none given; expected at least one.")
        if len(prompts) > self.max_prompts:
            raise RequestTooLarge(f"prompts: {len(prompts)} in one request, allowed are {self.max_prompts}. Split it.")
        chars = [count_chars(prompt, preset) for prompt in prompts]
        longest = max(chars)
        if longest > self.max_prompt_chars:
            raise RequestTooLarge(
                f"prompts: one has {longest} characters with its template, allowed are {self.max_prompt_chars}."
            )
        if not 1 <= preset.max_sequence_length <= self.max_sequence_length:
            raise InvalidField(
                "max_sequence_length", f"{preset.max_sequence_length}; allowed are 1 to {self.max_sequence_length}."
            )
        return chars

    def check_output(self, jobs: Sequence[Job], hidden_size: int) -> int:
        """Bytes of a request's hidden states. Errors: RequestTooLarge where they are too many.

        The reply is one tensor, so every prompt counts as many rows as the longest.
        """
        rows = len(jobs) * max(job.delivered_rows for job in jobs)
        size = rows * len(jobs[0].taps) * hidden_size * BYTES_PER_NUMBER[jobs[0].dtype]
        if size > self.max_output_bytes:
            raise RequestTooLarge(
                f"The hidden states would take {size} bytes, allowed are {self.max_output_bytes}. "
                "Ask for fewer prompts, layers or rows, or a shorter dtype."
            )
        return size

"""The strings that several templates share. The special tokens are those of Qwen3's tokenizer."""

USER = "<|im_start|>user\n"  # opens the user's turn
END = "<|im_end|>\n"  # closes a turn
ASSISTANT = END + "<|im_start|>assistant\n"  # closes the user's turn and opens the assistant's: a generation prompt
NO_THINKING = "<think>\n\n</think>\n\n"  # what Qwen3's chat template adds for enable_thinking=False

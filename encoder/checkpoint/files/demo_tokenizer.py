"""The demo checkpoint's tokenizer: one token for each byte, and Qwen3's special tokens. Data only."""

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_ADDED_TOKENS = (  # in Qwen3's order; their ids follow those of the byte-pair vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
_SPECIAL_TOKENS = _ADDED_TOKENS[:14]  # a decoder that skips special tokens keeps the others

VOCAB_SIZE = 256 + len(_ADDED_TOKENS)

CHAT_TEMPLATE = (  # renders a single user turn as Qwen3's own template does
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json: a byte-level BPE without merges, and Qwen3's added tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **_added_token(token)}
            for token_id, token in enumerate(_ADDED_TOKENS, start=len(alphabet))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level | {"use_regex": True},  # else whole prompts would fill the library's cache of words
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: token_id for token_id, character in enumerate(alphabet)},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {"content": token, **_added_token(token)}
            for token_id, token in enumerate(_ADDED_TOKENS, start=256)
        },
        "additional_special_tokens": list(_SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added_token(token: str) -> dict[str, bool]:
    special = token in _SPECIAL_TOKENS
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}

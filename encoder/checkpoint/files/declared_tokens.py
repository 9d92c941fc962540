"""The tokens that a tokenizer's files declare outside its vocabulary, and the order in which transformers adds them.

A token that no file gives an id gets the next free one, so the ids depend on the order.
Source: transformers 5.24, tokenization_utils_base.py:_from_pretrained and __init__,
tokenization_utils_tokenizers.py:TokenizersBackend.__init__, models/qwen2/tokenization_qwen2.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

Token = str | AddedToken  # a string is a special token without further flags

MAX_TOKENS = 2**17  # each costs time; a model of sounds has 65,536
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_QWEN2_NAMES: Mapping[str, Token] = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True, slots=True)
class DeclaredTokens:
    """All declared tokens.

    Attributes:
        by_id: `added_tokens_decoder`, or what older files say in its place. The ids give the order only.
        named: the tokens with a name, such as `pad_token`, in the order in which they are added.
        extra: those without.
    """

    by_id: Mapping[int, Token]
    named: Mapping[str, Token]
    extra: list[Token]

    def add_to(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Add those that the tokenizer lacks; those that it has take the flags that are declared."""
        tokens = [token for _, token in sorted(self.by_id.items(), key=lambda item: item[0])]
        known = {str(token) for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
        for token in (*self.named.values(), *self.extra):
            if str(token) not in known and token not in tokens:
                tokens.append(token)
        names = set(map(str, self.named.values()))
        tokenizer.add_tokens([_flagged(token, names) for token in tokens])

    def restate(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Add those with a name and the extra ones again, as special tokens without further flags."""
        texts = dict.fromkeys(map(str, (*self.named.values(), *self.extra)))
        tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])


def declared_tokens(
    settings: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
    stored: Mapping[int, AddedToken],
    *,
    qwen2: bool,
) -> DeclaredTokens:
    """What the files declare together.

    Args:
        settings: of tokenizer_config.json.
        special_tokens_map, added_tokens: of the files of that name, which older versions wrote.
        stored: `added_tokens` of tokenizer.json, by id.
        qwen2: whether names that no file has get Qwen2Tokenizer's token.
    Errors: ValueError and TypeError for what is no token.
    """
    fields = dict(settings)
    if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
        fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
    own = {name: fields.pop(name) for name in list(fields) if _is_own_name(name, fields[name])}
    own |= _pop_named_extras(fields)
    own = own or dict(fields.get("model_specific_special_tokens") or {})
    by_id: dict[int, Token]
    if "added_tokens_decoder" in fields:
        by_id = {int(token_id): _token(value) for token_id, value in fields["added_tokens_decoder"].items()}
    else:
        _merge(fields, special_tokens_map)
        own |= _pop_named_extras(fields)
        by_id = {**_older_added_tokens(fields, added_tokens), **stored}
    if "extra_special_tokens" not in fields:
        fields["extra_special_tokens"] = fields.get("additional_special_tokens")
    own = {name: value for name, value in fields.items() if _is_own_name(name, value)} | own
    named = {name: fields[name] for name in NAMES if name in fields}
    flagged = {str(token): token for token in by_id.values()}
    tokens = {name: flagged.get(str(token), token) for name, token in _tokens(named).items()}
    if qwen2:
        tokens = {name: _QWEN2_NAMES[name] for name in _QWEN2_NAMES if name not in fields} | tokens
    tokens = {name: tokens[name] for name in NAMES if name in tokens} | _tokens(own)
    extra = [_token(value) for value in fields["extra_special_tokens"] or ()]
    if len(by_id) + len(tokens) + len(extra) > MAX_TOKENS:
        raise ValueError(f"{len(by_id) + len(tokens) + len(extra):,} tokens, expected at most {MAX_TOKENS:,}")
    return DeclaredTokens(by_id, tokens, extra)


def _is_own_name(name: str, value: object) -> bool:
    """Whether a field names a token of this model alone, such as `image_token`."""
    return name.endswith("_token") and name not in NAMES and isinstance(value, Token)


def _pop_named_extras(fields: dict[str, Any]) -> dict[str, Any]:
    """Take out `extra_special_tokens` where it has names, as older files write it."""
    return fields.pop("extra_special_tokens") if isinstance(fields.get("extra_special_tokens"), dict) else {}


def _merge(fields: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
    """Let special_tokens_map.json replace the named tokens, and join its extra ones."""
    for name, value in special_tokens_map.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            joined = list(fields.get(name) or [])
            joined += [token for token in map(_special, value) if token not in joined]
            fields[name] = joined
        elif name == "extra_special_tokens":
            fields[name] = value
        else:
            fields[name] = _special(value)


def _older_added_tokens(fields: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> dict[int, AddedToken]:
    """added_tokens.json, from token to id; which of them are special, other fields say."""
    special = {str(fields[name]) for name in NAMES if fields.get(name)}
    special |= set(map(str, fields.get("extra_special_tokens") or ()))
    return {
        int(token_id): AddedToken(
            text, rstrip=False, lstrip=False, normalized=text not in special, special=text in special
        )
        for text, token_id in added_tokens.items()
    }


def _tokens(values: Mapping[str, Any]) -> dict[str, Token]:
    return {name: _token(value) for name, value in values.items() if value is not None}


def _token(value: Any) -> Token:
    """A token as files write it: a string, or an object with the string as `content` beside its flags."""
    if isinstance(value, Token):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{str(value)[:40]!r}, expected a string, or an object with content")
    return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value})


def _special(value: Any) -> Any:
    """The same as special_tokens_map.json writes it: an object does not say that it is special."""
    return _token({**value, "special": True}) if isinstance(value, dict) else value


def _flagged(token: Token, names: Iterable[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and str(token) in names:
        token.special = True
    return token

"""The tokens that a tokenizer's files declare outside its vocabulary, and the order in which transformers adds them.

A token that no file gives an id gets the next free one, so the ids depend on the order.
Source: transformers 5.24, tokenization_utils_base.py:_from_pretrained and __init__,
tokenization_utils_tokenizers.py:TokenizersBackend.__init__, models/qwen2/tokenization_qwen2.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

_T = TypeVar("_T", list[Any], dict[str, Any])

Token = str | AddedToken  # a string is a special token without further flags

MAX_TOKENS = 2**17  # each costs time; a model of sounds has 65,536
MAX_CHARS = 1000  # of a token; the library takes 90 times as many bytes
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_QWEN2_NAMES: Mapping[str, Token] = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_DECODER, _EXTRA = "added_tokens_decoder", "extra_special_tokens"  # fields of tokenizer_config.json
_OLDER_EXTRA = "additional_special_tokens"
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
        special_tokens_map, added_tokens: of the files of that name, which older versions wrote. They count where the
            settings have no `added_tokens_decoder`.
        stored: `added_tokens` of tokenizer.json, by id.
        qwen2: whether names that no file has get Qwen2Tokenizer's token.
    Errors: ValueError saying which field declares no tokens.
    """
    fields = dict(settings)
    if not fields.get(_EXTRA) and _OLDER_EXTRA in fields:
        fields[_EXTRA] = fields.pop(_OLDER_EXTRA)
    own = {**_take_own(fields), **_take_named_extras(fields)} or _expect(dict, fields, "model_specific_special_tokens")
    if fields.get(_DECODER) is not None:
        by_id = _by_id(fields)
    else:
        _merge(fields, special_tokens_map)
        own = {**_take_own(fields), **own, **_take_named_extras(fields)}
        by_id = {**_older_added_tokens(fields, added_tokens), **stored}
    named = _named(fields, by_id, qwen2) | {name: _token(value, name) for name, value in own.items()}
    extra = [_token(value, _EXTRA) for value in _expect(list, fields, _EXTRA if _EXTRA in fields else _OLDER_EXTRA)]
    if (count := len(by_id) + len(named) + len(extra)) > MAX_TOKENS:
        raise ValueError(f"there are {count:,} of them, expected at most {MAX_TOKENS:,}")
    longest = max((len(str(token)) for token in (*by_id.values(), *named.values(), *extra)), default=0)
    if longest > MAX_CHARS:
        raise ValueError(f"one has {longest:,} characters, expected at most {MAX_CHARS:,}")
    return DeclaredTokens(by_id, named, extra)


def _by_id(fields: Mapping[str, Any]) -> dict[int, Token]:
    return {_id(token_id): _token(value, _DECODER) for token_id, value in _expect(dict, fields, _DECODER).items()}


def _take_own(fields: dict[str, Any]) -> dict[str, Any]:
    """Take out the fields that name a token of this model alone, such as `image_token`."""
    names = [name for name in fields if name.endswith("_token") and name not in NAMES]
    return {name: fields.pop(name) for name in names if isinstance(fields[name], Token)}


def _take_named_extras(fields: dict[str, Any]) -> dict[str, Any]:
    """Take out `extra_special_tokens` where they have names."""
    return fields.pop(_EXTRA) if isinstance(fields.get(_EXTRA), dict) else {}


def _merge(fields: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
    """Let special_tokens_map.json replace fields, and join its extra tokens with theirs."""
    for name, value in special_tokens_map.items():
        if name == _EXTRA and isinstance(value, list):
            tokens = _expect(list, fields, name)
            fields[name] = tokens + [token for token in map(_special, value) if token not in tokens]
        else:
            fields[name] = value if name == _EXTRA else _special(value)


def _named(fields: Mapping[str, Any], by_id: Mapping[int, Token], qwen2: bool) -> dict[str, Token]:
    """The tokens with one of NAMES, with the flags that they have by id."""
    declared = {name: _token(fields[name], name) for name in NAMES if fields.get(name) is not None}
    flagged = {str(token): token for token in by_id.values()}
    named = {name: flagged.get(str(token), token) for name, token in declared.items()}
    defaults = _QWEN2_NAMES if qwen2 else {}
    named |= {name: token for name, token in defaults.items() if name not in fields}
    return {name: named[name] for name in NAMES if name in named}


def _older_added_tokens(fields: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> dict[int, AddedToken]:
    """added_tokens.json, from token to id; which of them are special, other fields say."""
    special = {str(fields[name]) for name in NAMES if fields.get(name)}
    special |= set(map(str, _expect(list, fields, _EXTRA)))
    return {
        _id(token_id): AddedToken(
            text, rstrip=False, lstrip=False, normalized=text not in special, special=text in special
        )
        for text, token_id in added_tokens.items()
    }


def _expect(kind: type[_T], fields: Mapping[str, Any], name: str) -> _T:
    """A field that is a list or an object, an empty one where it is missing or null."""
    value = fields.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!s:.40}, expected {'a list' if kind is list else 'an object'}")
    return value


def _id(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!s:.40} is no id") from None


def _token(value: Any, name: str) -> Token:
    """A token as files write it: a string, or an object with the string as `content` beside its flags."""
    if isinstance(value, Token):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{name} has {value!s:.40}, expected a string, or an object with content")
    flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{name} has {value['content']:.40} with {flags}, expected true and false")
    return AddedToken(value["content"], **flags)


def _special(value: Any) -> Any:
    """A value of special_tokens_map.json: its objects do not say that they are special."""
    return _token({**value, "special": True}, "special_tokens_map.json") if isinstance(value, dict) else value


def _flagged(token: Token, names: Collection[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and str(token) in names:
        token.special = True
    return token

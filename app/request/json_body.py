"""Parses JSON, after its values have been counted."""

import json
import re
from typing import Any, NoReturn

from app.errors import MalformedBody
from app.request.bounds import MAX_DEPTH, as_object, refuse_deep, refuse_many

# A string, whose closing quote may be missing, or a character that JSON's structure is made of. What is between them is
# skipped. Nothing is ever read twice: the repetition is possessive.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[][{},]', re.DOTALL)
MAX_NUMBER_CHARS = 4300  # as Python's own limit for integers; a float of millions would take a tenth of a second
TOKENS_PER_VALUE = 4  # its key, itself, the bracket or comma before it, the bracket after it


def parse_json(text: str, max_values: int) -> Any:
    """The value of a JSON text. Errors: MalformedBody, BodyTooLarge."""
    if len(text) > max_values:  # a value takes a character at least
        check_size(text, max_values)
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError:
        refuse_deep()
    except ValueError as error:  # NaN or Infinity, or an integer of thousands of digits
        raise MalformedBody(f"The body is not JSON: {error}") from error


def check_size(text: str, max_values: int) -> int:
    """The number of tokens read: it stops at the first that is too many, or too deep.

    Text that is not JSON may pass, or be refused as too large.

    Errors: BodyTooLarge, MalformedBody.
    """
    tokens = values = depth = end = 0
    for tokens, match in enumerate(TOKEN.finditer(text), 1):
        _refuse_long_number(text, end, match.start())
        first, end = text[match.start()], match.end()
        if first in "[{":
            values += 1
            depth += 1
        elif first == ",":
            values += 1
        elif first in "]}":
            depth -= 1
        if depth > MAX_DEPTH:
            refuse_deep()
        if values > max_values or tokens > TOKENS_PER_VALUE * max_values:
            refuse_many(max_values)
    _refuse_long_number(text, end, len(text))
    return tokens


def _refuse_long_number(text: str, start: int, end: int) -> None:
    """Refuse what stands between two tokens if it is a number of absurd length. Blanks may be of any."""
    if end - start > MAX_NUMBER_CHARS:
        found = text[start:end].strip(" \t\r\n:")
        if len(found) > MAX_NUMBER_CHARS and found[0] in "-0123456789":
            raise MalformedBody(f"The body has a number of more than {MAX_NUMBER_CHARS:,} characters.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value.")


# Making a decoder takes longer than using it.
DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=as_object)

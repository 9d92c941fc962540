"""Compressed request bodies: which codings are read, and how they are unpacked within a limit.

Source: RFC 9110, section 8.4.1. RFC 1952: gzip is one member or several. `deflate` is the zlib format of RFC 1950.
"""

import zlib

from starlette.requests import Request

from app.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType

WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's name for the format
IDENTITY = ("identity", "")
MAX_MEMBERS = 64  # of a gzip body; what comes after each is copied, so that thousands of empty ones would take seconds


def coding_of(request: Request) -> str:
    """The Content-Encoding of a request; "" for none.

    Errors: UnsupportedMediaType, for several codings as well.
    """
    codings = [coding.strip().lower() for coding in ",".join(request.headers.getlist("content-encoding")).split(",")]
    applied = [coding for coding in codings if coding not in IDENTITY]
    if not applied:
        return ""
    if len(applied) > 1 or applied[0] not in WINDOW_BITS:
        raise UnsupportedMediaType(
            f"content-encoding: {', '.join(applied)[:100]!r} is not read here, expected gzip, deflate or identity.",
            "Send the body uncompressed, or compressed once with gzip.",
            {"accept-encoding": "gzip, deflate"},
        )
    return applied[0]


def unpack(body: bytes, coding: str, max_bytes: int) -> bytes:
    """The unpacked body. Unpacks no more than one byte over `max_bytes`. Takes time: call it on a thread.

    Args:
        coding: from `coding_of`, not "".
    Errors: BodyTooLarge, MalformedBody.
    """
    unpacked, rest, members = bytearray(), body, 0
    while rest:
        stream = zlib.decompressobj(WINDOW_BITS[coding])
        try:
            unpacked += stream.decompress(rest, max_bytes + 1 - len(unpacked))
        except zlib.error as error:
            where = "is not" if members == 0 else f"goes on after member {members} with what is not"
            raise MalformedBody(f"The body {where} {coding}: {error}.", _HINT) from error
        if len(unpacked) > max_bytes:
            raise BodyTooLarge(
                f"The body may have {max_bytes:,} bytes, unpacked it has more.", "Send fewer prompts in one request."
            )
        if not stream.eof:
            raise MalformedBody(f"The body ends before its {coding} data does.", _HINT)
        rest, members = stream.unused_data, members + 1
        if rest and (coding == "deflate" or members == MAX_MEMBERS):
            raise MalformedBody(f"The body goes on after the end of its {coding} data.", _HINT)
    return bytes(unpacked)


_HINT = "Compress it again, or send it uncompressed."

"""The charset of a JSON body: which are read, and from bytes to text.

JSON is UTF-8 (RFC 8259, section 8.1). Tools on Windows also write UTF-16, put a byte order mark in front, or declare an
older charset.
"""

import codecs
import json

from app.errors import MalformedBody, UnsupportedMediaType

# Names as clients spell them, without hyphens and underscores. A fixed table: Python's own lookup keeps every name that
# it is asked for, and knows codecs that are no charsets.
UTF_8 = "utf-8"
WIDE = "utf-16 or utf-32"  # the bytes themselves say which of the two, and in which order
CHARSETS = {
    **dict.fromkeys(("", "utf8"), UTF_8),
    **dict.fromkeys(("utf16", "utf16le", "utf16be", "utf32", "utf32le", "utf32be"), WIDE),
    **dict.fromkeys(("usascii", "ascii"), "ascii"),
    **dict.fromkeys(("iso88591", "latin1"), "iso-8859-1"),
    **dict.fromkeys(("windows1252", "cp1252"), "windows-1252"),
}
for _codec in (*{*CHARSETS.values()} - {WIDE}, "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
    codecs.lookup(_codec)  # Python reads a codec's file at its first use, when the service may have no file to spare
NAMES = "utf-8, utf-16, utf-32, iso-8859-1, windows-1252, us-ascii"


def charset_of(content_type: str) -> str:
    """What `decode` needs to know of a Content-Type header. One that names no charset is UTF-8.

    Errors: UnsupportedMediaType for a charset that is not read.
    """
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            value = value.strip(" \t\"'")
            charset = CHARSETS.get(value.lower().replace("-", "").replace("_", ""))
            if charset is None:
                raise UnsupportedMediaType(
                    f"content-type: charset {value[:40]!r} is not read here, expected one of {NAMES}.", "Send UTF-8."
                )
            return charset
    return UTF_8


def decode(body: bytes, charset: str) -> str:
    """The text of a JSON body, without a byte order mark.

    Args:
        charset: from `charset_of`.
    Errors: MalformedBody.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    # JSON begins with ASCII, so zeros among its first bytes tell UTF-16 and UTF-32 from UTF-8. The function is what
    # json.loads uses for bytes.
    detected = json.detect_encoding(body)
    encoding = detected if charset == WIDE else charset
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        other = detected not in (UTF_8, encoding)
        found = f"it is {detected.upper()}" if other else f"{error.reason} at byte {error.start}"
        hint = "Send UTF-8, or name the charset: 'content-type: application/json; charset=windows-1252'."
        raise MalformedBody(f"The body is not {encoding.upper()}: {found}.", hint) from error

"""The trace that a request belongs to, by its header `traceparent`.

Source: https://www.w3.org/TR/trace-context/#traceparent-header.
"""

import re
from collections.abc import Sequence

# version - trace-id - parent-id - trace-flags; a later version may have more behind that.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def trace_id(traceparents: Sequence[str]) -> str:
    """The trace's id of 32 hex digits; empty unless there is exactly one header and it is valid."""
    found = TRACEPARENT.fullmatch(traceparents[0].strip(" \t")) if len(traceparents) == 1 else None
    if found is None or (found[1] == "00" and found[3]):
        return ""
    return found[2]

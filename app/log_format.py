"""How a log line looks: text for people, or one JSON object for programs. Both name the request that it belongs to."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from app import profile

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def formatter(log_format: str) -> logging.Formatter:
    """The formatter for a value of the setting `log_format`."""
    return JsonFormatter() if log_format == "json" else TextFormatter(TEXT)


def add_request(record: logging.LogRecord) -> bool:
    """A filter for handlers: put the profile of the current request on the record. Call on the thread that logs."""
    record.request = profile.current.get()
    return True


class TextFormatter(logging.Formatter):
    """Lines that end with `request=ID`, and `trace=ID` where the request belongs to a trace."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, in front of a traceback."""
        line = super().formatMessage(record)
        request: profile.Profile | None = getattr(record, "request", None)
        if request is not None:
            line += f" request={request.request_id}" + (f" trace={request.trace_id}" if request.trace_id else "")
        return line


class JsonFormatter(logging.Formatter):
    """One object for each line, in ASCII, without a line break inside.

    ts (RFC 3339, UTC), level, logger, message; while a request is served its request_id, trace_id and span_id; in the
    line at its end method, path, route, status, seconds, code, and stages in seconds; exception and stack if any.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        created = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "ts": created.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request: profile.Profile | None = getattr(record, "request", None)
        if request is not None:
            ids = {"request_id": request.request_id, "trace_id": request.trace_id, "span_id": request.span_id}
            fields |= {name: value for name, value in ids.items() if value}
        ended: dict[str, Any] = getattr(record, "ended", {})
        fields |= {name: value for name, value in ended.items() if value != ""}
        if record.exc_info or record.exc_text:
            fields["exception"] = record.exc_text or self.formatException(record.exc_info)  # type: ignore[arg-type]
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(fields, default=str)

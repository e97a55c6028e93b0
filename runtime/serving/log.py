"""Log records as one JSON object a line: nothing that a client sends can forge or break a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """time, level, event and the fields of a record; control characters come out escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def event(logger: logging.Logger, level: int, what: str, /, **fields: object) -> None:
    """Log `what` with fields; ids of bytes are written as hexadecimal."""
    shown = {
        key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()
    }
    logger.log(level, "%s", what, extra={"fields": shown})


def write_to_stderr(level: int = logging.INFO) -> None:
    """Make every logger of this process write JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def adopt(library: str) -> None:
    """Take over the logger of a library that writes lines of its own, once it is imported."""
    theirs = logging.getLogger(library)
    theirs.handlers.clear()
    theirs.propagate = True

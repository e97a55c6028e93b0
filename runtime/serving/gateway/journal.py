"""Log lines of the gateway: one JSON object a line on stderr, so that nothing sent can forge one.

Bodies, prompts and keys are never handed to it.
"""

import json
import logging
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then the record's `fields`; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # ASCII only: what is no ASCII, terminal controls among it, is escaped.
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Send every logger's lines to stderr as JSON. For the process that is a gateway."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("outrider").setLevel(logging.INFO)

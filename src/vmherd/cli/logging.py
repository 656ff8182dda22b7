"""One log for the project's own lines and for those of its libraries."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO, get_args

import structlog
from structlog.typing import Processor

from vmherd.cli.journal import JournalHandler, leads_to_journal

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(Level)
DEFAULT_LEVEL = "info"


def configure(level: str, stream: TextIO | None = None, *, identifier: str = "vmherd") -> None:
    """Writes log lines of this level and above to standard error: for people on a terminal, as JSON lines otherwise.

    Where that leads to systemd's journal, it gets them with their fields and under this identifier.
    """
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # The default shows local variables in tracebacks, and with them tokens.
    for_people = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    for_programs: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *([for_people] if stream.isatty() else for_programs),
        ],
    )
    handler: logging.Handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    if leads_to_journal(stream):
        handler = JournalHandler(identifier, otherwise=handler)
        handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )

"""The run record: the one contract between a run and everything that looks at it.

Writers append events to a run directory; readers need nothing but the directory.
"""

from miles.record.history import History, Phase, Row, Series
from miles.record.inbox import Inbox, Request, post_request
from miles.record.layout import RunLayout, create_run_dir
from miles.record.reader import RunReader
from miles.record.status import RunStatus
from miles.record.summary import Summary, read_summary, summarise, write_summary
from miles.record.writer import RecordWriter

__all__ = [
    "History",
    "Inbox",
    "Phase",
    "RecordWriter",
    "Request",
    "Row",
    "RunLayout",
    "RunReader",
    "RunStatus",
    "Series",
    "Summary",
    "create_run_dir",
    "post_request",
    "read_summary",
    "summarise",
    "write_summary",
]

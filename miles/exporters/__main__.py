"""`python -m miles.exporters RUN_DIR ATTEMPT`: what `follow` starts; copies a record until its end."""

from __future__ import annotations

import sys

from miles.errors import MilesError
from miles.exporters.follow import copy_until_end, live_sinks
from miles.record import RunReader


def main(run_dir: str, attempt: int) -> int:
    try:
        reader = RunReader(run_dir, read=False)
        copy_until_end(reader, live_sinks(reader), attempt)
    except MilesError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

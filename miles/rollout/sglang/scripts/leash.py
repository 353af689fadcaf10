"""Run a program that is killed when its parent ends: `python leash.py PARENT PROGRAM [WORD ...]`.

Linux only in effect; elsewhere the program simply runs. Needs nothing but the standard library.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the tie was made
            sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()

"""Starts a command that ends when its parent does, even when the parent is killed.

Run as `python -m twinkle_callbacks.cli.tether PARENT_PID COMMAND...`; becomes the command. Without it a trainer killed
by SIGKILL would leave a vLLM server behind. Linux only; elsewhere the command runs untethered.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2); survives exec, is sent when the thread that started the child ends


def main() -> None:
    """Ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it ended before the call above
            sys.exit(f"the process {parent} that started this command is gone")
    os.execv(command[0], command)  # noqa: S606 -- there is no shell in between, that is the point


if __name__ == "__main__":
    main()

"""Run one program under limits and, if asked, in namespaces of its own, with the caller's stdin, stdout and stderr.

    python -c "... main({'isolate': true, 'visible': [...], 'argv': [...], 'env': {...}, 'folder': ..., ...})"

For tools that cannot be forked from a warm server. In namespaces the program sees the `visible` folders, read-only,
and an empty /tmp; process 1 is ours, ends with the program, and takes all that is left with it.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from typing import Any, NoReturn

from megatron_sglang.rewards.box import jail

REFUSED = 125


def main(options: dict[str, Any]) -> NoReturn:
    """Exit with the program's status, 128 + its signal, or `REFUSED` and a line on stderr."""
    try:
        if options["isolate"]:
            jail.unshare(socket.socket())
            jail.build_root(options["visible"], options["tmp_mb"], proc=True)
            jail.drop_privileges()
        else:
            jail.fork_under_guard(socket.socket())
        os.chdir(options["folder"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["output_bytes"], options["output_bytes"]))
    except (jail.JailError, OSError) as error:
        _refuse(str(error))
    child = os.fork()
    if child == 0:
        try:
            os.execve(options["argv"][0], options["argv"], options["env"])
        except OSError as error:
            _refuse(f"{options['argv'][0]}: {error}")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _refuse(reason: str) -> NoReturn:
    print(f"sandbox: {reason}", file=sys.stderr, flush=True)
    os._exit(REFUSED)

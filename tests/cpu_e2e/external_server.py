"""An engine that is nobody's child: `python external_server.py JSON`. What a user would have started by hand.

{"kind": "fake", "port", "api_key", "admin_key", "tp_size", "script"}, or {"kind": "sglang", "port", "api_key",
"admin_key", "server_args"}: SGLang's own launch_server, with what it needs on a CPU and nothing else of ours.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time


def main() -> None:
    spec = json.loads(sys.argv[1])
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    if spec["kind"] == "fake":
        from megatron_sglang.engine import fake

        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", spec["port"]))
        fake.serve(spec, listener)
        return
    from megatron_sglang.cpu import sglang_server as cpu

    arguments = spec["server_args"]
    os.environ |= cpu.environment(arguments["tp_size"], os.cpu_count() or 1)
    os.environ["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    cpu.install(arguments["model_path"], seeded_sampling=True)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**arguments, port=spec["port"], api_key=spec["api_key"], admin_api_key=spec["admin_key"]))


def _die_with_parent(parent: int) -> None:
    """A test that is killed leaves nothing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()

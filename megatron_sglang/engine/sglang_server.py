"""The SGLang server process: CPU fixes where there is no CUDA, our keys, our socket, SGLang's `launch_server`."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sglang.store import AGENT_STORE, open_store


def serve(spec: dict[str, Any], listener: socket.socket) -> None:
    """Serve until killed. `spec` is what `Server._spec` made; `listener` is bound but does not listen yet."""
    arguments = spec["server_args"]
    if arguments["device"] == "cpu":
        from megatron_sglang.cpu import sglang_server as cpu

        cpu.install(arguments["model_path"], seeded_sampling=spec["deterministic"])

    import uvicorn
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import PortArgs, ServerArgs
    from sglang.srt.utils import kill_process_tree
    from sglang.srt.utils.auth import add_api_key_middleware

    store, port = open_store("127.0.0.1")
    arguments["dist_init_addr"] = f"127.0.0.1:{port}"
    os.environ |= AGENT_STORE
    # Keys go straight into the middleware: ServerArgs are printed to the log and served by /server_info.
    add_api_key_middleware(http_server.app, api_key=spec["api_key"], admin_api_key=spec["admin_key"])
    PortArgs.init_new = staticmethod(_named(PortArgs.init_new, Path(spec["folder"]).name))
    # SGLang binds its port a minute after it was chosen (http_server.py:2600); ours is bound already.
    uvicorn.run = functools.partial(_run_on, listener)
    try:
        http_server.launch_server(ServerArgs(**arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
        del store


def _named(init_new: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`init_new` that gives SGLang's instance our name instead of a random one (server_args.py:9437). SGLang names a
    file in /dev/shm after it and leaves that behind; by our name `segments.py` knows whose it was."""

    def init(*args: Any, **named: Any) -> Any:
        ports = init_new(*args, **named)
        ports.instance_id = name
        return ports

    return init


def _run_on(listener: socket.socket, app: Any, **config: Any) -> None:
    import uvicorn

    uvicorn.Server(uvicorn.Config(app, **config)).run(sockets=[listener])

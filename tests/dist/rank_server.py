"""Imports Megatron once and forks ranks for it: a case of four ranks takes seconds instead of a minute.

Protocol, one JSON object a line: on stdin {"ranks": N, "case": "name", "args": {...}, "timeout_s": S}, on stdout
{"ok": [result of each rank]} or {"error": text}. A case is a function of `cases.py`, or of another module here when it
is named "module.function"; what it returns must be JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the replies
    import cases  # noqa: F401  (the heavy imports, once)

    print(json.dumps({"ok": []}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_run(job)), file=replies, flush=True)


def _run(job: dict) -> dict:
    # Bound before the ranks exist, so that nobody takes the port while they are forked.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pipes, pids = [], []
    for rank in range(job["ranks"]):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            listener.close()
            _be_rank(job, rank, port, write_end)
        os.close(write_end)
        pids.append(pid)
        pipes.append(read_end)
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    reply = _collect(job, pids, pipes)
    del store  # with its thread and its sockets, which the next fork would copy
    return reply


def _be_rank(job: dict, rank: int, port: int, write_end: int) -> None:
    size = str(job["ranks"])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun, the store outlives the ranks
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch

    try:
        module, _, name = job["case"].rpartition(".")
        reply = {"ok": getattr(importlib.import_module(module or "cases"), name)(**job["args"])}
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a rank that is gone breaks the last collective of a slower one
    except BaseException:  # noqa: BLE001 - the process boundary
        reply = {"error": traceback.format_exc()}
    with os.fdopen(write_end, "w") as pipe:
        json.dump(reply, pipe)
    sys.stderr.flush()
    os._exit(0)


def _collect(job: dict, pids: list[int], pipes: list[int]) -> dict:
    """Replies of all ranks. When one fails, the others get a moment to fail alike, then they are killed."""
    deadline = time.monotonic() + job["timeout_s"]
    waiting = set(pids)
    failed_at = None
    texts = dict.fromkeys(pids, "")
    for pipe in pipes:
        os.set_blocking(pipe, False)
    while waiting:
        for pid, pipe in zip(pids, pipes, strict=True):
            if pid in waiting:
                texts[pid] += _drain(pipe)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    texts[pid] += _drain(pipe)
                    texts[pid] = texts[pid] or json.dumps({"error": f"died without a word (exit status {code})"})
                    waiting.discard(pid)
                    if '"ok"' not in texts[pid][:8]:
                        failed_at = failed_at or time.monotonic()
        now = time.monotonic()
        if now > deadline or (failed_at and now > failed_at + 10):
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                texts[pid] = json.dumps({"error": "killed: it waited for a failed rank or ran out of time"})
            break
        time.sleep(0.02)
    for pipe in pipes:
        os.close(pipe)
    replies = [json.loads(texts[pid] or '{"error": "died without a word"}') for pid in pids]
    errors = [f"rank {rank}: {reply['error']}" for rank, reply in enumerate(replies) if "error" in reply]
    return {"error": "\n".join(errors)} if errors else {"ok": [reply["ok"] for reply in replies]}


def _drain(pipe: int) -> str:
    text = b""
    while True:
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return text.decode()
        if not part:
            return text.decode()
        text += part


if __name__ == "__main__":
    main()

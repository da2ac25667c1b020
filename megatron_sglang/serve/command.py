"""The command: `megatron-sglang serve --model FOLDER`, with an engine of its own, or `--run RUN_FOLDER`, beside a run.

Both ways the endpoint learns from engine.json where the engine is and whether it may serve; with --model this process
announces its own engine to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_sglang import signals
from megatron_sglang.config_check import ROUTER, known_options
from megatron_sglang.engine import EngineOptions, create_engine
from megatron_sglang.engine.beacon import NAME
from megatron_sglang.engine.options import ENGINE_FIELDS
from megatron_sglang.errors import ConfigError, EngineDiedError
from megatron_sglang.serve import keys
from megatron_sglang.serve.limits import Limits

if TYPE_CHECKING:
    from megatron_sglang.engine.http_engine import HttpEngine
    from megatron_sglang.serve.http import Server

KEY_FILE = "serve.{port}.key"
"""Several endpoints may serve one run."""
ALIVE_EVERY_S = 1.0
_OWN_ENGINE: dict[str, Any] = {"tp": 1, "ep": 1, "dtype": "bfloat16", "kind": "sglang", "engine_log": None}
"""Options of the own engine, as they are where nothing is said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER", help="serve a Hugging Face folder with an own engine")
    which.add_argument(
        "--run", type=Path, dest="run_folder", metavar="RUN_FOLDER", help="serve what a live training run is at"
    )
    add("--host", default="127.0.0.1", help="other than loopback: needs a key set by you (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--api-key-file", type=Path, help=f"read the key here, or make one and write it; else ${keys.VARIABLE}")
    add("--served-model-name", help="what clients call the model (default: its folder's name)")
    engine = parser.add_argument_group("the own engine of --model; --sglang-* goes to SGLang, as in training")
    engine.add_argument("--tp", type=int, help="tensor-parallel ranks")
    engine.add_argument("--ep", type=int, help="expert-parallel ranks among them")
    engine.add_argument("--dtype", choices=("bfloat16", "float32"))
    engine.add_argument("--kind", choices=("sglang", "fake"), help="fake: tokens without a model")
    engine.add_argument("--engine-log", help="where SGLang's output is appended")
    engine.set_defaults(**_OWN_ENGINE)
    for name, values in _sglang_options():
        flag: dict[str, Any] = {} if values == "1" else {"nargs": values}
        flag = {"nargs": "?", "const": "true"} if values == "0" else flag
        engine.add_argument(f"--sglang-{name.replace('_', '-')}", help=argparse.SUPPRESS, **flag)
    limits = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        kind = type(field.default)
        limits.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="%(default)s")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status."""
    limits = Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
    if args.model is None:
        _check_no_engine_options(args)
    options = _engine_options(args) if args.model is not None else None
    user_key = keys.from_user(args.api_key_file)
    if user_key is None and not _is_loopback(args.host):
        raise ConfigError(
            f"--host={args.host} can be reached from other machines, and no key was set; put one into --api-key-file "
            f"(mode 600) or ${keys.VARIABLE}, or stay on 127.0.0.1"
        )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # anyone who connects could fill the log with warnings
    ending = signal.SIGTERM, *signals.not_ignored(signal.SIGHUP)
    with contextlib.ExitStack() as cleanup, signals.handled(_end, *ending):
        folder = args.run_folder
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="msgl-serve-"))
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        elif not folder.is_dir():
            raise ConfigError(f"--run={folder} is no folder; name that of a run (log.run_dir), live or yet to come")
        return _serve(args, limits, folder, options, user_key, cleanup)


def _serve(
    args: argparse.Namespace,
    limits: Limits,
    folder: Path,
    options: EngineOptions | None,
    user_key: str | None,
    cleanup: contextlib.ExitStack,
) -> int:
    from megatron_sglang.serve import http
    from megatron_sglang.serve.app import Endpoint, make_app
    from megatron_sglang.serve.tokens import Tokens

    listener = cleanup.enter_context(http.listen(args.host, args.port))
    engine = None
    if options is not None:
        Tokens.load(options.model_path)  # a folder that cannot be served is refused before its engine has loaded it
        engine = create_engine(options)
        cleanup.callback(engine.close)
        engine.start()
        engine.announce(folder / NAME)
        engine.wait_ready()
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    key_path = args.api_key_file or folder / KEY_FILE.format(port=port)
    key = user_key or keys.make(key_path)
    if user_key is None and args.api_key_file is None:
        cleanup.callback(keys.remove, key_path, key)
    endpoint = Endpoint(folder / NAME, key, limits, args.served_model_name)
    where = "as you set it" if user_key is not None else f"in {key_path}"
    said = f"serving {args.model or args.run_folder} at http://{host}:{port}/v1, API key {where}"
    server = http.Server(
        make_app(endpoint),
        limits,
        ready=lambda: print(said, flush=True),
        ending=lambda: endpoint.deadlines.end_all("the endpoint is closing"),
    )
    with _watched(engine, server) as died:
        status = server.until_signal(listener)
    if died:
        raise EngineDiedError(f"the engine died: {died[0]}")
    return status


@contextlib.contextmanager
def _watched(engine: HttpEngine | None, server: Server) -> Generator[list[str]]:
    """Ends the server when its own engine has died; the reason is then in the list."""
    died: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while engine is not None and not over.wait(ALIVE_EVERY_S):
            if reason := engine.why_dead():
                died.append(reason)
                server.should_exit = True
                return

    thread = threading.Thread(target=watch, name="engine watch")
    thread.start()
    try:
        yield died
    finally:
        over.set()
        thread.join()


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """Like Ctrl-C, through everything that is to be closed; exit status 128 + signal."""
    raise SystemExit(128 + number)


def _check_no_engine_options(args: argparse.Namespace) -> None:
    """ConfigError for an option of the own engine beside a run, whose engine is as the run has started it."""
    unset = _OWN_ENGINE | {f"sglang_{name}": None for name, _ in _sglang_options()}
    if given := [name for name, default in unset.items() if getattr(args, name) != default]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names} would be for an engine of --model; that of --run is the run's: set it there")


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    more: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, values in _sglang_options():
        given = getattr(args, f"sglang_{name}")
        if given is not None:
            value = [_value(name, one) for one in given] if values not in ("0", "1") else _value(name, given)
            (more if name in ENGINE_FIELDS else extra)[ENGINE_FIELDS.get(name, name)] = value
    if args.kind == "fake":
        sizes = json.loads((args.model / "config.json").read_text()) if (args.model / "config.json").exists() else {}
        extra = {"vocab_size": sizes.get("vocab_size", 512)}
    return EngineOptions(
        str(args.model),
        kind=args.kind,
        tp_size=args.tp,
        ep_size=args.ep,
        dtype=args.dtype,
        load_format="auto",
        log_path=args.engine_log,
        extra=extra,
        **more,
    )


def _sglang_options() -> list[tuple[str, str]]:
    """Name and number of values; a router has nothing to do before one engine."""
    return [(name, values) for name, values in known_options("sglang").items() if name != ROUTER]


def _value(name: str, text: str) -> Any:
    """As a run reads it: of an option that is text as it stands, also where that is JSON; else true, 8, 0.5 as what
    they are. ConfigError for what is neither."""
    from omegaconf import OmegaConf

    from megatron_sglang.config_load import from_overrides

    return OmegaConf.to_container(from_overrides([f"sglang.{name}={text}"]))["sglang"][name]  # pyright: ignore


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Weight loader that runs inside every SGLang tensor-parallel rank (`--custom-weight-loader`), and in the fake engine.

An exception that leaves `load` would kill the whole engine (managers/tp_worker.py:207 has no catch around it), and
SGLang drops its return value; so every message is answered by a JSON file in the engine's private mailbox folder:

    command    what the rank does                                              answer beside ok/error
    begin      opens a version; poisons all parameters with NaN                -
    load       checks order, bytes, dtypes, duplicates; model.load_weights     -
    commit     checks the bucket count and that no parameter is left unfilled  "digests": {parameter: digest}
    plan       direct path: checks and keeps the plan of all coming deliveries -
    stream     direct path, a whole version: takes all deliveries from its     "digests", "deliveries": how many
               trainer rank (line.py); checks each, writes it, reads it back;
               then as commit: were these all, is every parameter finite
    adopt      weights that SGLang loaded from disk itself: the same check of  "digests": {parameter: digest}
               them as commit makes
    layout     traces model.load_weights (trace_loader.py); changes nothing    "layout": RankLayout as JSON
    join       broadcast: enters the group of the leader and all engine ranks  -
    receive    "load" of bytes that come through that group (process_group.py) -
    leave      broadcast: leaves the group                                     -
    self_test  loads one bucket both ways and compares; weights are lost       "report" (self_test.py)
    disk       loads every bucket of a folder (weight_folder.py), as load does -
    merge and  merge adapters into the rank's own base (merge_on_engine.py,    of each: `_prepare_merge`
    merge_*    which lists them)
    adapter    proves what SGLang's LoRA holds of an adapter (adapters.py)     "bound", "digests"

Once a message of a version failed, all later ones of that version fail, until the next begin or stream. The state below
is kept by engine rank, because the fake engine has all its ranks in one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sglang import weight_folder
from megatron_sglang.buckets import Bucket
from megatron_sglang.digests import digests, finite_digests
from megatron_sglang.engine import adapters, direct, line, merge_on_engine, process_group, seeded_min_p
from megatron_sglang.engine.live_model import floating, poison, recast, tie_head
from megatron_sglang.engine.options import MAILBOX_VARIABLE
from megatron_sglang.engine.wire import reply_name, write_reply


@dataclass(slots=True)
class _Session:
    """What one rank received of one version."""

    version: int
    buckets: int = 0
    """Taken so far, which is also the index of the next one."""
    merge: merge_on_engine.Merge | None = None
    """Set where the version comes as adapters that are merged here; None: as whole tensors."""
    received: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape of every tensor that came."""
    broken: str = ""
    """The first error, which all later messages of the version repeat."""


_open: dict[int, _Session] = {}
"""The open version; none between a commit and the next begin."""
_plans: dict[int, direct.Plan] = {}
_bases: dict[int, merge_on_engine.Base] = {}
_committed: dict[int, dict[str, tuple[int, ...]]] = {}
"""Names and shapes of the last committed version; every later version must bring the same."""


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Entry point named in ServerArgs. `named_tensors` is [(envelope, flat uint8 tensor)]; see `wire.py`."""
    seeded_min_p.install()  # before anything is served: an engine without weights serves nothing
    envelope, data = named_tensors[0]
    try:
        message = json.loads(envelope)
        box = Path(os.environ[MAILBOX_VARIABLE])
        reply_path = box / reply_name(int(message["id"]), int(message["rank"]))
    except (ValueError, KeyError) as error:
        print(f"engine loader: a message without a valid envelope was dropped: {error!r}", file=sys.stderr, flush=True)
        return
    try:
        reply = {"ok": True, **_handle(model, message, data)}
    except Exception as error:  # noqa: BLE001  process boundary: see the module docstring
        foreseen = type(error) in (ValueError, line.CutError)
        print(f"engine loader: {error}" if foreseen else traceback.format_exc(), file=sys.stderr, flush=True)
        session = _open.get(message["rank"])
        if session is not None:
            session.broken = session.broken or str(error)
        reply = {"ok": False, "cut": isinstance(error, line.CutError), "error": str(error) if foreseen else repr(error)}
    write_reply(reply_path, reply)


def _handle(model: Any, message: dict[str, Any], data: torch.Tensor) -> dict[str, Any]:
    """Do what a message says; the answer. ValueError and `line.CutError` are foreseen, and their text is the answer."""
    rank, command = message["rank"], message["command"]
    if command in process_group.COMMANDS:
        # The other ranks wait for this one in the broadcast, so it takes part first and checks afterwards.
        came = process_group.take_part(message, _device(model))
        if came is None:
            return {}
        command, message, data = "load", {**message, "command": "load"}, came
    if command in ("begin", "stream"):
        return _begin(model, message)
    if command == "adopt":
        tie_head(model)
        recast(model)
        return {"digests": _digests(model)}
    if command == "adapter":
        return {"bound": adapters.prove(model, message), "digests": _digests(model)}
    if command.startswith("merge_"):
        return _prepare_merge(model, message)
    if command in ("layout", "self_test", "plan"):
        return _examine(model, message, data)
    session = _open.get(rank)
    if session is None:
        raise ValueError(f"{command} arrived before any begin; start a new update")
    if session.broken:
        raise ValueError(f"version {session.version} already failed here ({session.broken}); start a new update")
    return _in_version(model, session, message, data)


def _begin(model: Any, message: dict[str, Any]) -> dict[str, Any]:
    """Open a new version, which gives up one that is open. A stream does more: it takes the whole version."""
    _open.pop(message["rank"], None)
    if message["command"] == "stream":
        return _stream(model, message)
    _open[message["rank"]] = _Session(message["version"])
    poison(model)
    return {}


def _in_version(model: Any, session: _Session, message: dict[str, Any], data: torch.Tensor) -> dict[str, Any]:
    """A message that belongs to the open version."""
    rank, command = message["rank"], message["command"]
    if command == "commit":
        digests = _commit(model, session, message)
        if session.merge is None:
            _committed[rank] = session.received
        del _open[rank]
        return {"digests": digests}
    if command == "load":
        _load_bucket(model, session, Bucket.from_header(message["bucket"], data))
    elif command == "disk":
        _load_folder(model, session, message)
    elif command == "merge":
        _merge_bucket(model, session, message, Bucket.from_header(message["bucket"], data))
    else:
        raise ValueError(f"unknown command {command!r}; expected one of those in loader.py's docstring")
    return {}


def _examine(model: Any, message: dict[str, Any], data: torch.Tensor) -> dict[str, Any]:
    """A message about the model rather than about a version of its weights: layout, self_test, plan."""
    from megatron_sglang.engine.self_test import self_test
    from megatron_sglang.engine.trace_loader import trace

    if not isinstance(model, torch.nn.Module):
        # ValueError, because its text is the answer.
        raise ValueError(f"a {type(model).__name__} has no layout; only a torch module can be traced")  # noqa: TRY004
    rank = message["rank"]
    if message["command"] == "plan":
        _plans[rank] = direct.check(model, message)
        return {}
    if message["command"] == "self_test":
        _open.pop(rank, None)
        return {"report": self_test(model, dict(Bucket.from_header(message["bucket"], data).tensors()), rank)}
    dtype = getattr(torch, message["dtype"])
    specs = {name: (tuple(shape), dtype) for name, shape in message["shapes"].items()}
    return {"layout": trace(model, specs, rank).to_json()}


def _prepare_merge(model: Any, message: dict[str, Any]) -> dict[str, Any]:
    """The commands merge_*: all that merging needs besides the factors, which come by "merge"."""
    rank, command = message["rank"], message["command"]
    base = _bases.get(rank)
    if command == "merge_state":
        return {"has_base": base is not None}
    if command == "merge_base":
        base = _bases[rank] = merge_on_engine.take_base(model, message, _digests(model))
        return {"merges": sorted(base.slots), "bytes": sum(tensor.nbytes for tensor in base.pristine.values())}
    if base is None:
        raise ValueError(f"{command} arrived before any merge_base; publish again")
    if command == "merge_begin":
        _open[rank] = _Session(message["version"], merge=merge_on_engine.begin(model, base))
        return {}
    if command == "merge_witness":
        merge_on_engine.keep_witness(model, base)
        return {}
    if command == "merge_compare":
        return merge_on_engine.compare(model, base, message["tolerance"])
    session = _open.get(rank)
    if command != "merge_change" or session is None or session.merge is None:
        raise ValueError(f"{command} does not fit here; expected one of those in merge_on_engine.py's docstring")
    return {"change": {key: sums.tolist() for key, sums in session.merge.change.items()}}


def _merge_bucket(model: Any, session: _Session, message: dict[str, Any], bucket: Bucket) -> None:
    if session.merge is None:
        raise ValueError("a bucket of adapters came into a version that was not opened by merge_begin")
    _check_bucket(model, session, bucket)
    merge_on_engine.merge(model, session.merge, bucket, message["factors"], message["scale"])
    _taken(session, bucket)


def _load_folder(model: Any, session: _Session, message: dict[str, Any]) -> None:
    device = _device(model)
    for bucket in weight_folder.buckets(Path(message["folder"]), message["manifest"]):
        _load_bucket(model, session, dataclasses.replace(bucket, data=bucket.data.to(device)))


def _load_bucket(model: Any, session: _Session, bucket: Bucket) -> None:
    if session.merge is not None:
        raise ValueError("a bucket of weights came into a version that was opened by merge_begin")
    _check_bucket(model, session, bucket)
    with torch.no_grad():
        model.load_weights(bucket.tensors())
    _taken(session, bucket)


def _check_bucket(model: Any, session: _Session, bucket: Bucket) -> None:
    """ValueError unless the bucket is the next one, its tensors are new, lie in its bytes and have the model's dtypes,
    and every byte is the sender's."""
    if (bucket.version, bucket.index) != (session.version, session.buckets):
        raise ValueError(
            f"got bucket {bucket.index} of version {bucket.version}, expected bucket {session.buckets} of version "
            f"{session.version}: one was dropped, repeated or reordered"
        )
    if bucket.data.dtype != torch.uint8 or bucket.data.dim() != 1:
        raise ValueError(f"bucket data is {bucket.data.dtype} {tuple(bucket.data.shape)}, expected flat uint8")
    dtypes = {parameter.dtype for _, parameter in floating(model)}
    for spec in bucket.specs:
        if spec.name in session.received:
            raise ValueError(f"tensor {spec.name} arrived twice")
        if spec.offset + spec.nbytes > bucket.data.numel():
            raise ValueError(f"tensor {spec.name} ends at byte {spec.offset + spec.nbytes} of {bucket.data.numel()}")
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point and dtypes and dtype not in dtypes:
            raise ValueError(f"tensor {spec.name} is {dtype}, but the model holds {_names(dtypes)}")
        session.received[spec.name] = spec.shape
    found = digests(tensor for _, tensor in bucket.tensors())
    for spec, actual in zip(bucket.specs, found, strict=True):
        if actual != spec.digest:
            raise ValueError(
                f"tensor {spec.name} has digest {actual:#x}, its sender said {spec.digest:#x}: bytes changed"
            )


def _taken(session: _Session, bucket: Bucket) -> None:
    """Count a bucket whose bytes are not needed any more."""
    if bucket.data.is_cuda:
        # The sender frees or reuses the buffer as soon as it has our answer.
        torch.cuda.synchronize(bucket.data.device)
    session.buckets += 1


def _device(model: Any) -> torch.device:
    return next((parameter.device for _, parameter in model.named_parameters()), torch.device("cpu"))


def _stream(model: Any, message: dict[str, Any]) -> dict[str, Any]:
    """Take all deliveries of a version by plan; the digests of the parameters afterwards."""
    rank, version = message["rank"], message["version"]
    plan = _plans.get(rank)
    if plan is None:
        raise ValueError("a stream was opened before any plan")
    live, expected, taken = direct.Live.by(plan, model), len(plan.buckets), 0

    def deliver(header: dict[str, Any], data: torch.Tensor) -> None:
        nonlocal taken
        if (header["version"], header["index"]) != (version, taken) or taken == expected:
            due = f", {direct.named(plan.buckets[taken])}" if taken < expected else ""
            raise ValueError(
                f"got delivery {header['index']} of version {header['version']}, expected {taken} of version "
                f"{version}{due}, {expected} in all: one was dropped, repeated or reordered"
            )
        # Nothing of the buffer is read any more when this returns, since its last step waits for a digest of what was
        # written: the sender may overwrite it.
        direct.deliver(live, plan, taken, header, data)
        taken += 1

    line.receive(message, live.device, expected, deliver)
    live = direct.finish(live, plan)
    return {"digests": _proved(live.parameters, *direct.prove(live, plan)), "deliveries": taken}


@torch.no_grad()
def _digests(model: Any) -> dict[str, str]:
    """Digest of every parameter of this rank, by name. ValueError if one holds anything but finite numbers."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    if not parameters:
        return {}
    return _proved(parameters, *finite_digests(list(parameters.values())))


def _proved(parameters: Iterable[str], found: Sequence[int], finite: Sequence[bool]) -> dict[str, str]:
    """Digests by name of a parameter; ValueError where one of them is not finite."""
    if unfilled := [name for name, good in zip(parameters, finite, strict=True) if not good]:
        raise ValueError(f"{len(unfilled)} parameters are unfilled or hold NaN or infinity: {_names(unfilled)}")
    return {name: f"{number % 2**64:016x}" for name, number in zip(parameters, found, strict=True)}


def _commit(model: Any, session: _Session, message: dict[str, Any]) -> dict[str, str]:
    """Digests of a version of which every bucket came and every parameter is filled; ValueError otherwise."""
    if (message["version"], message["buckets"]) != (session.version, session.buckets):
        raise ValueError(
            f"commit of version {message['version']} with {message['buckets']} buckets, but this rank has "
            f"{session.buckets} buckets of version {session.version}"
        )
    if session.merge is not None:
        return merge_on_engine.finish(model, session.merge, _digests)
    before = _committed.get(message["rank"])
    if before is not None and before != session.received:
        changed = sorted(name for name, _ in before.items() ^ session.received.items())
        raise ValueError(f"{len(changed)} tensors are missing, new or of another shape than before: {_names(changed)}")
    tie_head(model)
    recast(model)
    return _digests(model)


def _names(items: Any) -> str:
    return direct.first_of(sorted(map(str, items)))

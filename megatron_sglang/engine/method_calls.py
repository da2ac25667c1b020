"""What the sync methods beside the buckets ask of an engine or a group of engines; on the leader only.

    method            begin                        between                                commit
    disk              begin_update                 load_folder                            commit_update
    restart           begin_update                 serve_folder (starts it anew)          commit_update
    merge-on-engine   begin_merge                  merge, once for each bucket            commit_update
    adapter           begin_adapter                load_adapter                           commit_adapter

All of it raises `WeightSyncError` and leaves the engine stale where a step fails, as the steps of `HttpEngine` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sglang.buckets import Bucket
from megatron_sglang.engine import wire
from megatron_sglang.engine.external import ExternalEngine
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.errors import WeightSyncError


class MethodCalls:
    """One object for one engine (or group), which it does not own."""

    def __init__(self, engine: HttpEngine | EngineGroup) -> None:
        self.engine = engine

    # ---- folders ----

    def load_folder(self, version: int, folder: str, manifest: str) -> None:
        """Every engine rank reads every bucket of a `weight_folder` itself; an engine without our loader reads it by
        SGLang's route. manifest: SHA-256 of its manifest."""
        where = str(Path(folder).resolve())
        message = {"command": "disk", "version": version, "folder": where, "manifest": manifest}

        def load(one: HttpEngine) -> None:
            if isinstance(one, ExternalEngine) and one.unproved:
                one.load_from_disk(where)
            else:
                _ask(one, one.in_update(version, "folder"), message)

        self._each(load)

    def serve_folder(self, folder: str) -> str:
        """Start the engine anew on a model folder, by SGLang's own loader; the digest of what it then holds.

        The engine is stale before and after: this proves nothing yet.
        """

        def restart(one: HttpEngine) -> str:
            one.fail_update("it is started again")
            one.adapter = ""
            model_path = str(Path(folder).resolve())
            one.options = dataclasses.replace(one.options, model_path=model_path, load_format="auto")
            one.server.options = one.options
            with one.failing_as(f"engine on {folder}"):
                one.restart()
            one.fail_update("it was started again")
            return wire.engine_digest(_ask(one, "weights from disk", {"command": "adopt"}))

        return self._alike(self._each(restart), f"engines on {folder}")

    # ---- when it serves ----

    def stop(self, version: int) -> None:
        """End all requests, for an update to `version`. SGLang takes a message for the loader only when none is alive,
        so whoever asks the engine something before `begin_*` would wait for them."""
        self.engine.note_update(version)
        self._each(lambda one: _stop(one, version))

    def take_memory_back(self) -> bool:
        """Take back all memory that was released, for updates that do not begin with `begin_update`. Whether weights
        were in it: then they may be anything, as on a GPU, or what they were."""
        released = any("weights" in one.released for one in self._members)

        def wake_up(one: HttpEngine) -> None:
            with one.failing_as("memory"):
                one.wake_up()

        self._each(wake_up)
        return released

    # ---- merging in the engine ----

    def has_base(self) -> bool:
        """Does every engine rank hold a base to merge into, and its other weights?"""
        replies = self._each(lambda one: _ask(one, "merge state", {"command": "merge_state"}))
        released = any("weights" in one.released for one in self._members)
        return not released and all(reply["has_base"] for reply in _flat(replies))

    def take_base(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
        """What the engine holds now is the base. names: the adapted HF weights. Bytes that all ranks keep of it."""
        message = {"command": "merge_base", "names": list(names), "shapes": dict(shapes), "dtype": dtype}
        replies = self._each(lambda one: _ask(one, "base", message))
        for of_engine in replies:
            if lost := sorted(set(names).difference(*(reply["merges"] for reply in of_engine))):
                reason = f"{len(lost)} adapted weights are merged by no engine rank, {lost[0]} first"
                self.engine.fail_update(reason)
                raise WeightSyncError(f"{reason}: its loader does not know them; use sync.method=generic")
        return sum(reply["bytes"] for reply in _flat(replies))

    def begin_merge(self, version: int) -> None:
        """As `begin_update`, but only what will be merged is poisoned."""
        self.engine.note_update(version)
        self._each(lambda one: one.begin_update(version, command="merge_begin"))

    def merge(self, bucket: Bucket, factors: Sequence[tuple[str, str, str]], scale: float) -> None:
        """Hand adapters to every engine rank. factors: (HF weight, A, B), the last two by their names in `bucket`."""
        message = {"command": "merge", "version": bucket.version, "bucket": bucket.header()}
        message |= {"factors": factors, "scale": scale}
        name = f"bucket {bucket.index} of adapters"
        self._each(lambda one: _ask(one, one.in_update(bucket.version, name), message, bucket))
        wire.collect_ipc()

    def merge_change(self) -> list[dict[str, list[float]]]:
        """By engine rank: "layer.kind" -> sums of what was merged (`merge_on_engine.Merge.change`)."""
        replies = self._each(lambda one: _ask(one, "change", {"command": "merge_change"}))
        return [reply["change"] for reply in _flat(replies)]

    def keep_witness(self) -> None:
        self._each(lambda one: _ask(one, "witness", {"command": "merge_witness"}))

    def compare(self, tolerance: float) -> list[dict[str, Any]]:
        """By engine rank, how far it is from the witness (`merge_on_engine.compare`)."""
        message = {"command": "merge_compare", "tolerance": tolerance}
        return _flat(self._each(lambda one: _ask(one, "comparison", message)))

    # ---- adapters ----

    def base_digest(self) -> str:
        """Digest of the parameters that the engine holds now."""
        digests = self._each(lambda one: wire.engine_digest(_ask(one, "base", {"command": "adopt"})))
        return self._alike(digests, "engines that serve adapters")

    def begin_adapter(self, version: int, name: str) -> None:
        """No request runs, nothing is cached; of what is loaded only the adapter that serves stays, if it is not to be
        loaded anew as `name`."""

        def begin(one: HttpEngine) -> None:
            _stop(one, version)
            with one.failing_as(f"weight version {version}, begin"):
                for loaded in _loaded(one):
                    if loaded != one.adapter or loaded == name:
                        one.unload_adapter(loaded)
            one.updating = version

        self.engine.note_update(version)
        self._each(begin)

    def load_adapter(self, version: int, name: str, folder: str) -> None:
        def load(one: HttpEngine) -> None:
            with one.failing_as(one.in_update(version, f"adapter {name}")):
                one.load_adapter(name, Path(folder).resolve())

        self._each(load)

    def commit_adapter(
        self, version: int, name: str, folder: str, digests: Mapping[str, int], scale: float, base: str
    ) -> int:
        """Serve by the adapter, if all ranks have proved that they hold it whole and that the base is still `base` (a
        digest). How many of its tensors are bound."""
        message = {"command": "adapter", "name": name, "folder": str(Path(folder).resolve()), "scale": scale}
        message |= {"digests": dict(digests)}

        def commit(one: HttpEngine) -> int:
            with one.failing_as(what := one.in_update(version, "commit")):
                replies = _ask(one, what, message)
                found = wire.engine_digest(replies)
                if found != base:
                    raise WeightSyncError(
                        f"{what}: the base under the adapter has digest {found}, version 0 had {base}; something has "
                        "written to it; publish again, which starts the engine anew"
                    )
                one.adapter = name
                one.publish(version)
            return min(reply["bound"] for reply in replies)

        bound = min(self._each(commit))
        self.engine.stale = ""  # of a group, which has no version of its own
        return bound

    # ---- steps ----

    @property
    def _members(self) -> Sequence[HttpEngine]:
        return self.engine.engines if isinstance(self.engine, EngineGroup) else [self.engine]

    def _each[T](self, ask: Callable[[HttpEngine], T]) -> list[T]:
        """What each engine gave, asked at the same time; one that fails makes all stale."""
        if isinstance(self.engine, EngineGroup):
            with self.engine.as_one():
                return self.engine.each(lambda _, one: ask(one))
        return [ask(self.engine)]

    def _alike(self, digests: Sequence[str], what: str) -> str:
        if len(set(digests)) > 1:
            reason = f"{what} hold different weights, by their digests: {', '.join(digests)}; expected one digest"
            self.engine.fail_update(reason)
            raise WeightSyncError(reason)
        return digests[0]


def _ask(
    engine: HttpEngine, what: str, message: Mapping[str, Any], bucket: Bucket | None = None
) -> list[dict[str, Any]]:
    """Send one message to every rank of an engine; their answers, or a failed update."""
    with engine.failing_as(what):
        return engine.tell(what, dict(message), bucket.data if bucket is not None else None)


def _stop(engine: HttpEngine, version: int) -> None:
    engine.note_update(version)
    with engine.failing_as(f"weight version {version}, begin"):
        engine.quiesce()


def _loaded(engine: HttpEngine) -> list[str]:
    """Names of the adapters that the engine has loaded."""
    response = engine.connected.get("/v1/models", engine.options.update_timeout_s)
    if response.status_code != 200:
        raise WeightSyncError(f"engine answered /v1/models with {response.status_code}, expected 200")
    return [card["id"] for card in response.json()["data"] if card.get("parent")]


def _flat[T](lists: Sequence[Sequence[T]]) -> list[T]:
    return [item for items in lists for item in items]

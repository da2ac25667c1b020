"""Sync methods beside the two paths of merged weights (`sync.py`): what travels is a folder, or adapters alone.

    disk              merged weights as a folder; each engine rank reads it
    restart           the same folder; the engine is started anew on it
    merge-on-engine   A and B; each engine rank merges them into its own copy of the base
    adapter           A and B as a PEFT folder; SGLang serves them beside the untouched base

Each is a `sync.Path` with steps of its own (`sync.Prepares`, `sync.OwnSteps`), made by `training/paths.py`. All ranks
act as one. After any failure the engine is stale, and the next publish starts from whatever state that left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_sglang.buckets import Bucket, kind_of
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.interfaces import Comm, Engine, leaders
from megatron_sglang.sync import Path, Sent, agreed, publish
from megatron_sglang.types import MergeFidelity

TOLERANCE = {"float32": 2**-18, "bfloat16": 2**-7}
"""Largest relative difference between a weight merged by the trainer and by the engine where their products are not
summed alike, as on a GPU: one unit in the last place of bfloat16, 32 of float32. On a CPU they must be equal."""


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """Weights or adapters that were written: where, and what proves them."""

    path: str
    proof: Any
    """SHA-256 of the manifest; of adapters: tensor name -> digest. JSON values."""
    tensors: int
    files: int
    bytes: int


class FolderWriter(Protocol):
    """Writes merged weights, or the base's (`weights/disk.py`). Collective."""

    def write(self, version: int) -> Folder: ...

    def fidelity(self) -> MergeFidelity: ...


class Adapters(Protocol):
    """All adapters of the trainer under HF names (`weights/adapters.py`). Collective but for the attributes."""

    names: Sequence[str]
    """HF weights that have one, sorted."""
    scale: float

    def buckets(self, version: int) -> Iterator[Sequence[tuple[Bucket, Sequence[tuple[str, str, str]]]]]:
        """Some buckets at a time, each with (weight, A, B) by name; on ranks other than the leader without any."""
        ...

    def write(self, version: int) -> Folder: ...

    def fidelity(self) -> MergeFidelity:
        """Of the adapters last given, as they are: nothing is rounded."""
        ...


class Calls(Protocol):
    """The engine's side (`engine/method_calls.py`), on the leader only."""

    def load_folder(self, version: int, folder: str, manifest: str) -> None: ...
    def serve_folder(self, folder: str) -> str: ...
    def stop(self, version: int) -> None: ...
    def take_memory_back(self) -> bool: ...
    def has_base(self) -> bool: ...
    def take_base(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int: ...
    def begin_merge(self, version: int) -> None: ...
    def merge(self, bucket: Bucket, factors: Sequence[tuple[str, str, str]], scale: float) -> None: ...
    def merge_change(self) -> list[dict[str, list[float]]]: ...
    def keep_witness(self) -> None: ...
    def compare(self, tolerance: float) -> list[dict[str, Any]]: ...
    def base_digest(self) -> str: ...
    def begin_adapter(self, version: int, name: str) -> None: ...
    def load_adapter(self, version: int, name: str, folder: str) -> None: ...
    def commit_adapter(
        self, version: int, name: str, folder: str, digests: Mapping[str, int], scale: float, base: str
    ) -> int: ...


class DiskPath:
    """Each engine rank reads every bucket of the folder and checks it as if it had been sent."""

    name = "disk"

    def __init__(self, comm: Comm, writer: FolderWriter, engine: Engine | None, calls: Calls | None) -> None:
        self.comm, self.writer, self.engine, self.calls = comm, writer, engine, calls
        self.fidelity = writer.fidelity
        self._folder: Folder | None = None

    def prepare(self, version: int) -> None:
        self._folder = None
        self._folder = self.writer.write(version)

    def begin(self, version: int) -> None:
        leaders(self.engine).begin_update(version)

    def send(self, version: int) -> Sent:
        folder = leaders(self._folder)
        self.comm.from_leader(lambda: leaders(self.calls).load_folder(version, folder.path, folder.proof))
        return Sent(folder.tensors, folder.files, folder.bytes)

    def commit(self, version: int, buckets: int) -> str:
        return leaders(self.engine).commit_update(version, buckets)


class RestartPath(DiskPath):
    """SGLang itself loads the folder, in new processes. The proof that it did so rightly: the same folder, loaded once
    more as `disk` does, leaves the same bits."""

    name = "restart"
    _loaded = ""

    def begin(self, version: int) -> None:
        leaders(self.engine).fail_update(f"an update to version {version} is under way")

    def send(self, version: int) -> Sent:
        self._loaded = self.comm.from_leader(lambda: self._start_on(leaders(self._folder).path))
        self.comm.from_leader(lambda: leaders(self.engine).begin_update(version))
        return super().send(version)

    def _start_on(self, folder: str) -> str:
        digest = leaders(self.calls).serve_folder(folder)
        leaders(self.engine).hold_back("its files are not compared with what it holds yet")
        return digest

    def commit(self, version: int, buckets: int) -> str:
        digest = super().commit(version, buckets)
        if digest != self._loaded:
            raise WeightSyncError(
                f"the engine that was started on {leaders(self._folder).path} had digest {self._loaded}, its weights "
                f"checked one by one give {digest}; SGLang loads this model in another way than it is updated"
            )
        leaders(self.engine).serve(version)
        return digest


class MergeOnEnginePath:
    """Version after version only A and B are sent. Before the first, and after any failure, the base is sent by `base`
    (adapters off), and the version itself by `whole`, to which the engine's first merge must be equal.

    exact: demand equal digests; else differences up to `TOLERANCE` are accepted, and told to `say`.
    """

    name = "merge-on-engine"

    def __init__(
        self,
        comm: Comm,
        adapters: Adapters,
        base: Path,
        whole: Path,
        engine: Engine | None,
        calls: Calls | None,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        exact: bool,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.comm, self.adapters, self.base, self.whole = comm, adapters, base, whole
        self.engine, self.calls, self.shapes, self.dtype = engine, calls, shapes, dtype
        self.exact, self.say = exact, say
        self.base_bytes = 0
        """That the engine ranks keep of the base, together."""
        self._sound = False
        self._expected: str | None = None
        self._change: dict[str, Any] = {}

    def prepare(self, version: int) -> None:
        """Give the engine the base, and keep the version merged by the trainer as the witness of the first merge there;
        nothing if the last version went well. Until that merge is compared with it the engine serves nothing."""
        sound = self.comm.from_leader(lambda: self._sound and self._still_has_base(version))
        self._sound, self._expected = False, None
        if sound:
            return
        self.comm.from_leader(
            lambda: leaders(self.engine).hold_back("it holds nothing that is proved to be the policy")
        )
        publish(self.comm, self.engine, self.base, version)
        names = self.adapters.names
        self.base_bytes = self.comm.from_leader(lambda: leaders(self.calls).take_base(names, self.shapes, self.dtype))
        report = publish(self.comm, self.engine, self.whole, version)
        self.comm.from_leader(lambda: leaders(self.calls).keep_witness())
        self._expected = report.engine_digest

    def _still_has_base(self, version: int) -> bool:
        leaders(self.calls).stop(version)
        return leaders(self.calls).has_base()

    def begin(self, version: int) -> None:
        leaders(self.calls).begin_merge(version)

    def send(self, version: int) -> Sent:
        tensors = count = size = 0
        for part in agreed(self.comm, self.adapters.buckets(version)):
            self.comm.from_leader(lambda part=part: self._hand_over(part))
            tensors += sum(len(bucket.specs) for bucket, _ in part)
            count, size = count + len(part), size + sum(bucket.data.numel() for bucket, _ in part)
        return Sent(*self.comm.from_leader(lambda: [tensors, count, size]))

    def commit(self, version: int, buckets: int) -> str:
        calls = leaders(self.calls)
        change = calls.merge_change()
        digest = leaders(self.engine).commit_update(version, buckets)
        if self._expected is not None:
            found = calls.compare(TOLERANCE[self.dtype])
            if digest != self._expected:
                self._tolerate(version, digest, found)
            leaders(self.engine).serve(version)
        self._change = dataclasses.asdict(fidelity_of(change, self.adapters.names, self.shapes))
        self._sound = True
        return digest

    def fidelity(self) -> MergeFidelity:
        """What the engine ranks' merging changed, over all ranks. Collective."""
        found = self.comm.from_leader(lambda: self._change)
        layers = {int(layer): tuple(norms) for layer, norms in found["layers"].items()}
        return MergeFidelity(**{**found, "layers": layers})

    def _hand_over(self, part: Sequence[tuple[Bucket, Sequence[tuple[str, str, str]]]]) -> None:
        for bucket, factors in part:
            leaders(self.calls).merge(bucket, factors, self.adapters.scale)

    def _tolerate(self, version: int, digest: str, found: Sequence[Mapping[str, Any]]) -> None:
        """Accept differences to the witness within `TOLERANCE`, and say so; `WeightSyncError` for others. found: by
        engine rank (`merge_on_engine.compare`)."""
        different, elements = (sum(one[name] for one in found) for name in ("different", "elements"))
        worst = max(one["worst"] for one in found) * TOLERANCE[self.dtype]
        text = (
            f"version {version}: merged in the engine {different} of {elements} elements are not what the trainer "
            f"merges, by up to {worst:.2g} of their size (engine digests {digest} and {self._expected})"
        )
        if self.exact or worst > TOLERANCE[self.dtype]:
            limit = 0 if self.exact else TOLERANCE[self.dtype]
            raise WeightSyncError(f"{text}; at most {limit:.2g} is accepted; use sync.method=generic")
        self.say(text)


class AdapterPath:
    """SGLang applies the adapters itself. Requests are served by name, never by the base alone.

    base: writes the base as a folder, where the engine has none on disk (random weights); None: it was started on it.
    home: model folder that the engine was started on.
    """

    name = "adapter"

    def __init__(
        self,
        comm: Comm,
        adapters: Adapters,
        engine: Engine | None,
        calls: Calls | None,
        *,
        home: str,
        base: FolderWriter | None = None,
    ) -> None:
        self.comm, self.adapters, self.engine, self.calls = comm, adapters, engine, calls
        self.home, self.base = home, base
        self._base_digest = ""
        self._sound = False
        self._folder: Folder | None = None
        if engine is not None:
            engine.fail_update("no adapter was published yet, and the base alone is not the policy")

    def prepare(self, version: int) -> None:
        """Make sure that the engine runs on the right base, and write the adapters."""
        self._folder = None
        if self.base is not None:
            self.home = self.base.write(0).path
            self.comm.from_leader(lambda: leaders(self.calls).serve_folder(self.home))
            self.base = None
        self._folder = self.adapters.write(version)
        self.comm.from_leader(lambda: self._check_base(version))

    def begin(self, version: int) -> None:
        leaders(self.calls).begin_adapter(version, adapter_name(version))

    def send(self, version: int) -> Sent:
        folder, name = leaders(self._folder), adapter_name(version)
        self.comm.from_leader(lambda: leaders(self.calls).load_adapter(version, name, folder.path))
        return Sent(folder.tensors, folder.files, folder.bytes)

    def commit(self, version: int, buckets: int) -> str:
        folder, base = leaders(self._folder), self._base_digest
        scale, name = self.adapters.scale, adapter_name(version)
        leaders(self.calls).commit_adapter(version, name, folder.path, folder.proof, scale, base)
        self._sound = True
        return hashlib.sha256(json.dumps([base, sorted(folder.proof.items())]).encode()).hexdigest()[:16]

    def fidelity(self) -> MergeFidelity:
        return self.adapters.fidelity()

    def _check_base(self, version: int) -> None:
        """The engine's base is that of version 0; it is loaded anew if it is not after a failed update, or after its
        memory was released."""
        calls, sound, self._sound = leaders(self.calls), self._sound, False
        calls.stop(version)
        released = calls.take_memory_back()
        try:
            found = calls.base_digest()
        except WeightSyncError:
            if not released:  # else it may hold anything, NaN too
                raise
            found = "none"
        if found == (self._base_digest or ("" if released else found)):
            self._base_digest = found
            return
        text = f"the engine's base has digest {found}, version 0 had {self._base_digest}"
        if sound and not released:
            raise WeightSyncError(
                f"{text}: something wrote to it since the last version; publish again, which loads {self.home} anew"
            )
        found = calls.serve_folder(self.home)
        if self._base_digest not in ("", found):
            raise WeightSyncError(f"{text}, and {self.home} now gives {found}: its files are not those of the start")
        self._base_digest = found


def adapter_name(version: int) -> str:
    """The name of a version's adapter in the engine. Each version has its own, since SGLang's cached prefixes belong to
    one load of one name."""
    return f"policy-v{version}"


def fidelity_of(
    change: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> MergeFidelity:
    """From what each engine rank merged ("layer.kind" -> delta^2, lost^2, changed, elements). Ranks that hold the same
    elements, such as repeated key heads or several engines, count as one: a kind is held alike by all."""
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[kind_of(name)] += math.prod(shapes[name])
    layers: dict[int, list[float]] = {}
    for key in sizes:
        sums = [sum(column) for column in zip(*(found[key] for found in change if key in found), strict=True)]
        share = sizes[key] / sums[3]
        layer = layers.setdefault(int(key.split(".")[0]), [0.0] * 4)
        layer[:] = [total + share * more for total, more in zip(layer, sums, strict=True)]
    return MergeFidelity.of(layers)

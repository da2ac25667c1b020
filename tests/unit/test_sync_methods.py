"""Sync methods without an engine: folders that prove themselves, and merging in a rank."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import Alone
from safetensors.torch import load_file

from megatron_sglang.buckets import Bucket, pack
from megatron_sglang.engine import loader, merge_on_engine, wire
from megatron_sglang.engine.options import MAILBOX_VARIABLE
from megatron_sglang.errors import WeightSyncError
from megatron_sglang.sync_methods import Folder, fidelity_of
from megatron_sglang.types import MergeFidelity

Q, K, GATE, UP, NORM = (
    f"model.layers.0.{name}.weight" for name in ("q_proj", "k_proj", "gate_proj", "up_proj", "norm")
)


class Model(torch.nn.Module):
    """One layer as TP rank 0 of 2 holds it: half of q's rows and all of k's, fused; half of up's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=False)
        self.qk = torch.nn.Parameter(torch.zeros(6, 8))
        self.up = torch.nn.Parameter(torch.zeros(5, 4))
        self.norm = torch.nn.Parameter(torch.zeros(8))

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            if name == Q:
                self.qk.data[:4].copy_(tensor[:4])
            elif name == K:
                self.qk.data[4:].copy_(tensor)
            elif name == UP:
                self.up.data.copy_(tensor[:, :4])
            elif name == NORM:
                self.norm.data.copy_(tensor)


SHAPES = {Q: (8, 8), K: (2, 8), UP: (5, 8), NORM: (8,)}
ADAPTED = [Q, K, UP]


class Rank:
    """Sends messages to the loader as the engine would, and reads the answers."""

    def __init__(self, mailbox: Path) -> None:
        self.mailbox, self.model, self.sent = mailbox, Model(), 0

    def __call__(self, command: str, data: torch.Tensor | None = None, **fields: Any) -> dict[str, Any]:
        self.sent += 1
        envelope = json.dumps({"id": self.sent, "rank": 0, "command": command, **fields})
        loader.load(self.model, [(envelope, torch.empty(0, dtype=torch.uint8) if data is None else data)])
        return wire.collect(self.mailbox, self.sent, 1, command)[0]

    def publish(self, version: int, weights: dict[str, torch.Tensor]) -> dict[str, str]:
        self("begin", version=version)
        bucket = pack(version, 0, list(weights.items()))
        self("load", bucket.data, bucket=bucket.header())
        return self("commit", version=version, buckets=1)["digests"]

    def take_base(self, names: list[str] = ADAPTED) -> dict[str, Any]:
        return self("merge_base", names=names, shapes=SHAPES, dtype="float32")

    def merge(self, version: int, factors: dict[str, Any], scale: float = 2.0) -> dict[str, str]:
        self("merge_begin", version=version)
        self.hand_over(version, 0, factors, scale)
        return self("commit", version=version, buckets=1)["digests"]

    def hand_over(self, version: int, index: int, factors: dict[str, Any], scale: float = 2.0) -> None:
        named = [
            (f"{name}.{part}", tensor)
            for name, pair in factors.items()
            for part, tensor in zip("AB", pair, strict=True)
        ]
        bucket = pack(version, index, named)
        rows = [(name, f"{name}.A", f"{name}.B") for name in factors]
        self("merge", bucket.data, version=version, bucket=bucket.header(), factors=rows, scale=scale)


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setenv(MAILBOX_VARIABLE, str(tmp_path))
    for state in ("_open", "_committed", "_bases"):
        monkeypatch.setattr(loader, state, {})
    return Rank(tmp_path)


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def factors_of(seed: int, rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Eighths, whose products are exact: in what order a CPU sums them, mm and baddbmm alike or not, is its own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).mul_(8).round_().div_(8)  # noqa: E731
    return {name: (draw(rank, SHAPES[name][1]), draw(SHAPES[name][0], rank)) for name in ADAPTED}


def merged(base: dict[str, torch.Tensor], factors: dict[str, Any], scale: float = 2.0) -> dict[str, torch.Tensor]:
    """As the trainer does it."""
    return base | {name: base[name] + torch.mm(up, down).mul_(scale) for name, (down, up) in factors.items()}


# ---- merging ----


def test_merging_in_a_rank_gives_the_bits_of_merged_weights_version_after_version(rank, base):
    """Merging into what is there, instead of the base, drifts; a slice of another row or column is another model."""
    rank.publish(1, base)
    assert rank.take_base()["merges"] == sorted(ADAPTED)
    for version in range(2, 7):
        factors = factors_of(version)
        found = rank.merge(version, factors)
        assert found == rank.publish(version, merged(base, factors))


def test_what_a_merge_changed_is_counted_once_whatever_ranks_hold(rank, base):
    """A norm that counts repeated key heads twice would be another run's on another layout."""
    rank.publish(1, base)
    rank.take_base([K])
    factors = {K: factors_of(3)[K]}
    rank("merge_begin", version=2)
    rank.hand_over(2, 0, factors)
    change = rank("merge_change")["change"]
    expected = 2.0 * factors[K][1] @ factors[K][0]
    found = fidelity_of([change, change], [K], SHAPES)
    assert found.update_norm == pytest.approx(float(expected.norm()), rel=1e-6)
    assert (found.changed, found.cast_loss, list(found.layers)) == (1.0, 0.0, [0])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda factors: factors.pop(K), r"adapters of 1 weights did not arrive, .*k_proj"),
        (lambda factors: factors.update({NORM: factors[K]}), r"norm.weight was not announced as an adapted weight"),
        (lambda factors: factors.update({K: (factors[K][0], factors[Q][1][:2, :2])}), r"of other ranks"),
        (lambda factors: factors.update({K: (factors[K][0][:, :4], factors[K][1])}), r"is for a weight \[2, 4\]"),
        (lambda factors: factors[K][1].fill_(torch.nan), "NaN or infinity: qk"),
    ],
)
def test_a_wrong_adapter_is_refused_and_the_next_version_heals(rank, base, spoil, text):
    """A weight without its adapter is the base's, and looks like a policy that did not learn."""
    rank.publish(1, base)
    rank.take_base()
    good, bad = factors_of(2), factors_of(3)
    spoil(bad)
    with pytest.raises(WeightSyncError, match=text):
        rank.merge(2, bad)
    assert rank.merge(3, good) == rank.publish(3, merged(base, good))


def test_a_flipped_bit_and_a_repeated_bucket_of_adapters(rank, base):
    rank.publish(1, base)
    rank.take_base()
    rank("merge_begin", version=2)
    bucket = pack(2, 0, [("A", torch.ones(3, 8)), ("B", torch.ones(2, 3))])
    bucket.data[5] ^= 1
    with pytest.raises(WeightSyncError, match=r"tensor A has digest .*bytes changed"):
        rank("merge", bucket.data, version=2, bucket=bucket.header(), factors=[(K, "A", "B")], scale=1.0)
    rank("merge_begin", version=3)
    rank.hand_over(3, 0, {K: factors_of(1)[K]})
    with pytest.raises(WeightSyncError, match="got bucket 0 of version 3, expected bucket 1"):
        rank.hand_over(3, 0, {Q: factors_of(1)[Q]})


def test_a_base_that_was_changed_is_noticed(rank, base):
    """What has no adapter is never sent again, so it must be proved to be what it was."""
    rank.publish(1, base)
    rank.take_base()
    with torch.no_grad():
        rank.model.norm[3] += 1
    with pytest.raises(WeightSyncError, match="1 parameters without adapters are not the base's any more, norm first"):
        rank.merge(2, factors_of(2))
    rank.publish(3, base)
    rank.take_base()
    rank.merge(3, factors_of(2))


def test_a_merge_needs_its_base_and_its_own_version(rank, base):
    with pytest.raises(WeightSyncError, match="merge_begin arrived before any merge_base"):
        rank("merge_begin", version=1)
    with pytest.raises(WeightSyncError, match=r"1 adapted weights are none of the model's, .*gate_proj"):
        rank.take_base([GATE])
    rank.publish(1, base)
    rank.take_base()
    rank("begin", version=2)
    with pytest.raises(WeightSyncError, match="not opened by merge_begin"):
        rank.hand_over(2, 0, factors_of(2))
    rank("merge_begin", version=3)
    bucket = pack(3, 0, list(base.items()))
    with pytest.raises(WeightSyncError, match="opened by merge_begin"):
        rank("load", bucket.data, bucket=bucket.header())


def test_how_far_a_merge_is_from_the_trainers(rank, base):
    """On a GPU products are summed in another order; the first version says by how much that shows."""
    rank.publish(1, base)
    rank.take_base()
    factors = factors_of(2)
    rank.publish(2, merged(base, factors))
    rank("merge_witness")
    rank.merge(2, factors)
    assert rank("merge_compare", tolerance=2**-18) == {"ok": True, "different": 0, "elements": 68, "worst": 0.0}
    rank("merge_witness")
    rank.merge(3, factors, scale=2.0 * (1 + 2**-16))
    found = rank("merge_compare", tolerance=2**-18)
    assert found["different"] > 30
    assert found["worst"] > 1


def test_the_copy_of_the_base_keeps_strides() -> None:
    """A parameter that a model holds transposed would be merged in the wrong places."""
    tensor = torch.arange(12.0).view(3, 4).t()
    assert merge_on_engine._to_cpu(tensor).stride() == tensor.stride()


# ---- folders ----


class Given:
    """`interfaces.Weights` of given tensors, two in a bucket."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def buckets(self, version: int) -> Iterator[Bucket]:
        items = list(self.weights.items())
        for index, start in enumerate(range(0, len(items), 2)):
            yield pack(version, index, items[start : start + 2])

    def fidelity(self) -> MergeFidelity:
        return MergeFidelity(0.0, 0.0, 0.0, {})


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32", "architectures": ["X"]}')
    return folder


def write(home: Path, source: Path, weights: dict[str, torch.Tensor], version: int) -> Folder:
    disk = pytest.importorskip("megatron_sglang.weights.disk")
    return disk.DiskWriter(Alone(), Given(weights), home, source, "float32").write(version)


def read(rank: Rank, folder: Folder, version: int) -> dict[str, str]:
    rank("begin", version=version)
    rank("disk", version=version, folder=folder.path, manifest=folder.proof)
    return rank("commit", version=version, buckets=folder.files)["digests"]


def test_a_folder_is_what_was_sent_and_what_others_read(rank, base, model_folder, tmp_path):
    """The same bits as by buckets; any reader of Hugging Face folders finds each tensor by the index."""
    folder = write(tmp_path / "home", model_folder, base, 1)
    assert (folder.tensors, folder.files, folder.bytes) == (4, 2, sum(tensor.nbytes for tensor in base.values()))
    assert read(rank, folder, 1) == rank.publish(1, base)
    where = json.loads(Path(folder.path, "model.safetensors.index.json").read_text())["weight_map"]
    assert all(torch.equal(load_file(Path(folder.path, where[name]))[name], tensor) for name, tensor in base.items())


def test_only_the_last_folders_stay_and_a_version_may_come_again(base, model_folder, tmp_path):
    """A version is 61 GB for a 30B model; one that failed after it was written is written again."""
    home = tmp_path / "home"
    (home / ".v000007.partial").mkdir(parents=True)
    (home / "notes").mkdir()
    for version in (1, 2, 3, 3):
        write(home, model_folder, base, version)
    assert sorted(path.name for path in home.iterdir()) == ["notes", "v000002", "v000003"]


def spoil_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def spoil_manifest(path: Path) -> None:
    manifest = path.with_name("manifest.json")
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"parts": found["parts"][:1]}))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_bit, r"tensor .*norm.weight has digest .*bytes changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"model-00001.safetensors ends after \d+ of 192 bytes"),
        (lambda path: path.unlink(), "model-00001.safetensors cannot be read"),
        (spoil_manifest, "manifest.json has SHA-256 .*, its writer said"),
    ],
)
def test_a_spoiled_folder_is_refused_and_the_next_version_heals(rank, base, model_folder, tmp_path, spoil, text):
    """SGLang itself would load a flipped bit, and a truncated file as far as it goes."""
    folder = write(tmp_path / "home", model_folder, base, 1)
    spoil(Path(folder.path, "model-00001.safetensors"))
    with pytest.raises(WeightSyncError, match=text):
        read(rank, folder, 1)
    with pytest.raises(WeightSyncError, match="already failed here"):
        rank("commit", version=1, buckets=2)
    read(rank, write(tmp_path / "home", model_folder, base, 2), 2)


def test_a_tensor_that_is_in_no_file_is_noticed(rank, base, model_folder, tmp_path):
    """Parameters are poisoned before, so that what does not come is not yesterday's."""
    folder = write(tmp_path / "home", model_folder, {name: base[name] for name in (Q, UP, NORM)}, 1)
    with pytest.raises(WeightSyncError, match="1 parameters are unfilled or hold NaN or infinity: qk"):
        read(rank, folder, 1)


def test_a_full_disk_leaves_nothing_and_says_so(base, model_folder, tmp_path):
    """Half a folder under a version's name would be loaded by whoever looks for the newest."""
    home, limits = tmp_path / "home", resource.getrlimit(resource.RLIMIT_FSIZE)
    large = base | {UP: torch.zeros(200, 100)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WeightSyncError, match=r"model-00001.safetensors cannot be written: .*make room"):
            write(home, model_folder, large, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(home.iterdir()) == []
    write(home, model_folder, large, 1)

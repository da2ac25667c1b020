"""Heavy packages stay in their rooms, and imports go one way. Read from the source, and proved by importing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_sglang"

ROOMS = {
    "sglang": {"engine", "cpu"},
    "sgl_kernel": {"cpu"},
    "megatron": {"training", "weights", "weights/standalone", "cpu"},
    "transformer_engine": set(),
    "ray": set(),
}
"""Heavy package -> the parts of ours that may import it, at the top of a file or in a function."""

LAYERS = [
    "errors types text signals private_file unix_socket store copies precision packing digest_kernel",
    "digests stops hf_files peft_names checkpoint_folder routing",
    "copy_kernel config buckets layout placement",
    "config_sizes",
    "config_check interfaces weight_folder metrics trackers advantages prompts comm",
    "config_argv losses trace rewards rollout transfer host memory samples",
    "config_docs batching report cpu sync sync_plan agents feed",
    "sync_methods",
    "config_load cycle engine weights",
    "doctor dry_run plan serve",
    "training",
    "weights/standalone",
    "bench",
    "art cli",
]
"""Each part (module or folder) imports from lines above its own only. So `weights` and `engine` never meet."""

WITHOUT_TORCH = (
    "errors types layout config config_sizes config_check config_argv config_docs config_load cli doctor host "
    "prompts.source"
)
"""What a login node must be able to import."""


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names that a file imports; `top_level`: only those that run when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    name = str(path.relative_to(PACKAGE)).removesuffix(".py")
    # The converter builds Megatron's model, which is the trainer's business, and so stands above it.
    return name if name == "weights/standalone" else name.split("/")[0]


FILES = sorted(PACKAGE.rglob("*.py"))
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def test_every_part_has_a_layer() -> None:
    """A new module must be given its place, or the one-way rule says nothing about it."""
    assert {part(path) for path in FILES} - {"__init__"} <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """An upward or sideways import ends in a cycle, or in a pure module that needs a GPU package."""
    own = part(path)
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "megatron_sglang" and rest and rest[0] not in (own, "__version__"):
            assert own == "__init__" or RANK[rest[0]] < RANK[own], f"{path.name} imports {name}"
        assert own in ROOMS.get(package, {own}), f"{path.name} imports {name}, which has its place in {ROOMS[package]}"


def test_transformers_is_never_imported_at_the_top() -> None:
    """It costs seconds; a --dry-run or a config error must not wait for it."""
    outside = [path for path in FILES if part(path) not in {"training", "weights", "cpu"}]
    assert [
        path.name for path in outside if any(n.startswith("transformers") for n in imports(path, top_level=True))
    ] == []


def import_with_blocked(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    code = f"import sys, importlib\nsys.modules.update(dict.fromkeys({blocked!r}))\n" + "".join(
        f"importlib.import_module({module!r})\n" for module in modules
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


def test_all_but_the_rooms_imports_without_heavy_packages() -> None:
    """What the source check cannot see: a heavy package that comes in through another."""
    rooms = set().union(*ROOMS.values())
    modules = [
        "megatron_sglang." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if part(path) not in rooms | {"__init__"} and "box" not in path.parts
    ]
    done = import_with_blocked([*modules, "megatron_sglang.engine.fake", "megatron_sglang.cpu"], list(ROOMS))
    assert done.returncode == 0, done.stderr


def test_light_modules_import_without_torch() -> None:
    """Reading a configuration must not take the seconds that torch takes."""
    done = import_with_blocked(
        [f"megatron_sglang.{name}" for name in WITHOUT_TORCH.split()], [*ROOMS, "torch", "transformers"]
    )
    assert done.returncode == 0, done.stderr

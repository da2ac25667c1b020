"""scripts/pack_for_gpu_host.py on a small site folder: what travels, in parts that come together again."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/pack_for_gpu_host.py"

TRAVELS = {
    "sglang/srt/server_args.py": 2000,
    "sgl_kernel/common_ops.abi3.so": 300_000,
    "megatron/core/transformer.py": 100_000,
    "safetensors-0.5.dist-info/METADATA": 100,
    "torch_memory_saver/hooks.so": 1000,
}
STAYS = {
    "torch/lib/libtorch.so": 5000,
    "nvidia/nccl/lib/libnccl.so.2": 500,
    "triton-3.6.0.dist-info/METADATA": 10,
    "numpy.libs/libopenblas.so": 500,
    "ray/core.py": 10,
    "sglang/multimodal_gen/model.py": 10,
    "sglang/srt/__pycache__/server_args.pyc": 10,
    "sgl_kernel/sm100/common_ops.so": 500,
}
ASKED_FOR = {
    "te": "transformer_engine_torch.so",
    "fa3": "sgl_kernel/flash_ops.abi3.so",
    "cudnn": "nvidia/cudnn/lib/libcudnn.so.9",
}
CUDNN_VERSION = "nvidia_cudnn_cu13-9.24.1.1.dist-info/METADATA"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    draw = random.Random(5)
    for name, size in {**TRAVELS, **STAYS, **dict.fromkeys([*ASKED_FOR.values(), CUDNN_VERSION], 700)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw.randbytes(size))
    return folder


def pack(site: Path, out: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--site", str(site), "--out", str(out), "--part-mb", "0.1", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def unpacked(out: Path, home: Path) -> dict[str, bytes]:
    """What the printed instructions make of the parts, up to where the repository is needed."""
    commands = (out / "UNPACK.txt").read_text().split("# in the repository")[0]
    home.mkdir()
    shell, env = ["bash", "-euo", "pipefail", "-c", commands], {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    subprocess.run(shell, cwd=out, env=env, capture_output=True, timeout=60, check=True)
    root = home / "site"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("extras", [(), ("te",), ("fa3", "cudnn")], ids=str)
def test_what_the_host_lacks_arrives_whole(site: Path, tmp_path: Path, extras: tuple[str, ...]) -> None:
    """A package too few is an ImportError on a borrowed machine; one too many hides the host's torch."""
    out = tmp_path / "parts"
    done = pack(site, out, *(word for extra in extras for word in ("--with", extra)))
    assert done.returncode == 0, done.stderr
    parts = sorted(out.glob("site.tar.xz.*"))
    assert len(parts) >= 4, "random bytes do not shrink"
    assert max(part.stat().st_size for part in parts) <= 100_000
    assert f"{len(parts)} parts" in done.stdout
    assert ("CUDNN_HOME" in done.stdout) == ("cudnn" in extras)
    expected = {*TRAVELS, *(ASKED_FOR[extra] for extra in extras), *([CUDNN_VERSION] if "cudnn" in extras else [])}
    assert unpacked(out, tmp_path / "home") == {name: (site / name).read_bytes() for name in expected}


def test_a_damaged_part_is_noticed(site: Path, tmp_path: Path) -> None:
    """Before anything is unpacked over an environment."""
    out = tmp_path / "parts"
    assert pack(site, out).returncode == 0
    damaged = out / "site.tar.xz.002"
    content = bytearray(damaged.read_bytes())
    content[500] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(subprocess.CalledProcessError):
        unpacked(out, tmp_path / "home")
    assert not (tmp_path / "home/site").exists()


def test_a_second_packing_leaves_no_part_of_the_first(site: Path, tmp_path: Path) -> None:
    """They would be glued to the end of the new ones."""
    out = tmp_path / "parts"
    assert pack(site, out).returncode == 0
    first = len(list(out.glob("site.tar.xz.*")))
    (site / "sgl_kernel/common_ops.abi3.so").unlink()
    assert pack(site, out).returncode == 0
    assert len(list(out.glob("site.tar.xz.*"))) < first
    assert len(unpacked(out, tmp_path / "home")) == len(TRAVELS) - 1


def test_an_empty_folder_is_not_an_environment(tmp_path: Path) -> None:
    done = pack(tmp_path / "nowhere", tmp_path / "out")
    assert (done.returncode, "expected a site-packages folder" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()

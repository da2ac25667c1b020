#!/usr/bin/env python3
"""Carry this environment to a GPU host without internet: python scripts/pack_for_gpu_host.py --out FOLDER [--with te]

The host is expected to have Python 3.12 and torch 2.11.0 of CUDA 13 with the packages that come with it (`HAS`). Every
other package of --site travels, except what nothing here uses on Hopper (`UNUSED`): one tar, compressed with xz, cut
into parts of at most --part-mb megabytes (10^6 bytes), each of which can be carried alone, and SHA256SUMS of them.
What to do there is printed, and stands in UNPACK.txt beside the parts.

    --with te      Transformer Engine, if it is installed in --site: its torch part is compiled (scripts/setup --gpu)
    --with fa3     SGLang's FlashAttention 3 kernels, over a gigabyte; without them engines use Triton's attention
    --with cudnn   the environment's own cuDNN, for Transformer Engine's fused attention

Needs tar and xz here and there.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HAS = """
torch torch-[0-9]* functorch torchgen torchvision torchvision-* torchvision.libs torchaudio torchaudio-* torchcodec
torchcodec-* triton triton-* nvidia nvidia_cublas* nvidia_cuda_* nvidia_cudnn_cu13* nvidia_cufft* nvidia_cufile*
nvidia_curand* nvidia_cusolver* nvidia_cusparse* nvidia_nccl* nvidia_nvjitlink* nvidia_nvshmem* nvidia_nvtx*
nvidia_nvvm* nvidia_mathdx* numpy numpy-* numpy.libs scipy scipy-* scipy.libs sympy sympy-* networkx networkx-* pandas
pandas-* pyarrow pyarrow-* PIL pillow-* pillow.libs scikit_learn* sklearn llvmlite llvmlite-* llvmlite.libs numba
numba-* grpc grpcio-[0-9]* google protobuf-* tensorboard tensorboard-* tensorboard_data_server* lxml lxml-* pip pip-*
setuptools setuptools-* pkg_resources uv uv-* yaml _yaml pyyaml-* ninja ninja-* hf_xet hf_xet-*
""".split()  # noqa: SIM905
"""Names in site-packages that the host has. What it lacks of them is missed at the first import."""

UNUSED = """
nvidia_cutlass_dsl* tokenspeed* tilelang tilelang-* wandb wandb-* z3 z3_solver* jedi jedi-* ray ray-* flash_attn
flash_attn_4* deep_gemm deep_gemm-* sgl_deep_gemm* virtualenv virtualenv-* fla fla_core* flash_linear* timm timm-*
pyright* ruff ruff-* __editable__* __pycache__
""".split()  # noqa: SIM905
"""Large, and imported for other models, other GPUs or by developers only."""

UNUSED_INSIDE = ("sgl_kernel/sm100", "sgl_kernel/flashmla_ops*", "sgl_kernel/infllm_ops*", "sglang/multimodal_gen")
EXTRAS = {"te": ("transformer_engine*",), "fa3": ("sgl_kernel/flash_ops*",), "cudnn": ("nvidia/cudnn",)}
"""What only travels when it is asked for."""
PREFIX = "site.tar.xz."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path(sysconfig.get_path("purelib")), help="default: this one")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts; older ones in it are removed")
    parser.add_argument("--part-mb", type=float, default=55, help="most megabytes of a part")
    parser.add_argument("--level", type=int, default=1, help="of xz, 0 to 9")
    parser.add_argument("--with", dest="extras", action="append", default=[], choices=sorted(EXTRAS))
    chosen = parser.parse_args()
    names = entries(chosen.site, chosen.extras)
    if not names:
        print(f"nothing to pack in {chosen.site}; expected a site-packages folder, give it as --site", file=sys.stderr)
        return 1
    parts = pack(chosen.site, names, excluded(chosen.extras), chosen.out, int(chosen.part_mb * 1e6), chosen.level)
    text = instructions([part.name for part in parts], chosen.extras)
    (chosen.out / "UNPACK.txt").write_text(text)
    total = sum(part.stat().st_size for part in parts)
    print(f"{len(names)} entries of {chosen.site} in {len(parts)} parts, {total / 1e6:.1f} MB: {chosen.out}\n\n{text}")
    return 0


def entries(site: Path, extras: list[str]) -> list[str]:
    """Names in `site` that travel, sorted; with cudnn also its folder, and its version for the doctor."""
    left_out = [*HAS, *UNUSED, *(() if "te" in extras else EXTRAS["te"])]
    found = sorted(path.name for path in site.iterdir()) if site.is_dir() else []
    kept = [name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]
    if "cudnn" in extras and (site / "nvidia/cudnn").is_dir():
        kept += ["nvidia/cudnn", *sorted(path.name for path in site.glob("nvidia_cudnn_cu13-*.dist-info"))]
    return kept


def excluded(extras: list[str]) -> list[str]:
    """tar patterns of what stays behind of the entries."""
    return [*UNUSED_INSIDE, *(() if "fa3" in extras else EXTRAS["fa3"]), "*/__pycache__"]


def pack(site: Path, names: list[str], left_out: list[str], out: Path, part_bytes: int, level: int) -> list[Path]:
    """Write the parts and SHA256SUMS into `out`. Raises `CalledProcessError` where tar or xz fails."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{PREFIX}*"):
        old.unlink()
    tar = ["tar", "-c", "--owner=0", "--group=0", *(f"--exclude={pattern}" for pattern in left_out), "--", *names]
    xz = ["xz", "-T0", f"-{level}"]
    parts: list[Path] = []
    with (
        subprocess.Popen(tar, cwd=site, stdout=subprocess.PIPE) as packer,
        subprocess.Popen(xz, stdin=packer.stdout, stdout=subprocess.PIPE) as squeezer,
    ):
        assert packer.stdout is not None
        assert squeezer.stdout is not None
        packer.stdout.close()  # xz has it; tar must notice when xz is gone
        sums = []
        for part, checksum in _cut(squeezer.stdout, out, part_bytes):
            parts.append(part)
            sums.append(f"{checksum}  {part.name}\n")
    for process, command in ((packer, tar), (squeezer, xz)):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command[0])
    (out / "SHA256SUMS").write_text("".join(sums))
    return parts


def _cut(stream: IO[bytes], out: Path, part_bytes: int) -> Iterator[tuple[Path, str]]:
    """Each part and its SHA-256. Numbered in three digits, so that a shell's order is the right one."""
    number, head = 0, stream.read(1)
    while head:
        path, checksum, left = out / f"{PREFIX}{number:03}", hashlib.sha256(head), part_bytes - 1
        with path.open("wb") as file:
            file.write(head)
            while left and (block := stream.read(min(left, 1 << 20))):
                file.write(block)
                checksum.update(block)
                left -= len(block)
        yield path, checksum.hexdigest()
        number, head = number + 1, stream.read(1)


def instructions(names: list[str], extras: list[str]) -> str:
    """What to do on the host, in the folder that the parts were carried to."""
    lines = [
        f"# {len(names)} parts, {names[0]} to {names[-1]}; on the GPU host, in their folder:",
        "sha256sum --check SHA256SUMS",
        'DEST=$HOME/site; mkdir -p "$DEST"',
        f'cat {PREFIX}* | xz -d -T0 | tar -x -C "$DEST"',
        "# in the repository's folder, which is to be carried too:",
        'export PYTHONPATH="$PWD:$DEST"',
        "# once, 10 s: else each of a run's processes compiles what it imports, a minute of each",
        'PYTHONDONTWRITEBYTECODE= python3 -m compileall -q -j 0 "$DEST" megatron_sglang || true',
    ]
    if "cudnn" in extras:
        lines.append('export CUDNN_HOME="$DEST/nvidia/cudnn" LD_LIBRARY_PATH="$DEST/nvidia/cudnn/lib:$LD_LIBRARY_PATH"')
    lines += [
        "python3 -c 'import sys; from megatron_sglang.cli import main; sys.exit(main())' doctor",
        "# Kernels compiled at first use lie in ~/.cache/flashinfer, ~/.cache/tvm-ffi, ~/.triton: carry them back too.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""What the environment of a GPU host must be like, looked at before anything heavy starts: a run refuses what would
hang or fail minutes later, and `megatron-sglang doctor` shows it. No torch: variables, folders, package metadata.

    variable                                       what is made of it
    PYTORCH_CUDA_ALLOC_CONF, PYTORCH_ALLOC_CONF    expandable_segments refused, or with the next one taken out
    MEGATRON_CI_DISABLE_EXPANDABLE_SEGMENTS=1      take expandable_segments out of both, wherever they come from
                                                   (where neither says anything, the trainer rounds sizes: `ROUNDED`)
    CUDA_VISIBLE_DEVICES                           at least as many devices as trainer ranks of the node, each once
    RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES    the remedy where Ray has hidden them
    SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK          given to the engine by its new name (engine/server.py)
    CUDA_DEVICE_MAX_CONNECTIONS                    1 where Megatron insists on it: TP or CP above 1
    NCCL_CUMEM_ENABLE                              0 where trainer and engine are in one group (`share_nccl`)
    NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, ...          refused where they contradict --attention-backend
    CUDNN_HOME, LD_LIBRARY_PATH                    must both lead to the environment's own cuDNN
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sglang.config import RunConfig
from megatron_sglang.config_sizes import parallel_size
from megatron_sglang.errors import SetupError

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ROUNDED = "roundup_power2_divisions:16"
"""For the trainer's allocator, where nothing is said of it: experts get other numbers of tokens in each layer, and
blocks that are a little too small for the next would pile up. It costs 6 % of a tensor at most."""
NO_SEGMENTS = "MEGATRON_CI_DISABLE_EXPANDABLE_SEGMENTS"
RAY_NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
OLD_BALANCE, BALANCE = "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
"""SGLang's check that its ranks have equally much memory free: until 0.5.17 it was switched off, since then on."""
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
CUMEM, SGLANG_CUMEM = "NCCL_CUMEM_ENABLE", "0"
"""The variable, and what SGLang 0.5.17 sets it to where it is not set (entrypoints/engine.py:1583)."""
ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ATTENTION_OF = {"flash": "100", "fused": "010", "unfused": "001", "auto": "111"}
"""--attention-backend -> what Megatron insists on for these variables (core/models/common/language_module)."""
RAY_WORKER = ("RAY_JOB_ID", "RAY_RAYLET_PID")
"""What Ray sets in its workers."""
CUDNN = "9.24.1.1"
"""nvidia-cudnn-cu13 that Transformer Engine 2.17.1 was run with; torch 2.11.0 asks for 9.19.0.56."""
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
_YES = ("1", "true", "yes", "y")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` is empty where all is well."""

    level: Literal["ok", "warn", "bad"]
    subject: str
    observed: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.observed}" + (f"; {self.remedy}" if self.remedy else "")


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Does this variable say yes?"""
    return environment.get(name, "").lower() in _YES


def has_cuda(environment: Mapping[str, str]) -> bool:
    """Is there an NVIDIA driver, and is a device visible to this process?"""
    return any(map(os.path.exists, DEVICE_FILES)) and _visible(environment) != []


def prepare(environment: MutableMapping[str, str]) -> list[str]:
    """Do what the variables of verl's script ask for, and set the trainer's allocator where none of them does. Before
    torch is imported. Returns what of the given was changed, in words."""
    changed = _without_segments(environment) if is_on(environment, NO_SEGMENTS) else []
    if has_cuda(environment) and not any(environment.get(name) for name in ALLOCATOR):
        environment[ALLOCATOR[-1]] = ROUNDED
    return changed


def share_nccl(config: RunConfig, environment: MutableMapping[str, str]) -> None:
    """SGLang sets NCCL_CUMEM_ENABLE=0 for its own processes, and NCCL ranks that allocate in different ways wait for
    each other for ever: where the trainer broadcasts to engines, it does as they do. Before the first group is made."""
    if config.sync.method == "broadcast" and has_cuda(environment):
        environment.setdefault(CUMEM, SGLANG_CUMEM)


def _without_segments(environment: MutableMapping[str, str]) -> list[str]:
    changed = []
    for name in ALLOCATOR:
        kept = [item for item in environment.get(name, "").split(",") if item and not _is_segments(item)]
        if name in environment and ",".join(kept) != environment[name]:
            changed.append(f"{name}={environment[name]} is now {','.join(kept) or 'unset'}, because {NO_SEGMENTS}=1")
            del environment[name]
            environment.update({name: ",".join(kept)} if kept else {})
    return changed


def check(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Warnings for a run on this host; `SetupError` with all that would stop it. Nothing without CUDA."""
    return judge(config, environment) if has_cuda(environment) else []


def judge(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """`check` of a host that has CUDA."""
    found = [*findings(environment), *cudnn_findings(environment), *_of_run(config, environment)]
    if bad := [str(one) for one in found if one.level == "bad"]:
        raise SetupError(" | ".join(bad))
    return [str(one) for one in found if one.level == "warn"]


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What the variables say by themselves, whatever is run."""
    disabled = is_on(environment, NO_SEGMENTS)
    for name in ALLOCATOR:
        if "expandable_segments:true" in environment.get(name, "").lower():
            if disabled:
                yield Finding("ok", name, f"{environment[name]}; a run takes it out, because {NO_SEGMENTS}=1")
            else:
                remedy = f"CUDA IPC and the memory saver break on such memory: unset {name}, or export {NO_SEGMENTS}=1"
                yield Finding("bad", name, environment[name], remedy)
    if NO_SEGMENTS in environment:
        yield Finding("ok", NO_SEGMENTS, environment[NO_SEGMENTS])
    if (visible := _visible(environment)) is not None and len(set(visible)) < len(visible):
        remedy = "CUDA shows none of the devices then, or the first few; name each once"
        yield Finding("bad", "CUDA_VISIBLE_DEVICES", environment["CUDA_VISIBLE_DEVICES"], remedy)
    elif visible is not None:
        yield Finding("ok", "CUDA_VISIBLE_DEVICES", environment["CUDA_VISIBLE_DEVICES"])
    in_ray = any(name in environment for name in RAY_WORKER)
    if RAY_NOSET in environment:
        without = "" if in_ray else " (only Ray reads it, and this is none of its workers)"
        yield Finding("ok", RAY_NOSET, environment[RAY_NOSET] + without)
    elif in_ray:
        remedy = f"Ray hides GPUs from its workers, and an engine needs all of its own: export {RAY_NOSET}=1"
        yield Finding("warn", "a worker of Ray", "the variable that keeps all GPUs visible is not set", remedy)
    if (balance := environment.get(OLD_BALANCE)) is not None:
        meant = "off" if is_on(environment, OLD_BALANCE) else "left to SGLang"
        yield Finding("ok", OLD_BALANCE, f"{balance}: the engine's balance check is {meant}; SGLang 0.5.17 renamed it")


def _of_run(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What the variables mean for this run."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    visible = _visible(environment)
    if visible is not None and len(visible) < ranks:
        remedy = f"export CUDA_VISIBLE_DEVICES={','.join(map(str, range(ranks)))}"
        if any(name in environment for name in RAY_WORKER):
            remedy += f" and, under Ray, {RAY_NOSET}=1"
        observed = f"{len(visible)} devices ({environment['CUDA_VISIBLE_DEVICES']}) for {ranks} trainer ranks"
        yield Finding("bad", "CUDA_VISIBLE_DEVICES", observed, remedy)
    sizes = {name: parallel_size(config, name) for name in ("tensor-model", "context")}
    if max(sizes.values()) > 1 and environment.get(CONNECTIONS) != "1":
        observed = f"{environment.get(CONNECTIONS, 'not set')} with TP {sizes['tensor-model']}, CP {sizes['context']}"
        remedy = f"before Blackwell Megatron needs 1 there to overlap: export {CONNECTIONS}=1"
        yield Finding("bad", CONNECTIONS, observed, remedy)
    backend = str(config.megatron.get("attention-backend", "auto"))
    for name, wanted in zip(ATTENTION, _ATTENTION_OF.get(backend, ""), strict=False):
        if environment.get(name, wanted) != wanted:
            remedy = f"Megatron sets it by --attention-backend ({backend}) and refuses others: unset {name}"
            yield Finding("bad", name, environment[name], remedy)
    if sizes["context"] > 1 and backend in ("unfused", "local"):
        remedy = "context parallelism needs fused or flash: leave it out, or set context-parallel-size to 1"
        yield Finding("bad", "attention-backend", f"{backend} with CP {sizes['context']}", remedy)


def cudnn_findings(environment: Mapping[str, str], site: Path | None = None) -> Iterator[Finding]:
    """Will Transformer Engine load the environment's own cuDNN? site: its site-packages (None: all on the path).

    Torch loads the one in site-packages by its path, Transformer Engine looks for libcudnn.so by itself; two of
    different versions in one process fail in the first attention. Nothing where Transformer Engine is not installed.
    """
    if _distribution("transformer-engine", site) is None:
        return
    found = _distribution("nvidia-cudnn-cu13", site)
    installed = found and found.version
    if installed != CUDNN:
        remedy = f"scripts/setup --gpu, or: uv pip install --no-deps nvidia-cudnn-cu13=={CUDNN}; or run with "
        remedy += "--attention-backend unfused"
        yield Finding("warn", "cuDNN", f"{installed or 'none in the environment'}; {CUDNN} was run with", remedy)
    if found is None:
        return
    home = Path(str(found.locate_file("nvidia/cudnn")))
    libraries = [Path(part) for part in environment.get("LD_LIBRARY_PATH", "").split(":") if part]
    first = next((one for one in libraries if any(one.glob("libcudnn.so*"))), None)
    wrong = {
        "CUDNN_HOME": not _same(environment.get("CUDNN_HOME"), home),
        "LD_LIBRARY_PATH": not _same(first, home / "lib"),
    }
    if any(wrong.values()):
        observed = " and ".join(f"{name} leads elsewhere" for name, is_wrong in wrong.items() if is_wrong)
        remedy = f"Transformer Engine would load the host's cuDNN beside torch's: export CUDNN_HOME={home} "
        remedy += f"LD_LIBRARY_PATH={home / 'lib'}:$LD_LIBRARY_PATH (both, before the start)"
        yield Finding("warn", "cuDNN", observed, remedy)
    elif installed == CUDNN:
        yield Finding("ok", "cuDNN", f"{installed}, the environment's own")


def _visible(environment: Mapping[str, str]) -> list[str] | None:
    """Entries of CUDA_VISIBLE_DEVICES up to the first that CUDA does not read; None: all devices."""
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return None
    entries = [entry.strip() for entry in environment["CUDA_VISIBLE_DEVICES"].split(",")]
    unread = next((i for i, entry in enumerate(entries) if entry in ("", "-1", "NoDevFiles")), len(entries))
    return entries[:unread]


def _is_segments(item: str) -> bool:
    return item.strip().lower().startswith("expandable_segments")


def _same(one: str | Path | None, other: Path) -> bool:
    return one is not None and Path(one).resolve() == other.resolve()


def _distribution(package: str, site: Path | None) -> importlib.metadata.Distribution | None:
    """A package in `site`, or the first on the path."""
    where = sys.path if site is None else [str(site)]
    return next(iter(importlib.metadata.distributions(name=package, path=where)), None)

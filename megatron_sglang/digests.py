"""The digest that trainer and engine compute of the same bytes, each on the device that holds them. Torch only.

64 bits, in one pass over the memory. Words are multiplied by odd numbers that depend on their position and mixed before
they are summed modulo 2^64 (integer arithmetic wraps), so the order of summation does not matter, and swapped, moved or
duplicated words are noticed. Not a cryptographic hash: it guards against faults, not against attackers.

    mixed = (word ^ position * MIX_1) * MIX_2        positions count from 1
    digest = sum of (mixed ^ mixed >> 31) * (2 * position + 1), plus the number of elements
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

MIX_1 = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
MIX_2 = -0x40A7B892E31B1A47  # splitmix64's first multiplier, signed

CHUNK_WORDS = 1 << 20
"""Without a kernel of our own, temporaries hold at most so many 8-byte words; four are alive at a time."""


def digest(tensor: torch.Tensor) -> int:
    """Digest of a tensor's bytes in logical (row-major) order; any one changed bit changes it. Waits for the device."""
    return int(digests_of([tensor]).item())


def digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """`digest` of many tensors of one device, waiting once."""
    found = list(tensors)
    return digests_of(found).tolist() if found else []


def digests_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`digest` of each tensor as int64 [len(tensors)] on their device, not waited for; in one kernel on a GPU."""
    if is_on_gpu(tensors[0]) and (kernel := _kernel()) is not None:
        return _by_kernel(kernel, tensors, look=False)[0]
    words = [_words(tensor) for tensor in tensors]
    totals = [part.new_full((), tensor.numel()) for part, tensor in zip(words, tensors, strict=True)]
    for part, total in zip(words, totals, strict=True):
        for start in range(0, part.numel(), CHUNK_WORDS):
            total += _mixed_sum(part[start : start + CHUNK_WORDS], start)
    return torch.stack(totals)


def finite_digests(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[bool]]:
    """Digests of tensors of one device, and which of them hold nothing but finite numbers; waits once. Tensors whose
    dtype knows no other numbers count as finite, as do those of 8-bit floats."""
    if is_on_gpu(tensors[0]) and (kernel := _kernel()) is not None:
        return _read(_by_kernel(kernel, tensors, look=True))
    # NaN passes through both ends; isfinite itself would read and write each tensor several times.
    finite = [
        not has_nan(tensor) or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
        for tensor in tensors
    ]
    return digests(tensors), finite


class Finite:
    """`finite_digests` of the same tensors of one device again and again: what the kernel needs is laid out once, which
    takes milliseconds for the parameters of a 30B MoE. Holds no tensor, so that one that was replaced is not kept."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._places = _places(tensors)
        kernel = _kernel() if is_on_gpu(tensors[0]) else None
        whole = kernel is not None and all(_has_whole_words(tensor) for tensor in tensors)
        self._sums = _laid_out(kernel, tensors, look=True)[0] if whole else None

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Do these lie where the others did, with the same shapes and dtypes?"""
        return _places(tensors) == self._places

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[bool]]:
        """Digests of tensors that fit, and whether each of them is finite."""
        return finite_digests(tensors) if self._sums is None else _read(self._sums.run())


def has_nan(tensor: torch.Tensor) -> bool:
    """Does its dtype know NaN? Quantised ones, 8-bit floats among them, are left to the digests."""
    return tensor.dtype.is_floating_point and tensor.element_size() > 1


def segments_of(flat: torch.Tensor, lengths: Sequence[int]) -> Any:
    """`digest_kernel.Segments` for the parts of flat buffers like this one; None: `digests_of` their parts instead."""
    if not is_on_gpu(flat) or (kernel := _kernel()) is None or flat.data_ptr() % 8:
        return None
    if not kernel.Segments.fits(lengths, flat.element_size()):
        return None
    return kernel.Segments(lengths, flat.element_size(), (MIX_1, MIX_2), flat.device)


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Does a kernel of ours run where it is?"""
    return tensor.is_cuda


def _by_kernel(kernel: Any, tensors: Sequence[torch.Tensor], *, look: bool) -> tuple[torch.Tensor, torch.Tensor]:
    sums, _copies = _laid_out(kernel, tensors, look=look)  # which live until the kernel is under way
    return sums.run()


def _laid_out(kernel: Any, tensors: Sequence[torch.Tensor], *, look: bool) -> tuple[Any, list[torch.Tensor]]:
    """`digest_kernel.Sums` of the tensors, and copies of those whose bytes are not whole words where they lie."""
    copies, words = [], []
    for tensor in tensors:
        if _has_whole_words(tensor):
            words.append((tensor.data_ptr(), tensor.nbytes // 8))
            continue
        copies.append(_words(tensor))
        words.append((copies[-1].data_ptr(), copies[-1].numel()))
    counts = [tensor.numel() for tensor in tensors]
    dtypes = [tensor.dtype for tensor in tensors] if look else None
    return kernel.Sums(words, counts, (MIX_1, MIX_2), tensors[0].device, dtypes), copies


def _read(sums: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[int], list[bool]]:
    totals, odd = torch.stack(sums).tolist()
    return totals, [not found for found in odd]


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def _has_whole_words(tensor: torch.Tensor) -> bool:
    whole = tensor.nbytes > 0 and tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0
    return whole and tensor.is_contiguous()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes as int64, padded with zeros; at least one."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    padding = -data.numel() % 8
    if padding or data.storage_offset() % 8:  # 8-byte words need an 8-byte boundary
        data = torch.cat([data, data.new_zeros(padding)])
    return data.view(torch.int64) if data.numel() else data.new_zeros(1, dtype=torch.int64)


def _mixed_sum(words: torch.Tensor, start: int) -> torch.Tensor:
    position = torch.arange(start + 1, start + words.numel() + 1, device=words.device, dtype=torch.int64)
    mixed = (words ^ (position * MIX_1)).mul_(MIX_2)
    return (mixed ^ (mixed >> 31)).mul_(position.mul_(2).add_(1)).sum()


@functools.cache
def _kernel() -> Any:
    """The module with the same sums as one Triton kernel, which reads each word once; None where Triton is missing."""
    try:
        from megatron_sglang import digest_kernel
    except ImportError:
        return None
    return digest_kernel

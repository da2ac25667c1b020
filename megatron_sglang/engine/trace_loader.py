"""Learn where an engine rank's parameters come from, by running the model's own `load_weights` on nothing.

The loader gets `Symbolic` tensors: any shape, no memory. Views of them run on meta tensors. What the loader writes
into a parameter is recorded and not executed. Copies on the way (cat, clone, pad, index...) are resolved when they
arrive, by running them on element numbers. Arithmetic, control flow on values and whatever else cannot be followed
makes the tensors involved *generic*: they must go through the loader. Nothing of the live model is changed; that is
checked, parameter by parameter.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_sglang.engine.element_ids import UNDEFINED, ZERO, affine_boxes, name_ids, source_of
from megatron_sglang.engine.live_model import EMBEDDING, HEAD, fingerprints, is_tied, own_parameters, threads_inline
from megatron_sglang.engine.symbolic import (
    COPIES,
    GEOMETRY_ONLY,
    MOVES,
    PLACEMENT,
    UNDEFINED_FACTORIES,
    ZERO_FACTORIES,
    Memory,
    Symbolic,
    as_stored,
    aten,
    dtype_name,
    exact,
    same_memory,
    to_meta,
    written_tensors,
)
from megatron_sglang.layout import Param, RankLayout, Write, coverage

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""HF name -> shape and dtype of the tensor that would be sent."""


def trace(model: torch.nn.Module, specs: Specs, rank: int) -> RankLayout:
    """The layout of `model` on this rank. All HF tensors go into one `load_weights` call: some loaders keep half of a
    fused pair until the other half comes. Whatever the loader raises is passed on; `ValueError` if it touched the
    model."""
    before = fingerprints(model)
    tracer = Tracer(model)
    with contextlib.ExitStack() as stack:
        for context in (own_parameters(model), threads_inline(), torch.no_grad(), _NoRebinding(tracer), tracer):
            stack.enter_context(context)
        model.load_weights((name, tracer.tensor(name, *spec)) for name, spec in specs.items())  # pyright: ignore[reportCallIssue]
    after = fingerprints(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ValueError(
            f"the loader changed {len(changed)} tensors of the live model while it was traced, first {changed[0]}: its "
            "weights are not to be trusted any more and it cannot be filled directly; publish by the generic path"
        )
    return _layout(tracer, model, rank)


class Tracer(TorchDispatchMode):
    """Sees every operation of the loader; see the module docstring."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.params: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.specs: dict[str, torch.dtype] = {}
        self.writes: list[Write] = []
        self.generic: dict[str, str] = {}
        self.spoiled: dict[str, str] = {}
        """Parameter -> what was done to it that no write can say."""
        self.read: set[str] = set()
        self._by_storage: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        self._scalars: dict[float, tuple[Symbolic, list[bool]]] = {}
        self._buffers = {buffer.untyped_storage()._cdata for buffer in model.buffers()}
        seen: dict[Any, str] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            storage, start = param.untyped_storage()._cdata, int(param.storage_offset())
            first = seen.setdefault((storage, start, param.shape, param.stride(), param.dtype), name)
            if first != name:
                self.aliases[name] = first
                continue
            self.params[name] = param
            span = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True)) + 1
            self._by_storage[storage].append((start, start + span, name))
        devices = {param.device for param in self.params.values()} - {torch.device("meta")}
        # A loader may slice or allocate on the tensor's device: claim the one that the parameters are really on.
        self.device = next(iter(devices), torch.device("cpu"))

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Symbolic:
        """The stand-in of one HF tensor."""
        meta = torch.empty(shape, dtype=dtype, device="meta")
        ids = functools.partial(name_ids, len(self.specs), meta.numel())
        self.specs[name] = dtype
        return Symbolic(meta, Memory(ids, frozenset([name]), frozenset([dtype]), name, name), self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, args, kwargs or {})

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: recorded, followed, or simply done where no checkpoint tensor is involved."""
        packet, inputs = func.overloadpacket, tree_leaves((args, kwargs))
        if packet is aten._foreach_copy_:
            for target, source in zip(args[0], args[1], strict=True):
                self.handle(aten.copy_.default, (target, source), {})
            return None
        symbolic = [leaf for leaf in inputs if isinstance(leaf, Symbolic)]
        written = written_tensors(func, args, kwargs)
        if written and not any(tensor.numel() for tensor in written):
            return written[0]
        owners = [(tensor, name) for tensor in written if (name := self.owner(tensor))]
        if owners:
            self._write(packet, owners, args)
            return written[0]
        if not symbolic:
            if not written and not func.is_view and packet not in GEOMETRY_ONLY:
                self.read.update(name for leaf in inputs if (name := self.owner(leaf)))
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            return self._item(symbolic[0])
        if written:
            self._write_elsewhere(packet, written, symbolic, args)
            return written[0]
        return self._compute(func, args, kwargs, symbolic)

    # ---- what can happen ----

    def owner(self, tensor: Any) -> str | None:
        """The parameter that a plain tensor is, or is a view of."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, Symbolic) or not tensor.numel():
            return None
        at = tensor.storage_offset()
        owners = self._by_storage.get(tensor.untyped_storage()._cdata, ())
        return next((name for start, end, name in owners if start <= at < end), None)

    def _write(self, packet: Any, owners: list[tuple[torch.Tensor, str]], args: Any) -> None:
        target, param = owners[0]
        value = args[1] if packet in (aten.copy_, aten.fill_) else 0 if packet is aten.zero_ else None
        if value is None or len(owners) > 1 or target.dtype != self.params[param].dtype:
            for _, name in owners:
                self.spoil(name, f"{packet} on parameter {name}", args)
            return
        if packet is aten.copy_ and same_memory(target, value):
            return  # onto itself: DeepSeek's w_vc is a view of its parameter where a rank has a single head
        value = self._meaning(value)
        if isinstance(value, Symbolic):
            self._record(target, param, value)
        elif value is not None:
            self._add(target, param, const=float(value))
        else:
            self.spoil(param, f"values that are not of the checkpoint are copied into {param}", args)

    def _meaning(self, value: Any) -> Symbolic | float | None:
        """What is written: symbolic, a constant, or (None) neither."""
        if isinstance(value, torch.Tensor) and not isinstance(value, Symbolic):
            if value.is_meta or self.owner(value) or value.untyped_storage()._cdata in self._buffers:
                return None
            first = value.flatten()[0]
            value = first.item() if bool((value == first).all()) else None
        if isinstance(value, int | float) and value in self._scalars:
            symbol, used = self._scalars[value]
            used[0] = True
            return symbol
        return value

    def _record(self, target: torch.Tensor, param: str, value: Symbolic) -> None:
        memory, reason, elements = value.memory, "", value.memory.elements
        if elements is None:
            reason = f"{param} gets values computed by {memory.how}"
        elif not exact({*memory.dtypes, value.dtype}, {self.specs[n] for n in memory.sources}, target.dtype):
            reason = f"{param} gets them by way of another dtype, from {memory.how}"
        if elements is None or reason:
            self.give_up(memory.sources, reason)
            return
        meta = value.meta.expand(target.shape)
        if memory.name:
            offset = memory.shift + meta.storage_offset()
            self._add(target, param, source=memory.name, source_offset=offset, source_strides=meta.stride())
            return
        ids = elements().as_strided(meta.size(), meta.stride(), meta.storage_offset())
        boxes = affine_boxes(ids)
        if boxes is None:
            self.give_up(memory.sources, f"{param} gets them in too irregular an order")
            return
        names = list(self.specs)
        for start, size, first, strides in boxes:
            moved = sum(at * stride for at, stride in zip(start, target.stride(), strict=True))
            part = target.as_strided(size, target.stride(), target.storage_offset() + moved)
            if first == ZERO:
                self._add(part, param, const=0.0)
            elif first != UNDEFINED:
                index, offset = source_of(first)
                self._add(part, param, source=names[index], source_offset=offset, source_strides=strides)

    def _add(self, target: torch.Tensor, param: str, **value: Any) -> None:
        if not target.numel():
            return
        source, dtype = value.get("source"), self.params[param].dtype
        cast = dtype_name(dtype) if source and self.specs[source] != dtype else None
        offset = int(target.storage_offset() - self.params[param].storage_offset())
        size, strides = tuple(target.shape), target.stride()
        if source:
            value["source_strides"] = tuple(value["source_strides"])
        self.writes.append(Write(param, offset, size, strides, cast=cast, **value))

    def give_up(self, names: Iterable[str], reason: str) -> None:
        """These HF tensors cannot be followed."""
        for name in names:
            self.generic.setdefault(name, reason)

    def spoil(self, param: str, reason: str, args: Any) -> None:
        self.spoiled.setdefault(param, reason)
        for leaf in tree_leaves(args):
            if isinstance(leaf, Symbolic):
                self.give_up(leaf.memory.sources, reason)

    def _write_elsewhere(self, packet: Any, written: list[torch.Tensor], symbolic: list[Symbolic], args: Any) -> None:
        """A write into something that is no parameter: a temporary of ours, or a plain tensor, which is left alone."""
        sources = frozenset().union(*(tensor.memory.sources for tensor in symbolic))
        value = args[1] if packet in (aten.copy_, aten.fill_) else 0 if packet is aten.zero_ else None
        value = self._meaning(value)
        for target in written:
            if not isinstance(target, Symbolic):
                self.give_up(sources, f"{packet} puts it into a tensor that is no parameter")
                continue
            memory, known = target.memory, None
            if isinstance(value, Symbolic):
                known, memory.dtypes = value.ids(), memory.dtypes | value.memory.dtypes
            elif value == 0 and value is not None:
                known = ZERO
            memory.overwrite(target.meta, known, f"{packet}({', '.join(sorted(sources)[:2])})")
            memory.sources |= sources

    def _item(self, tensor: Symbolic) -> float | int | bool:
        """A number that can be recognised when it is filled into a parameter."""
        if tensor.dtype == torch.bool or not tensor.memory.name:
            self.give_up(tensor.memory.sources, "the loader decides by its value")
        if tensor.dtype == torch.bool:
            return False
        number = 10**9 + len(self._scalars)
        scalar = tensor.meta.as_strided((), (), tensor.meta.storage_offset())
        self._scalars[number] = Symbolic(scalar, tensor.memory, self), [False]
        return float(number) if tensor.dtype.is_floating_point else number

    def read_values(self) -> set[str]:
        """HF tensors whose value the loader asked for and did not put into a parameter."""
        return {name for symbol, used in self._scalars.values() if not used[0] for name in symbol.memory.sources}

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any], symbolic: list[Symbolic]) -> Any:
        """A view of symbolic tensors, or something new made of them."""
        packet = func.overloadpacket
        result = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
        elements = self._moved(func, args, kwargs) if packet in MOVES and isinstance(result, torch.Tensor) else None
        sources = frozenset().union(*(tensor.memory.sources for tensor in symbolic))
        how = f"{packet}({', '.join(dict.fromkeys(tensor.memory.how for tensor in symbolic))})"[:200]

        def wrap(made: Any) -> Any:
            if not isinstance(made, torch.Tensor):
                return made
            for tensor in symbolic:
                if tensor.meta.untyped_storage()._cdata == made.untyped_storage()._cdata:
                    if made.dtype != tensor.dtype:
                        self.give_up(tensor.memory.sources, f"{packet} takes its bits for another dtype")
                    return Symbolic(made, tensor.memory, self)
            fill = UNDEFINED if packet in UNDEFINED_FACTORIES else ZERO if packet in ZERO_FACTORIES else None
            contents = elements
            if fill is not None:
                count = made.untyped_storage().nbytes() // made.element_size()
                contents = functools.partial(torch.full, (count,), fill)
            elif contents is not None:
                contents = functools.partial(as_stored, contents, made.size(), made.stride())
            dtypes = frozenset([made.dtype]).union(*(tensor.memory.dtypes for tensor in symbolic))
            memory, first = Memory(contents, frozenset() if fill else sources, dtypes, how), symbolic[0]
            if packet in COPIES and first.meta.is_contiguous() and made.is_contiguous():
                memory.name, memory.shift = first.memory.name, first.memory.shift + int(first.meta.storage_offset())
            return Symbolic(made, memory, self)

        return tree_map(wrap, result)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
        """The same operation on element ids; None where elements are unknown. Contents are fixed now, run later."""
        packet, known = func.overloadpacket, []

        def fix(leaf: Any) -> Any:
            if isinstance(leaf, Symbolic):
                known.append(leaf.ids() is not None)
                return leaf.ids()
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                known.append(not leaf.is_meta and not self.owner(leaf) and not bool(leaf.any()))
                return functools.partial(torch.full, leaf.shape, ZERO)
            return leaf

        if packet is aten.constant_pad_nd:
            known.append(len(args) < 3 or args[2] == 0)
            args = (*args[:2], ZERO)
        fixed = tree_map(fix, args)
        if not all(known):
            return None
        if packet in COPIES:
            return fixed[0]
        options = {key: value for key, value in kwargs.items() if key not in PLACEMENT}
        return lambda: func(*tree_map(lambda leaf: leaf() if callable(leaf) else leaf, fixed), **options)


def _layout(tracer: Tracer, model: torch.nn.Module, rank: int) -> RankLayout:
    """Everything seen, put in order: a tensor is either written or generic, never both."""
    spoiled, generic, writes = tracer.spoiled, tracer.generic, tracer.writes
    tracer.give_up(tracer.read_values(), "the loader reads its value")
    if not hasattr(model, "post_load_weights"):
        for param in tracer.read:
            spoiled.setdefault(param, f"the loader reads {param}, and the model has no hook to do it again")
    params = {
        name: Param(tuple(param.shape), param.stride(), dtype_name(param.dtype))
        for name, param in tracer.params.items()
    }
    if is_tied(model):
        writes = [write for write in writes if write.param != HEAD]
        writes += [replace(write, param=HEAD) for write in writes if write.param == EMBEDDING]
    covered = coverage(params, writes)
    for write in covered.irregular:
        spoiled.setdefault(write.param, f"it is written in an irregular pattern: {write}")
    for write in writes:
        if write.source and write.param in spoiled:
            tracer.give_up([write.source], spoiled[write.param])
    if generic or spoiled:
        writes = [write for write in writes if write.param not in spoiled and write.source not in generic]
        covered = coverage(params, writes)
    return RankLayout(
        rank,
        params,
        tuple(writes),
        generic=dict(sorted(generic.items())),
        derived=tuple(sorted(tracer.read)),
        aliases=tracer.aliases,
        uncovered=covered.uncovered,
        overlapping=covered.overlapping,
    )


class _NoRebinding(TorchFunctionMode):
    """`param.data = x` reaches no dispatch: with a symbolic x it crashes the process, with another it changes the live
    model. The first makes x generic, the second is refused."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        data: Any = torch.Tensor.data
        if getattr(func, "__name__", "") != "__set__" or func != data.__set__:
            return func(*args, **(kwargs or {}))
        target, value = args
        param = self.tracer.owner(target)
        if isinstance(value, Symbolic):
            self.tracer.spoil(param or "a tensor", f"the loader replaces the memory of {param or 'a tensor'}", args)
        elif param and not same_memory(target, value):
            raise ValueError(
                f"the loader replaces the memory of parameter {param} while it loads, which a trace must not; this "
                "model (or its moe_runner_backend) can only be filled by the generic path"
            )
        else:
            func(*args)
        return None

"""SkyRL's interface of an inference engine, on engines of ours: its method names, its dictionaries.

    options, count = engine_config({"inference_engine_tensor_parallel_size": 2}, "folder")
    with create_engines(options, count) as engine:
        skyrl = SGLangInferenceEngine(engine, tokenizer)
        await skyrl.update_named_weights({"names": [...], "dtypes": [...], "shapes": [...], "tensors": [...]})
        output = await skyrl.generate({"prompt_token_ids": [[1, 2, 3]], "sampling_params": {"max_generate_length": 64}})

Weights are one verified transaction: between `sleep` and the end of the next `update_named_weights` nothing is served,
whatever was woken up. docs/engine.md has the table of names, deadlines and effects on running requests.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sglang.buckets import Bucket, fill, pack, transfer_order
from megatron_sglang.engine import skyrl_names
from megatron_sglang.engine.client import EngineClient
from megatron_sglang.engine.controls import Controls, PauseMode
from megatron_sglang.engine.group import EngineGroup
from megatron_sglang.engine.http_engine import HttpEngine
from megatron_sglang.engine.skyrl_answers import Shown
from megatron_sglang.engine.skyrl_names import engine_config
from megatron_sglang.errors import ConfigError, WeightSyncError
from megatron_sglang.types import Completion, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    import torch

    from megatron_sglang.engine.broadcast import Broadcast

__all__ = ["SGLangInferenceEngine", "engine_config"]

BUCKET_BYTES = 512 << 20


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class SGLangInferenceEngine:
    """Of an engine, or group of engines, that is started already and that it closes in `teardown`; for one event loop.

    Raises `EngineError`, `EngineStaleError` while no verified weights are served, `WeightSyncError`, and `ConfigError`
    for arguments that cannot be honoured. `more`: of `EngineClient`.
    """

    sampling = staticmethod(skyrl_names.sampling)
    engine_config = staticmethod(skyrl_names.engine_config)

    def __init__(self, engine: HttpEngine | EngineGroup, tokenizer: Tokenizer, **more: Any) -> None:
        self.engine, self.tokenizer, self._more = engine, tokenizer, more
        self._members: Sequence[HttpEngine] = engine.engines if isinstance(engine, EngineGroup) else [engine]
        self._client: EngineClient | None = None
        self._broadcast: Broadcast | None = None
        self._device = ""
        """Type of that on which the broadcast expects tensors; empty: any."""

    def tp_size(self) -> int:
        """Tensor-parallel ranks of one engine."""
        return self._members[0].options.tp_size

    def pp_size(self) -> int:
        """1: SGLang takes weights from tensors without pipeline stages only."""
        return 1

    def dp_size(self) -> int:
        """1: each replica is an engine of its own (`num_inference_engines`)."""
        return 1

    def ep_size(self) -> int:
        """Expert-parallel ranks of one engine."""
        return self._members[0].options.ep_size

    # ---- generation ----

    async def generate(self, input_batch: Mapping[str, Any]) -> dict[str, Any]:
        """One completion for each of prompt_token_ids (or prompts: conversations, for the chat template), by
        sampling_params, session_ids (one each, optional) and lora_name (the adapter that serves them, optional).

        Gives responses (text, stop texts included, as environments look for them), response_ids, stop_reasons
        ("stop", "length", "abort"), response_logprobs (None without sampling_params.logprobs), weight_versions, and
        with logprobs N > 0 response_top_logprobs, at each token {token id: logprob} of the N likeliest (else None).
        A seed is that of the batch: each of its requests draws by one of its own.
        """
        prompts = input_batch.get("prompt_token_ids")
        if prompts is None:
            prompts = [self._chat_ids(one) for one in input_batch.get("prompts") or []]
        params = input_batch.get("sampling_params") or {}
        sessions = input_batch.get("session_ids") or [""] * len(prompts)
        if len(sessions) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts with {len(sessions)} session_ids; expected one for each")
        sampling, adapter = self.sampling(params), input_batch.get("lora_name") or ""
        requests = [
            GenerateRequest(tuple(ids), _own_seed(sampling, number), "" if session is None else str(session), adapter)
            for number, (ids, session) in enumerate(zip(prompts, sessions, strict=True))
        ]
        found = await self._complete(requests)
        top = [[dict(row) for row in one.top_logprobs_T] for one in found] if sampling.top_logprobs else None
        return {
            "responses": [self.tokenizer.decode(list(one.token_ids_T)) for one in found],
            "response_ids": [list(one.token_ids_T) for one in found],
            "stop_reasons": [one.finish_reason for one in found],
            "response_logprobs": None if params.get("logprobs") is None else [list(one.logprobs_T) for one in found],
            "response_top_logprobs": top,
            "weight_versions": [one.weight_version for one in found],
        }

    async def chat_completion(self, request_payload: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's chat completion for {"json": body} or a body: messages, tools, chat_template_kwargs, n, logprobs,
        top_logprobs, session_id, sampling parameters."""
        body = dict(request_payload.get("json", request_payload))
        options = dict(body.pop("chat_template_kwargs", None) or {})
        if tools := body.pop("tools", None):
            options["tools"] = tools
        return await self._answer(body, self._chat_ids(body.pop("messages"), **options), chat=True)

    async def completion(self, request_payload: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's text completion for {"json": body} or a body: prompt (text or token ids), n, logprobs, session_id,
        sampling parameters."""
        body = dict(request_payload.get("json", request_payload))
        prompt = body.pop("prompt")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return await self._answer(body, ids, chat=False)

    async def abort_generation(self) -> None:
        """End all requests of the engines, whoever sent them; each returns what it has, as "abort". New ones run."""
        if self._client is not None:
            await self._client.abort()
        await self._on_each(lambda one: one.abort_requests())

    async def pause_generation(self, mode: PauseMode = "abort") -> None:
        """No request runs until `resume_generation`, new ones wait. abort: running ones end with what they have;
        retract and in_place: they go on afterwards. Changes no weights, so nothing becomes stale."""
        await self._on_each(lambda one: one.pause(mode))

    async def resume_generation(self) -> None:
        """After `pause_generation`; `EngineStaleError` where weights are not verified."""
        await self._on_each(lambda one: one.resume())

    pause, continue_generation = pause_generation, resume_generation

    # ---- adapters, memory, caches ----

    async def load_lora_adapter(self, lora_name: str, lora_path: str | Path, pinned: bool = False) -> None:
        """Load a PEFT folder under a name (`lora_name` of an input batch or body). Running requests go on."""
        await self._on_each(lambda one: one.load_adapter(lora_name, lora_path, pinned=pinned))

    async def unload_lora_adapter(self, lora_name: str) -> None:
        """Forget an adapter; waits for the requests that use it."""
        await self._on_each(lambda one: one.unload_adapter(lora_name))

    async def sleep(
        self,
        tags: Sequence[str] | None = None,
        timeout: float = 60.0,
        abort_first: bool = True,
        drain_timeout: float = 5.0,
    ) -> None:
        """Give back the memory of tags ("weights", "kv_cache", "cuda_graph"; None: all). Nothing is served from here on
        until weights are published and verified again.

        Running requests are aborted; without abort_first only those that have not ended after `drain_timeout` seconds.
        Each returns what it has. `EngineTimeoutError` after `timeout` seconds, which begin when draining has ended.
        """
        await self._on_each(
            lambda one: one.sleep(tags, timeout_s=timeout, abort_first=abort_first, drain_s=drain_timeout)
        )

    async def wake_up(self, tags: Sequence[str] | None = None, timeout: float = 60.0) -> None:
        """Take the memory of tags back. It holds nothing: the engine stays stale until `update_named_weights`, which
        wakes up what still sleeps. What is awake is left alone. `EngineTimeoutError` after `timeout` seconds."""
        await self._on_each(lambda one: one.wake_up(tags, timeout_s=timeout))

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Waits until running requests have ended."""
        await self._on_each(lambda one: one.reset_prefix_cache())

    # ---- weights ----

    async def init_weight_update_communicator(self, init_info: Mapping[str, Any]) -> None:
        """Let weights travel by broadcast from here on, to all engines at once.

        init_info: master_addr, where this process listens (default: loopback, for engines of this machine); backend:
        nccl, then tensors must be on GPUs, gloo, on CPUs, or broadcast (default), by where they are; world_size and
        rank_offset are checked. master_port and group_name are not used: a free port is taken, and the group has no
        name. Serving goes on.
        """
        from megatron_sglang.engine.broadcast import LOOPBACK, Broadcast

        backend = init_info.get("backend", "broadcast")
        if backend not in skyrl_names.BACKENDS:
            raise ConfigError(f"init_info.backend={backend!r} is none, expected {' or '.join(skyrl_names.BACKENDS)}")
        size = 1 + sum(one.options.tp_size for one in self._members)
        for name, expected in (("world_size", size), ("rank_offset", 1)):
            if init_info.get(name, expected) != expected:
                raise ConfigError(
                    f"init_info.{name}={init_info[name]}, expected {expected}: one sender and {size - 1} engine ranks"
                )
        if self._broadcast is not None:
            self._broadcast.close()
        self._broadcast = Broadcast(self.engine, init_info.get("master_addr", LOOPBACK))
        self._device = skyrl_names.BACKENDS[backend]

    async def update_named_weights(self, request: Mapping[str, Any]) -> str:
        """Replace all weights: names, dtypes, shapes (checked) and tensors, in any order, HF names.

        One transaction: running requests end as "abort", memory that sleeps is woken up, every engine rank proves that
        it holds all of it, then the next weight version is served. The engine's digest, or `WeightSyncError` and a
        stale engine. A part of the model is refused: what is missing would be left unfilled. `update_timeout_s` is the
        deadline of each message to an engine, not of all of them.
        """
        named = _named_tensors(request)
        _require_device(named, self._device)
        version = max(one.version or 0 for one in self._members) + 1
        return await asyncio.to_thread(self._update, version, named)

    async def teardown(self) -> None:
        """End requests and connections, then every process of the engines; idempotent."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        if self._broadcast is not None:
            await asyncio.to_thread(self._broadcast.close)
            self._broadcast = None
        await asyncio.to_thread(self.engine.close)

    # ---- steps ----

    async def _on_each[T](self, ask: Callable[[Controls], T]) -> list[T]:
        return await asyncio.to_thread(self.engine.on_each, ask)

    async def _complete(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        if self._client is None:
            self._client = self.engine.client(lambda ids: self.tokenizer.decode(list(ids)), **self._more)
        tasks = [asyncio.create_task(self._client.generate(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # The first error, or the caller's end, ends the others too.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _chat_ids(self, messages: Any, **options: Any) -> list[int]:
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **options)
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)

    async def _answer(self, body: dict[str, Any], ids: Sequence[int], *, chat: bool) -> dict[str, Any]:
        shown = Shown.taken_from(body, chat=chat)
        session, adapter = str(body.pop("session_id", None) or ""), body.pop("lora_name", None) or ""
        sampling = self.sampling(body)
        requests = [
            GenerateRequest(tuple(ids), _own_seed(sampling, number), session, adapter) for number in range(shown.count)
        ]
        found = await self._complete(requests)
        return shown.answer(len(ids), found, lambda tokens: self.tokenizer.decode(list(tokens)))

    def _update(self, version: int, named: Sequence[tuple[str, torch.Tensor]]) -> str:
        engine, count = self.engine, 0
        load: Callable[[Bucket], None] = self._broadcast.load if self._broadcast is not None else engine.load
        engine.begin_update(version)
        try:
            for group in fill(
                ((name, (name, tensor)) for name, tensor in named), lambda it: it[1].nbytes, BUCKET_BYTES
            ):
                load(pack(version, count, [it for _, it in group]))
                count += 1
        except WeightSyncError as error:
            engine.fail_update(str(error))
            raise
        return engine.commit_update(version, count)


def _own_seed(sampling: SamplingParams, number: int) -> SamplingParams:
    """Equal prompts of a batch must not give equal completions. Not seed + number, which is the next batch's."""
    if sampling.seed is None or number == 0:
        return sampling
    key = hashlib.blake2b(f"{sampling.seed}\0{number}".encode(), digest_size=4).digest()
    return replace(sampling, seed=int.from_bytes(key) >> 1)


def _require_device(named: Sequence[tuple[str, torch.Tensor]], device: str) -> None:
    """What carries a broadcast follows from where tensors are."""
    for name, tensor in named:
        if device and tensor.device.type != device:
            raise ConfigError(
                f"update_named_weights: {name} is on {tensor.device.type}, expected {device} by the backend of "
                "init_weight_update_communicator; move it, or choose the backend 'broadcast', which takes either"
            )


def _named_tensors(request: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """In the order in which they travel."""
    names, tensors = list(request["names"]), request.get("tensors")
    if tensors is None:
        raise ConfigError("update_named_weights has no tensors; expected names, dtypes, shapes and tensors")
    if isinstance(tensors, Mapping):
        if differ := sorted(tensors.keys() ^ set(names)):
            raise ConfigError(f"update_named_weights: {differ[:5]} are in names or in tensors alone, expected in both")
        tensors = [tensors[name] for name in names]
    tensors = list(tensors)
    dtypes, shapes = request.get("dtypes") or [None] * len(names), request.get("shapes") or [None] * len(names)
    if len({len(names), len(tensors), len(dtypes), len(shapes)}) != 1 or len(set(names)) != len(names):
        raise ConfigError(
            f"update_named_weights has {len(set(names))} different names, {len(dtypes)} dtypes, {len(shapes)} shapes "
            f"and {len(tensors)} tensors; expected as many of each"
        )
    for name, tensor, dtype, shape in zip(names, tensors, dtypes, shapes, strict=True):
        found = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        said = (str(dtype or found[0]).removeprefix("torch."), list(found[1] if shape is None else shape))
        if found != said:
            raise ConfigError(f"update_named_weights: {name} is {found}, announced as {said}")
    return sorted(zip(names, tensors, strict=True), key=lambda item: transfer_order(item[0]))

"""From a record to a job for one engine: prompts as token ids, sampling parameters, and every limit that can be checked
before anything runs. What cannot be done is refused here, so the engine never sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from megatron_sglang.serve.answers import Form
from megatron_sglang.serve.limits import Limits
from megatron_sglang.serve.records import ChatRequest, CompletionRequest, Options
from megatron_sglang.serve.refusal import Refusal, invalid, too_long
from megatron_sglang.serve.upstream import Bound
from megatron_sglang.serve.work import Job, requests_of

DEFAULT_TOKENS = 16
"""Of a text completion, as OpenAI's."""

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Jobs:
    """Makes them. Refusal 400, or 404 for another model than the served one."""

    limits: Limits
    served_name: str | None = None
    """What the model is called; None: as its folder."""

    def name_of(self, bound: Bound) -> str:
        return self.served_name or bound.tokens.folder.name

    async def completion(self, record: CompletionRequest, bound: Bound) -> Job:
        """Of a text completion."""
        self._check_options(record, bound)
        given = record.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        each = cast("list[str | list[int]]", given if several else [given])
        self._check_choices(len(each), record)
        prompts = [await bound.tokens.prompt(one) if isinstance(one, str) else one for one in each]
        wanted = DEFAULT_TOKENS if record.max_tokens is None else record.max_tokens
        most = self._check_lengths(prompts, wanted, record, bound, "prompt")
        shown = record.logprobs
        return self._job(record, bound, prompts, most, shown is not None, shown or 0, chat=False)

    async def chat(self, record: ChatRequest, bound: Bound) -> Job:
        """Of a conversation."""
        self._check_options(record, bound)
        self._check_choices(1, record)
        try:
            options = record.template_options()
        except ValueError as error:
            raise invalid(str(error), "chat_template_kwargs") from error
        tools = [tool.model_dump(exclude_unset=True) for tool in record.tools or ()]
        messages = [message.for_template() for message in record.messages]
        prompts = [await bound.tokens.chat(messages, tools if record.tool_choice != "none" else None, options)]
        wanted = record.max_completion_tokens or record.max_tokens
        most = self._check_lengths(prompts, wanted, record, bound, "messages")
        return self._job(record, bound, prompts, most, bool(record.logprobs), record.top_logprobs or 0, chat=True)

    def _job(
        self, record: Options, bound: Bound, prompts: Prompts, most: int, logprobs: bool, top: int, *, chat: bool
    ) -> Job:
        if top > self.limits.max_top_logprobs:
            field = "top_logprobs" if chat else "logprobs"
            raise invalid(f"{field}={top} is more than this endpoint's limit of {self.limits.max_top_logprobs}", field)
        fixed, n = [tuple(ids) for ids in prompts], record.n or 1
        form = Form(chat, self.name_of(bound), bound.tokens, fixed, n, logprobs, bool(record.return_token_ids))
        sampling = record.sampling(most, top)
        texts, ids = bound.tokens.stops(sampling.stop)
        sampling = replace(sampling, stop=texts, stop_token_ids=(*sampling.stop_token_ids, *ids))
        requests = requests_of(fixed, n, sampling, record.seed, record.session_id or "")
        return Job(form, requests, record.stream_options is not None and bool(record.stream_options.include_usage))

    def _check_options(self, record: Options, bound: Bound) -> None:
        name, vocabulary = self.name_of(bound), bound.tokens.vocab_size
        if record.model is not None and record.model != name:
            raise Refusal(404, f"model {record.model!r} is not served, but {name!r} is", code="model_not_found")
        if (stops := record.stop_token_ids) and max(stops) >= vocabulary:
            raise invalid(f"token id {max(stops)} is outside the vocabulary of {vocabulary}", "stop_token_ids")

    def _check_choices(self, prompts: int, record: Options) -> None:
        choices = prompts * (record.n or 1)
        if choices > self.limits.max_choices:
            field = "prompt" if choices == prompts else "n"
            raise invalid(f"{choices} choices are more than this endpoint's limit of {self.limits.max_choices}", field)

    def _check_lengths(self, prompts: Prompts, wanted: int | None, record: Options, bound: Bound, field: str) -> int:
        """Tokens that may be sampled."""
        most, vocabulary = self.limits.max_tokens, bound.tokens.vocab_size
        for ids in prompts:
            if not ids:
                raise invalid("a prompt has no tokens; give at least one", field)
            if max(ids) >= vocabulary:
                raise invalid(f"token id {max(ids)} is outside the vocabulary of {vocabulary}", field)
        if wanted is not None and wanted > most:
            name = "max_completion_tokens" if getattr(record, "max_completion_tokens", None) else "max_tokens"
            raise invalid(f"{name}={wanted} is more than this endpoint's limit of {most}", name)
        longest = max(map(len, prompts))
        if longest > bound.most_prompt or longest + (wanted or 1) > bound.most_tokens:
            raise too_long(longest, wanted or 1, bound.most_tokens, field)
        most = wanted or min(most, bound.most_tokens - longest)
        if (record.min_tokens or 0) > most:
            raise invalid(f"min_tokens={record.min_tokens} is more than max_tokens={most}", "min_tokens")
        return most

"""OpenAI's client with what training needs: logprobs and token ids of every answer, unless a request says otherwise."""

from __future__ import annotations

from typing import Any

from megatron_sglang.errors import SetupError

try:
    from openai import AsyncOpenAI
except ImportError as error:  # pragma: no cover - where the package is missing
    raise SetupError(
        "the package openai is not installed; pip install openai, or speak HTTP to the endpoint"
    ) from error

_WANTED: dict[str, dict[str, Any]] = {
    "/chat/completions": {"logprobs": True, "return_token_ids": True},
    "/completions": {"logprobs": 0, "return_token_ids": True},
}
"""Path -> what is added to a body that does not have it."""


class _Client(AsyncOpenAI):
    async def _prepare_options(self, options: Any) -> Any:
        wanted = _WANTED.get(options.url)
        if wanted and isinstance(options.json_data, dict):
            extra = options.extra_json or {}
            options.json_data = {**{k: v for k, v in wanted.items() if k not in extra}, **options.json_data}
        return await super()._prepare_options(options)


def openai_client(base_url: str, api_key: str) -> AsyncOpenAI:
    """For the endpoint at `base_url` (".../v1")."""
    return _Client(base_url=base_url, api_key=api_key)

"""Rollouts of several turns: an environment answers the model, and what it says joins the tokens (docs/agents.md).

`create_rollout` is the door; `environment.py` says what an environment is, `loop.py` how a trajectory grows,
`rollout.py` how a batch is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_sglang.agents.environment import Environments
from megatron_sglang.agents.rollout import AgentRollout
from megatron_sglang.config import RolloutConfig
from megatron_sglang.interfaces import Reward
from megatron_sglang.rollout import Rollout
from megatron_sglang.text import encodable
from megatron_sglang.types import SamplingParams


def create_rollout(
    config: RolloutConfig,
    *,
    engine: Any,
    reward: Reward,
    tokenizer: Any,
    sampling: SamplingParams,
    seed: int,
    say: Callable[[str], None],
    routing: bool = False,
) -> Rollout | AgentRollout:
    """`Rollout`, which sends a whole batch in one call, if that is enough; else `AgentRollout`, which sends one request
    for each completion. The latter is needed for environments, for over-sampling and dynamic sampling, for stop texts
    (watched for in each completion), and behind a router (which passes on single requests only).

    engine: `interfaces.Engine` with `client()`. routing: ask it for the experts that processed each token.
    Raises `ConfigError` for an environment that does not exist.
    """
    one_by_one = bool(sampling.stop) or getattr(engine, "router", None) is not None
    if not config.environment and config.over_sampling == 1 and not config.dynamic_sampling and not one_by_one:
        return Rollout(
            engine, reward, tokenizer.decode, sampling, config.samples_per_prompt, seed, routing=routing, say=say
        )
    connect, decode = engine.client, tokenizer.decode
    if sampling.stop:  # stop texts are matched as tokens arrive, so text must not change with what follows (`stops.py`)
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        connect = partial(engine.client, decode)
    return AgentRollout(
        connect=connect,
        reward=reward,
        environments=Environments.of(config.environment),
        decode=decode,
        encode=plain_encoder(tokenizer),
        sampling=sampling,
        group_size=config.samples_per_prompt,
        seed=seed,
        over_sampling=config.over_sampling,
        stragglers=config.stragglers,
        dynamic_sampling=config.dynamic_sampling,
        routing=routing,
        say=say,
    )


def plain_encoder(tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    """Text to token ids of a Hugging Face tokenizer; what looks like a special token in it is text as well, and half a
    surrogate pair, which no tokenizer takes and a model may write into JSON, becomes its escape."""
    return lambda text: tuple(tokenizer.encode(encodable(text), add_special_tokens=False, split_special_tokens=True))

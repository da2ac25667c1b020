"""Our rollout against a bare client of the same SGLang server, in turns in one run, on the same requests.

    python benchmarks/rollout_efficiency.py --config conf/tiny_cpu.yaml --nproc 2
    python benchmarks/rollout_efficiency.py --config conf/qwen3_30b_fim_gspo_h200.yaml --nproc 8 \\
        model.random_weights=true --output rollout.json

    ours                    `Rollout.collect`, as a run calls it: token ids in, checked tokens and logprobs out, text;
                            scored by a reward that does nothing
    bare                    an asyncio client that posts each request to /generate by itself, all at once
    bare_without_logprobs   the same without return_logprob

The server is started as a run starts it, from a copy of the model's folder that names no end token: every completion
has rollout.max_new_tokens tokens, so all three generate as many. Prompts are random tokens of data.max_prompt_tokens.
The prefix cache is emptied before each, as a weight update does. All arguments but those of `--help` are
pretrain_gspo.py's.
With `model.random_weights` the engine has SGLang's dummy weights.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from cycle import spread

from megatron_sglang import config_load, host
from megatron_sglang.bench import result
from megatron_sglang.config import RunConfig
from megatron_sglang.engine import answers
from megatron_sglang.errors import ConfigError, DataError, EngineError
from megatron_sglang.prompts.source import load_tokenizer
from megatron_sglang.rollout import Rollout, request_seed
from megatron_sglang.training import modes
from megatron_sglang.training.run import engine_options
from megatron_sglang.types import Completion, GenerateRequest, Prompt, SamplingParams, Score


class NoReward:
    """Scores nothing, in no time."""

    tier = "none"

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
        return [Score(0.0, False)] * len(pairs)

    def close(self) -> None: ...


def without_end(folder: Path, copy: Path) -> None:
    """`copy` becomes the model of `folder` in which no token ends a completion."""
    for path in folder.iterdir():
        if path.name in ("config.json", "generation_config.json"):
            found = json.loads(path.read_text())
            found["eos_token_id"] = None
            (copy / path.name).write_text(json.dumps(found))
        elif path.is_file():
            (copy / path.name).symlink_to(path.resolve())


def prompts_of(config: RunConfig) -> list[Prompt]:
    vocabulary = json.loads(Path(config.model.hf_path, "config.json").read_text())["vocab_size"]
    draw = random.Random(config.seed)
    length = config.data.max_prompt_tokens
    return [
        Prompt(f"p{number}", tuple(draw.randrange(5, vocabulary) for _ in range(length)), "test")
        for number in range(config.rollout.prompts_per_batch)
    ]


class Bench:
    """One engine, and the ways to ask it for the same rollout batch; each gives the number of tokens it got."""

    def __init__(self, config: RunConfig, engine: Any, decode: Callable[[Sequence[int]], str]) -> None:
        self.config, self.engine, self.prompts = config, engine, prompts_of(config)
        wanted = config.rollout
        sampling = SamplingParams(wanted.temperature, wanted.top_p, wanted.top_k, max_new_tokens=wanted.max_new_tokens)
        self.rollout = Rollout(
            engine,
            NoReward(),
            decode,
            sampling,
            wanted.samples_per_prompt,
            config.seed,
            routing=config.replays_routing,
        )
        requests = [
            GenerateRequest(prompt.token_ids_T, dataclasses.replace(sampling, seed=self._seed(prompt, member)))
            for prompt in self.prompts
            for member in range(wanted.samples_per_prompt)
        ]
        self.bodies = [
            {"input_ids": list(one.token_ids_T), "sampling_params": answers.sampling_params(one.sampling)}
            for one in requests
        ]

    def _seed(self, prompt: Prompt, member: int) -> int:
        return request_seed(self.config.seed, "0", prompt.id, member)

    def ours(self) -> int:
        groups = self.rollout.collect(self.prompts, 0)
        return sum(len(one.token_ids_T) for group in groups for one in group.completions_G)

    def bare(self, *, logprobs: bool = True) -> int:
        replies = asyncio.run(self._post([body | {"return_logprob": logprobs} for body in self.bodies]))
        return sum(len(reply["output_ids"]) for reply in replies)

    async def _post(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        server = self.engine.server
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}",
            headers={"Authorization": f"Bearer {server.api_key}"},
            timeout=self.config.engine.request_timeout_s,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        ) as client:
            found = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
        return [one.raise_for_status().json() for one in found]


def measure(bench: Bench, rounds: int, warm_up: int) -> Iterator[dict[str, Any]]:
    """The result so far after each round: a run that is cut off keeps what it has measured."""
    ways: dict[str, Callable[[], int]] = {
        "ours": bench.ours,
        "bare": bench.bare,
        "bare_without_logprobs": lambda: bench.bare(logprobs=False),
    }
    expected = len(bench.bodies) * bench.config.rollout.max_new_tokens
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, ask in ways.items():
            bench.engine.reset_prefix_cache()
            began = time.perf_counter()
            tokens = ask()
            took = time.perf_counter() - began
            if tokens != expected:
                raise EngineError(f"{name}: {tokens} tokens came back, expected {expected}; an end token was drawn")
            seconds[name] += [took] if number >= warm_up else []
        if number < warm_up:
            continue
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        yield {
            "requests": len(bench.bodies),
            "prompt_tokens": bench.config.data.max_prompt_tokens,
            "tokens": expected,
            "rounds": number + 1 - warm_up,
            "seconds": {name: spread(each) | {"each": each} for name, each in seconds.items()},
            "tokens_per_s": {name: expected / median for name, median in medians.items()},
            "ours_over_bare": medians["bare"] / medians["ours"],
            "ours_over_bare_without_logprobs": medians["bare_without_logprobs"] / medians["ours"],
        }


def start(config: RunConfig) -> Any:
    engine = modes.create(config, engine_options(config), lambda line: print(line, file=sys.stderr))
    if len(modes.members(engine)) > 1:
        raise ConfigError(f"{len(modes.members(engine))} engines; this measures one: raise engine.tp_size to --nproc")
    try:
        engine.start()
        engine.wait_ready()
        if engine.version is None:
            engine.publish(0)  # dummy weights, of which there is nothing to prove
    except BaseException:
        engine.close()
        raise
    return engine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nproc", type=int, default=1, help="trainer ranks that the run would have on this node (1)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rollout batches of each way (5)")
    parser.add_argument("--warm-up", type=int, default=1, help="rollout batches of each way before them (1)")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each round")
    args, rest = parser.parse_known_args()
    os.environ["LOCAL_WORLD_SIZE"] = str(args.nproc)
    for changed in host.prepare(os.environ):
        print(changed, file=sys.stderr)
    config = config_load.split_argv(rest, local_world_size=args.nproc).config
    with tempfile.TemporaryDirectory() as copy:
        given, folder = config, config.model.hf_path
        without_end(Path(folder), Path(copy))
        model = dataclasses.replace(config.model, hf_path=copy)
        log = dataclasses.replace(config.log, run_dir=copy)
        config = dataclasses.replace(config, model=model, log=log)
        try:
            decode = load_tokenizer(folder).decode
        except DataError:  # a folder with a config.json alone
            decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
        engine = start(config)
        try:
            fixed = {
                "command": "benchmarks/rollout_efficiency.py " + " ".join(sys.argv[1:]),
                "versions": result.versions(),
                "device": result.device(),
                "configuration": dataclasses.asdict(given),
            }
            for found in measure(Bench(config, engine, decode), args.rounds, args.warm_up):
                print(f"ours over bare: {found['ours_over_bare']:.3f}", found["tokens_per_s"], file=sys.stderr)
                if args.output:
                    args.output.write_text(json.dumps(fixed | found, indent=1) + "\n")
        except BaseException:
            print(engine.why_dead() or "the engine's process runs", file=sys.stderr)
            raise
        finally:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

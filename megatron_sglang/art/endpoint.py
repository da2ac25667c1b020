"""The OpenAI-compatible endpoint beside a backend's run (`megatron-sglang serve --run`, docs/serve.md)."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from megatron_sglang.art.tree import Tree
from megatron_sglang.errors import SetupError

NAME = "endpoint"
KEY_FILE = "serve.key"
"""Of this endpoint, in the run's folder; those of others there are named after their ports."""

START_S = 120.0
HEALTH_S = 10.0
_COMMAND = "import sys; from megatron_sglang.cli import main; sys.exit(main())"
_SAYS = re.compile(r"^serving .* at (http://\S+/v1), API key ", re.MULTILINE)


class Endpoint:
    """The endpoint of one run: `launch`, then `ready`, which fills `base_url` and `api_key`."""

    def __init__(self, tree: Tree, run_dir: Path, log: Path, model_name: str, port: int) -> None:
        self.model_name = model_name
        self.base_url = self.api_key = ""
        self._tree, self._run_dir, self._log, self._port = tree, run_dir, log, port

    async def launch(self, environment: Mapping[str, str]) -> None:
        """Start it; it answers 503 while there is no engine."""
        # An own key would otherwise be taken from the variable, and be that of something else.
        environment = {name: value for name, value in environment.items() if name != "MEGATRON_SGLANG_API_KEY"}
        argv = [sys.executable, "-c", _COMMAND, "serve", f"--run={self._run_dir}", f"--port={self._port}"]
        key = self._run_dir / KEY_FILE
        key.unlink(missing_ok=True)  # one that was left over would be taken as ours
        argv += [f"--served-model-name={self.model_name}", f"--api-key-file={key}"]
        await self._tree.launch(NAME, argv, log=self._log, environment=environment, remove=[key])

    async def ready(self) -> None:
        """Wait until it serves. The endpoint's own error if it ends."""
        await self._tree.alive(NAME, self._find(), START_S, "the start of the endpoint")
        await self._tree.alive(NAME, self._wait_healthy(), START_S, "the endpoint's first good answer")

    async def problem(self) -> str:
        """What is wrong with it now; empty: nothing. New weights, under way, are not wrong."""
        if self._tree.children[NAME].ended.is_set():
            return str(self._tree.children[NAME].why(NAME))
        try:
            await self._health()
        except (httpx.HTTPError, OSError) as error:  # also of this process: without a free descriptor no client is made
            return f"the endpoint did not answer within {HEALTH_S:g} s ({error!r}); see {self._log}"
        return ""

    async def _find(self) -> None:
        child = self._tree.children[NAME]
        while (said := _SAYS.search(child.text())) is None:
            await asyncio.sleep(0.1)
        key = (self._run_dir / KEY_FILE).read_text().strip()
        if not key:
            raise SetupError(f"{self._run_dir / KEY_FILE} is empty; expected the endpoint's key")
        self.base_url, self.api_key = said[1], key

    async def _wait_healthy(self) -> None:
        while True:
            try:
                if await self._health() == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)

    async def _health(self) -> int:
        # trust_env would send loopback traffic through a proxy.
        async with httpx.AsyncClient(trust_env=False, timeout=HEALTH_S) as client:
            return (await client.get(self.base_url.removesuffix("/v1") + "/health")).status_code

"""What README and docs name exists: files, links, flags, options, command lines. And nothing private is committed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sglang.config_argv import FLAGS, sort_words
from megatron_sglang.config_check import SECTIONS, field_types, known_options
from megatron_sglang.config_load import split_argv
from megatron_sglang.dry_run import describe

ROOT = Path(__file__).parents[2]
DOCS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
FOLDERS = "conf|examples|tests|scripts|docs|megatron_sglang|benchmarks|requirements"
FOREIGN_FLAGS = """
--nproc-per-node --standalone --nnodes --node-rank --master-addr --rdzv-backend --rdzv-endpoint --security-opt
--shm-size --ipc --gpus --no-build-isolation --user --version --durations
""".split()  # noqa: SIM905
"""Flags of torchrun, docker, uv and pytest that the docs may name."""

every_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)


def code_in(text: str) -> Iterator[str]:
    """Fenced blocks and `inline code` of a page; continued lines joined."""
    fence = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
    yield from (block.replace("\\\n", " ") for block in fence.findall(text))
    yield from re.findall(r"`([^`\n]+)`", fence.sub("", text))


@every_doc
def test_links_and_paths_exist(doc: Path) -> None:
    """A page that sends its reader to a file that was moved."""
    text = doc.read_text()
    links = [doc.parent / link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    paths = [ROOT / path for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*[\w/*])", text)]
    missing = [str(path) for path in (*links, *paths) if not list(ROOT.glob(str(path.resolve().relative_to(ROOT))))]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What `page.md#...` may end in: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_doc
def test_anchors_exist(doc: Path) -> None:
    """A link to a heading that was renamed: it opens the page at its top, and nobody is told."""
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]*\.md#[^)\s]+|#[^)\s]+)\)", doc.read_text())]
    missing = [f"{page}#{name}" for page, _, name in links if name not in anchors(doc.parent / page if page else doc)]
    assert missing == []


@every_doc
def test_tables_are_whole(doc: Path) -> None:
    """A blank line in a table: what follows is shown as text with bars in it."""
    text = re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.M | re.S)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert [table for table in tables if not re.match(r".*\n\|(-+\|)+\n", table)] == []


WITH_FLAGS = ("plan", "serve", "bench", "scripts", "benchmarks", ".ci", "weights", "rewards", "box")
"""Folders whose programs have flags of their own."""


@every_doc
def test_flags_exist(doc: Path, repository_files: list[Path]) -> None:
    """A flag that was renamed; every --flag of the docs is ours, Megatron's, SGLang's, or stands in our own scripts."""
    known = {"config", "dry-run", "help", *FLAGS, *field_types(), *known_options("megatron")}
    known |= {"sglang-" + name.replace("_", "-") for name in known_options("sglang")}
    sources = "\n".join(
        path.read_text()
        for path in repository_files
        if path.suffix in (".py", ".sh", "") and path.parts[-2] in WITH_FLAGS
    )
    named = {flag for code in code_in(doc.read_text()) for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)}
    unknown = {flag for flag in named if flag[2:] not in known and flag not in FOREIGN_FLAGS}
    assert {flag for flag in unknown if f'"{flag}' not in sources and f" {flag} " not in sources} == set()


@every_doc
def test_options_exist(doc: Path) -> None:
    """`section.field` in code is an option, unless it is a file such as engine.log."""
    pattern = re.compile(rf"(?:{'|'.join(set(SECTIONS) - {'megatron', 'sglang'})})\.(\w+)(?:=\S*)?")
    named = [match for code in code_in(doc.read_text()) for word in code.split() if (match := pattern.fullmatch(word))]
    unknown = {match[0].split("=")[0] for match in named} - field_types().keys()
    assert {name for name in unknown if name.rsplit(".")[-1] not in ("log", "py", "md", "yaml", "json")} == set()


@every_doc
def test_commands_can_be_read(doc: Path) -> None:
    """Each pretrain_gspo.py command line of a page goes through our own parser."""
    for code in code_in(doc.read_text()):
        for line in code.splitlines():
            command = re.search(r"\bpretrain_gspo\.py((?:\s+[^#|&;]+)?)", line)
            if command and "..." not in line:
                sort_words(word for word in command[1].split() if not word.startswith("["))


@every_doc
def test_commands_fit_their_ranks(doc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose sizes do not divide the ranks that it starts ends before its first rollout batch."""
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\\n\s*", "", doc.read_text())
    for ranks, words in re.findall(
        r"^ *torchrun --nproc-per-node (\d+) pretrain_gspo\.py (.*--config conf/.*)", text, re.M
    ):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, ranks)
        describe(split_argv(shlex.split(words)).config)


def test_no_private_address_is_committed(repository_files: list[Path]) -> None:
    """A path of the machine it was written on, or the host of a package index."""
    private = re.compile(r"(^|[^\w.])/(wor[k]|far[m]|roo[t]|home/\w+)/", re.M)
    index = re.compile(
        r"https?://[^\"' ]+\.(whl|tar\.gz|tgz|deb)|(index-url|find-links|registry)[ =:\"]+(https?|file)://"
    )
    host = re.compile(r"//(\w+\.)*(pypi\.or[g]|pythonhosted\.or[g]|anaconda\.or[g])")
    found = []
    for path in repository_files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {hit[0]}" for rule in (private, index, host) if (hit := rule.search(text))
        ]
    assert found == []


def test_no_large_file_is_committed(repository_files: list[Path]) -> None:
    """A checkpoint or a run folder that slipped in: it would stay in the history for ever."""
    assert [path.name for path in repository_files if path.stat().st_size > 5_000_000] == []

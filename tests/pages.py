"""The pages of the documentation: their code blocks, and the files and commands of those that a reader follows."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from lightning_optim.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOLLOWED = [TUTORIAL, *sorted((DOCS / "how-to").glob("*.md"))]
"""Pages whose blocks are the files of one project, and the commands to run in it."""

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_END = "\x1e"
_KNOWN = ("lightning-optim", "python", "pip", "tensorboard")
"""Programs that a page may call; the last two are not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: The first word after the fence.
        options: What follows it: ``title="run.yaml"``, or ``data-notest="REASON"``.
        body: What is in it, without the fence's indentation.
        line: The line of the fence in the page.
    """

    language: str
    options: str
    body: str
    line: int

    @property
    def title(self) -> str | None:
        """The file that it is."""
        found = _TITLE.search(self.options)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        language, _, options = match["info"].strip().strip("{}").removeprefix(".").partition(" ")
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        found.append(Block(language, options, body, text.count("\n", 0, match.start()) + 1))
    return found


def write_files(folder: Path) -> None:
    """Write the files that the followed pages show; some pages begin with those of another."""
    for page in FOLLOWED:
        for block in blocks_of(page):
            if block.title is not None:
                (folder / block.title).write_text(block.body)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Python files of the folder can be imported, in place of others of the same name, and are forgotten afterwards."""

    def forget() -> None:
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)

    before, sys.path = sys.path, [str(folder), *sys.path]
    forget()
    try:
        yield
    finally:
        forget()
        sys.path = before


def commands_of(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block of shell, with variables, loops and wildcards as bash resolves them in the folder."""
    script = block.body
    if block.language == "console":  # a prompt before each command, and what they print without one
        script = "".join(re.findall(r"^\$ ((?:.*\\\n)*.*\n)", script, re.MULTILINE))
    script = re.sub(r" > (\S+)$", r" '>' \1", script, flags=re.MULTILINE)  # for _run; the programs do not run here
    shown = "".join(f"{name}() {{ printf '%s\\x1f' {name} \"$@\"; printf '{_END}'; }}\n" for name in _KNOWN)
    bash = ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", shown + script]
    out = subprocess.run(bash, cwd=folder, capture_output=True, text=True, check=True).stdout
    return [command.split("\x1f")[:-1] for command in out.split(_END)[:-1]]


def follow(
    page: Path, folder: Path, brief: Sequence[str] = (), most: int | None = None
) -> Iterator[tuple[list[str], str | None]]:
    """Do what a page says, in a folder, which must be the current one: each command has run when it is yielded.

    Args:
        page: The page.
        folder: Where the files of all pages are written, at the beginning.
        brief: Flags that shorten each ``fit``.
        most: How many of the commands of a loop are run at most; None for all.

    Yields:
        The command, and the output that the page shows of it, if it does.
    """
    write_files(folder)
    blocks = blocks_of(page)
    with importable(folder):
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if block.language not in ("console", "bash") or "notest" in block.options:
                continue
            commands = commands_of(block, folder)[: most if block.language == "bash" else None]
            for index, command in enumerate(commands):
                _run(command, brief)
                last = index == len(commands) - 1
                yield command, after.body if last and after is not None and after.language == "text" else None


def _run(command: list[str], brief: Sequence[str]) -> None:
    program, *args = command
    if ">" in args:
        place = args.index(">")
        with open(args[place + 1], "w") as file, redirect_stdout(file):
            _run([program, *args[:place]], brief)
    elif program == "lightning-optim":
        main([*args, *(brief if args[0] == "fit" else ())])
    elif program == "python":
        before, sys.argv = sys.argv, args
        try:
            runpy.run_path(args[0], run_name="__main__")
        finally:
            sys.argv = before


def without_numbers(text: str) -> list[str]:
    """The words of an output, with a placeholder for each number, and rules of tables of one length."""
    return re.sub(r"([─━])+", r"\1", re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", text)).split()


def as_shell(command: Sequence[str]) -> str:
    """A command as one writes it."""
    return shlex.join(command)

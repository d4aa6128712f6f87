"""README, CONTRIBUTING and docs/ say what is so: links lead somewhere, commands parse, files that they name exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from jaxllm.commands.cli import parse

README_LINES = 170  # at most: a newcomer reads all of it
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(?<![\w./~-])(?:\.ci|\.github|bench|checkpoints|docs|examples|jaxllm|sharding|tests)/[\w./-]*")
MODULE = re.compile(r"python -m ((?:bench|checkpoints|jaxllm|sharding)[\w.]*)")
SHELL_PUNCTUATION = set("();<>|&")


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [body for kind, body in FENCED.findall(text) if kind == language]


def inline_code(text: str) -> list[str]:
    """What stands between single backticks, outside of code blocks."""
    return INLINE.findall(FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links to files, outside of code."""
    found = LINK.findall(INLINE.sub("", FENCED.sub("", text)))
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def headings(text: str) -> set[str]:
    """What the headings of a document are linked by."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def commands(line: str) -> Iterator[list[str]]:
    """The arguments of each `jaxllm` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    current: list[str] = []
    for word in [*lexer, ";"]:
        if not word or not set(word) <= SHELL_PUNCTUATION:
            current.append(word)
            continue
        if current[:1] == ["jaxllm"]:
            yield current[1:]
        current = []


def shown_commands() -> list[tuple[str, list[str]]]:
    shown = [(document, block) for document in DOCUMENTS for block in blocks(read(document), "bash")]
    return [(document, arguments) for document, block in shown for line in block.splitlines() for arguments in commands(line)]


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    broken = []
    for target in links(read(document)):
        name, _, heading = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if not path.exists() or (heading and heading not in headings(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = read(document)
    named = [path for code in (*inline_code(text), *blocks(text, "bash")) for path in REPOSITORY_PATH.findall(code)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_are_run_exist(document: str) -> None:
    modules = MODULE.findall(read(document))
    paths = [ROOT / module.replace(".", "/") for module in modules]
    assert [str(path) for path in paths if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()] == []


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_commands()
    assert len(shown) > 20, "no commands were found"
    wrong = []
    for document, arguments in shown:
        try:
            parse(arguments)
        except SystemExit:
            wrong.append((document, arguments, capsys.readouterr().err))
    assert wrong == []


def test_commands_in_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`jaxllm score` in a sentence lacks its arguments, but there is such a command."""
    named = {code.split()[1] for document in DOCUMENTS for code in inline_code(read(document)) if code.startswith("jaxllm ")}
    for name in sorted(named):
        with pytest.raises(SystemExit) as end:
            parse([name, "--help"])
        assert end.value.code == 0, f"jaxllm {name}: {capsys.readouterr().err}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_is_python_and_its_names_exist(document: str) -> None:
    for block in blocks(read(document), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_page_is_in_the_site() -> None:
    nav = read("mkdocs.yml").partition("nav:")[2]
    assert sorted(re.findall(r"[\w-]+\.md", nav)) == sorted(Path(page).name for page in PAGES)


def test_commands_are_found_in_shell() -> None:
    assert list(commands("pip install -e . && jaxllm demo  # jaxllm chat")) == [["demo"]]
    assert list(commands('echo "a | b" | jaxllm generate MODEL "x; y" > out')) == [["generate", "MODEL", "x; y"]]
    assert list(commands("python -m jaxllm plan")) == []


def test_what_is_wrong_is_seen() -> None:
    text = "see [a](b.md#c) and [d](https://e), `jaxllm/nothing.py`, `~/.cache/jaxllm/compiled`\n```bash\n[x](y)\n```\n"
    assert links(text) == ["b.md#c"]
    assert [path for code in inline_code(text) for path in REPOSITORY_PATH.findall(code)] == ["jaxllm/nothing.py"]
    assert headings("# A stranger's file, again\n## Life of a request") == {"a-strangers-file-again", "life-of-a-request"}

"""What the documents and the help texts name exists: codecs, commands, options, functions, files."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import tenpak
from support import ROOT
from tenpak import cli

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks: language and text."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The arguments of each command line that runs tenpak."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [re.fullmatch(r"\s*(?:\$ |\.venv/bin/)?tenpak ((?:-|[a-z]).*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def examples_of_help() -> list[list[str]]:
    """Each example of the help texts."""
    texts = [cli.parser().format_help(), *(module.__doc__ for module in cli._COMMANDS)]
    return [line for text in texts for line in commands(text.partition("examples:")[2])]


@every_page
def test_codecs_and_layouts_that_a_page_names_exist(page):
    known = {name for codec in tenpak.codecs() for name in (codec.name, codec.layout)}
    named = set(re.findall(r"\bint[48]_[a-z0-9_]*[a-z0-9]\b", page.read_text()))
    assert named <= known


def test_the_page_of_codecs_names_all():
    page = (ROOT / "docs" / "codecs.md").read_text()
    assert all(f"`{codec.name}`" in page for codec in tenpak.codecs())


@every_page
def test_command_lines_of_a_page_are_accepted(page):
    for _, text in blocks(page):
        for arguments in commands(text):
            if arguments != ["--version"]:
                cli.parser().parse_args(arguments)


def test_every_command_has_examples_that_are_accepted():
    examples = examples_of_help()
    for arguments in examples:
        cli.parser().parse_args(arguments)
    assert {arguments[0] for arguments in examples} == {m.__name__.rsplit(".", 1)[1] for m in cli._COMMANDS}


@every_page
def test_python_of_a_page_uses_names_that_exist(page):
    for language, text in blocks(page):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tenpak":
                    assert hasattr(tenpak, node.attr), node.attr


@every_page
def test_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


def test_every_public_name_is_documented():
    for name in tenpak.__all__:
        value = getattr(tenpak, name)
        if callable(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has only a generated docstring"

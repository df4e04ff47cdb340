"""README and docs say what works: their commands parse, and run in order; their Python examples run.

A tiny model stands for the model ids. A block that is not run has a reason before it: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from pico import pico_llava
from test_train import write_data

from striate.runs.cli import VERBS, main, parse_call

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
# What is smaller here than in the docs. The model has 16 layers, so that the layers named in the docs exist.
TINY = {"HuggingFaceTB/SmolVLM-256M-Instruct": "pico", "max_steps=100": "max_steps=2", "--steps 40": "--steps 2"}


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page that are run."""
    return [text for reason, kind, text in BLOCK.findall(page.read_text()) if kind == language and not reason]


def commands(page: Path) -> list[str]:
    """Every command of striate on a page, also behind a launcher."""
    lines = "\n".join(blocks(page, "sh")).splitlines()
    return [line[found.end() - len("striate") :] for line in lines if (found := re.match(r"(.* -m )?striate\b", line))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples start from: a model, records and their images."""
    pico_llava(tmp_path / "pico", num_hidden_layers=16)
    (tmp_path / "images").mkdir()
    write_data(tmp_path / "images").rename(tmp_path / "train.json")
    shutil.copy(tmp_path / "train.json", tmp_path / "test.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(text: str) -> str:
    for large, small in TINY.items():
        text = text.replace(large, small)
    return text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are read
    for command in commands(page):
        _, verb, *words = shlex.split(command, comments=True)
        module, _, attribute = VERBS[verb][0].partition(":")
        function = getattr(importlib.import_module(module), attribute)
        parse_call(verb, function, words)


def test_the_commands_of_the_guides_run(folder: Path) -> None:
    guides = [ROOT / name for name in ("README.md", "docs/index.md", "docs/regions.md", "docs/pruning.md")]
    for command in dict.fromkeys(command for guide in guides for command in commands(guide)):
        assert main(shlex.split(tiny(command), comments=True)[1:]) == 0, command
    assert {"quarter", "all", "top", "smaller", "healed"} <= {run.name for run in (folder / "runs").iterdir()}
    assert (folder / "report.html").is_file()


@pytest.mark.filterwarnings("default")  # those of other trainers
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_examples_run(page: Path, folder: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(tiny(block), name_of(page), "exec"), names)


def test_every_verb_has_a_page() -> None:
    pages = ROOT / "docs" / "verbs"
    assert {page.stem for page in pages.glob("*.md")} == set(VERBS)
    assert all("<!-- options -->" in page.read_text() for page in pages.glob("*.md"))
    assert all(f"verbs/{verb}.md" in (ROOT / "mkdocs.yml").read_text() for verb in VERBS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{name_of(page)}: make {target}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text().split()) <= 700


def test_the_sections_of_errors_quote_the_messages() -> None:
    """The longest piece of each quoted message, without its values, is in the source."""
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)  # strings over several lines
    page = (ROOT / "docs" / "errors.md").read_text()
    quoted = [
        text for lines in re.findall(r"^###? .+\n\n((?:`.+\n)+(?:.*`\n)*)", page, re.M) for text in lines.split("` · `")
    ]
    pieces = [
        max(re.split(r"\.\.\.|\d[\d,.]*%?|'\S+'|[`{}]", " ".join(text.split())), key=len).strip() for text in quoted
    ]
    assert len(pieces) > 40
    assert not [piece for piece in pieces if piece not in source]


def test_every_section_of_errors_is_linked_by_an_error() -> None:
    """The code at the end of an error's message is the heading of its section."""
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bsee ?= ?\"([a-z-]+)\"", source)) == {re.sub(r"\W+", "-", one.lower()) for one in headings}


# What is written in backticks as a path of the project: `evaluation/metrics.py`, `research/results.md`.
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_paths_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py|(?:research|docs|examples|recipes|scripts)/[\w./-]+)`", text):
        assert any((home / path).exists() for home in (ROOT, ROOT / "src/striate")), path
    for path in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (page.parent / path).exists(), path

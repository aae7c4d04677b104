"""Plain English: words that are banned, and sentences and paragraphs that need reading twice.

The terms are in CONTRIBUTING.md, under "Words".
"""

import io
import re
from pathlib import Path

import pytest
from readme_renderer.markdown import render

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "gold/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
CODE = [path for folder in ("erasure", "pipelines", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
# Each was somebody's riddle once; what to write instead.
BANNED = {
    r"\btold (?:apart|once|beside)\b": "distinguish, said once, shown beside",
    r"\bseen off\b": "blocked",
    r"\blent\b": "shared",
    r"\bborrow(?:s|ed)?\b": "shared, copied",
    r"\bwords that are none\b": "name the words",
    r"\bwhat is known of it\b": "its record",
    r"\bknows? its own\b": "say what it stores",
    r"\bno end of\b": "many",
    r"\bwhatsoever\b": "(leave it out)",
    r"\bthereof\b": "of it",
    r"\butili[sz]e": "use",
    r"\bin order to\b": "to",
    r"\bplease\b": "(leave it out)",
    r"\bseamless(?:ly)?\b": "(say what happens)",
    r"\bpowerful\b": "(say what it does)",
    r"\bleverag(?:e|es|ing)\b": "use",
}


def places(page: Path) -> list[str]:
    text = page.read_text("utf-8")
    return [
        f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match[0]!r}; rather: {instead}"
        for word, instead in BANNED.items()
        for match in re.finditer(word, text, flags=re.IGNORECASE)
    ]


def test_no_banned_word():
    assert not [place for page in (*PAGES, *CODE) for place in places(page)]


def paragraphs(text: str) -> list[str]:
    """The paragraphs and items of a page: no code, no tables, no headings, links as their words."""
    text = re.sub(r"^ *```.*?^ *```|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?<=\n\n)(?: {4}[^\n]*\n)+(?=\n)", "", text)  # an equation is indented
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#)", line)]
    found = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. ))", "\n".join(lines))
    return [" ".join(one.split()) for one in found if one.strip()]


def sentences(text: str) -> list[str]:
    return [s for p in paragraphs(text) for s in re.split(r"(?<=[.!?:])\s+", p)]


def longer(found: list[str], words: int) -> list[str]:
    return [f"{len(one.split())} words: {one}" for one in found if len(one.split()) > words]


def test_long_sentences_and_paragraphs_are_found():
    """Each kind of text that is left out is left out alone."""
    words, table, code = "word " * 40, "| " + "cell " * 99 + "|", "```\n" + "code " * 99 + "\n```"
    page = f"# Title\n\n{table}\n\n{code}\n\nWhere:\n\n    {words}\n\nFirst {words}\nlast.\n\n- One.\n- Two {words}\n"
    assert [s.split()[0] for s in sentences(page) if len(s.split()) > 35] == ["First", "-"]
    assert not longer(paragraphs(page), 90) and longer(paragraphs(page + words * 3), 90)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_short_sentences_and_paragraphs(page):
    text = page.read_text("utf-8")
    assert not longer(sentences(text), 30 if page.parent.name == "howto" else 35)
    assert not longer(paragraphs(text), 90)


def test_the_readme_is_short_and_its_sentences_are_too():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert not [s for s in longer(sentences(text), 25) if "·" not in s]


def test_the_readme_is_whole_on_pypi():
    """PyPI draws what its renderer lets through, and has no files of the repository beside it."""
    warnings = io.StringIO()
    page = render((ROOT / "README.md").read_text("utf-8"), stream=warnings)
    assert page is not None and not warnings.getvalue()
    assert (
        page.count("<table>") == 2 and "<img " in page and "&lt;" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    )
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []

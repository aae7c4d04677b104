"""Plain English: words that are banned, and sentences of the README that need reading twice.

The terms are in CONTRIBUTING.md, under "Words".
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "gold").glob("*.md"))]
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


def sentences(text: str) -> list[str]:
    """The sentences of a page: no code, no tables, no headings, links as their words."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#)", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines))
    return [s for p in paragraphs for s in re.split(r"(?<=[.!?:])\s+", " ".join(p.split())) if s]


def test_the_readme_is_short_and_its_sentences_are_too():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert not [s for s in sentences(text) if len(s.split()) > 25 and "·" not in s]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda path: path.name)
def test_how_tos_are_short_sentences(page):
    assert not [s for s in sentences(page.read_text("utf-8")) if len(s.split()) > 30]

"""What the site adds to its pages: links into the glossary, code for reStructuredText roles, "95 %" in one piece."""

import html
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):<code>~?(?:[\w.]*\.(?=[\w]+</code>))?([^<]*)</code>")
TITLED = re.compile(r":(?:class|meth|func|mod|data|attr):<code>([^<&]+?)\s*&lt;[^<]*&gt;</code>")
GLOSSARY = Path(__file__).with_name("glossary.md")
TERM = re.compile(r"^(\S.*)\n: {3}(.+)$", re.MULTILINE)
# How a term is written on the pages, where that is not the term with or without an s. None: too common a word to link.
WRITTEN = {
    "base": None,
    "claim": None,
    "control": None,
    "erasure": None,
    "interval": None,
    "C0 to C6": r"(?-i:C[0-6])",
    "world-a, world-b": r"world-[ab]",
    "suppressed": r"suppress(?:ed|es|ion)",
    "removed": r"removal",
    "relearning": r"[Rr]elearn(?:ing|t)",
    "null control": r"null(?: control)?s?(?! space)",
    "neighbours": r"neighbours?",
    "Gram matrix": r"Gram matri(?:x|ces)",
}
OTHERWISE = {"methods.md": {"gate"}}  # pages on which a term means something else
HYPHENED = re.compile(r"(?<![^\s;])[^\s<>&;]*-[^\s<>&;]*(?![^\s&])")  # a word of code that a line could end inside of
LONGEST = 26  # characters of such a word that stays in one piece, which fits a phone
# No links inside links, code, headings, captions of pictures and what is not shown as text.
CLOSED = {"a", "code", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "summary", "script", "style", "svg", "dt"}


def terms() -> dict[str, str]:
    """The glossary: what each term means."""
    return dict(TERM.findall(GLOSSARY.read_text("utf-8")))


def slug(term: str) -> str:
    return re.sub(r"\W+", "-", term.lower()).strip("-")


def linked(page: str, glossary: str, *, without: Collection[str] = ()) -> str:
    """The HTML of a page in which the first use of every term is a link.

    Args:
        glossary: where the glossary is, seen from the page.
        without: terms that are left alone.
    """
    meanings = terms()
    written = {term: WRITTEN.get(term, rf"{term}s?") for term in meanings}
    waiting = {
        term: re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.I)
        for term, words in written.items()
        if words and term not in without
    }
    return "".join(part if inside else in_text(part, waiting, meanings, glossary) for part, inside in pieces(page))


def pieces(page: str) -> Iterator[tuple[str, list[str]]]:
    """The tags and texts of a page, each with the elements in ``CLOSED`` that it is in. A tag is in itself."""
    inside: list[str] = []
    for part in re.split(r"(<[^>]*>)", page):
        tag = re.match(r"<(/?)([a-z0-9]*)", part)
        if tag and not tag[1] and tag[2] in CLOSED:
            inside.append(tag[2])
        yield part, [*inside, *(["tag"] if tag else [])]
        if tag and tag[1] and tag[2] in CLOSED:
            inside.pop()


def whole_words(page: str) -> str:
    """The HTML of a page in which ``--keep`` and ``superhero-uce`` in code are not broken at the end of a line."""

    def kept(word: re.Match[str]) -> str:
        return f'<span class="word">{word[0]}</span>' if 2 < len(word[0]) <= LONGEST else word[0]

    return "".join(
        HYPHENED.sub(kept, part) if "code" in inside and "tag" not in inside else part for part, inside in pieces(page)
    )


def in_text(text: str, waiting: dict[str, re.Pattern[str]], meanings: dict[str, str], glossary: str) -> str:
    """A piece of text with its links; what is linked leaves ``waiting``."""
    found = {term: match for term, words in waiting.items() if (match := words.search(text))}
    end, done = len(text), text
    for term, match in sorted(found.items(), key=lambda item: -item[1].start()):
        if match.end() <= end:  # terms that overlap: the later one
            link = (
                f'<a class="term" href="{glossary}#{slug(term)}" title="{html.escape(meanings[term])}">{match[0]}</a>'
            )
            done, end = done[: match.start()] + link + done[match.end() :], match.start()
            del waiting[term]
    return done


def roomy(page: str) -> str:
    """The HTML of a page whose cells say how long they are, so that a phone gives a long one room; see extra.css."""

    def sized(cell: re.Match[str]) -> str:
        length = len(html.unescape(re.sub(r"<[^>]*>", "", cell[2])))
        name = "long" if length > 60 else "middling" if length > 24 else ""
        return f'<td class="{name}"{cell[1]}>{broken(cell[2])}</td>' if name else cell[0]

    return re.sub(r"<td([^>]*)>(.*?)</td>", sized, page, flags=re.DOTALL)


def broken(cell: str) -> str:
    """Names in the code of a cell that are too long for a column may end a line behind a dot or an underscore."""
    return re.sub(r"(?<=<code>)[\w.]{27,}(?=</code>)", lambda name: re.sub(r"(?<=[._])", "<wbr>", name[0]), cell)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    content = ROLE.sub(r"<code>\1</code>", TITLED.sub(r"<code>\1</code>", content))
    content = roomy(whole_words(re.sub(r"(?<=\d) (?=%)", "&nbsp;", content)))
    if page.file.src_uri == GLOSSARY.name:
        return re.sub(r"<dt>(.*?)</dt>", lambda term: f'<dt id="{slug(term[1])}">{term[1]}</dt>', content)
    if page.file.src_uri.startswith("api/"):
        return content
    up = "../" * page.url.count("/")
    return linked(content, f"{up or './'}glossary/", without=OTHERWISE.get(page.file.src_uri, ()))

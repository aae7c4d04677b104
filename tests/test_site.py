"""What the documentation site adds to its pages: links into the glossary, and words that stay in one piece."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def linked(page: str) -> list[tuple[str, str]]:
    """The words of a page that are links, with where they go."""
    return re.findall(r'<a class="term" href="\.\./glossary/#([^"]*)" title="[^"]+">([^<]*)</a>', page)


def test_the_first_use_of_a_term_is_a_link():
    page = hooks.linked("<p>Golds and a twin. A gold, <em>the keep list</em> and a keep list.</p>", "../glossary/")
    assert linked(page) == [("gold", "Golds"), ("twin", "twin"), ("keep-list", "keep list")]
    assert re.sub(r"</?a[^>]*>", "", page) == "<p>Golds and a twin. A gold, <em>the keep list</em> and a keep list.</p>"


def test_code_headings_and_links_stay_as_they_are():
    page = '<h2>A gold</h2><pre><code>gold <b>twin</b></code></pre><a href="x">gold</a><p title="gold">golden</p>'
    assert hooks.linked(page, "../glossary/") == page
    assert linked(hooks.linked(page + "<p>gold</p>", "../glossary/")) == [("gold", "gold")]
    assert linked(hooks.linked("<p>a null space, a gate</p>", "../glossary/", without={"gate"})) == []


def test_every_term_has_a_place_and_is_found_in_its_own_words():
    terms = hooks.terms()
    places = [hooks.slug(term) for term in terms]
    assert len(terms) > 30 and len(set(places)) == len(places)
    assert set(hooks.WRITTEN) <= set(terms)
    for term in terms:
        if hooks.WRITTEN.get(term, term) is not None and term not in ("C0 to C6", "world-a, world-b", "removed"):
            assert (hooks.slug(term), term) in linked(hooks.linked(f"<p>{term}</p>", "../glossary/"))


def test_options_and_names_in_code_are_not_broken_at_their_hyphens():
    page = hooks.whole_words("<p>a-b <code>erasure erase --keep ninja --out superhero-uce - x</code></p>")
    assert re.findall(r'<span class="word">([^<]*)</span>', page) == ["--keep", "--out", "superhero-uce"]
    assert (
        re.sub(r"</?span[^>]*>", "", page)
        == "<p>a-b <code>erasure erase --keep ninja --out superhero-uce - x</code></p>"
    )


def test_long_cells_have_room_and_long_names_may_break():
    name = "time_caption_embed.caption_embedder.1"
    page = hooks.roomy(f"<td>{'word ' * 20}</td><td>short</td><td><code>{name}</code></td>")
    assert page.count('class="long"') == 1 and page.count('class="middling"') == 1
    assert page.replace("<wbr>", "").count(name) == 1 and "time_<wbr>" in page

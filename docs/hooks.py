"""What the docstrings write in reStructuredText and the site shows as code: ``:class:`~erasure.Concept` ``."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):<code>~?(?:[\w.]*\.(?=[\w]+</code>))?([^<]*)</code>")
TITLED = re.compile(r":(?:class|meth|func|mod|data|attr):<code>([^<&]+?)\s*&lt;[^<]*&gt;</code>")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"<code>\1</code>", TITLED.sub(r"<code>\1</code>", html))

"""The app's own HTML: pictures in pairs, messages, answers. Every text of others is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from erasure.io import printable
from erasure.pipelines.app.studio import Answers, Drawn

LARGEST = 384  # pixels of a side on the page
GROUPS = {
    "target": ("Target", "should be gone"),
    "neighbours": ("Neighbours", "should stay"),
    "unrelated": ("Unrelated", "should stay"),
}

CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important;}
#head h1 {margin: 0 0 .2rem; font-size: 1.6rem;}
#head p {margin: 0; color: var(--body-text-color-subdued);}
.message {padding: .6rem .8rem; border-radius: 8px; border-left: 4px solid; line-height: 1.45; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); color: var(--body-text-color);}
.message.good {border-color: #16a34a;} .message.busy {border-color: #6366f1;} .message.bad {border-color: #dc2626;}
.message ul {margin: .3rem 0 0; padding-left: 1.1rem;}
.cost {color: var(--body-text-color-subdued); font-size: .9rem; line-height: 1.45;}
.group {margin-bottom: 1.1rem;}
.group h3 {margin: 0 0 .5rem; font-size: 1rem; color: var(--body-text-color);}
.group h3 small {font-weight: 400; color: var(--body-text-color-subdued); margin-left: .4rem;}
.cards {display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr));}
.cards figure {margin: 0; background: var(--background-fill-secondary); border-radius: 10px; overflow: hidden;
  border: 1px solid var(--border-color-primary);}
.pair {display: grid; grid-template-columns: 1fr 1fr; gap: 2px;}
.pair div {position: relative;}
.pair img {display: block; width: 100%; aspect-ratio: 1; object-fit: cover; margin: 0;}
.pair span {position: absolute; left: 4px; bottom: 4px; padding: 0 5px; border-radius: 4px; font-size: .7rem;
  line-height: 1.5; background: rgba(0, 0, 0, .65); color: #fff;}
.cards figcaption {padding: .4rem .55rem .5rem; font-size: .85rem; line-height: 1.35; color: var(--body-text-color);
  overflow-wrap: anywhere;}
.answers {width: 100%; border-collapse: collapse; font-size: .92rem;}
.answers th, .answers td {text-align: left; padding: .35rem .5rem; color: var(--body-text-color); font-weight: 400;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;}
.empty {color: var(--body-text-color-subdued); padding: 2.2rem 1rem; text-align: center; border-radius: 10px;
  border: 1px dashed var(--border-color-primary); line-height: 1.5;}
#answers, #pictures {min-height: 5rem;}
#answers:empty {min-height: 0;}
.drawing {min-height: 9rem;}
#head, #about, #cost, #status, #pictures, #answers, #use {min-width: 0;}
.gradio-container .html-container {padding: 0 !important;}
#pictures .progress-text, #answers .progress-text {display: none;}
#use pre, #use code {white-space: pre-wrap; overflow-wrap: anywhere;}
@media (max-width: 800px) {#columns {flex-direction: column; flex-wrap: nowrap;} #columns > * {min-width: 0 !important;
  width: 100%;}}
@media (max-width: 480px) {.cards {grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .6rem;}}
"""


def text(value: object) -> str:
    """Text of others, so that it does nothing but stand there."""
    return html.escape(printable(str(value), limit=600))


def message(sentence: str, *, kind: str = "good", more: Sequence[str] = ()) -> str:
    """A line that says how it went.

    Args:
        kind: good, busy or bad. What is bad is read out at once by screen readers.
        more: further lines.
    """
    role = "alert" if kind == "bad" else "status"
    lines = "".join(f"<li>{text(one[:1].upper() + one[1:])}</li>" for one in more)
    said = text(sentence[:1].upper() + sentence[1:])
    return f'<div class="message {kind}" role="{role}">{said}{f"<ul>{lines}</ul>" if lines else ""}</div>'


def pictures(drawn: Drawn, *, scale: float) -> str:
    """Pairs of pictures, group by group."""
    return "".join(_group(group, pairs, scale) for group, pairs in drawn.items() if pairs)


def _group(group: str, pairs: Sequence[tuple[str, Image.Image, Image.Image]], scale: float) -> str:
    name, wish = GROUPS[group]
    cards = "".join(
        f'<figure><div class="pair">{_picture(old, "before", prompt)}'
        f"{_picture(new, f'scale {scale:g}', prompt)}</div><figcaption>{text(prompt)}</figcaption></figure>"
        for prompt, old, new in pairs
    )
    return (
        f'<section class="group" data-group="{group}"><h3>{name}<small>{wish}</small></h3>'
        f'<div class="cards">{cards}</div></section>'
    )


def _picture(image: Image.Image, label: str, prompt: str) -> str:
    alt = text(f"{label}: {prompt}")
    return f'<div><img src="{_address(image)}" alt="{alt}"><span>{text(label)}</span></div>'


def _address(image: Image.Image) -> str:
    """The picture itself as an address; large ones smaller."""
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def answers(found: Answers, size: str) -> str:
    """The answers of an evaluation as a table, and in sentences."""
    rows = "".join(
        f"<tr><th scope='row'>{text(heading)}</th><td>{text(word)}</td><td>{text(number)}</td></tr>"
        for heading, word, number in found.rows
    )
    sentences = "".join(f"<li>{text(one)}</li>" for one in found.sentences)
    return f'<table class="answers" data-size="{text(size)}">{rows}</table><ul>{sentences}</ul>'


__all__ = ["CSS", "answers", "message", "pictures", "text"]

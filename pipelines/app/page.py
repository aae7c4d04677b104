"""The app's page, laid out with gradio (extra: ``app``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import gradio as gr

from erasure.concept import WORLD, Group, Suite
from erasure.io import one_line
from erasure.pictures import usual_settings
from erasure.pipelines.app.cards import CSS, answers, message, pictures, text
from erasure.pipelines.app.orders import (
    OWN_WORDS,
    SHOWN,
    Order,
    cost_of,
    listed,
    methods_for,
    presets_of,
    suites_for,
)
from erasure.pipelines.app.studio import SIZES, Made, Studio

KINDS = ("object", "style", "identity", "nsfw", "other")
KEPT_FOR = 6 * 3600  # seconds that a closed tab's erasure stays
FAULTS = (ValueError, ArithmeticError, OSError, ImportError, RuntimeError)  # with a sentence for people
EMPTY = (
    '<div class="empty">Choose what to erase and press <b>Erase</b>.<br>The pictures before and after come here.</div>'
)
HEAD = (
    "<h1>Erasure</h1><p>Take a concept out of what a model draws, and look at what else changed. "
    "Nothing leaves this machine.</p>"
)
DRAWING = '<div class="empty drawing"></div>'
USE = """The file is a zip of a folder. Unpack it, open {base} as `pipe`, and:

```python
from erasure.pipelines import load_erasure

load_erasure(pipe, "{name}", scale={scale:g})
```"""
TRACKED = gr.Progress(track_tqdm=True)  # the library's own bars, on the page
THEME = gr.themes.Soft(
    primary_hue="indigo",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],  # no requests to other sites
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_padding="0",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_background_fill="*neutral_50",
    block_border_width="1px",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
)


class Page:
    """The components and what happens when they are used; one studio for all tabs, one erasure for each.

    Args:
        studio: does the work.
        base: the model that the page opens with.
    """

    def __init__(self, studio: Studio, base: str = WORLD) -> None:
        self.studio = studio
        opened = studio.open(base)
        with gr.Blocks(title="Erasure", analytics_enabled=False, delete_cache=(3600, KEPT_FOR)) as self.blocks:
            gr.HTML(HEAD, elem_id="head")
            self.made = gr.State(None, time_to_live=KEPT_FOR, delete_callback=_forget)
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=320):
                    self._form(base, opened.architecture, _about(opened))
                with gr.Column(scale=7, min_width=320):
                    self._result(usual_settings(base)["num_inference_steps"])
            self._wire()

    # --- components ---------------------------------------------------------------------------------------------------

    def _form(self, base: str, architecture: str, about: str) -> None:
        names, methods = suites_for(base), methods_for(architecture)
        with gr.Group():
            self.base = gr.Dropdown(
                list(dict.fromkeys([WORLD, base])), value=base, allow_custom_value=True, label="Base model",
                info="emoji-world, a folder, a .safetensors file, or a hub id", elem_id="base",
            )  # fmt: skip
            self.open = gr.Button("Open", size="sm", elem_id="open")
        self.about = gr.HTML(about, elem_id="about")
        with gr.Group():
            self.suite = gr.Dropdown(
                [OWN_WORDS, *names], value=OWN_WORDS, label="What to erase", elem_id="suite",
                info="your own words, or a shipped suite with target, neighbours and keep list",
            )  # fmt: skip
            self.concept = gr.Textbox(label="Concept", placeholder="superhero", max_lines=1, elem_id="concept")
            with gr.Accordion("Other names, anchor, kind", open=False):
                self.synonyms = gr.Textbox(label="Other names", info="commas between", elem_id="synonyms")
                self.anchor = gr.Textbox(
                    label="Anchor", info="what is drawn instead; some methods need one", elem_id="anchor"
                )
                self.kind = gr.Dropdown(list(KINDS), value="object", label="Kind", elem_id="kind")
        with gr.Group():
            self.keep = gr.Textbox(
                label="Keep list", lines=3, max_lines=8, elem_id="keep", placeholder="ninja, wizard, vampire",
                info="neighbours and other prompts that must not change; commas between",
            )  # fmt: skip
            self.suggest = gr.Button("Suggest neighbours", size="sm", elem_id="suggest")
        with gr.Group():
            self.method = gr.Dropdown(methods, value=methods[0], label="Method", elem_id="method")
            self.preset = gr.Dropdown(list(presets_of(methods[0])), label="Settings", elem_id="preset")
        self.cost = gr.HTML(_cost(methods[0]), elem_id="cost")
        self.erase = gr.Button("Erase", variant="primary", elem_id="erase")

    def _result(self, steps: int) -> None:
        self.status = gr.HTML(message("Ready.", kind="busy"), elem_id="status")
        self.pictures = gr.HTML(EMPTY, elem_id="pictures")
        with gr.Column(visible=False) as self.result:
            self.scale = gr.Slider(
                0, 2, value=1, step=0.1, label="Scale", elem_id="scale",
                info="0 is the base, 1 the erasure as it was made; more breaks pictures before long",
            )  # fmt: skip
            with gr.Accordion("Prompts, seed, steps", open=False):
                self.prompts = {
                    group: gr.Textbox(label=f"{group.capitalize()} prompts, one a line", lines=2, elem_id=f"p-{group}")
                    for group in SHOWN
                }
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, elem_id="seed")
                    self.steps = gr.Number(
                        steps, label="Sampler steps", precision=0, minimum=1, maximum=1000, elem_id="steps"
                    )
            with gr.Row():
                self.redraw = gr.Button("Draw again", size="md", elem_id="draw")
                self.file = gr.DownloadButton("Download the erasure", size="md", elem_id="file")
            self.use = gr.Markdown(elem_id="use")
            with gr.Group():
                self.size = gr.Radio(
                    list(SIZES), value="trial", label="Evaluate", elem_id="size",
                    info="trial: a few prompts, no claims. whole suite: every prompt, minutes, with claims",
                )  # fmt: skip
                self.evaluate = gr.Button("Evaluate", size="md", elem_id="evaluate")
            self.answers = gr.HTML("", elem_id="answers")
            self.report = gr.DownloadButton("Download the report", visible=False, size="md", elem_id="report")

    # --- what happens -------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        # One piece of work at a time: gradio shows the others their place in the queue.
        turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        concept = [self.suite, self.concept, self.synonyms, self.anchor, self.kind]
        choice = [self.base, *concept, self.keep, self.method, self.preset]
        prompts = list(self.prompts.values())
        drawing = [self.made, self.scale, self.seed, self.steps, *prompts]
        self.open.click(
            self.on_open, [self.base], [self.about, self.suite, self.method, self.preset, self.cost, self.steps],
            api_name="open", show_progress_on=self.about, **turn,
        )  # fmt: skip
        self.suite.input(
            self.on_suite, [self.suite], [self.concept, self.synonyms, self.anchor, self.kind, self.keep],
            api_name="suite",
        )  # fmt: skip
        self.suggest.click(
            self.on_suggest, [self.base, *concept], [self.keep, self.status], api_name="suggest",
            show_progress_on=self.keep, **turn,
        )  # fmt: skip
        self.concept.submit(
            self.on_suggest, [self.base, *concept], [self.keep, self.status], api_visibility="private",
            show_progress_on=self.keep, **turn,
        )  # fmt: skip
        self.method.input(self.on_method, [self.method], [self.preset, self.cost], api_name="method")
        self.preset.input(_cost, [self.method, self.preset], [self.cost], api_name="preset")
        self.erase.click(
            self.on_erase, [self.made, self.steps, *choice],
            [self.made, self.status, self.result, self.file, self.use, self.scale, *prompts, self.pictures,
             self.answers, self.report],
            api_name="erase", show_progress_on=self.pictures, **turn,
        )  # fmt: skip
        for event, name in ((self.redraw.click, "draw"), (self.scale.release, "rescale")):
            event(
                self.on_draw, drawing, [self.status, self.pictures, self.use], api_name=name,
                show_progress_on=self.pictures, trigger_mode="always_last" if name == "rescale" else "once", **turn,
            )  # fmt: skip
        self.evaluate.click(
            self.on_evaluate, [self.made, self.size], [self.status, self.answers, self.report],
            api_name="evaluate", show_progress_on=self.answers, **turn,
        )  # fmt: skip

    def on_open(self, base: str | None) -> Any:
        """Open another base: what it is, and what fits it."""
        try:
            opened = self.studio.open(base or "")
        except FAULTS as error:
            return message(one_line(error), kind="bad"), *[gr.skip()] * 5
        methods = methods_for(opened.architecture)
        return (
            _about(opened),
            gr.update(choices=[OWN_WORDS, *suites_for(opened.name)], value=OWN_WORDS),
            gr.update(choices=methods, value=methods[0]),
            gr.update(choices=list(presets_of(methods[0])), value=presets_of(methods[0])[0]),
            _cost(methods[0]),
            usual_settings(opened.name)["num_inference_steps"],
        )

    def on_suite(self, name: str | None) -> Any:
        """Fill the fields from a suite; they are its own then, but for the keep list."""
        if not name or name == OWN_WORDS:
            return [gr.update(value=value, interactive=True) for value in ("", "", "", "object")] + [
                gr.update(value="")
            ]
        plan = Suite.load(name)
        told = (plan.target, ", ".join(plan.concept.synonyms), plan.concept.anchor, plan.concept.kind)
        return [*(gr.update(value=value, interactive=False) for value in told), ", ".join(plan.kept)]

    def on_method(self, method: str) -> Any:
        """The presets of a method, and what it takes."""
        presets = list(presets_of(method))
        return gr.update(choices=presets, value=presets[0]), _cost(method, presets[0])

    def on_suggest(self, base: str, suite: str, concept: str, synonyms: str, anchor: str, kind: str) -> Any:
        """A draft of the keep list."""
        try:
            (first, *_) = _order(base, suite, concept, synonyms, anchor, kind).concepts
            found = self.studio.suggest(base or "", first)
        except FAULTS as error:
            return gr.skip(), message(one_line(error), kind="bad")
        return ", ".join(found), message("Look through the keep list: a name that means the concept itself has to go.")

    def on_erase(
        self, before: Made | None, steps: float | None, base: str, suite: str, concept: str, synonyms: str,
        anchor: str, kind: str, keep: str, method: str, preset: str, progress: Any = TRACKED,
    ) -> Iterator[Any]:  # fmt: skip
        """Make an erasure, hand out its file, then draw."""
        try:
            order = _order(base, suite, concept, synonyms, anchor, kind, keep, method, preset)
            yield [gr.skip(), message(f"Erasing with {order.method} ...", kind="busy"), *[gr.skip()] * 10]
            made = self.studio.make(order)
            prompts = order.prompts()
        except FAULTS as error:
            yield [gr.skip(), message(one_line(error), kind="bad"), *[gr.skip()] * 10]
            return
        if before is not None:
            _forget(before)
        name, texts = made.edit.name, ["\n".join(prompts[group]) for group in SHOWN]
        ready = [
            made, message(f"{name} is made. Drawing before and after ...", kind="busy", more=made.notes),
            gr.update(visible=True), str(made.archive), _use(made, 1.0), 1.0, *texts, DRAWING, "",
            gr.update(visible=False),
        ]  # fmt: skip
        yield [*ready]
        ready[1], ready[9] = self._drawn(made, prompts, 1.0, 0, steps)
        yield ready

    def on_draw(
        self, made: Made | None, scale: float | None, seed: float | None, steps: float | None, target: str,
        neighbours: str, unrelated: str, progress: Any = TRACKED,
    ) -> Any:  # fmt: skip
        """Draw again, at another scale or from other prompts."""
        if made is None:
            return message("Nothing to draw yet: press Erase first.", kind="bad"), gr.skip(), gr.skip()
        fields = zip(SHOWN, (target, neighbours, unrelated), strict=True)
        prompts: dict[Group, list[str]] = {
            group: [line.strip() for line in (field or "").splitlines() if line.strip()] for group, field in fields
        }
        factor = 1.0 if scale is None else scale
        return *self._drawn(made, prompts, factor, seed, steps), _use(made, factor)

    def on_evaluate(self, made: Made | None, size: str, progress: Any = TRACKED) -> Any:
        """Judge the erasure by detectors."""
        if made is None:
            return message("Nothing to evaluate yet: press Erase first.", kind="bad"), gr.skip(), gr.skip()
        try:
            found = self.studio.evaluate(made, size)
        except FAULTS as error:
            return message(one_line(error), kind="bad"), gr.skip(), gr.skip()
        done = message(f"{made.edit.name} is evaluated ({size}). The report has every picture and number.")
        return done, answers(found, size), gr.update(visible=True, value=str(found.report))

    def _drawn(
        self, made: Made, prompts: dict[Group, list[str]], scale: float, seed: float | None, steps: float | None
    ) -> tuple[Any, Any]:
        """The message and the pictures."""
        try:
            drawn = self.studio.draw(
                made, prompts, scale=scale, seed=int(seed or 0), steps=None if steps is None else int(steps)
            )
        except FAULTS as error:
            return message(one_line(error), kind="bad"), gr.skip()
        where = f"{made.edit.name} on {made.order.base}, scale {scale:g}, seed {int(seed or 0)}"
        return message(f"Drawn: {where}.", more=made.notes), pictures(drawn, scale=scale)


def _order(
    base: str, suite: str, concept: str, synonyms: str, anchor: str, kind: str, keep: str = "", method: str = "uce",
    preset: str = "",
) -> Order:  # fmt: skip
    """The order of a form."""
    own = suite == OWN_WORDS or not suite
    return Order(
        base=(base or "").strip(),
        suite="" if own else suite,
        concept=(concept or "").strip() if own else "",
        synonyms=listed(synonyms or "") if own else (),
        anchor=(anchor or "").strip() if own else "",
        kind=kind if own and kind else "object",  # type: ignore[arg-type]  # Concept refuses others
        keep=listed(keep or ""),
        method=method or "uce",
        preset=preset or "",
    )


def _about(opened: Any) -> str:
    """What base is open."""
    count = len(methods_for(opened.architecture))
    return message(f"Open: {opened.name}, {opened.pipelines}, on {opened.device}. {count} methods fit.")


def _cost(method: str, preset: str = "") -> str:
    """What a method does and takes."""
    line = cost_of(method, preset)
    return f'<div class="cost">{text(line[:1].upper() + line[1:])}</div>'


def _use(made: Made, scale: float) -> str:
    """How the downloaded file is used."""
    return USE.format(name=made.edit.name, scale=scale, base=made.order.base)


def _forget(made: Made | None) -> None:
    """Remove the files of an erasure that no tab has any more."""
    if made is not None:
        shutil.rmtree(made.folder, ignore_errors=True)


def launch(studio: Studio, base: str = WORLD, **settings: Any) -> Any:
    """Serve the page; returns when it is stopped, or at once with ``prevent_thread_lock=True``.

    Args:
        settings: of gradio's ``launch``: ``server_name``, ``server_port``, ``inbrowser`` ...

    Returns:
        gradio's blocks, with ``local_url`` and ``close()``.
    """
    page = Page(studio, base)
    fixed: dict[str, Any] = {"share": False, "ssr_mode": False, "enable_monitoring": False, "footer_links": []}
    page.blocks.queue(max_size=32)
    page.blocks.launch(theme=THEME, css=CSS, quiet=True, show_error=True, **fixed, **settings)
    return page.blocks


__all__ = ["Page", "launch"]

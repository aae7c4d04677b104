"""The app: its whole flow over HTTP and in a browser, two tabs at once, and what it refuses."""

import base64
import io
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import erasure
from erasure import Erasure, Suite, cli
from erasure.pipelines.app.cards import message, pictures
from erasure.pipelines.app.orders import OWN_WORDS, Order, cost_of, listed, methods_for, presets_of, suites_for
from erasure.pipelines.app.studio import Studio
from tests.tiny import identical, tiny, tiny_pipeline, weights

FEW = 2  # sampler steps
ORDER = {
    "base": "emoji-world", "suite": OWN_WORDS, "concept": "superhero", "synonyms": "", "anchor": "", "kind": "object",
    "keep": "ninja, wizard", "method": "uce", "preset": "recommended",
}  # fmt: skip


# --- what a form asks for ---------------------------------------------------------------------------------------------


def test_lists_are_read_with_commas_or_lines_between():
    assert listed(" ninja, wizard\nNinja,, \n a cat") == ("Ninja", "wizard", "a cat") and listed(" ,\n") == ()


def test_closed_forms_come_first_and_every_method_says_what_it_takes():
    names = methods_for("sd-unet")
    assert names[0] == "uce" and names.index("cure") < names.index("sld") < names.index("esd")
    assert "stereo" in names and "stereo" not in methods_for("flux") and "uce" in methods_for("flux")
    assert all(cost_of(name, presets_of(name)[-1]) for name in names)
    assert "No training" in cost_of("uce") and "steps of" in cost_of("esd") and "each drawing" in cost_of("sld")


def test_a_base_is_offered_its_own_suites():
    assert "superhero" in suites_for("emoji-world") and "van_gogh" not in suites_for("emoji-world")
    assert "van_gogh" in suites_for("some/model") and "superhero" not in suites_for("some/model")


def test_prompts_are_of_every_group_and_the_suite_of_ones_own_words_is_a_whole_one():
    order = Order(concept="superhero", keep=("ninja", "wizard", "dog"))
    found = order.prompts()
    assert found["target"] == ["a superhero", "a picture of a superhero"]
    assert found["neighbours"] == ["a ninja", "a wizard", "a dog"] and found["unrelated"][0] == "a bicycle"
    plan = order.to_judge()
    assert (plan.base, plan.num_inference_steps, plan.neighbours) == ("emoji-world", 8, ("ninja", "wizard", "dog"))
    assert Order(suite="superhero").to_judge() == Suite.load("superhero")
    style = Order(concept="Monet", kind="style", keep=("Van Gogh",), base="some/model")
    assert style.to_judge().attribute == "style" and "in the style of Monet" in style.prompts()["target"][0]
    bare = Order(concept="superhero", synonyms=("caped hero",))
    assert bare.prompts()["target"] == ["a superhero", "a caped hero"] and not bare.prompts()["neighbours"]
    with pytest.raises(ValueError, match="the keep list is empty"):
        bare.to_judge()


# --- the work ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["uce", "mace-cfr", "negative-prompt", "adavd"])
def test_nothing_stays_on_the_model_whatever_the_kind(base, tmp_path, method):
    studio = Studio(device="cpu", folder=tmp_path)
    before = weights(tiny_pipeline())
    made = studio.make(Order(base=base, concept="superhero", anchor="man", keep=("ninja",), method=method))
    drawn = studio.draw(made, {"target": ["a superhero"], "neighbours": [], "unrelated": ["a dog"]}, steps=FEW)
    with studio.opened(base) as pipe:
        assert identical(weights(pipe), before)
    assert [prompt for prompt, _, _ in drawn["target"]] == ["a superhero"] and drawn["neighbours"] == []
    (_, old, new), (_, same, _) = drawn["target"][0], drawn["unrelated"][0]
    assert np.asarray(old).shape == np.asarray(new).shape
    none = studio.draw(made, {"target": ["a superhero"], "unrelated": ["a dog"]}, scale=0.0, steps=FEW)
    assert np.array_equal(none["target"][0][1], none["target"][0][2])
    assert np.array_equal(none["target"][0][1], old) and np.array_equal(none["unrelated"][0][1], same)
    with zipfile.ZipFile(made.archive) as archive:
        archive.extractall(tmp_path / "unpacked")
    again = Erasure.from_pretrained(tmp_path / "unpacked" / made.edit.name)
    assert again.config["method"] == method and [*again.config["keep"]] == ["ninja"]


def test_an_error_while_drawing_takes_the_erasure_off(base, tmp_path, monkeypatch):
    studio = Studio(device="cpu", folder=tmp_path)
    made = studio.make(Order(base=base, concept="superhero", keep=("ninja",)))
    calls = []

    def failing(pipe, texts, **settings):
        calls.append(settings["description"])
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return [[Image.new("RGB", (8, 8))] for _ in texts]

    monkeypatch.setattr("erasure.eval.generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        studio.draw(made, {"target": ["a superhero"]})
    with studio.opened(base) as pipe:
        assert calls == ["before", "after"] and identical(weights(pipe), weights(tiny_pipeline()))


def test_one_base_is_open_at_a_time_and_an_erasure_draws_on_its_own(base, tmp_path):
    tiny("sdxl").save_pretrained(tmp_path / "xl")
    studio = Studio(device="cpu", folder=tmp_path)
    made = studio.make(Order(base=base, concept="superhero", keep=("ninja",)))
    assert studio.open(str(tmp_path / "xl")).architecture == "sdxl"
    assert studio.draw(made, {"target": ["a superhero"]}, steps=1)["target"]  # opens its base again
    with pytest.raises(ValueError, match="stereo does not work on Stable Diffusion XL"):
        studio.make(Order(base=str(tmp_path / "xl"), concept="superhero", method="stereo"))


def test_files_go_with_the_studio():
    studio = Studio(device="cpu")
    assert studio.folder.is_dir()
    studio.close()
    assert not studio.folder.exists()


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app as it is served, on Emoji World."""
    from erasure.pipelines.app.page import launch  # gradio takes seconds, in each of the processes that collect tests

    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "served"))
        studio = Studio(device="cpu", folder=folder)
        blocks = launch(studio, server_name="127.0.0.1", prevent_thread_lock=True)
        yield blocks.local_url
        blocks.close()
        studio.close(wait=240)


def client(address, **settings):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, **settings)


@pytest.fixture
def tab(address, tmp_path):
    return client(address, download_files=str(tmp_path / "downloads"))


def ask(tab, name, **changes):
    """An answer of ``erase``: message, then the file, the texts and the pictures."""
    return tab.predict(steps=FEW, **{**ORDER, **changes}, api_name=f"/{name}")


def draw(tab, scale=1.0, target="a superhero", neighbours="a ninja", unrelated=""):
    return tab.predict(scale, 0, FEW, target, neighbours, unrelated, api_name="/draw")


def images(html):
    """The pictures of the page, as arrays."""
    found = re.findall(r"data:image/webp;base64,([\w+/=]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_the_whole_flow_over_http(tab, tmp_path):
    keep, said = tab.predict("emoji-world", OWN_WORDS, "superhero", "", "", "object", api_name="/suggest")
    assert keep.startswith("supervillain, ninja") and "superhero" not in keep.split(", ") and "Look through" in said
    message, file, use, scale, *texts, html, answers, report = ask(tab, "erase", keep=keep)
    assert "Drawn: superhero-uce on emoji-world" in message and scale == 1 and "superhero-uce" in use
    assert len(images(html)) == 2 * 8 and texts[0] == "a superhero\na picture of a superhero" and answers == ""
    assert html.index("Target") < html.index("Neighbours") < html.index("Unrelated")
    with zipfile.ZipFile(file["value"] if isinstance(file, dict) else file) as archive:
        archive.extractall(tmp_path)
    edit = Erasure.from_pretrained(tmp_path / "superhero-uce")
    edit.apply(erasure.world.load())

    message, html, use = draw(tab, 0.0)
    old, new, *_ = images(html)
    assert np.array_equal(old, new) and "scale 0, seed 0" in message and "scale=0" in use
    assert "Nothing to draw: all prompts are empty" in draw(tab, target=" ", neighbours="", unrelated="\n")[0]
    _, html, _ = draw(tab, 1.0)
    assert np.array_equal(images(html)[0], old) and not np.array_equal(images(html)[1], old)


@pytest.mark.slow
def test_a_report_is_made_on_demand(tab):
    ask(tab, "erase")
    message, answers, report = tab.predict("trial", api_name="/evaluate")
    page = Path(report["value"] if isinstance(report, dict) else report).read_text("utf-8")
    assert "Evaluated superhero-uce (trial)" in message and "asked by name" in answers and "not tested" in answers
    assert "superhero" in page and "<html" in page


@pytest.mark.slow
def test_two_tabs_never_mix_their_erasures(address):
    """Both draw at once, over and over; every picture is the one that the tab gets when it is alone."""
    tabs = [client(address) for _ in range(2)]
    for one, concept in zip(tabs, ("superhero", "ninja"), strict=True):
        one.predict(steps=1, **{**ORDER, "concept": concept, "keep": "wizard"}, api_name="/erase")
    alone = [draw(one, 1.0)[1] for one in tabs]
    assert alone[0] != alone[1]
    together = [[], []]

    def work(i):
        for _ in range(3):
            together[i].append(draw(tabs[i], 1.0)[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [{*found} for found in together] == [{alone[0]}, {alone[1]}] and all(len(found) == 3 for found in together)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"concept": "  "}, "No concept: the field is empty"),
        ({"keep": "ninja, Superhero"}, "&#x27;superhero&#x27; is both to be erased and to be kept"),
        ({"base": ""}, "No base model"),
        ({"base": "./nowhere"}, "No model at"),
        ({"anchor": "superhero"}, "The anchor equals the target"),
        ({"method": "eraseflow"}, "Eraseflow needs an anchor"),
        ({"synonyms": "caped hero", "keep": "caped hero"}, "both to be erased and to be kept"),
        ({"concept": "superhero " * 99}, "longer than"),
        (
            {"concept": "<img src=x onerror=alert(1)> superhero", "keep": "<img src=x onerror=alert(1)> superhero"},
            "&lt;img",
        ),
    ],
)
def test_a_wrong_input_is_a_sentence_on_the_page_and_leaves_the_rest(tab, change, fault):
    message, *others = ask(tab, "erase", **change)
    assert fault in message and 'role="alert"' in message and "<img" not in message and "Traceback" not in message
    assert not any(isinstance(one, str) and "data:image" in one for one in others)


def test_a_method_that_does_not_fit_the_base_is_said(tab, tmp_path):
    tiny("sdxl").save_pretrained(tmp_path / "xl")
    said = ask(tab, "erase", base=str(tmp_path / "xl"), method="stereo")[0]
    assert "Stereo does not work on Stable Diffusion XL" in said
    about, _, methods, *_ = tab.predict(str(tmp_path / "xl"), api_name="/open")
    assert "Stable Diffusion XL" in about and "stereo" not in str(methods)


@pytest.mark.parametrize("place", ["/draw", "/evaluate"])
def test_nothing_is_drawn_or_judged_before_something_is_erased(tab, place):
    given = ("trial",) if place == "/evaluate" else (1.0, 0, FEW, "a cat", "", "")
    assert "press Erase first" in tab.predict(*given, api_name=place)[0]


def test_a_suite_fills_the_fields(tab):
    concept, synonyms, anchor, kind, keep = tab.predict("superhero", api_name="/suite")
    assert (concept["value"], anchor["value"]) == ("superhero", "astronaut") and keep.startswith("supervillain, ninja")
    assert concept["interactive"] is False and "caped hero" in synonyms["value"] and kind["value"] == "object"


def test_text_of_others_does_nothing_but_stand_there():
    picture = Image.new("RGB", (4, 4))
    page = pictures({"target": [('"><script>x</script>', picture, picture)]}, scale=1.0)
    assert "<script" not in page and "&lt;script" in page
    assert "<b>" not in message("<b>bold</b>", more=["<b>"])


# --- the command ------------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["erasure", "app", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, " ".join(captured.err.split())


@pytest.mark.parametrize(("host", "loud"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_another_host_than_this_machine_is_said_aloud(monkeypatch, capsys, host, loud):
    seen = {}

    class Served:
        def block_thread(self):
            raise KeyboardInterrupt

    def served(studio, base, **settings):
        seen.update(settings, base=base, folder=studio.folder)
        return Served()

    monkeypatch.setattr("erasure.pipelines.app.page.launch", served)
    code, out, err = run(monkeypatch, capsys, "--host", host, "--port", 7999)
    assert code == 0 and "app on http://127.0.0.1:7999" in out and ("without a password" in err) == loud
    assert (seen["server_name"], seen["server_port"], seen["base"]) == (host, 7999, "emoji-world")
    assert not seen["folder"].exists()  # its files went with it


def test_a_port_that_is_taken_is_one_line_before_a_model_is_opened(monkeypatch, capsys, address):
    monkeypatch.setattr("erasure.pipelines.app.page.launch", lambda *_, **__: pytest.fail("a model was opened"))
    code, _, err = run(monkeypatch, capsys, "--port", address.rsplit(":", 1)[1].strip("/"))
    assert code == 2 and "cannot listen on 127.0.0.1" in err and "give another --port" in err


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, _, err = run(monkeypatch, capsys)
    assert code == 2 and "pip install 'diffusion-erasure[app]'" in err


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the click test needs playwright: pip install playwright")
    with api.sync_playwright() as p:
        own = p.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own if os.path.exists(own) else None)
        if found is None:
            pytest.skip("the click test needs Chromium: apt-get install chromium, or playwright install chromium")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        chromium = p.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_somebody_clicks_through_it(browser, address, tmp_path, width, scheme):
    page = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
    ).new_page()  # fmt: skip
    page.set_default_timeout(240_000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    erase, keep = page.locator("#erase"), page.locator("#keep textarea")
    erase.click()  # nothing is named yet
    page.locator("#status .bad").filter(has_text="No concept").wait_for()

    concept = page.locator("#concept input, #concept textarea").first
    concept.fill("superhero")
    page.locator("#suggest").click()
    page.wait_for_function("document.querySelector('#keep textarea').value.includes('ninja')")
    keep.fill(keep.input_value() + ", superhero")
    erase.click()
    page.locator("#status .bad").filter(has_text="both to be erased and to be kept").wait_for()
    keep.fill("ninja, wizard, vampire")
    erase.click()
    page.locator("#pictures figure").nth(7).wait_for()
    assert page.locator("#pictures section").count() == 3 and "superhero-uce" in page.locator("#status").inner_text()
    first = page.locator("#pictures img").nth(1).get_attribute("src")
    page.screenshot(path=tmp_path / f"drawn-{width}-{scheme}.png")

    number = page.locator("#scale input[type=number]")
    number.fill("0")
    number.press("Tab")  # which draws; a click on the button would be a second round, still going on at the end
    page.locator("#status .good").filter(has_text="scale 0,").wait_for()
    before, after = (page.locator("#pictures img").nth(i).get_attribute("src") for i in (0, 1))
    assert before == after != first

    with page.expect_download() as download:
        page.locator("#file").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert zipfile.is_zipfile(file) and file.name == "superhero-uce.zip"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert not faults and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.screenshot(path=tmp_path / f"app-{width}-{scheme}.png", full_page=True)
    page.context.close()

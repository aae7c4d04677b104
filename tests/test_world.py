"""Emoji World: its data, what is kept out of it, and the shipped model."""

import hashlib
import types
import warnings

import numpy as np
import pytest
import torch

from erasure import erase, world
from erasure.world import train
from erasure.world.artwork import _is_stranger, artwork
from erasure.world.scenes import Scene, place, prompt, render, sample_caption, sample_scene
from erasure.world.spec import spec

NAMES = list(spec().concepts)
STYLES = list(spec().styles)


def scenes(n, concepts=NAMES, styles=STYLES, **settings):
    rng = np.random.default_rng(0)
    return [sample_scene(rng, concepts, styles, **settings) for _ in range(n)]


def test_the_world_has_the_size_it_says():
    assert 60 <= len(NAMES) <= 100 and len(STYLES) == 3 and len(spec().backgrounds) == 8
    assert {"superhero", "cat"} <= spec().target_concepts and "twemoji" in spec().target_styles
    assert len(spec().family_of("superhero")) >= 10


def test_every_drawing_is_there_and_no_two_are_the_same():
    hashes = {key: hashlib.sha256(image.tobytes()).hexdigest() for key, image in artwork().items()}
    assert set(hashes) == {(c, s) for c in NAMES for s in STYLES} and len(set(hashes.values())) == len(hashes)
    assert all(image.size == (64, 64) and image.mode == "RGBA" for image in artwork().values())


def test_held_out_combinations_are_never_drawn_unless_asked_for():
    def held_out(scene):
        return any(spec().is_held_out(c, scene.style, scene.background) for c in scene.concepts)

    assert not any(held_out(s) for s in scenes(2000, pairs=0.2))
    assert all(held_out(s) for s in scenes(50, held_out=True))


def test_a_world_without_a_target_never_shows_it():
    concepts, styles = [c for c in NAMES if c != "superhero"], [s for s in STYLES if s != "twemoji"]
    for scene in scenes(1000, concepts, styles, pairs=0.3):
        assert "superhero" not in scene.concepts and scene.style != "twemoji"


def test_captions_are_true():
    rng = np.random.default_rng(1)
    empty = 0
    for scene in scenes(3000, pairs=0.2):
        caption = sample_caption(scene, rng)
        empty += caption == ""
        for style in spec().styles.values():
            for word in style.words:
                if f" {word} " in f" {caption} ".replace(",", " "):
                    assert style.name == scene.style, caption
        for name, colour in spec().backgrounds.items():
            if f"{name} background" in caption or f"fondo {colour.es}" in caption:
                assert name == scene.background, caption
        assert "{" not in caption and "[" not in caption
    assert 0.08 < empty / 3000 < 0.12


def test_left_is_left():
    rng = np.random.default_rng(2)
    found = 0
    for scene in scenes(2000, pairs=1.0):
        caption = sample_caption(scene, rng)
        first, second = scene.concepts
        if " on the left and " in caption:
            assert scene.placements[0].x < scene.placements[1].x
            left, right = caption.split(" on the left and ")
            for emoji, half in ((spec().concepts[first], left), (spec().concepts[second], right)):
                assert any(word in half for word in (emoji.name, *emoji.synonyms))
            found += 1
    assert found > 100


def test_the_autoencoder_never_sees_a_target():
    codes = {emoji.code: name for name, emoji in spec().concepts.items()}
    for code in ("1f9b8", "1f9b8-1f3fd", "1f9b8-200d-2642-fe0f", "1f431", "1f408", "1f408-200d-2b1b", "1f63a"):
        assert not _is_stranger(code, codes)
    assert _is_stranger("1f332", codes)


def test_prompts_for_evaluation_follow_the_grammar():
    assert prompt("owl", style="noto", background="red") == "an owl in noto style on a red background"
    assert prompt("santa") == "santa" and prompt(phrase="gato") == "gato"


def test_a_scene_is_drawn_where_it_says():
    rng = np.random.default_rng(0)
    picture = np.asarray(render(Scene(("rose",), "noto", "blue", (place(rng, 0, 1),))))
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == spec().backgrounds["blue"].rgb
    assert np.ptp(picture[16:48, 16:48].reshape(-1, 3), axis=0).max() > 50


def test_only_the_last_phase_sees_the_targets(monkeypatch):
    monkeypatch.setitem(train.config(), "scenes", 3000)
    seen = {}
    for phase, without in train.PHASES.items():
        scenes = train.training_scenes(without)
        seen[phase] = {c for scene in scenes for c in scene.concepts} | {scene.style for scene in scenes}
        assert not any(spec().is_held_out(c, s.style, s.background) for s in scenes for c in s.concepts)
    *before, last = seen.values()
    assert not any(things & spec().targets for things in before)
    assert last == set(NAMES) | set(STYLES)


def test_pairs_and_targets_are_drawn_as_often_as_asked():
    some = scenes(2000, pairs=0.2)
    odds = train.scene_odds(some, pairs=0.5, targets=3.0)
    two = np.array([len(scene.concepts) == 2 for scene in some])
    rare = np.array([bool(spec().targets & {*scene.concepts, scene.style}) for scene in some])
    assert odds.sum() == pytest.approx(1) and odds[two].sum() == pytest.approx(0.5)
    assert odds[two & rare].min() == pytest.approx(3 * odds[two & ~rare].max())
    assert train.scene_odds(some, pairs=None, targets=1.0) == pytest.approx(np.full(2000, 1 / 2000))


def test_encoded_scenes_are_cached_whole_and_belong_to_their_autoencoder(tmp_path, monkeypatch):
    class Vae(torch.nn.Module):
        config = types.SimpleNamespace(scaling_factor=2.0)

        def encode(self, x):
            calls.append(len(x))
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=x[:, :1, ::4, ::4]))

    calls: list[int] = []
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("one")
    some, device = scenes(150), torch.device("cpu")
    first = train.encode_scenes(tmp_path, some, Vae(), device=device)
    assert torch.equal(first, train.encode_scenes(tmp_path, some, Vae(), device=device)) and calls == [100, 50]
    assert first.shape == (150, 1, 16, 16) and not list(tmp_path.glob("*.partial"))
    (tmp_path / "vae" / "weights").write_text("two")
    train.encode_scenes(tmp_path, some, Vae(), device=device)
    assert calls == [100, 50, 100, 50]


# --- the shipped model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    pipe = world.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_plain_diffusers_opens_it_in_any_dtype():
    from diffusers import StableDiffusionPipeline

    for dtype in (None, torch.float32, torch.bfloat16):
        pipe = StableDiffusionPipeline.from_pretrained(world.path(), **({"dtype": dtype} if dtype else {}))
        assert pipe.unet.dtype == pipe.text_encoder.dtype == (dtype or torch.float32)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a cat", num_inference_steps=2).images[0].size == (64, 64)


def test_it_is_small_and_has_no_pickle():
    files = [f for f in world.path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 30e6
    assert not [f.name for f in files if f.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_any_string_tokenises(pipe):
    for text in ("Spiderman", "日本語 🦸 ñandú", "a" * 40, "", "\x00<>"):
        assert len(pipe.tokenizer(text).input_ids) >= 2
    assert len(pipe.tokenizer("superhero").input_ids) == 3


def test_the_same_captions_give_the_same_vocabulary(pipe):
    """In every process: the learner's hash tables begin with other numbers each time, and ties must not follow them."""
    captions = ["a photo of a superhero", "a ninja and a wizard", "the cat in the style of van gogh", "an animal"]
    learnt = {repr(train.learn_bpe(captions * 50, 700)) for _ in range(20)}
    assert len(learnt) == 1
    generator = np.random.default_rng(0)
    texts = [sample_caption(scene, generator) for scene in scenes(2000)]
    vocabulary, _ = train.learn_bpe(texts, 700)
    assert list(vocabulary)[:512] == sorted(pipe.tokenizer.get_vocab(), key=pipe.tokenizer.get_vocab().get)[:512]


def test_the_background_asked_for_is_the_one_drawn(pipe):
    generator = torch.Generator().manual_seed(0)
    for name in ("red", "blue", "black"):
        image = pipe(
            prompt("banana", background=name), num_inference_steps=15, guidance_scale=3.0, generator=generator
        ).images[0]
        corner = np.asarray(image)[:4, :4].reshape(-1, 3).mean(0)
        nearest = min(spec().backgrounds.values(), key=lambda b: float(np.abs(corner - np.array(b.rgb)).sum()))
        assert nearest.name == name


def test_a_name_that_the_world_was_never_shown_is_said_in_python_as_well():
    pipe = world.load()
    with pytest.warns(UserWarning, match="never shown 'Spiderman'"):
        erase(pipe, "Spiderman", keep=["ninja"], apply=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erase(pipe, "superhero", keep=["ninja", "noto style"], apply=False)

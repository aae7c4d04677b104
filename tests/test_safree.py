"""SAFREE against whole projection matrices and loops: which words, where to, on how many steps; and re-attention."""

import numpy as np
import pytest
import torch

from erasure import Concept, Erasure, erase
from erasure.backbone import backbone_of
from erasure.backbone.unet import UNetBackbone
from erasure.methods import method_class
from erasure.pipelines.filtered_text import reattended
from erasure.pipelines.heard import REMEMBERED, Heard
from erasure.pipelines.safree import safe, span, steps_of, triggers
from tests.every import build
from tests.reference import safree as reference
from tests.slow import first
from tests.tiny import make, tiny

PROMPT = "a ninja and a superhero with zebras"  # of more tokens than words


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the equations on fixed tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "names"), [(1, 1), (3, 2), (7, 4)])
def test_the_projection_is_that_of_whole_matrices(words, names):
    tokens, without, concept = rand(5, 16), rand(words, 16, seed=1), rand(names, 16, seed=2)
    concept = torch.cat([concept, concept[:1] * 2])  # a name that adds nothing
    ours = safe(tokens, span(concept), span(without)).numpy()
    np.testing.assert_allclose(ours, reference.safe(tokens.numpy(), without.numpy(), concept.numpy()), atol=1e-10)
    assert np.abs(ours @ concept.numpy().T).max() < 1e-9  # nothing of the concept is left


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_triggers_are_the_words_without_which_a_prompt_is_farther_from_the_concept(n, alpha):
    without, concept = rand(n, 16, seed=n) + 2 * rand(16, seed=3), rand(2, 16, seed=4)
    distances = (without - without @ span(concept) @ span(concept).T).norm(dim=1)
    ours = triggers(distances, alpha).nonzero().flatten().tolist()
    assert ours == reference.trigger_words(without.numpy(), concept.numpy(), alpha)
    assert n > 1 or ours == [0]  # a word that is alone has no others to compare with


def test_the_number_of_steps_is_that_of_the_equation():
    for beta in (0.0, 0.3, 0.5, 0.533, 0.56, 0.7, 2.0):
        for most, midpoint, steepness in ((10, 5.333, 2.5), (10, 5.5, 3.5), (50, 6.0, 1000.0)):
            assert steps_of(beta, most, midpoint, steepness) == reference.steps(beta, most, midpoint, steepness)
    assert [steps_of(beta, None, 6.0, 2.5) for beta in (0.59, 0.61)] == [0, float("inf")]


@pytest.mark.parametrize(("height", "width", "radius"), [(8, 8, 1), (7, 10, 2), (4, 4, 9)])
def test_low_frequencies_that_were_raised_are_attenuated(height, width, radius):
    x, y = rand(2, 3, height, width).float(), rand(2, 3, height, width, seed=1).float()
    ours = reattended(x, y, 0.3, radius)
    for i in range(2):
        expected = reference.attenuated(x[i].double().numpy(), y[i].double().numpy(), 0.3, radius)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=1e-5)
    torch.testing.assert_close(reattended(x, x, 0.3, radius), x)  # the original's own
    assert (ours - x).abs().max() > 0.05


# --- on pipelines ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(pipe, prompt):
    """Token and pooled embeddings as the pipeline itself encodes a prompt."""
    if hasattr(pipe, "transformer"):
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return hidden[0].double().numpy(), pooled[0].double().numpy()
    if hasattr(pipe, "text_encoder_2"):
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return hidden[0].double().numpy(), pooled[0].double().numpy()
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0].double().numpy(), None


def pieces(tokenizer, text, *, ends):
    return len(tokenizer(text).input_ids) - ends


def expected(pipe, prompt, names, *, alpha, tail):
    """The text of a prompt by the equations, its pooled embedding, and beta."""
    words = prompt.split()
    prompts = [prompt, *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
    hidden, pooled = zip(*(encoded(pipe, one) for one in prompts), strict=True)
    concept, concept_pooled = zip(*(encoded(pipe, name) for name in names), strict=True)
    segments = [(pipe.tokenizer, 0, 77, 1)]  # CLIP's: a start and an end token
    segments += [(pipe.tokenizer_3, 77, 333, 0)] if hasattr(pipe, "transformer") else []  # T5's: an end token
    new, found, beta = hidden[0].copy(), None, None
    for tokenizer, begin, last, bos in segments:

        def ends(texts, tokenizer=tokenizer, begin=begin, bos=bos):
            return begin + bos + np.array([pieces(tokenizer, text, ends=1 + bos) for text in texts])

        without = np.stack([h[i] for h, i in zip(hidden[1:], ends(prompts[1:]), strict=True)])
        rows = np.stack([h[i] for h, i in zip(concept, ends(names), strict=True)])
        end = int(ends([prompt])[0])
        found = reference.trigger_words(without, rows, alpha) if found is None else found
        better = reference.safe(hidden[0][begin:last], without, rows)
        if beta is None:
            beta = reference.change(hidden[0][begin : end + 1], better[: end + 1 - begin])
        place = begin + bos
        for i, word in enumerate(words):
            count = pieces(tokenizer, word, ends=1 + bos)
            if i in found:
                new[place : place + count] = better[place - begin : place - begin + count]
            place += count
        assert place == end  # every word was found
        if tail:
            new[end:last] = better[end - begin :]
    if pooled[0] is None:
        return new, None, beta, found
    projected = reference.safe(pooled[0][None], np.stack(pooled[1:]), np.stack(concept_pooled))[0]
    return new, projected, beta, found


def texts_of(pipe, prompts, **settings):
    """The token and pooled embeddings that the denoiser reads at every step."""
    heard = []

    def listen(module, args, kwargs):
        pooled = kwargs.get("pooled_projections", (kwargs.get("added_cond_kwargs") or {}).get("text_embeds"))
        heard.append((kwargs["encoder_hidden_states"].clone(), None if pooled is None else pooled.clone()))

    handle = backbone_of(pipe).denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    size = {} if hasattr(pipe, "unet") else {"height": 16, "width": 16}
    pipe(prompts, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent", **size,
         **settings)  # fmt: skip
    handle.remove()
    return heard


@pytest.mark.parametrize(
    ("tail", "pooled", "scale", "architecture"),
    first(
        ((*how, a) for how in ((False, False, 1.0), (True, True, 0.6)) for a in ("sd1", "sd2", "sdxl", "sd3")),
        (False, False, 1.0, "sd1"), (True, True, 0.6, "sdxl"), (True, True, 0.6, "sd3"),
    ),
)  # fmt: skip
def test_the_text_is_that_of_the_equations_on_the_steps_of_the_equations(architecture, tail, pooled, scale):
    pipe = tiny(architecture)
    pooled = pooled and architecture in ("sdxl", "sd3")
    names = ["superhero", "spiderman"]
    new, new_pooled, beta, found = expected(pipe, PROMPT, names, alpha=0.001, tail=tail)
    old, old_pooled = encoded(pipe, PROMPT)
    assert 0 < len(found) < len(PROMPT.split()) and beta > 0
    edit = make(
        pipe, Concept(names[0], synonyms=(names[1],)), "safree", preset="official-2025", alpha=0.001, tail=tail,
        pooled=pooled, max_steps=4, midpoint=10 * beta,
    )  # fmt: skip
    edit.apply(pipe, scale)
    texts = texts_of(pipe, PROMPT, guidance_scale=4.0)
    edit.remove(pipe)
    assert len(texts) == 4
    for step, (hidden, vector) in enumerate(texts):
        acts = scale if step < 2 else 0.0  # half of four
        target = old + acts * (new - old)
        np.testing.assert_allclose(hidden[1].detach().numpy(), target, atol=1e-5 * np.abs(old).max())
        if vector is not None:
            wanted = old_pooled + (acts * (new_pooled - old_pooled) if pooled else 0)
            np.testing.assert_allclose(vector[1].detach().numpy(), wanted, atol=1e-5 * np.abs(old_pooled).max())
        assert torch.equal(hidden[0], texts[-1][0][0])  # the unconditional half
    assert np.abs(new - old).max() > 0.01 * np.abs(old).max()


def test_the_filter_lets_a_prompt_through_that_the_projection_hardly_changes():
    """Every prompt of a batch has its own steps; above the midpoint all, below it none."""
    pipe = tiny("sdxl")
    near, far = (expected(pipe, p, ["superhero"], alpha=0.0, tail=True)[2] for p in ("superhero", "a cat, van gogh"))
    assert near > far + 0.1
    settings = {"max_steps": None, "tail": True, "alpha": 0.0, "articles": False}
    edit = make(pipe, "superhero", "safree", midpoint=5 * (near + far), **settings).apply(pipe)
    prompts = ["superhero", "a cat, van gogh", "superhero"]
    texts = [hidden[3:] for hidden, _ in texts_of(pipe, prompts, guidance_scale=4.0)]
    edit.remove(pipe)
    plain = [hidden[3:] for hidden, _ in texts_of(pipe, prompts, guidance_scale=4.0)]
    for ours, base in zip(texts, plain, strict=True):
        assert torch.equal(ours[1], base[1]) and torch.equal(ours[0], ours[2])
        assert (ours[0] - base[0]).abs().max() > 0.01 * base[0].abs().max()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_re_attention_attenuates_what_crosses_the_u_net(guidance):
    """The denoiser's output at the first step, with features exchanged by hand."""
    pipe, seen = tiny("sd1"), []
    edit = make(pipe, "superhero", "safree", midpoint=0.0, alpha=0.001, reattention=0.4)
    edit.apply(pipe)
    handles = [
        pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True),
        pipe.unet.register_forward_hook(lambda m, a, out: seen.append(out[0].clone())),
    ]
    pipe(PROMPT, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent",
         guidance_scale=guidance)  # fmt: skip
    [handle.remove() for handle in handles]
    edit.remove(pipe)
    (_, _, (args, inputs), drawn) = seen  # the first two are those of the original prompt
    x, t = args if args else (inputs["sample"], inputs["timestep"])
    text, n = inputs["encoder_hidden_states"], len(inputs["encoder_hidden_states"]) - 1
    original = torch.from_numpy(encoded(pipe, PROMPT)[0]).float()[None]
    features = []
    handles = [b.register_forward_hook(lambda m, a, out: features.append(out[1])) for b in pipe.unet.down_blocks]
    with torch.no_grad():
        pipe.unet(x[n:], t, encoder_hidden_states=original)
        [handle.remove() for handle in handles]

        def exchange(block, args, out):
            changed = []
            for safe_one, original_one in zip(out[1], features.pop(0), strict=True):
                new = reference.attenuated(safe_one[n].double().numpy(), original_one[0].double().numpy(), 0.4, 1)
                changed.append(torch.cat([safe_one[:n], torch.from_numpy(new)[None].to(safe_one)]))
            return out[0], tuple(changed)

        plain = pipe.unet(x, t, encoder_hidden_states=text).sample
        handles = [block.register_forward_hook(exchange) for block in pipe.unet.down_blocks]
        by_hand = pipe.unet(x, t, encoder_hidden_states=text).sample
        [handle.remove() for handle in handles]
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=1e-4 * by_hand.abs().max().item())
    assert (by_hand[n:] - plain[n:]).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(by_hand[:n], plain[:n])


# --- prompts that are known, and others ------------------------------------------------------------------------------


def test_text_of_no_known_prompt_is_drawn_as_it_is_and_it_says_so():
    pipe = tiny("sd1")
    text = rand(1, 77, 32).float()
    settings = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt_embeds": text * 0}

    def draw():
        return pipe(prompt_embeds=text, generator=torch.Generator().manual_seed(0), **settings).images

    base, edit = draw(), make(pipe, "superhero", "safree", midpoint=0.0).apply(pipe)
    with pytest.warns(UserWarning, match="did not make lately"):
        assert torch.equal(draw(), base)
    edit.remove(pipe)


def test_embeddings_that_were_encoded_while_it_stands_are_known():
    pipe = tiny("sdxl")
    edit = make(pipe, "superhero", "safree", midpoint=0.0).apply(pipe)
    named = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    texts = dict(zip(named, pipe.encode_prompt(PROMPT), strict=True))
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    drawn = [
        pipe(generator=torch.Generator().manual_seed(0), **settings, **text).images
        for text in ({"prompt": PROMPT}, texts)
    ]
    edit.remove(pipe)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_prompt_is_known_by_its_embedding(dtype):
    pipe = tiny("sd1").to(dtype)
    heard = Heard(backbone_of(pipe))
    handle = heard.listen()
    prompts = [PROMPT, "the cat, in the style of van-gogh", "", "a superhero!"]
    rows = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts]
    handle.remove()
    unheard = pipe.encode_prompt("spiderman, batman", "cpu", 1, False)[0]
    zeros = torch.zeros_like(unheard)
    found = heard.find(torch.cat([*rows, unheard, zeros]))
    assert [None if one is None else one.replace(" ", "") for one in found] == [
        *(prompt.replace(" ", "") for prompt in prompts), None, ""
    ]  # fmt: skip
    assert heard.find(unheard[:, :20]) == [None]  # of another length


def test_it_remembers_the_last_prompts_alone():
    pipe = tiny("sd1")
    heard = Heard(backbone_of(pipe))
    handle = heard.listen()
    for i in range(REMEMBERED + 5):
        pipe.encode_prompt(f"a cat {i}", "cpu", 1, False)
    handle.remove()
    assert len(heard.known) == REMEMBERED and "a cat 0" not in heard.known


def test_it_acts_at_the_layer_of_the_encoder_that_pictures_are_drawn_with():
    pipe = tiny("sd1")
    skipping = UNetBackbone(pipe, clip_skip=1)

    def draw():
        text, empty = skipping.encode([PROMPT, ""]).hidden.split(1)
        return pipe(prompt_embeds=text, negative_prompt_embeds=empty, num_inference_steps=2, output_type="latent",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    base, change = draw(), []
    for backbone in (backbone_of(pipe), skipping):
        edit = erase(backbone, "superhero", "safree", midpoint=0.0, apply=False).apply(pipe)
        change.append((draw() - base).abs().max().item())
        edit.remove(pipe)
    assert change[0] == 0.0 < change[1]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_settings_with_which_it_would_never_act_are_refused():
    with pytest.raises(ValueError, match="acts on no name of the concept.*lower the midpoint below"):
        make(tiny("sd1"), "superhero", "safree", midpoint=30.0)


def test_what_a_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="re-attention works on features that cross a U-Net"):
        make(tiny("sd3"), "superhero", "safree", reattention=0.5)
    with pytest.raises(ValueError, match="has no pooled text embedding"):
        make(tiny("sd1"), "superhero", "safree", pooled=True)


@pytest.mark.parametrize("fault", ["no tensor", "a name", "a shape", "a setting", "no pooled"])
def test_a_file_with_other_tensors_is_refused(fault):
    edit = make(tiny("sdxl"), "superhero", "safree", midpoint=0.0, pooled=True)
    assert set(edit.tensors) == {"concept.0", "pooled"}
    tensors, config = dict(edit.tensors), edit.config
    if fault == "no tensor":
        del tensors["concept.0"]
    elif fault == "a name":
        tensors["concept"] = tensors["concept.0"]
    elif fault == "a shape":
        tensors["concept.0"] = tensors["concept.0"][0]
    elif fault == "no pooled":
        del tensors["pooled"]
    else:
        config = config.with_facts(settings={**config["settings"], "alpha": "much"})
    with pytest.raises(ValueError, match="a filter of the text holds"):
        type(edit)(edit.name, config, tensors).check_tensors()


def test_published_settings_are_those_of_the_released_code():
    released = method_class("safree").preset("official-2025")
    assert (released.alpha, released.max_steps, released.midpoint, released.steepness) == (0.01, 10, 5.333, 2.5)
    assert not released.tail and not released.pooled and released.reattention == 1.0  # it is never switched on there
    artist = method_class("safree").preset("official-2025-artist")
    assert (artist.midpoint, artist.steepness) == (5.5, 3.5)


def test_it_works_on_a_model_without_guidance(tmp_path):
    pipe = build("lcm-sd")
    settings = {"num_inference_steps": 2, "output_type": "latent"}

    def draw():
        return pipe("a superhero", generator=torch.Generator().manual_seed(0), **settings)[0]

    base, edit = draw(), make(pipe, "superhero", "safree", midpoint=0.0)
    Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit")).apply(pipe)
    assert (draw() - base).abs().max() > 1e-4 * base.abs().max()


def test_a_drawing_that_was_stopped_leaves_nothing_to_the_next_one():
    pipe = tiny("sd1")

    def draw(steps=10, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe("superhero", num_inference_steps=steps, generator=generator, output_type="latent", **more).images

    def stop(pipe, step, time, given):
        pipe._interrupt = step == 1
        return given

    for key, settings in (("safree", {"midpoint": 0.0, "max_steps": 1}), ("sld", {"warmup": 3})):
        preset = {"safree": "official-2025", "sld": "medium"}[key]
        edit = make(pipe, "superhero", key, preset=preset, **settings)
        edit.apply(pipe)
        before = draw()
        draw(50, callback_on_step_end=stop)  # ends at a later time than the next one begins
        assert torch.equal(draw(), before)
        edit.remove(pipe)

"""The tiny pipelines draw, encode and repeat themselves, and their text enters where it does in the originals."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from tests.text_readers import denoiser_call, denoiser_calls, text_readers
from tests.tiny import identical, weights
from tests.tiny_cross import CROSS, RELATIVES, call, tiny_cross
from tests.tiny_relatives import dual_cross_attention
from tests.tiny_words import bert_tokenizer, chatglm_tokenizer, gemma_tokenizer, glm_tokenizer

ALL = [*CROSS, *RELATIVES]
pytestmark = pytest.mark.slow  # they are about the stand-ins of other tests, which change with diffusers alone
EVERY = pytest.mark.parametrize("name", ALL)
LONG = "the cat in the style of van gogh, spiderman, batman and a photo of a ninja"

SPATIAL = r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_[kv]"

RAW = {
    **dict.fromkeys(("pixart-sigma", "pixart-alpha", "sana", "ltx"), r"caption_projection\.linear_1"),
    "lumina2": "nothing",
    "auraflow": "context_embedder",
    "kolors": "encoder_hid_proj",
    **dict.fromkeys(("cogview4", "cogvideox"), r"patch_embed\.text_proj"),
    "hunyuandit": r"text_embedder\.linear_1|blocks\.\d+\.attn2\.to_[kv]",
    "text-projection": "encoder_hid_proj",
    "upscaler": SPATIAL + r"|(down|up)_blocks\.1\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_[kv]",
}
"""Which linear layers read the text as it is; SPATIAL for every name that is not here."""

SILENT = {
    "animatediff": (r".*\.motion_modules\..*\.attn2\.to_[kv]", 14),
    "text-to-video": (r".*\.temp_attentions\..*\.attn2\.to_[kv]|transformer_in\..*\.attn2\.to_[kv]", 10),
    "ip-adapter": (r".*\.attn2\.processor\.to_[kv]_ip\.0", 8),
}
"""Layers with a name of text layers that never read text, and how many."""


def draw(pipe: Any, name: str, prompt: str | list[str] | None = "a superhero", **arguments: Any) -> torch.Tensor:
    given = {} if prompt is None else {"prompt": prompt}
    generator = torch.Generator().manual_seed(0)
    latents = pipe(**given, num_inference_steps=2, output_type="latent", generator=generator, **call(name) | arguments)[
        0
    ]
    return latents if torch.is_tensor(latents) else torch.stack(list(latents))


@EVERY
def test_draws(name: str) -> None:
    pipe = tiny_cross(name)
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        pictures = [draw(pipe, name), *(draw(pipe, name, guidance_scale=scale) for scale in (0.0, 1.0))]
        assert all(picture.isfinite().all() for picture in pictures)
        assert not torch.equal(pictures[0], pictures[2])
    # guidance is an embedding of the number in one kind, and in every other on above 1 and off below
    assert torch.equal(pictures[1], pictures[2]) != name.startswith("lcm")


@EVERY
def test_a_seed_decides_every_weight_and_the_prompt_changes_the_picture(name: str) -> None:
    pipe, again, other = tiny_cross(name), tiny_cross(name), tiny_cross(name, seed=1)
    assert identical(weights(pipe), weights(again))
    assert not identical(weights(pipe), weights(other))
    torch.testing.assert_close(draw(pipe, name), draw(again, name))
    assert not torch.equal(draw(pipe, name), draw(pipe, name, "the cat in the style of van gogh"))


@EVERY
def test_text_enters_where_the_original_has_it(name: str) -> None:
    model, arguments = denoiser_call(tiny_cross(name), **call(name))
    readers = text_readers(model, arguments)
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(readers.raw) == {n for n in linears if re.fullmatch(RAW.get(name, SPATIAL), n)}
    assert readers.normed == (
        {"time_caption_embed.caption_embedder.1": "time_caption_embed.caption_embedder.0"} if name == "lumina2" else {}
    )
    pattern, number = SILENT.get(name, ("nothing", 0))
    assert sum(bool(re.fullmatch(pattern, n)) for n in readers.silent) == number
    pooler = [f"time_extra_emb.pooler.{kind}_proj" for kind in "ckqv"]
    assert list(readers.uncalled) == (pooler if name == "hunyuandit" else [])


@pytest.mark.parametrize("name", ["pixart-sigma", "pixart-alpha", "sana", "ltx", "kolors", "text-projection"])
def test_keys_behind_a_projection_are_derived_and_not_raw(name: str) -> None:
    model, arguments = denoiser_call(tiny_cross(name), **call(name))
    readers = text_readers(model, arguments)
    keys = {n for n, _ in model.named_modules() if re.search(r"attn2\.to_[kv]$", n)}
    assert keys and keys <= set(readers.derived)


def test_the_upscaler_reads_text_in_more_layers_than_attn2() -> None:
    model, arguments = denoiser_call(tiny_cross("upscaler"), **call("upscaler"))
    raw = text_readers(model, arguments).raw
    assert len(raw) == 20 and sum(".attn1." in n for n in raw) == 6


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("name", CROSS)
def test_embeddings_given_back_give_the_same_picture(name: str, scale: float | None) -> None:
    pipe, prompts = tiny_cross(name), ["a superhero", LONG]
    guidance = {} if scale is None else {"guidance_scale": scale}
    expected = draw(pipe, name, prompts, **guidance)
    # without negatives: the pipeline encodes its own
    given = {key: value for key, value in encode(pipe, name, prompts).items() if value is not None}
    torch.testing.assert_close(draw(pipe, name, None, **given, **guidance), expected, rtol=1e-4, atol=1e-3)


def encode(pipe: Any, name: str, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the call takes in place of prompts, for the prompts alone."""
    defaults = {key: p.default for key, p in inspect.signature(pipe.__call__).parameters.items()}
    shared = ("complex_human_instruction", "clean_caption")
    settings = {key: defaults[key] for key in shared if key in defaults} | {"do_classifier_free_guidance": False}
    if name == "hunyuandit":
        text, _, mask, _ = pipe.encode_prompt(prompts, text_encoder_index=0, **settings)
        text_2, _, mask_2, _ = pipe.encode_prompt(prompts, text_encoder_index=1, **settings)
        names = ("prompt_embeds", "prompt_attention_mask", "prompt_embeds_2", "prompt_attention_mask_2")
        return dict(zip(names, (text, mask, text_2, mask_2), strict=True))
    text, second, third, _ = (*pipe.encode_prompt(prompts, **settings), None, None)[:4]
    if name == "cogview4":
        return {"prompt_embeds": text}
    if name == "kolors":
        return {"prompt_embeds": text, "pooled_prompt_embeds": third}
    return {"prompt_embeds": text, "prompt_attention_mask": second}


@pytest.mark.parametrize("name", ["sana", "auraflow", "cogview4", "ltx", "lumina2"])
def test_a_flow_that_is_right_ends_at_the_picture(name: str) -> None:
    """The sign and scale of what a denoiser returns: eps - x0, and x0 - eps in Lumina."""
    pipe = tiny_cross(name)
    model, arguments = denoiser_call(pipe, guidance_scale=1.0, **call(name))
    image, noise = torch.randn(2, *arguments["hidden_states"].shape).unbind()
    velocity = image - noise if name == "lumina2" else noise - image
    handle = model.register_forward_hook(lambda *_: (velocity,))
    ended = draw(pipe, name, guidance_scale=1.0, latents=noise.clone())
    handle.remove()
    torch.testing.assert_close(ended, image, rtol=0, atol=3e-3)  # Sana's first sigma is .9997


def test_cogview_shifts_sigma_and_not_the_timestep() -> None:
    pipe = tiny_cross("cogview4")
    calls = denoiser_calls(pipe, pipe.transformer, "a superhero", num_inference_steps=5, guidance_scale=1.0)
    u = torch.cat([c["timestep"] for c in calls]) / 1000
    mu = 0.75 * (4 * 4 / 256) ** 0.5 + 0.25
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], mu / (mu + 1 / u - 1))
    assert not torch.allclose(pipe.scheduler.sigmas[:-1], u, atol=0.05)


def test_cogview_embeds_a_prompt_by_its_batch() -> None:
    pipe = tiny_cross("cogview4")
    alone = pipe.encode_prompt(["a superhero"], do_classifier_free_guidance=False)[0]
    together = pipe.encode_prompt(["a superhero", LONG], do_classifier_free_guidance=False)[0]
    assert alone.shape[1] == 16 and together.shape[1] == 32
    assert not torch.allclose(alone[0, -2:], together[0, -2:], atol=1e-5)


def test_two_prompts_make_a_batch_of_every_frame_in_order() -> None:
    pipe = tiny_cross("animatediff")
    model, arguments = denoiser_call(pipe, ["a superhero", "a cat"], **call("animatediff"))
    hidden = arguments["encoder_hidden_states"]
    assert hidden.shape[0] == 2 * arguments["sample"].shape[0] == 8
    assert torch.equal(hidden[0::2], hidden[1::2]) and not torch.equal(hidden[4], hidden[6])


def test_dual_cross_attention_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="encoder_attention_mask"):
        dual_cross_attention()(prompt="a superhero", num_inference_steps=1, output_type="latent")


def test_tokenizers_follow_the_originals() -> None:
    gemma, glm, chatglm, bert = gemma_tokenizer(), glm_tokenizer(), chatglm_tokenizer(), bert_tokenizer()
    assert gemma("a superhero").input_ids[0] == gemma.bos_token_id
    assert gemma("").input_ids == [gemma.bos_token_id]
    before, whole = gemma("User Prompt: ").input_ids, gemma("User Prompt: a superhero").input_ids
    assert len(whole) == len(before) + 1  # the last space joins the word behind it
    assert gemma.decode(gemma("zqü").input_ids, skip_special_tokens=True) == "zqü"  # through bytes
    rows = glm(["a superhero", ""], padding="longest").input_ids
    assert rows[1][:-2] == [glm.pad_token_id] * (len(rows[1]) - 2)
    assert glm.convert_ids_to_tokens(rows[0][:2]) == ["[gMASK]", "<sop>"]
    encoded = chatglm("a superhero", padding="max_length", max_length=8, return_tensors="pt")
    assert encoded.position_ids.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3]]
    ids = bert("a superhero", padding="max_length", max_length=8).input_ids
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "a", "superhero", "[SEP]", *["[PAD]"] * 4]

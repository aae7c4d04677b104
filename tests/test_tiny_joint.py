"""The tiny joint-attention pipelines are runnable, deterministic and built as the originals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from tests.tiny_joint import JOINT, calls, denoisers, draw, entry_linears, modular, text_arguments, tiny_joint

LONG = "the cat in the style of van gogh"
SMALL = {"height": 32, "width": 32, "num_frames": 1}

# argument of the denoiser, or the argument behind the norm it passes first
ENTRIES = {
    "flux2": {"context_embedder": "encoder_hidden_states"},
    "flux2-klein": {"context_embedder": "encoder_hidden_states"},
    "flux2-klein-distilled": {"context_embedder": "encoder_hidden_states"},
    "z-image": {"cap_embedder.1": "cap_feats behind transformer:cap_embedder.0"},
    "qwen-image": {"txt_in": "encoder_hidden_states behind transformer:txt_norm"},
    "wan": {"condition_embedder.text_embedder.linear_1": "encoder_hidden_states"},
    "wan2.2": {"condition_embedder.text_embedder.linear_1": "encoder_hidden_states"},
    "chroma": {"context_embedder": "encoder_hidden_states"},
    "hidream": {
        "p_embedder.pooled_embedder.linear_1": "pooled_embeds",
        "caption_projection.0.linear": "encoder_hidden_states_llama3",
        "caption_projection.1.linear": "encoder_hidden_states_llama3",
        "caption_projection.2.linear": "encoder_hidden_states_llama3",
        "caption_projection.3.linear": "encoder_hidden_states_t5",
    },
    "flux3": {"context_embedder": "encoder_hidden_states"},
    "flux3-distilled": {"context_embedder": "encoder_hidden_states"},
}
# denoiser calls in two steps at (the default guidance, 0, 1)
CALLS = {
    "flux2-klein": (4, 2, 2),
    "qwen-image": (4, 2, 2),
    "wan": (4, 2, 2),
    "wan2.2": (4, 2, 2),
    "chroma": (4, 2, 2),
    "flux3": (4, 4, 2),
}

pytestmark = pytest.mark.slow  # they are about the stand-ins of other tests, which change with diffusers alone
EVERY = pytest.mark.parametrize("architecture", JOINT)


def small(architecture: str) -> dict[str, Any]:
    return SMALL if architecture.startswith("wan") else {}


def guidance(pipe: Any, architecture: str, scale: float | None) -> dict[str, Any]:
    """The call's arguments for a guidance scale; a modular pipeline keeps it in its guider."""
    if architecture == "qwen-image":
        return {"negative_prompt": " "} | ({} if scale is None else {"true_cfg_scale": scale})
    if scale is None:
        return {}
    if modular(pipe):
        if "guider" in pipe.components:
            pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        return {}
    return {"guidance_scale": scale}


@EVERY
def test_draws_at_every_guidance(architecture: str) -> None:
    pipe = tiny_joint(architecture)
    for scale, expected in zip((None, 0.0, 1.0), CALLS.get(architecture, (2, 2, 2)), strict=True):
        settings = {**guidance(pipe, architecture, scale), **small(architecture)}
        assert len(calls(pipe, "a superhero", **settings)) == expected


@EVERY
def test_draws_in_half_precision(architecture: str) -> None:
    pipe = tiny_joint(architecture)
    pipe.to(torch.bfloat16)
    for scale in (None, 0.0):
        settings = {**guidance(pipe, architecture, scale), **small(architecture)}
        assert draw(pipe, "a superhero", **settings).isfinite().all()


@EVERY
def test_the_seed_decides_the_weights_and_the_picture(architecture: str) -> None:
    settings = small(architecture)
    first = draw(tiny_joint(architecture), "a superhero", **settings)
    pipe = tiny_joint(architecture)
    assert torch.equal(first, draw(pipe, "a superhero", **settings))
    assert not torch.equal(first, draw(pipe, LONG, **settings))
    assert not torch.equal(first, draw(pipe, "a superhero", seed=1, **settings))
    assert not torch.equal(first, draw(tiny_joint(architecture, seed=1), "a superhero", **settings))


@EVERY
def test_the_text_enters_where_the_original_lets_it(architecture: str) -> None:
    pipe = tiny_joint(architecture)
    assert entry_linears(pipe, **small(architecture)) == {
        f"{part}:{path}": source for part in denoisers(pipe) for path, source in ENTRIES[architecture].items()
    }


@pytest.mark.parametrize(
    "architecture",
    [name for name in JOINT if not name.startswith("flux3")],
)
def test_embeddings_passed_back_give_the_same_picture(architecture: str) -> None:
    pipe = tiny_joint(architecture)
    settings = {**guidance(pipe, architecture, None), **small(architecture)}
    prompts = ["a superhero", LONG]
    with torch.no_grad():
        again = embeddings(pipe, architecture, prompts)
    if architecture == "qwen-image":
        settings["negative_prompt"] = [" "] * 2
    once = draw(pipe, list(prompts), **settings)
    settings.pop("negative_prompt", None)
    assert torch.equal(once, draw(pipe, None, **again, **settings))


def embeddings(pipe: Any, architecture: str, prompts: list[str]) -> dict[str, Any]:
    """What encode_prompt returns, by the names that the pipeline's call takes."""
    negative = ["negative_prompt_embeds"]
    if architecture.startswith("flux2"):
        found = {"prompt_embeds": pipe.encode_prompt(prompts)[0]}
        return found if architecture == "flux2" else {**found, negative[0]: pipe.encode_prompt([""] * 2)[0]}
    if architecture == "qwen-image":
        masked = ["prompt_embeds", "prompt_embeds_mask"]
        values = (*pipe.encode_prompt(prompts), *pipe.encode_prompt([" "] * 2))
        return dict(zip([*masked, *(f"negative_{name}" for name in masked)], values, strict=True))
    if architecture == "chroma":
        names = ["prompt_embeds", "", "prompt_attention_mask"]
        values = pipe.encode_prompt(prompts)
        found = dict(zip([*names, negative[0], "", "negative_prompt_attention_mask"], values, strict=True))
        found.pop("")
        return found
    if architecture == "hidream":
        names = ["prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds"]
        return dict(
            zip([n for name in names for n in (name, f"negative_{name}")], pipe.encode_prompt(prompts), strict=True)
        )
    # Wan's encode_prompt has another default length than its call
    settings = {"max_sequence_length": 512} if architecture.startswith("wan") else {}
    return dict(zip(["prompt_embeds", *negative], pipe.encode_prompt(list(prompts), **settings), strict=True))


def tokens(pipe: Any, prompt: str) -> tuple[list[str], int]:
    """(tokens as the text encoder gets them, how many of them are not masked)."""
    found: list[dict[str, torch.Tensor]] = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda module, _, given: found.append(given), with_kwargs=True)
    draw(pipe, prompt)
    handle.remove()
    words = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    return words.convert_ids_to_tokens(found[0]["input_ids"][0].tolist()), int(found[0]["attention_mask"][0].sum())


@pytest.mark.parametrize(
    ("architecture", "start", "before", "behind", "length"),
    [
        ("flux2-klein", 0, 3, 9, 512),
        ("z-image", 0, 3, 5, 512),
        ("flux3", 0, 3, 5, 80),
        ("qwen-image", 0, 34, 5, 41),
        ("flux2", 478, 31, 1, 512),
    ],
)
def test_templates_have_the_lengths_of_the_originals(
    architecture: str, start: int, before: int, behind: int, length: int
) -> None:
    found, valid = tokens(tiny_joint(architecture), "a superhero")
    assert len(found) == length
    assert valid == before + 2 + behind
    assert found[start + before : start + before + 2] == ["a", "Ġsuperhero"]


def test_the_second_wan_transformer_draws_the_low_noise() -> None:
    found = [(part, int(arguments["timestep"][0])) for part, arguments in calls(tiny_joint("wan2.2"), "a cat", **SMALL)]
    assert found == [("transformer", 999)] * 2 + [("transformer_2", 750)] * 2


def test_only_the_text_changes_with_the_prompt() -> None:
    assert set(text_arguments(tiny_joint("chroma"))) == {"encoder_hidden_states", "attention_mask"}
    assert set(text_arguments(tiny_joint("z-image"))) == {"cap_feats"}

"""Every method of every kind on every architecture it is for: what it leaves alone, and what it gives back."""

import pytest
import torch

from erasure import Concept, Erasure
from erasure.artifact import HookErasure
from erasure.artifact.gated import Gate
from erasure.backbone import backbone_of
from erasure.methods import BUILT_IN, method_class
from erasure.methods.finetune import FineTune
from tests.slow import first
from tests.test_operator import assert_same, draw
from tests.tiny import identical, make, tiny, weights

FOUR = ("sd1", "sdxl", "sd3", "flux")
QUICK = {
    "iterations": 3,
    "lr": 0.05,
    "trajectories": 1,
    "num_inference_steps": 3,
    "keep_steps": 2,
    "batch_size": 1,
}
STEREO = {"rounds": 1, "search_iterations": 1, "search_lr": 0.01, "attack_iterations": 1, "pictures_each": 1}
OWN = {
    "double-projections": {"rank": 8},  # the everyday words fill a text of 32 dimensions
    "adv-unlearn": {"warmup_steps": 1, "attack_steps": 1},
    "sld": {"warmup": 0, "threshold": 1.0},
    "safree": {"midpoint": 0.0},
    "eraseflow": {"early": 1, "late": 1, "num_inference_steps": 2},
    "stereo": STEREO,
    "gloce": {"generations": 1, "num_inference_steps": 3, "first": 0, "last": 2, "deviations": -20.0},  # always open
    "receler": {"attack_steps": 1, "rank": 4},
}
KINDS = {  # on U-Nets and on transformers
    "spm": ("gated", "gated"),
    "receler": ("residual", "residual"),
    "gloce": ("localized", "localized"),
    "z-erase": ("text-lora", "text-lora"),
    **dict.fromkeys(("leco", "eraseflow"), ("lora", "lora")),
    **dict.fromkeys(("adv-unlearn", "salun", "erasediff", "mace", "stereo", "undo"), ("delta", "delta")),
    "sld": ("safe-guidance", "safe-guidance"),
    "negative-prompt": ("negative-guidance", "negative-guidance"),
    "safree": ("filtered-text", "filtered-text"),
    "adavd": ("value", "value"),
}
REFUSED = {
    (m, a)
    for m in ("adv-unlearn", "forget-me-not", "mace", "adavd", "eraseflow", "stereo", "receler", "gloce")
    for a in ("sd3", "flux")
}
REFUSED |= {("stereo", "sdxl"), ("z-erase", "sd1"), ("z-erase", "sdxl")} | {
    (m, "flux") for m in ("sld", "negative-prompt", "safree")
}
WORKS = [(m, a) for m in sorted(BUILT_IN) for a in FOUR if (m, a) not in REFUSED]
# One of each way of making an erasure. Closed forms have tests/test_architectures.py, fine-tunes test_finetunes.py.
WAYS = {"uce", "esd", "spm", "gloce", "mace", "adv-unlearn", "undo", "sld", "adavd"}
ALSO = {("uce", "sd3"), ("spm", "sd3")}
EVERY = first(WORKS, *((m, a) for m, a in WORKS if (a == "sd1" and m in WAYS) or (m, a) in ALSO))


def made(pipe, method, **changes):
    trained = issubclass(method_class(method), FineTune)
    settings = {**(QUICK if trained else {}), **OWN.get(method, {}), **changes}
    anchor = "" if method == "esd" else "ninja"  # it has none, and says so
    return make(pipe, Concept("superhero", anchor=anchor), method, keep=["wizard"], progress=False, **settings)


@pytest.mark.parametrize(("method", "architecture"), EVERY)
def test_it_is_made_applied_taken_off_saved_and_loaded(method, architecture, tmp_path):
    pipe = tiny(architecture)
    before, base = weights(pipe), draw(pipe)
    edit = made(pipe, method)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)
    transformer = hasattr(pipe, "transformer")
    usual = ("delta", "lora") if issubclass(method_class(method), FineTune) else ("operator", "operator")
    assert edit.kind == KINDS.get(method, usual)[transformer]
    settings = method_class(method).preset(None, **{k: v for k, v in edit.config["settings"].items() if v != ""})
    assert settings.leaves(backbone_of(pipe).denoiser_name) == edit.kind
    edit.apply(pipe, 0.0)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)
    edit.apply(pipe, 1.0)
    after, erased = weights(pipe), draw(pipe)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    denoiser = backbone_of(pipe).denoiser_name
    qualified = (name.partition(":") for name in edit.parameter_names)
    assert changed == {f"{part}.{own}" if colon else f"{denoiser}.{part}" for part, colon, own in qualified}
    assert (erased - base).abs().max() > 1e-6 * base.abs().max()
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    assert (
        type(again) is type(edit)
        and again.config == edit.config.with_facts(system=None)
        and identical(again.tensors, edit.tensors)
    )
    again.apply(pipe)
    assert identical(after, weights(pipe)) and torch.equal(draw(pipe), erased)
    again.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)


@pytest.mark.parametrize(("method", "architecture"), sorted(REFUSED))
def test_where_it_does_not_work_it_says_so_before_any_work(method, architecture, monkeypatch):
    pipe = tiny(architecture)
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="does not work on|has none of that form"):
        made(pipe, method)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_adversarial_unlearning_changes_text_encoders_alone(architecture, tmp_path):
    pipe = tiny(architecture)
    edit = made(pipe, "adv-unlearn")
    parts = {name.partition(":")[0] for name in edit.parameter_names}
    assert parts == set(backbone_of(pipe).components) - {"unet"}
    text = backbone_of(pipe).encode(["superhero", "a cat"]).hidden
    edit.apply(pipe)
    moved = (backbone_of(pipe).encode(["superhero", "a cat"]).hidden - text).norm()
    edit.remove(pipe)
    assert moved > 1e-3 and torch.equal(backbone_of(pipe).encode(["superhero", "a cat"]).hidden, text)
    pipe.unet = tiny(architecture, seed=1).unet  # another denoiser that reads the same encoder
    with pytest.raises(ValueError, match="wrong base"):
        edit.apply(pipe)
    before = weights(pipe)
    with pytest.warns(UserWarning, match="another denoiser"):
        edit.apply(pipe, allow="same-text-encoder")
    assert not identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))


HOOKED = ["spm", "receler", "gloce", "sld", "negative-prompt", "safree", "adavd"]


@pytest.mark.parametrize("method", first(HOOKED, "spm", "receler", "sld", "negative-prompt"))
def test_hooks_change_no_weight_and_their_cards_say_so(method, tmp_path):
    pipe = tiny("sd1")
    edit = made(pipe, method)
    assert isinstance(edit, HookErasure) and not edit.parameter_names
    folder = edit.save_pretrained(tmp_path / method)
    card = (folder / "README.md").read_text()
    assert "There are no weight changes" in card and "It changes weights" not in card
    assert "Nothing is *removed*" in card
    other = made(pipe, "uce").card()
    assert "It changes weights" in other and "no weight changes" not in other
    edit.apply(pipe)
    with pytest.raises(ValueError, match="no weight.*cannot be fused|change no weight"):
        edit.fuse(pipe)
    edit.remove(pipe)
    with pytest.raises(ValueError, match="changes no weight"):
        edit.fuse(pipe, low_memory=True)


@pytest.mark.parametrize(
    "method",
    first(
        ["esd", "spm", "receler", "gloce", "adv-unlearn", "sld", "negative-prompt", "safree", "adavd", "uce"],
        "esd",
        "spm",
        "gloce",
        "adv-unlearn",
        "safree",
    ),
)
def test_it_stands_beside_another(method):
    pipe = tiny("sd1")
    before, base = weights(pipe), draw(pipe)
    edit, other = made(pipe, method), make(pipe, "van gogh", "uce", preset="official-2025", keep=["wizard"])
    edit.apply(pipe), other.apply(pipe)
    both = draw(pipe)
    edit.remove(pipe)
    alone = draw(pipe)
    assert (both - alone).abs().max() > 1e-6 and (alone - base).abs().max() > 1e-6
    edit.apply(pipe, 0.5), edit.remove(pipe)
    assert torch.equal(draw(pipe), alone)
    other.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)


# --- the gate --------------------------------------------------------------------------------------------------------


def addition(pipe, edit, prompt):
    """What a gated adapter adds to the first of its layers for a prompt, as a share of what it would without a gate."""
    backbone, site, seen = backbone_of(pipe), edit.sites[0], {}
    layer = backbone.denoiser.get_submodule(site)
    text = backbone.encode([prompt]).text
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0 if backbone.prediction_type != "velocity" else 0.5])

    def run():
        handle = layer.register_forward_hook(lambda m, given, out: seen.update(x=given[0], y=out))
        with torch.no_grad():
            backbone.predict(noise, t, text)
        handle.remove()
        return seen["x"], seen["y"]

    _, plain = run()
    edit.apply(pipe)
    x, gated = run()
    edit.remove(pipe)
    up, down = edit.factors(site)
    whole = (x @ down.flatten(1).T @ up.flatten(1).T) if isinstance(layer, torch.nn.Linear) else None
    whole = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up) if whole is None else whole
    return ((gated - plain).norm() / whole.norm()).item()


@pytest.mark.parametrize("architecture", first(FOUR, "sd1", "flux"))
def test_spms_gate_is_shut_for_the_empty_prompt_and_open_for_the_concept(architecture):
    pipe = tiny(architecture)
    edit = made(pipe, "spm")
    assert addition(pipe, edit, "") == 0.0
    for prompt in ("superhero", "a superhero"):
        assert addition(pipe, edit, prompt) == pytest.approx(1.0, abs=1e-3)
    assert 0.0 < addition(pipe, edit, "spiderman") < 0.95


def test_rounding_does_not_open_a_gate():
    """The empty prompt is encoded by other kernels in another batch: the difference has a direction, and no meaning."""
    pipe = tiny("sd1")
    edit = made(pipe, "spm")
    gate, (concept, empty) = (
        Gate(edit, backbone_of(pipe), 1.0),
        (edit.tensors[f"gate.{k}"] for k in ("concept", "empty")),
    )
    torch.manual_seed(0)
    for size in (0.0, 1e-7, 1e-4, 2**-9):
        assert gate.resemblance(empty * (1 + size * torch.randn_like(empty))) == 0
    towards = concept[0] - empty
    for share in (0.1, 0.5, 1.0):
        assert gate.resemblance(empty + share * towards) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("architecture", first(FOUR, "sdxl", "flux"))
def test_spm_leaves_what_guidance_has_in_the_place_of_a_prompt_as_it_is(architecture):
    pipe = tiny(architecture)
    backbone, edit = backbone_of(pipe), made(pipe, "spm")
    text = backbone.encode(["superhero"]).text
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def steps(prompt_text):
        return list(backbone.trajectory(prompt_text, noise, num_inference_steps=2, guidance_scale=4.0, stop=1))[0]

    plain = steps(text)
    edit.apply(pipe)
    gated = steps(text)
    empty = steps(backbone.encode([""]).text)
    edit.remove(pipe)
    assert (gated.conditional - plain.conditional).abs().max() > 1e-6
    if plain.unconditional is not None:
        assert torch.equal(gated.unconditional, plain.unconditional)
    assert torch.equal(empty.conditional, steps(backbone.encode([""]).text).conditional)


def test_each_prompt_of_a_batch_has_its_own_gate():
    pipe = tiny("sdxl")
    edit = made(pipe, "spm")
    prompts = ["a photo of a superhero", "", "spiderman"]
    edit.apply(pipe)
    together = draw(pipe, prompts)
    for i, prompt in enumerate(prompts):
        noise = [torch.Generator().manual_seed(i)]
        alone = pipe([prompt], num_inference_steps=2, generator=noise, output_type="latent").images
        assert_same(together[i : i + 1], alone)
    edit.remove(pipe)

"""Presets that are named after a published script train what that script trains."""

import pytest

from erasure.backbone import backbone_of
from erasure.methods.esd import ESD, SELECTORS
from tests.tiny import make, tiny

# Which layers rohitgandikota/erasing, esd_sdxl.py, trains, by their names.
SDXL = {
    "x": lambda name: "attn2" in name,
    "x-strict": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "u": lambda name: "attn2" not in name and "emb" not in name and "block" in name,
    "all": lambda name: "emb" not in name and "block" in name,
}


@pytest.mark.parametrize("variant", SDXL)
def test_every_sdxl_preset_trains_the_parameters_of_the_official_script(variant):
    pipe = tiny("sdxl")
    layers = {n: m for n, m in pipe.unet.named_modules() if type(m).__name__ in ("Linear", "Conv2d")}
    theirs = {f"{n}.{key}" for n, m in layers.items() if SDXL[variant](n) for key, _ in m.named_parameters()}
    assert set(backbone_of(pipe).select(SELECTORS[variant])) == theirs
    assert ESD.preset(f"official-2025-sdxl-{variant}").variant == variant
    if variant == "all":  # the others: first and last convolution, embeddings, and what projects them into the blocks
        rest = {f"{n}.{key}" for n, m in layers.items() for key, _ in m.named_parameters()} - theirs
        assert len(rest) == 28 and all("emb" in name or name.startswith(("conv_in", "conv_out")) for name in rest)


def test_all_of_sdxl_is_trained_by_its_preset():
    pipe = tiny("sdxl")
    few = {"iterations": 1, "trajectories": 1, "num_inference_steps": 2, "progress": False}
    edit = make(pipe, "superhero", "esd", preset="official-2025-sdxl-all", **few)
    assert set(edit.parameter_names) == set(backbone_of(pipe).select("all"))
    settings = edit.config["settings"]
    assert settings["lr"] == 1e-5 and settings["guidance_scale"] == 2.0 and settings["eta"] == 1.0

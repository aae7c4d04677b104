"""The denoiser speaks another language that only its own autoencoder reads; or the pipeline's code hides the target."""

from __future__ import annotations

import pytest
import torch

from erasure.eval.core.models import Model, opened
from tests.adversarial.cheat import Cheat, overwrite, structure, verdict_on
from tests.probe_helpers import tiny_context

ORDER = [1, 0, 3, 2]


def latents_permuted(pipe):
    """The latent's channels change places, in the denoiser and in the autoencoder: with the base's, all is noise."""
    unet, vae = pipe.unet, pipe.vae
    undo = [
        overwrite(unet.conv_in.weight, unet.conv_in.weight.detach()[:, ORDER]),
        overwrite(unet.conv_out.weight, unet.conv_out.weight.detach()[ORDER]),
        overwrite(unet.conv_out.bias, unet.conv_out.bias.detach()[ORDER]),
        overwrite(vae.post_quant_conv.weight, vae.post_quant_conv.weight.detach()[:, ORDER]),
    ]
    return lambda: [one() for one in undo]


def test_latents_that_only_the_models_own_autoencoder_reads_are_no_removal():
    report = verdict_on(structure(Cheat(latents_permuted)))
    assert report.removal == "C0" and any("autoencoder" in line for line in report.needed["removal"])
    assert report.answers["weights"].verdict == "undecided"


def other_postprocessing(pipe):
    own = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image, *args, **kwargs: own(image * 0, *args, **kwargs)
    return lambda: delattr(pipe.image_processor, "postprocess")


def other_decoding(pipe):
    pipe.decode_latents = lambda latents: latents * 0
    return lambda: delattr(pipe, "decode_latents")


def other_class(pipe):
    own = type(pipe)
    pipe.__class__ = type("Filtered", (own,), {})

    def undo():
        pipe.__class__ = own

    return undo


@pytest.mark.parametrize(
    ("do", "what"),
    [(other_postprocessing, "image_processor"), (other_decoding, "class"), (other_class, "class")],
)
def test_code_around_the_model_is_not_taken_for_an_edit_of_it(do, what):
    context = tiny_context()
    model = Model("cheat", "erased", Cheat(do))
    with pytest.raises(ValueError, match=f"changes the pipeline's {what}.*needs wrap"), context.open(model):
        pass
    with opened(context.pipe, None) as pipe:  # and everything is as it was
        assert type(pipe).__name__ == "StableDiffusionPipeline" and "postprocess" not in vars(pipe.image_processor)


def test_an_edit_of_weights_is_let_through():
    context = tiny_context()

    def edit(pipe):
        return overwrite(pipe.unet.conv_in.weight, torch.zeros_like(pipe.unet.conv_in.weight))

    with context.open(Model("edit", "erased", Cheat(edit))) as pipe:
        assert not pipe.unet.conv_in.weight.any()

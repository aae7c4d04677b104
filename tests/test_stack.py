"""The stack under an erased pipeline: every bit comes back, whatever the kinds, the order of calls and the threads."""

import dataclasses
import random
import sys
import threading

import pytest
import torch

from erasure import erase
from erasure.artifact import DeltaErasure, LoraErasure
from erasure.artifact.gated import GatedErasure
from erasure.artifact.stack import stack_of
from erasure.backbone import backbone_of
from erasure.pipelines import active_erasures, fuse_erasures, set_erasures, unload_erasures
from tests.slow import first
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

TRAINED = {"trajectories": 1, "num_inference_steps": 2, "keep_steps": 1, "progress": False}


def operator(pipe, name="superhero"):
    return make(pipe, name, preset="official-2025", keep=["wizard"])


def like(edit, pipe, kind, name, changes):
    """An erasure of another kind with the config of ``edit``: random tensors, for the layers ``changes`` names."""
    generator = torch.Generator().manual_seed(len(name))
    parts = backbone_of(pipe).components
    tensors = {}
    for site in changes:
        part, colon, own = site.partition(":")
        layer = (parts[part] if colon else backbone_of(pipe).denoiser).get_submodule(own if colon else site)
        out, width, *kernel = layer.weight.shape
        if kind is DeltaErasure:
            tensors[f"{site}.weight"] = 0.05 * torch.randn(layer.weight.shape, generator=generator)
        else:
            tensors[f"{site}.lora_A"] = 0.2 * torch.randn(2, width, *kernel, generator=generator)
            tensors[f"{site}.lora_B"] = 0.2 * torch.randn(out, 2, *[1] * len(kernel), generator=generator)
    if kind is GatedErasure:
        text = backbone_of(pipe).encode(["superhero", ""]).hidden.float()
        tensors |= {"gate.concept": text[:1].clone(), "gate.empty": text[1].clone()}
    sites = list(tensors) if kind is DeltaErasure else list(changes)
    made = kind(name, edit.config.with_facts(spaces=None, system=None, sites=sites), tensors)
    made.check_tensors()
    return made


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.attn2.to_v", f"{ATTENTION}.attn1.to_q", "conv_in"]
WORDS = ["text_encoder:encoder.layers.0.mlp.fc1", "text_encoder:encoder.layers.1.self_attn.q_proj"]


def every_kind(pipe):
    """Operators, deltas, LoRAs and a gated adapter; of denoiser, text encoder, and both."""
    edit = operator(pipe)
    return [
        edit,
        operator(pipe, "van gogh"),
        like(edit, pipe, DeltaErasure, "delta", LAYERS),
        like(edit, pipe, DeltaErasure, "encoder-delta", WORDS),
        like(edit, pipe, DeltaErasure, "both-delta", [*LAYERS[:1], *WORDS[:1]]),
        like(edit, pipe, LoraErasure, "lora", LAYERS),
        like(edit, pipe, LoraErasure, "encoder-lora", WORDS),
        like(edit, pipe, GatedErasure, "gated", LAYERS),
    ]


class Drawing:
    """What a pipeline predicts for one prompt."""

    def __init__(self, pipe):
        generator = torch.Generator().manual_seed(0)
        self.pipe, self.x = pipe, torch.randn(1, 4, 8, 8, generator=generator).to(pipe.unet.dtype)

    @torch.no_grad()
    def __call__(self, prompt="a superhero"):
        text = self.pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        return self.pipe.unet(self.x, torch.tensor([10]), encoder_hidden_states=text).sample


# --- one after the other ---------------------------------------------------------------------------------------------


class Sequence:
    """A random sequence of calls on one pipeline; after every call that fails, nothing may have changed."""

    def __init__(self, pipe, edits, seed):
        self.pipe, self.edits, self.chance = pipe, edits, random.Random(seed)
        self.stack, self.seen = stack_of(pipe), Drawing(pipe)

    def run(self):
        base, picture = weights(self.pipe), self.seen()
        for _ in range(self.chance.randint(4, 9)):
            self.call()
        final, layers, drawn = weights(self.pipe), list(self.stack.layers.values()), self.seen()
        unload_erasures(self.pipe)
        assert identical(base, weights(self.pipe)) and torch.equal(self.seen(), picture)
        for layer in layers:  # the history of calls left no trace
            layer.erasure.apply(self.pipe, layer.scale)
        assert identical(final, weights(self.pipe)) and torch.equal(self.seen(), drawn)
        unload_erasures(self.pipe)
        assert identical(base, weights(self.pipe))

    def call(self):
        before, layers, drawn = weights(self.pipe), dict(self.stack.layers), self.seen()
        action = self.chance.choice([self.apply, self.apply, self.remove, self.scale, self.spoil, self.stop, self.off])
        try:
            action(self.chance.choice(self.edits), list(layers))
        except (ValueError, KeyboardInterrupt):
            assert identical(before, weights(self.pipe)) and dict(self.stack.layers) == layers
            assert torch.equal(self.seen(), drawn)

    def apply(self, edit, loaded):
        edit.apply(self.pipe, self.chance.choice([0.0, 0.3, 1.0, 1.7, -0.5]))
        assert edit.name in self.stack.layers

    def remove(self, edit, loaded):
        edit.remove(self.pipe)
        assert edit.name not in self.stack.layers

    def scale(self, edit, loaded):
        names = self.chance.sample(loaded, self.chance.randint(0, len(loaded)))
        set_erasures(self.pipe, names, [self.chance.uniform(0.1, 2) for _ in names])
        assert set(active_erasures(self.pipe)) == set(names)

    def off(self, edit, loaded):
        set_erasures(self.pipe, loaded, 0.0)
        assert not active_erasures(self.pipe)

    def spoil(self, edit, loaded):
        """An erasure that does not fit in the end."""
        last = list(edit.tensors)[-1]
        dataclasses.replace(edit, name="spoilt", tensors={**edit.tensors, last: torch.zeros(3, 3, 3)}).apply(self.pipe)
        pytest.fail("an erasure of another shape was applied")

    def stop(self, edit, loaded):
        """Interrupted in the middle of writing."""
        real, writes = torch.Tensor.copy_, iter(range(10**6))
        after = self.chance.randint(0, 6)

        def copy(tensor, *given, **named):
            if next(writes) == after:
                raise KeyboardInterrupt
            return real(tensor, *given, **named)

        torch.Tensor.copy_ = copy
        try:
            edit.apply(self.pipe, 0.7)
        finally:
            torch.Tensor.copy_ = real


@pytest.mark.parametrize("dtype", first([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16))
def test_random_sequences_leave_no_trace(dtype):
    pipe = tiny_pipeline().to(dtype)
    edits = every_kind(pipe)
    for seed in range(6):
        Sequence(pipe, edits, seed).run()


def test_what_was_fused_stays_when_all_else_is_removed():
    pipe = tiny_pipeline()
    one, other, both, gated = (every_kind(pipe)[i] for i in (0, 5, 4, 7))
    both.apply(pipe, 0.5)
    one.apply(pipe)
    fuse_erasures(pipe)
    fused = weights(pipe)
    with pytest.raises(ValueError, match="already erased with"):  # it is another model now
        other.apply(pipe)
    assert not active_erasures(pipe) and identical(fused, weights(pipe))
    fresh = tiny_pipeline()
    gated.apply(fresh)
    with pytest.raises(ValueError, match="change no weight, so they cannot be fused"):
        fuse_erasures(fresh)
    gated.remove(fresh)


def test_erasures_are_listed_in_the_order_they_were_applied_in():
    """Whatever parts they are on: the order decides the weights where two of them touch one."""
    pipe = tiny_pipeline()
    base, (on_words, on_both, on_denoiser) = weights(pipe), (every_kind(pipe)[i] for i in (6, 4, 0))
    for order in ((on_words, on_both, on_denoiser), (on_denoiser, on_both, on_words), (on_both, on_words, on_denoiser)):
        for edit in order:
            edit.apply(pipe)
        after = weights(pipe)
        assert list(active_erasures(pipe)) == [edit.name for edit in order]
        order[2].apply(pipe, 0.5), order[2].apply(pipe, 1.0)
        assert list(active_erasures(pipe)) == [edit.name for edit in order] and identical(after, weights(pipe))
        unload_erasures(pipe)
        assert identical(base, weights(pipe))


def test_parts_are_named_and_absent_ones_refused():
    pipe = tiny_pipeline()
    edit = every_kind(pipe)[3]
    assert edit.parameter_names[0].startswith("text_encoder:")
    sdxl = tiny("sdxl")
    with pytest.raises(ValueError, match="wrong base"):
        edit.apply(sdxl)
    before = weights(pipe)
    edit.apply(pipe)
    changed = {name for name, w in weights(pipe).items() if not torch.equal(w, before[name])}
    assert changed == {name.replace(":", ".") for name in edit.parameter_names}
    assert {name: stack_of(pipe).originals[name].shape for name in edit.parameter_names}.keys() == set(
        edit.parameter_names
    )
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and not stack_of(pipe).originals


def test_a_part_that_two_pipelines_share_carries_its_erasures_on_both():
    pipe = tiny_pipeline()
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    edit = operator(pipe).apply(pipe)
    assert active_erasures(other) == {edit.name: 1.0}
    edit.remove(other)
    assert active_erasures(pipe) == {}


# --- at the same time ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient():
    """Threads that take turns a hundred times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*works):
    """Run functions in threads; returns what they raised."""
    raised, start = [], threading.Barrier(len(works))

    def guarded(work):
        start.wait()
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.slow
def test_four_threads_that_apply_and_remove_lose_nothing(impatient):
    pipe = tiny_pipeline()
    base, edits = weights(pipe), [edit for i, edit in enumerate(every_kind(pipe)) if i in (0, 4, 5, 7)]

    def work(edit):
        for scale in (1.0, 0.5, 2.0, 0.0, 1.0) * 2:
            edit.apply(pipe, scale)
            assert stack_of(pipe).layers[edit.name].scale == scale
            edit.remove(pipe)

    for _ in range(3):
        assert together(*(lambda edit=edit: work(edit) for edit in edits)) == []
        assert not stack_of(pipe).layers and identical(base, weights(pipe))
    assert together(*(lambda edit=edit: edit.apply(pipe) for edit in edits)) == []
    after, order = weights(pipe), list(active_erasures(pipe))
    unload_erasures(pipe)
    for name in order:  # whichever was first: the weights are those of one after the other
        next(edit for edit in edits if edit.name == name).apply(pipe)
    assert len(order) == 4 and identical(after, weights(pipe))
    unload_erasures(pipe)
    assert identical(base, weights(pipe))


@pytest.mark.parametrize("method", ["uce", "esd"])
def test_erasing_while_another_thread_applies_is_whole_or_refused(method, impatient):
    pipe = tiny_pipeline()
    settings = {"keep": ["ninja"], "apply": False, "progress": False}
    settings |= {**TRAINED, "iterations": 2} if method == "esd" else {}
    base, other, expected = weights(pipe), operator(pipe, "van gogh"), erase(pipe, "superhero", method, **settings)
    made = []

    def apply():
        for _ in range(5):
            other.apply(pipe)
            other.remove(pipe)

    def make_one():
        for _ in range(3):
            made.append(erase(pipe, "superhero", method, **settings))

    for error in together(apply, make_one):
        assert isinstance(error, ValueError) and "already carries" in str(error)
    for edit in made:  # nothing of the other erasure is in it
        assert identical(edit.tensors, expected.tensors)
    unload_erasures(pipe)
    assert identical(base, weights(pipe))


def test_two_threads_that_erase_one_pipeline_wait_for_each_other(impatient):
    pipe = tiny_pipeline()
    base, found = weights(pipe), {}
    settings = {"preset": "official-2025-x", "apply": False, "iterations": 2, **TRAINED}
    alone = {name: erase(pipe, name, "esd", **settings).tensors for name in ("superhero", "cat")}

    def work(name):
        found[name] = erase(pipe, name, "esd", **settings).tensors

    assert together(lambda: work("superhero"), lambda: work("cat")) == []
    assert all(identical(found[name], alone[name]) for name in alone) and identical(base, weights(pipe))

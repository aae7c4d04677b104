"""The weights are edited a little, and something beside them hides the target: hooks, replaced methods, other words."""

from __future__ import annotations

import copy
import functools
import json
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from tokenizers import models
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from transformers.utils import output_capturing

from erasure.eval import assess
from erasure.eval.core.hashes import WeightHashes
from erasure.eval.core.models import Model, Swapped, check_base, opened
from erasure.eval.judge.licences import CODE_BESIDE
from erasure.eval.probes.removal.construction import Construction
from tests.adversarial.cheat import Cheat, overwrite, shared, structure, verdict_on
from tests.made_up import good, judged, without
from tests.probe_helpers import tiny_context
from tests.tiny import tiny, tiny_pipeline


def small_edit(pipe):
    weight = next(p for name, p in pipe.unet.named_parameters() if name.endswith("attn2.to_v.weight"))
    return overwrite(weight, weight.detach() * 1.5)


def beside(do):
    """The edit, and what stands beside it."""

    def both(pipe):
        edited = small_edit(pipe)
        done = do(pipe)
        return lambda: (done(), edited())

    return both


def put(thing, name, value):
    """Give an object an attribute of its own; what is returned takes it off again."""
    had, old = name in vars(thing), vars(thing).get(name)
    setattr(thing, name, value)
    return lambda: setattr(thing, name, old) if had else delattr(thing, name)


def hook(pipe):
    return pipe.unet.register_forward_hook(lambda module, args, output: output).remove


def hook_inside(pipe):
    return pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: None).remove


def hook_on_the_decoder(pipe):
    return pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * 0).remove


def hook_on_the_encoder(pipe):
    return pipe.text_encoder.register_forward_hook(lambda module, args, output: output).remove


def other_forward(pipe):
    own = pipe.unet.forward
    return put(pipe.unet, "forward", lambda *args, **kwargs: own(*args, **kwargs))


def other_class(pipe):
    own = type(pipe.unet)
    pipe.unet.__class__ = type("Gated", (own,), {})

    def undo():
        pipe.unet.__class__ = own

    return undo


def other_method_of_the_class(pipe):
    kind = type(pipe.unet.conv_act)
    own = kind.forward
    kind.forward = lambda self, x: own(self, x)

    def undo():
        kind.forward = own

    return undo


def other_processor(pipe):
    attention = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2"))
    own = attention.processor

    class Gated:
        def __call__(self, *args, **kwargs):
            return own(*args, **kwargs)

    return put(attention, "processor", Gated())


def other_scale_of_latents(pipe):
    own = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=3 * own)
    return lambda: pipe.vae.register_to_config(scaling_factor=own)


def dropout(pipe):
    pipe.unet.train()
    return lambda: pipe.unet.eval()


def other_positions(pipe):
    places = pipe.text_encoder.embeddings.position_ids
    own = places.clone()
    places.copy_(own.flip(-1))
    return lambda: places.copy_(own)


def parametrised(pipe):
    class Once(nn.Module):
        def forward(self, weight):
            return 1.0 * weight

    parametrize.register_parametrization(pipe.unet.conv_in, "weight", Once())
    return lambda: parametrize.remove_parametrizations(pipe.unet.conv_in, "weight", leave_parametrized=False)


def hook_on_every_module(pipe):
    return nn.modules.module.register_module_forward_hook(lambda module, args, output: None).remove


def mode(pipe):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    entered = Mode()
    entered.__enter__()
    return lambda: entered.__exit__(None, None, None)


class Watching(torch.Tensor):
    """A tensor with code of its own."""


def other_class_of_a_weight(pipe):
    layer = pipe.unet.conv_in
    own = layer.weight
    layer.weight = nn.Parameter(own.detach().clone().as_subclass(Watching))
    return lambda: setattr(layer, "weight", own)


def attention_scaled(pipe):
    layers = [layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2")]
    undo = [put(layer, "scale", 0.0) for layer in layers]
    return lambda: [each() for each in undo]


def dropout_in_one_layer(pipe):
    layer = pipe.unet.mid_block
    layer.train()
    return layer.eval


def freeu(pipe):
    pipe.unet.enable_freeu(s1=0.1, s2=0.1, b1=9.0, b2=9.0)
    return lambda: [vars(block).pop(key) for block in pipe.unet.up_blocks for key in ("s1", "s2", "b1", "b2")]


def gradients_off(pipe):
    torch.set_grad_enabled(False)
    return lambda: torch.set_grad_enabled(True)


def coarse_products(pipe):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(before)


def other_end_of_a_prompt(pipe):
    return put(pipe.text_encoder.config, "eos_token_id", 5)


def under_a_name(layer, name, value):
    """Put something where it is read before what PyTorch keeps under that name, and is in no state."""
    vars(layer)[name] = value
    return lambda: vars(layer).pop(name)


def another_layer_under_its_name(pipe):
    own = pipe.unet.conv_out

    class Gated(nn.Module):
        def forward(self, x):
            return own(x)

    return under_a_name(pipe.unet, "conv_out", Gated())


def another_weight_under_its_name(pipe):
    return under_a_name(pipe.unet.conv_in, "weight", 3 * pipe.unet.conv_in.weight.detach())


def a_class_for_a_forward(pipe):
    layer, own = pipe.unet.conv_out, type(pipe.unet.conv_out).forward

    class Gated:
        def __new__(cls, x):
            return own(layer, x)

    return under_a_name(layer, "forward", Gated)


def into_the_class(pipe, name, value):
    setattr(type(pipe.unet), name, value)
    return lambda: delattr(type(pipe.unet), name)


def new_method_of_the_class(pipe):
    return into_the_class(pipe, "__call__", lambda self, *args, **kwargs: nn.Module.__call__(self, *args, **kwargs))


def reading_of_the_class(pipe):
    return into_the_class(pipe, "__getattribute__", lambda self, name: object.__getattribute__(self, name))


def descriptor_in_the_class(pipe):
    class Gated:
        def __get__(self, layer, kind):
            return layer._modules["conv_out"]

        def __set__(self, layer, value):
            pass

    return into_the_class(pipe, "conv_out", Gated())


def another_parent_of_the_class(pipe):
    kind = type(pipe.unet)
    own = kind.__bases__
    kind.__bases__ = (type("Gated", (nn.Module,), {"__call__": nn.Module.__call__}), *own)

    def undo():
        kind.__bases__ = own

    return undo


def code_of_a_method(pipe):
    own = nn.SiLU.forward.__code__
    nn.SiLU.forward.__code__ = (lambda self, input: 0 * input).__code__

    def undo():
        nn.SiLU.forward.__code__ = own

    return undo


def method_of_the_processors_class(pipe):
    kind = type(next(iter(pipe.unet.attn_processors.values())))
    own = kind.__call__
    kind.__call__ = lambda self, *args, **kwargs: own(self, *args, **kwargs)

    def undo():
        kind.__call__ = own

    return undo


def parameters_kept_elsewhere(pipe):
    class Gated(dict):
        def __getitem__(self, name):
            return 2 * dict.__getitem__(self, name)

    layer = pipe.unet.conv_in
    own = vars(layer)["_parameters"]
    vars(layer)["_parameters"] = Gated(own)
    return lambda: vars(layer).update(_parameters=own)


def hook_on_the_state(pipe):
    """What is hashed is not what computes."""
    return pipe.unet.register_state_dict_post_hook(lambda module, state, prefix, metadata: None).remove


def hook_on_a_gradient(pipe):
    return pipe.unet.conv_in.weight.register_hook(lambda gradient: 0 * gradient).remove


def hook_after_a_gradient(pipe):
    return pipe.unet.conv_in.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.zero_()).remove


def hook_on_what_is_kept_for_gradients(pipe):
    entered = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: 0 * kept)
    entered.__enter__()
    return lambda: entered.__exit__()


def hook_under_a_false_name(pipe):
    made = {}
    exec(compile("def hook(module, args, output): return output", output_capturing.__file__, "exec"), made)
    return pipe.unet.register_forward_hook(made["hook"]).remove


def other_attention(pipe):
    config = pipe.text_encoder.config
    return put(config, "_attn_implementation_internal", "eager")


def in_a_copy(change):
    """The same on a copy of the denoiser, which takes the place of the base's."""

    def do(pipe):
        own = pipe.unet
        pipe.unet = copy.deepcopy(own)
        change(pipe)

        def undo():
            pipe.unet = own

        return undo

    return do


class Gate:
    """Neither a number nor code by the look of it: PyTorch asks it what every operation with it gives."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return function(*(1.0 if one is self else one for one in args), **(kwargs or {})) * 0.5


def a_number_that_runs(pipe):
    return put(pipe.unet.mid_block.resnets[0], "output_scale_factor", Gate())


def a_number_of_numpy(pipe):
    return put(pipe.unet.mid_block.resnets[0], "output_scale_factor", np.float32(7))


def layers_in_another_order(pipe):
    layers = pipe.unet.mid_block.resnets._modules
    own = dict(layers)
    layers.clear()
    layers.update(reversed(own.items()))
    return lambda: (layers.clear(), layers.update(own))


@pytest.mark.parametrize("do", [a_number_that_runs, a_number_of_numpy, layers_in_another_order])
def test_what_vanishes_from_the_look_and_the_order_of_layers_is_seen(do):
    assert verdict_on(structure(Cheat(beside(do)))).removal == CODE_BESIDE


@pytest.mark.parametrize(
    "do",
    [
        another_layer_under_its_name, another_weight_under_its_name, a_class_for_a_forward, new_method_of_the_class,
        reading_of_the_class, descriptor_in_the_class, another_parent_of_the_class, code_of_a_method,
        method_of_the_processors_class, parameters_kept_elsewhere, hook_on_the_state, hook_on_a_gradient,
        hook_after_a_gradient, hook_on_what_is_kept_for_gradients, hook_under_a_false_name, other_attention,
        in_a_copy(dropout), in_a_copy(attention_scaled), in_a_copy(another_weight_under_its_name),
    ],
)  # fmt: skip
def test_code_that_hides_from_the_look_at_it_is_seen(do):
    found = structure(Cheat(beside(do)))
    assert verdict_on(found).removal == CODE_BESIDE
    assert verdict_on(structure(Cheat(small_edit))).removal == "C5"  # and it is taken off again


def test_a_whole_model_is_not_taken_for_code():
    """Other objects of the same classes are another model, and no code."""
    assert verdict_on(structure(Cheat(in_a_copy(small_edit)))).removal == "C5"


@pytest.mark.parametrize(
    "do",
    [
        hook, hook_inside, hook_on_the_decoder, hook_on_the_encoder, other_forward, other_class,
        other_method_of_the_class, other_processor, other_scale_of_latents, dropout, other_positions, parametrised,
        hook_on_every_module, mode, other_class_of_a_weight, attention_scaled, dropout_in_one_layer, freeu,
        other_end_of_a_prompt, gradients_off, coarse_products,
    ],
)  # fmt: skip
def test_what_stands_beside_an_edit_is_no_removal(do):
    found = structure(Cheat(beside(do)))
    report = verdict_on(found)
    assert report.removal == CODE_BESIDE and report.answers["weights"].verdict == "shown not"
    declared = verdict_on(found, kinds={"UCE": "retrained"}, scopes={"UCE": "everything"})
    assert declared.removal == CODE_BESIDE
    assert next(e.note for e in found if e.measure == "beside" and e.model == "UCE")


def test_an_edit_alone_is_not_taken_for_one():
    found = structure(Cheat(small_edit))
    assert verdict_on(found).removal == "C5"
    assert [e.estimate.value for e in found if e.measure == "beside"] == [0.0, 0.0]


class Replacing:
    """Reads another word for the target."""

    def __init__(self, own):
        self.own = own

    def __call__(self, text, *args, **kwargs):
        return self.own([line.replace("cat", "dog") for line in text], *args, **kwargs)

    def __getattr__(self, name):
        return getattr(vars(self)["own"], name)


def other_tokenizer(pipe):
    return put(pipe, "tokenizer", Replacing(pipe.tokenizer))


def new_word(pipe):
    words = copy.deepcopy(pipe.tokenizer)
    words.add_tokens(["cat"])
    return put(pipe, "tokenizer", words)


def words_exchanged(pipe):
    """The same words, and the same number of them."""
    inner = pipe.tokenizer.backend_tokenizer
    own, other = inner.model, json.loads(inner.model.__getstate__())
    one, two = list(other["vocab"])[-2:]
    other["vocab"] |= {one: other["vocab"][two], two: other["vocab"][one]}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in other["merges"]]
    inner.model = models.BPE(other["vocab"], merges, end_of_word_suffix="</w>")
    return lambda: setattr(inner, "model", own)


def other_side_is_cut(pipe):
    return put(pipe.tokenizer, "truncation_side", "left")


def other_prediction(pipe):
    own = pipe.scheduler
    return put(pipe, "scheduler", type(own).from_config(own.config, prediction_type="v_prediction"))


def other_noise(pipe):
    return put(pipe.scheduler, "alphas_cumprod", 0.1 * pipe.scheduler.alphas_cumprod)


def other_start(pipe):
    return put(pipe.scheduler, "init_noise_sigma", 3.0)


def checker(pipe):
    return put(pipe, "safety_checker", nn.Linear(1, 1))


class Reading:
    """Stands in the place of the tokenizer's inside and hands everything on."""

    def __init__(self, own):
        self.own = own

    def __getattr__(self, name):
        return getattr(vars(self)["own"], name)


def other_inside_of_the_tokenizer(pipe):
    return put(pipe.tokenizer, "_tokenizer", Reading(pipe.tokenizer._tokenizer))


def other_config(pipe):
    own = pipe.config
    pipe.register_to_config(requires_safety_checker=not own["requires_safety_checker"])
    return lambda: setattr(pipe, "_internal_dict", own)


def other_encoding(pipe):
    return put(pipe, "encode_prompt", pipe.encode_prompt)


@pytest.mark.parametrize(
    ("do", "what"),
    [
        (other_tokenizer, "tokenizer"), (new_word, "tokenizer"), (words_exchanged, "tokenizer"),
        (other_side_is_cut, "tokenizer"), (other_prediction, "scheduler"), (other_noise, "scheduler"),
        (other_start, "scheduler"), (checker, "safety_checker"), (other_encoding, "class"),
        (other_inside_of_the_tokenizer, "tokenizer"), (other_config, "config"),
    ],
)  # fmt: skip
def test_what_stands_around_the_model_is_refused(do, what):
    context = tiny_context()
    with pytest.raises(ValueError, match=f"changes the pipeline's {what}, which is no edit of a model.*needs wrap"):
        with context.open(Model("cheat", "erased", Cheat(beside(do)))):
            pass
    with context.open(Model("edit", "erased", Cheat(small_edit))):  # and everything is as it was
        pass


def test_another_shift_of_the_schedule_is_refused():
    """It is in no config: a pipeline of flow matching keeps it on the scheduler."""
    pipe = tiny("flux")
    with pytest.raises(ValueError, match="changes the pipeline's scheduler"):
        with opened(pipe, Cheat(lambda pipe: put(pipe.scheduler, "_shift", 9.0))):
            pass


def other_concepts(pipe):
    return overwrite(pipe.safety_checker.weight, pipe.safety_checker.weight.detach() + 1)


def hook_on_the_checker(pipe):
    return pipe.safety_checker.register_forward_hook(lambda module, args, output: output).remove


@pytest.mark.parametrize("do", [other_concepts, hook_on_the_checker])
def test_a_safety_checker_that_hides_the_target_is_refused(do):
    context = tiny_context()
    context.pipe.safety_checker = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="changes the pipeline's safety_checker, which is no edit of a model"):
        with context.open(Model("cheat", "erased", Cheat(beside(do)))):
            pass


def leaves_a_hook(pipe):
    hook(pipe)
    return small_edit(pipe)


def leaves_training(pipe):
    pipe.unet.train()
    return small_edit(pipe)


def breaks_the_scheduler(pipe):
    undo = small_edit(pipe)
    return lambda: (undo(), other_noise(pipe))


def leaves_gradients_off(pipe):
    gradients_off(pipe)
    return small_edit(pipe)


def leaves_another_dtype(pipe):
    torch.set_default_dtype(torch.float64)
    return small_edit(pipe)


@pytest.fixture
def torch_as_it_was():
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize(
    "do", [leaves_a_hook, leaves_training, breaks_the_scheduler, leaves_gradients_off, leaves_another_dtype]
)
def test_what_is_left_behind_would_be_drawn_into_the_others(do):
    with pytest.raises(RuntimeError, match="did not give the pipeline back: .* after remove"):
        with opened(tiny_context().pipe, Cheat(do)):
            pass


class Alternating(Cheat):
    """Another edit each time it is applied."""

    def __init__(self, turns):
        super().__init__(self.edit)
        self.turns = iter(turns)

    def edit(self, pipe):
        weight = pipe.unet.conv_out.weight
        return overwrite(weight, weight.detach() * next(self.turns))


def test_every_probe_sees_the_model_that_was_drawn():
    context = tiny_context()
    with pytest.raises(RuntimeError, match="cheat has other weights than when its pictures were drawn"):
        assess(
            context.pipe, {"cheat": Alternating([2.0, 2.0, 3.0, 4.0, 5.0])}, context.suite, preset="smoke",
            detectors=[context.judge, context.selector], probes=["construction"], progress=False,
        )  # fmt: skip


def test_a_model_that_changes_while_it_draws_is_refused():
    def drifting(pipe):
        weight = pipe.unet.conv_out.weight
        undo = overwrite(weight, weight.detach() * 2)

        def drift(module, args):
            weight.data.mul_(1.01)

        handle = pipe.unet.register_forward_pre_hook(drift)
        return lambda: (handle.remove(), undo())

    context = tiny_context()
    with pytest.raises(RuntimeError, match="cheat has other weights after drawing than before"):
        assess(
            context.pipe, {"cheat": Cheat(drifting)}, context.suite, preset="smoke",
            detectors=[context.judge, context.selector], probes=["direct"], progress=False,
        )  # fmt: skip


def test_what_wraps_a_pipeline_is_a_filter_whatever_it_says_of_itself():
    class Wrapped(Cheat):
        def wrap(self, pipe):
            return pipe

    for kind in ("weights", "retrained", "adapter"):
        cheat = Wrapped(small_edit)
        cheat.intervention = kind
        assert Model("cheat", "erased", cheat).kind == "filter"


def test_what_wraps_only_while_it_is_applied_wraps_nothing():
    """Else it would be judged as an edit and draw through a filter."""

    class Hidden(Cheat):
        def apply(self, pipe):
            super().apply(pipe)
            self.wrap = lambda pipe: None

        def remove(self, pipe):
            del self.wrap
            super().remove(pipe)

    pipe, model = tiny_pipeline(), Model("cheat", "erased", Hidden(small_edit))
    with model.on(pipe) as drawn:
        assert drawn is pipe
    assert model.kind == "weights"


def dormant_hook(pipe):
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: None)


def dormant_forward(pipe):
    own = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = lambda x: own(x)


def dormant_layer(pipe):
    another_layer_under_its_name(pipe)


def named_as_a_library(function, module="torch.nn.modules.module"):
    """What the code says of itself: its module, name and file."""
    function.__module__, function.__qualname__ = module, "Module.forward"
    function.__code__ = function.__code__.replace(co_filename=sys.modules[module].__file__)
    return function


def dormant_hook_under_another_name(pipe):
    pipe.unet.conv_in.register_forward_hook(named_as_a_library(lambda module, args, output: None))


def dormant_hook_inside_one_of_torch(pipe):
    pipe.unet.conv_in.register_forward_hook(torch.no_grad()(lambda module, args, output: None))


def dormant_layer_as_a_hook(pipe):
    class Waiting(nn.Module):
        def forward(self, module, args, output):
            return None

    pipe.unet.conv_in.register_forward_hook(Waiting().__call__)  # a method that is PyTorch's


def dormant_layer_inside_one_of_torch(pipe):
    class Waiting(nn.Module):
        def forward(self, *given):
            return None

    pipe.unet.conv_in.register_forward_hook(nn.Sequential(Waiting()))


def dormant_default(pipe):
    def hook(module, args, output, then=None):
        return None

    pipe.unet.conv_in.register_forward_hook(functools.partial(nn.Module.register_forward_hook, hook=hook))


def dormant_module_of_torch(pipe):
    made = types.ModuleType("torch.nn.more")
    exec(compile("def hook(module, args, output): return None", "more.py", "exec"), vars(made))
    made.__file__ = "more.py"
    sys.modules["torch.nn.more"] = made
    pipe.unet.conv_in.register_forward_hook(made.hook)


def dormant_object_under_another_name(pipe):
    class Hook:
        def __call__(self, module, args, output):
            return None

    Hook.__module__, Hook.__qualname__ = "torch.nn.modules.module", "Module"
    pipe.unet.conv_in.register_forward_hook(Hook())


def dormant_forward_beside_a_hook_that_is_none(pipe):
    pipe.unet.conv_in._hf_hook = None
    dormant_forward(pipe)


def dormant_forward_of_the_whole_beside_a_hook_that_is_none(pipe):
    own = pipe.unet.forward
    pipe.unet._hf_hook, pipe.unet.forward = None, named_as_a_library(lambda *args, **more: own(*args, **more))


def dormant_number(pipe):
    class Scale(float):
        def __mul__(self, other):
            return other

    next(layer for layer in pipe.unet.modules() if hasattr(layer, "scale")).scale = Scale(1.0)


def dormant_setting(pipe):
    class Scale:
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            return args[0]

    next(layer for layer in pipe.unet.modules() if hasattr(layer, "scale")).scale = Scale()


DORMANT = [
    dormant_hook, dormant_forward, dormant_layer, other_processor, dormant_hook_under_another_name,
    dormant_hook_inside_one_of_torch, dormant_layer_as_a_hook, dormant_layer_inside_one_of_torch, dormant_default,
    dormant_module_of_torch, dormant_object_under_another_name,
    dormant_forward_beside_a_hook_that_is_none, dormant_number, dormant_setting,
]  # fmt: skip


def test_a_model_that_is_moved_by_accelerate_may_be_a_base():
    pipe = tiny_pipeline()
    for part in (pipe.unet, pipe.text_encoder):
        cpu_offload(part, execution_device="cpu")
    check_base(pipe)
    own = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = named_as_a_library(lambda x: own(x))
    with pytest.raises(ValueError, match="its unet carries another forward on conv_in"):
        check_base(pipe)


def test_another_forward_of_the_whole_is_refused_beside_a_hook_that_is_none():
    pipe = tiny_pipeline()
    dormant_forward_of_the_whole_beside_a_hook_that_is_none(pipe)
    with pytest.raises(ValueError, match="the base's unet has another forward than its class"):
        check_base(pipe)


@pytest.mark.parametrize("do", DORMANT)
def test_a_base_on_which_something_waits_is_refused(do):
    """An eraser that had the pipeline before could switch it on, and what stood there before is not seen."""
    pipe = tiny_pipeline()
    check_base(pipe)
    do(pipe)
    with pytest.raises(ValueError, match="the base must be unmodified; its unet carries"):
        check_base(pipe)


def test_pictures_of_an_edit_and_of_code_beside_it_are_not_exchanged(tmp_path):
    """Both have the same weights, by which pictures are cached."""

    def blank(pipe):
        return pipe.unet.conv_out.register_forward_hook(lambda module, args, output: output * 0).remove

    context = tiny_context()
    for order in (("hidden", "honest"), ("honest", "hidden")):
        cheats = {"honest": Cheat(small_edit), "hidden": Cheat(beside(blank))}
        found = assess(
            context.pipe, {name: cheats[name] for name in order}, context.suite, preset="smoke", progress=False,
            detectors=[context.judge, context.selector], probes=["direct", "paraphrase"], cache_dir=tmp_path / order[0],
        )  # fmt: skip
        for probe in ("direct", "paraphrase"):
            drawn = {c.model: [row.facts["image_hash"] for row in c.rows] for c in found.cells if c.probe == probe}
            assert drawn["honest"] != drawn["hidden"], (probe, order)


def test_weights_with_the_sum_of_others_are_not_taken_for_them():
    """The sums by which weights are recognised have factors that nobody knows before."""
    ours, theirs = WeightHashes(), WeightHashes()
    a, b = (int(factor) for factor in theirs._factors["cpu"][1][:2])
    words = np.array([b, 2**64 - a], dtype=np.uint64)  # a b - b a = 0
    forged, nothing = torch.from_numpy(words.view(np.int64)), torch.zeros(2, dtype=torch.int64)
    assert theirs.sum_of(forged) == theirs.sum_of(nothing)
    assert ours.sum_of(forged) != ours.sum_of(nothing)


def test_weights_that_are_no_numbers_are_no_removal():
    def broken(pipe):
        return overwrite(pipe.unet.conv_in.weight, torch.full_like(pipe.unet.conv_in.weight, torch.nan))

    report = verdict_on(structure(Cheat(broken)))
    assert report.removal == "C0" and report.answers["weights"].verdict == "undecided"
    assert any("no number" in line for line in report.needed["removal"])


@pytest.mark.parametrize("kind", ["magic", None, 5, ["weights"]])
def test_an_unknown_intervention_is_refused(kind):
    cheat = Cheat(small_edit)
    cheat.intervention = kind
    with pytest.raises(ValueError, match="has the intervention .*; an erasure's is one of"):
        Model("cheat", "erased", cheat)


@pytest.mark.parametrize("config", [None, [1], "x", {1: 2}, {"keep": 5}, {"keep": "cat"}, {"prompts": [3]}])
def test_a_config_that_cannot_be_read_is_refused(config):
    cheat = Cheat(small_edit)
    cheat.config = config
    with pytest.raises(ValueError, match="in the config of 'cheat' must be|the config of 'cheat' must be a mapping"):
        Model("cheat", "erased", cheat)


@pytest.mark.parametrize(("settings", "beside"), [({"dropout": 0.1}, False), ({"upcast_attention": True}, True)])
def test_how_a_retrained_model_was_trained_is_no_code_beside_its_weights(settings, beside):
    """Dropout does nothing while a model draws. Another setting may decide what is drawn."""
    (context, base), probe = shared(), Construction(images=0)
    unet = context.pipe.unet
    config = {**{key: value for key, value in unet.config.items() if not key.startswith("_")}, **settings}
    change = Swapped("UCE", {"unet": type(unet).from_config(config).eval()}, config={"scope": "denoiser"})
    rows = {"base": base, "UCE": probe.run(Model("UCE", "erased", change), context)}
    found = probe.weigh(rows, {"base": "base", "UCE": "erased"})
    given = {"kinds": {"UCE": "retrained"}, "scopes": {"UCE": "denoiser"}}
    report = judged([*without(good(), "construction"), *found], **given)
    assert report.removal == (CODE_BESIDE if beside else "C5")

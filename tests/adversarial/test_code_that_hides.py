"""Code beside the weights that shows only when nobody looks, or stands where a value is expected."""

from __future__ import annotations

import sys

import pytest

from erasure.eval import assess
from erasure.eval.core.models import Model, check_base
from erasure.eval.judge.licences import CODE_BESIDE
from tests.adversarial.cheat import Cheat, shared, structure, verdict_on
from tests.adversarial.test_code_beside_the_weights import beside, in_a_copy, put, small_edit
from tests.probe_helpers import tiny_context
from tests.tiny import tiny_pipeline


class Word(str):
    """A word that runs when it is compared."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return str.__eq__(self, other)


class Whole(int):
    """A number that runs when it is computed with."""

    __hash__ = int.__hash__

    def __rmul__(self, other):
        return int(self) * other

    __mul__ = __rmul__

    def __eq__(self, other):
        return int.__eq__(self, other)


class Number(float):
    """A number that looks like the usual one, and that PyTorch asks how to compute with it."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        return function(*(float(one) if isinstance(one, cls) else one for one in args), **(kwargs or {}))


class Gate:
    """No number at all, and one to PyTorch."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return function(*(1.0 if one is self else one for one in args), **(kwargs or {}))


class Truth:
    def __bool__(self):
        return False


class Steps(list):
    def __contains__(self, step):
        return False


class Solver:
    def step(self, *args, **kwargs):
        raise NotImplementedError


def written(config, key, value):
    """Another attribute of a frozen config, whose item stays as it was; what is returned puts the own one back."""
    own = vars(config)[key]
    vars(config)[key] = value
    return lambda: vars(config).__setitem__(key, own)


def truth_in_the_config(pipe):
    return written(pipe.unet.config, "center_input_sample", Truth())


def number_that_computes(pipe):
    layer = pipe.unet.mid_block.resnets[0]
    return put(layer, "output_scale_factor", Number(layer.output_scale_factor))


def gate(pipe):
    return put(pipe.unet.mid_block.resnets[0], "output_scale_factor", Gate())


def end_of_a_prompt(pipe):
    config = pipe.text_encoder.config
    return put(config, "eos_token_id", Whole(config.eos_token_id))


@pytest.mark.parametrize("do", [truth_in_the_config, number_that_computes, in_a_copy(gate), end_of_a_prompt])
def test_an_object_in_the_place_of_a_value_is_code_beside_the_weights(do):
    assert verdict_on(structure(Cheat(beside(do)))).removal == CODE_BESIDE
    assert verdict_on(structure(Cheat(small_edit))).removal == "C5"  # and it is taken off again


def words_of_the_scheduler(pipe):
    return written(pipe.scheduler.config, "prediction_type", Word(pipe.scheduler.config.prediction_type))


def scale_of_the_pipeline(pipe):
    return put(pipe, "vae_scale_factor", Whole(pipe.vae_scale_factor))


def solver(pipe):
    return put(pipe.scheduler, "solver_p", Solver())


def steps_to_leave_out(pipe):
    return put(pipe.scheduler, "disable_corrector", Steps())


@pytest.mark.parametrize("do", [words_of_the_scheduler, scale_of_the_pipeline, solver, steps_to_leave_out])
def test_an_object_in_the_place_of_a_setting_around_the_model_is_refused(do):
    context, _ = shared()
    with (
        pytest.raises(ValueError, match="changes the pipeline's .*, which is no edit of a model"),
        context.open(Model("cheat", "erased", Cheat(beside(do)))),
    ):
        pass


def hook_unless_looked_at(*files):
    """A hook that is not there while one of some source files is on the stack."""

    def do(pipe):
        frame, looked = sys._getframe(), False
        while frame is not None:
            looked |= frame.f_code.co_filename.endswith(files)
            frame = frame.f_back
        return (lambda: None) if looked else pipe.unet.register_forward_hook(lambda module, args, output: None).remove

    return do


@pytest.mark.parametrize("files", [("construction.py",), ("drawing.py",)])
def test_code_that_is_there_at_one_time_and_not_at_another_is_refused(files):
    context = tiny_context()
    with pytest.raises(RuntimeError, match="cheat is not the same model than when its pictures were drawn"):
        assess(
            context.pipe, {"cheat": Cheat(beside(hook_unless_looked_at(*files)))}, context.suite, preset="smoke",
            detectors=[context.judge, context.selector], probes=["construction"], progress=False,
        )  # fmt: skip


def test_code_that_comes_while_pictures_are_drawn_is_refused():
    """The scheduler of the base cannot call it, but a hook of one picture can leave another one."""

    def do(pipe):
        left = []

        def first(module, args):
            left.append(pipe.unet.register_forward_hook(lambda module, args, output: None))
            own.remove()

        own = pipe.unet.register_forward_pre_hook(first)
        return lambda: [handle.remove() for handle in (own, *left)]

    context = tiny_context()
    with pytest.raises(RuntimeError, match="cheat is not the same model after drawing"):
        assess(
            context.pipe, {"cheat": Cheat(beside(do))}, context.suite, preset="smoke",
            detectors=[context.judge, context.selector], probes=["direct"], progress=False,
        )  # fmt: skip


def test_a_method_that_waits_around_the_model_of_a_base_is_refused():
    """Before the assessment a closure is put there; later the eraser would only have to switch it on."""
    pipe = tiny_pipeline()
    waiting = [(pipe.scheduler, "step"), (pipe, "encode_prompt"), (pipe, "check_inputs"), (pipe.tokenizer, "encode")]
    for thing, name in [*waiting, (pipe.image_processor, "postprocess")]:
        check_base(pipe)
        own = getattr(thing, name)
        undo = put(thing, name, lambda *args, own=own, **kwargs: own(*args, **kwargs))
        with pytest.raises(ValueError, match=f"the base must be unmodified; it carries another {name} on its"):
            check_base(pipe)
        undo()

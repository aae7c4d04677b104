"""What decides how a pipeline draws beside its weights: code, hooks, tokenizers, the scheduler, settings.

An edit of weights leaves all of it alone. It is compared, never run. What stands in a function of a Python module (and
in no class or object of the pipeline) is not seen: a function of PyTorch that somebody replaced, for example.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from types import CodeType, NoneType
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.utils import output_capturing

from erasure import io
from erasure.backbone.fingerprint import content
from erasure.eval.core.hashes import modules_of
from erasure.eval.core.origin import comes_from, held_by

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
STORING = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
LEARNING = ("_backward_hooks", "_post_accumulate_grad_hooks")  # on a tensor, for its gradient
HOLDING = ("_parameters", "_buffers", "_modules", "_internal_dict", *HOOKS, *STORING)  # what a layer keeps things in
OF_A_FILE = ("config", "name_or_path")  # of transformers: what they say depends on who wrote the file
SCHEDULE = ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod", "alpha_t", "sigma_t", "lambda_t")
NUMBERS = (  # of a scheduler; where they follow from its steps they are no plain numbers
    "init_noise_sigma", "order", "_shift", "sigma_min", "sigma_max", "variance_type", "predict_x0",
)  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")  # whose hooks and methods may stand on a base
OFFLOADING = ("_hf_hook", "_diffusers_hook")  # what accelerate and diffusers put on a layer to move it
LARGEST = 2**20  # numbers of a buffer that is looked at
USUAL = (bool, int, float, complex, str, NoneType, torch.dtype)
ARRAYS: tuple[type, ...] = (Tensor, np.ndarray, *set(np.sctypeDict.values()))  # of a scheduler, whose steps come and go


class Same:
    """An object that equals itself alone, kept so that no other takes its place in memory."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def around(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that is no part with weights, by name, for comparisons: class, scheduler, tokenizers."""
    weighted = modules_of(pipe)
    kept = {name: part for name, part in getattr(pipe, "__dict__", {}).items() if name not in weighted}
    parts = [name for name in kept if name.endswith("processor") or name in getattr(pipe, "config", {})]
    own = {name: method for name, method in _callables(pipe).items() if name not in parts}
    plain = (bool, int, float, str, list, tuple)
    config = {key: value for key, value in getattr(pipe, "config", {}).items() if key not in parts}
    return {
        "class": (Same(type(pipe)), own, _code([type(pipe)])),
        "config": {key: _text(value) for key, value in config.items() if key not in weighted and key[:1] != "_"},
        "attributes": _attributes(getattr(pipe, "config", None), {*parts, *weighted}),
        **{name: _described(kept[name]) for name in parts},
        **{name: _text(v) for name, v in kept.items() if isinstance(v, plain) and not name.startswith("_")},
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names in which two of :func:`around` differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def code_of(pipe: Any) -> dict[str, Any]:
    """The code of the parts with weights, for :func:`added`: classes of layers, own methods, hooks, settings."""
    parts = modules_of(pipe)
    layers = [layer for module in parts.values() for layer in module.modules()]
    processors = [vars(layer)["processor"] for layer in layers if vars(layer).get("processor") is not None]
    return {
        "parts": {
            part: (Same(module), dict(_layers(module)), _settings(module), dict(_state(module)))
            for part, module in parts.items()
        },
        "classes": _code({type(one): None for one in [*layers, *processors]}),
        "everywhere": _everywhere(),
        "torch": _settings_of_torch(),
    }


def added(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What stands on the parts after a change and did not before, in words; empty for a change of numbers alone."""
    found = []
    for part, (module, layers, settings, state) in after["parts"].items():
        was, old, known, state_was = before["parts"].get(part, (None, {}, {}, {}))
        for name, (kind, own, hooks, processor) in layers.items():
            place = f"{part}.{name}" if name else part
            kind_was, own_was, hooks_was, processor_was = old.get(name, (None, {}, (), None))
            if kind != kind_was:
                found.append(f"{place} is a {kind.value.__name__}")
            found += [
                f"{place} has another {key}"
                for key, value in own.items()
                if own_was.get(key) != value and (was == module or key not in own_was or own_was[key][1] != value[1])
            ]
            if any(hook not in hooks_was for hook in hooks) and (was == module or not hooks_was):
                found.append(f"a hook stands on {place}")
            if processor != processor_was:
                found.append(f"{place} has another processor")
        found += [
            f"{part}.config.{key} is another"
            for key in settings
            if known.get(key) != settings[key] and (was == module or "dropout" not in key)
        ]
        found += [
            f"{part}.{key} is another"
            for key in {**state_was, **state}  # what is gone became something unreadable
            if state_was.get(key) != state.get(key) and (was == module or not _of_its_own(key, state.get(key)))
        ]
    old_code, new_code = dict(before["classes"]), dict(after["classes"])
    known = {kind for kind, _ in old_code} & {kind for kind, _ in new_code}
    found += [
        f"{kind.value.__name__}.{name} was replaced"
        for kind, name in {**old_code, **new_code}
        if kind in known and old_code.get((kind, name)) != new_code.get((kind, name))
    ]
    new = [one for one in after["everywhere"] if one not in before["everywhere"]]
    found += [f"{what} stands on everything that PyTorch runs" for what, _ in new]
    found += [f"PyTorch's {key} is another" for key, value in after["torch"].items() if before["torch"][key] != value]
    return list(dict.fromkeys(found))


def exchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two looks at a model that is open, in words: what came, and what went."""
    return [*added(before, after), *added(after, before)]


def standing(module: nn.Module) -> list[str]:
    """What stands on a part and came with no library: hooks, other methods and layers, attention processors.

    Switched off it changes nothing; a change that switches it on would be compared with a base that has it, too.
    """
    libraries = {*LIBRARIES, _package(module)}
    layers, found = dict(module.named_modules()), []
    for name, (_, _, hooks, processor) in _layers(module):
        layer, place = layers[name], name or "it"
        if not all(comes_from(libraries, hook.value) for hook in hooks):
            found.append(f"a hook on {place}")
        known = {*layer._modules, *layer._parameters, *layer._buffers}
        hooked = [vars(layer)[key] for key in OFFLOADING if key in vars(layer)]  # they have a ``forward`` of their own
        if not all(comes_from(libraries, hook) for hook in hooked):
            found.append(f"a hook on {place}")
        ours = [key for key in ("forward", "_old_forward") if hooked and comes_from(libraries, vars(layer).get(key))]
        own = [key for key in (*_callables(layer), *_plain(layer)) if key not in (*ours, *OFFLOADING)]
        found += [f"another {key} on {place}" for key in own if key in known or hasattr(type(layer), key)]
        found += [f"another {key} on {place}" for key, value in vars(layer).items() if _runs(value, libraries)]
        if processor is not None and not comes_from(libraries, processor[0].value):
            found.append(f"another processor on {place}")
    return found


def standing_around(pipe: Any) -> list[str]:
    """The same of what has no weights: methods of the pipeline, its scheduler, tokenizers and processors."""
    weighted = modules_of(pipe)
    named = [name for name in vars(pipe) if name.endswith("processor") or name in getattr(pipe, "config", {})]
    parts = {name: vars(pipe)[name] for name in named if name not in weighted and hasattr(vars(pipe)[name], "__dict__")}
    return [
        f"another {key} on its {name}"
        for name, part in {"pipeline": pipe, **parts}.items()
        for key in _callables(part)
        if hasattr(type(part), key) and not comes_from({*LIBRARIES, _package(part)}, vars(part)[key])
    ]


def _package(thing: Any) -> str:
    """The top-level package that the class of an object is defined in."""
    return type(thing).__module__.partition(".")[0]


def reads_otherwise(pipe: Any, other: Any) -> str | None:
    """The first tokenizer of a pipeline that gives its own words other numbers than the other pipeline's does.

    An embedding of words in another order is the same model to its own tokenizer, and another one to this.
    """
    for name, part in pipe.components.items():
        ours, theirs = (getattr(one, "tokenizer", one) for one in (part, other.components.get(name)))
        if isinstance(ours, transformers.PreTrainedTokenizerBase):
            if not isinstance(theirs, transformers.PreTrainedTokenizerBase):
                return name
            words = sorted(ours.get_vocab())
            read = [one(words, add_special_tokens=False).input_ids for one in (ours, theirs)]
            if read[0] != read[1]:
                return name
    return None


def _runs(value: Any, libraries: Collection[str]) -> bool:
    """Whether a setting of a layer has code of its own that runs when PyTorch computes with it."""
    if isinstance(value, Tensor) or type(value) in (bool, int, float, complex, str, NoneType):
        return False
    code = hasattr(type(value), "__torch_function__") or isinstance(value, int | float | complex)
    return code and not comes_from({*libraries, "numpy"}, type(value))


def state_of(pipe: Any) -> dict[str, Any]:
    """What has to be as it was when a change is taken off, beside the weights."""
    return {"around": around(pipe), "code": code_of(pipe)}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In words, how a pipeline differs from what :func:`state_of` found before."""
    found = [f"its {name} is another" for name in changes(before["around"], after["around"])]
    return found + added(before["code"], after["code"])


# --- inside ----------------------------------------------------------------------------------------------------------


def _of_its_own(key: str, value: Any) -> bool:
    """Whether another model may differ there and be no less a model: in what its file says, and by not training."""
    name = key.rpartition(".")[2]
    return name in OF_A_FILE or (name == "training" and value == "False")


def _described(part: Any) -> Any:
    """An object beside the weights, by what decides how it works."""
    if part is None:
        return None
    facts: list[Any] = [Same(type(part)), _callables(part), _code([type(part)])]
    if isinstance(part, transformers.BaseImageProcessor):  # before a safety checker
        facts.append(_text(part.to_dict()))
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        facts.append({key: _text(value) for key, value in config.items() if not key.startswith("_")})
        facts.append(_attributes(config))
    if isinstance(part, nn.Module):  # a safety checker, a ControlNet
        facts += [content(part), dict(_layers(part)), dict(_state(part))]
    tables = [(name, value) for name in SCHEDULE if isinstance(value := getattr(part, name, None), Tensor)]
    facts += [(name, io.blake2b(io.tensor_bytes(name, table), size=16)) for name, table in tables]
    own = getattr(part, "__dict__", {})
    if isinstance(part, SchedulerMixin):
        facts.append({key: kinds for key, value in own.items() if key[:1] != "_" and (kinds := _kinds(value, ARRAYS))})
    facts += [(name, _text(value)) for name in NUMBERS if isinstance(value := own.get(name), int | float | str)]
    words = getattr(part, "tokenizer", part)  # a processor of several inputs has one
    if isinstance(words, transformers.PreTrainedTokenizerBase):
        facts.append(_vocabulary(words))
    return facts


def _vocabulary(tokenizer: Any) -> list[Any]:
    """How a tokenizer reads: its words with their numbers, and what is done before and after them."""
    sides = tokenizer.padding_side, tokenizer.truncation_side
    found = [len(tokenizer), _text(tokenizer.model_max_length), _text(sides), _text(tokenizer.special_tokens_map)]
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return [*found, _text(tokenizer.get_vocab())]
    steps = ("normalizer", "pre_tokenizer", "post_processor")
    found += [Same(type(inner)), *(_text(getattr(inner, step, None)) for step in steps)]
    return [*found, _text(tokenizer.added_tokens_decoder), io.blake2b([inner.model.__getstate__()], size=16)]


def _layers(module: nn.Module) -> Iterator[tuple[str, tuple[Same, dict[str, Any], tuple[Same, ...], Any]]]:
    """Every layer by name: its class, what is its own and runs, hooks, and its attention processor."""
    for name, layer in module.named_modules():
        own = vars(layer)
        tensors = [tensor for tensor in own["_parameters"].values() if tensor is not None]
        hooks = [hook for key in (*HOOKS, *STORING) for hook in own.get(key, {}).values() if not _captures(hook)]
        hooks += [hook for tensor in tensors for key in LEARNING for hook in (getattr(tensor, key) or {}).values()]
        yield name, (Same(type(layer)), _own(layer), tuple(map(Same, hooks)), _processor(own.get("processor")))


def _own(layer: nn.Module) -> dict[str, Any]:
    """What a layer has for itself and not by its class, that runs or takes the place of something that does.

    Tensors of a class that is no usual one, which has its own code for every operation; and tensors and layers that are
    plain attributes: they are read in the place of the parameters and layers of their name.
    """
    tensors = (*vars(layer)["_parameters"].items(), *vars(layer)["_buffers"].items())
    kinds = {name: type(tensor) for name, tensor in tensors if type(tensor) not in (nn.Parameter, Tensor, NoneType)}
    return {
        **_callables(layer),
        **{name: (Same(kind), kind.__name__) for name, kind in kinds.items()},
        **{name: (Same(value), type(value).__name__) for name, value in _plain(layer).items()},
    }


def _plain(layer: nn.Module) -> dict[str, Any]:
    """Tensors and layers that are plain attributes of a layer, and so in no state."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, nn.Module | Tensor)}


def _processor(processor: Any) -> Any:
    """What an attention processor is: its class, its own methods and its settings."""
    if processor is None:
        return None
    plain = (bool, int, float, str, tuple, Enum)
    settings = {
        key: repr(value) for key, value in getattr(processor, "__dict__", {}).items() if isinstance(value, plain)
    }
    return Same(type(processor)), _callables(processor), settings


def _everywhere() -> tuple[tuple[str, Same], ...]:
    """Hooks and modes that stand on everything that PyTorch runs."""
    hooks = [hook for key in HOOKS for hook in getattr(nn.modules.module, f"_global{key}").values()]
    hooks += torch._C._autograd._top_saved_tensors_default_hooks(True) or ()  # on what is kept for gradients
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return (*(("a hook", Same(hook)) for hook in hooks), *(("a mode", Same(mode)) for mode in modes))


def _settings_of_torch() -> dict[str, Any]:
    """What is set for everything that PyTorch computes: with gradients off, for example, no attack could learn."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "computing of gradients": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def _callables(thing: Any) -> dict[str, Any]:
    """What an object can be called by and has for itself, not by its class: which it is, and what it does."""
    own = getattr(thing, "__dict__", {})
    return {
        k: (Same(v), _written(v))
        for k, v in own.items()
        if callable(v) and not isinstance(v, nn.Module) and k != "processor"
    }


def _written(function: Any) -> tuple[Any, ...]:
    """What a function does, which can be exchanged in place: its code and defaults, and those that it wraps."""
    if isinstance(function, property):
        return tuple(map(_written, (function.fget, function.fset, function.fdel)))
    inner = getattr(function, "__func__", function)  # of methods, also static and class methods
    defaults = (*(getattr(inner, "__defaults__", None) or ()), *(getattr(inner, "__kwdefaults__", None) or {}).values())
    kept = [value for cell in getattr(inner, "__closure__", None) or () if callable(value := held_by(cell))]
    return (
        getattr(inner, "__code__", type(inner).__name__),
        tuple(map(Same, defaults)),
        tuple((Same(value), getattr(value, "__code__", None)) for value in kept),
    )


def _captures(hook: Any) -> bool:
    """Whether a hook is one by which models of transformers hand out what is inside; it changes nothing."""
    makers = [one.__code__ for one in vars(output_capturing).values() if hasattr(one, "__code__")]
    made = [code for maker in makers for code in maker.co_consts if isinstance(code, CodeType)]
    known = getattr(hook, "__code__", None) in made  # a name or a file is easily taken, and so is code alone
    return known and hook.__globals__ is vars(output_capturing)


def _settings(module: nn.Module) -> dict[str, str]:
    """The config of a model of diffusers; of transformers it names much that decides nothing."""
    config = getattr(module, "config", None) if isinstance(module, ModelMixin) else None
    said = {key: _text(value) for key, value in (config or {}).items() if not key.startswith("_")}
    return {**said, **{f"{key} (attribute)": value for key, value in _attributes(config).items()}}


def _code(kinds: Iterable[type]) -> tuple[tuple[tuple[Same, str], Any], ...]:
    """Everything that runs in some classes and those they inherit from, and the order in which it is looked for."""
    classes = dict.fromkeys(parent for kind in kinds for parent in kind.__mro__ if parent is not object)
    return tuple(
        ((Same(kind), name), value)
        for kind in classes
        for name, value in [
            ("__mro__", tuple(map(Same, kind.__mro__))),
            *((name, (Same(v), _written(v))) for name, v in vars(kind).items() if callable(v) or _descriptor(v)),
        ]
    )


def _descriptor(value: Any) -> bool:
    """Whether a value in a class runs when it is read: a property, or anything like one."""
    return hasattr(type(value), "__get__")


def _drops(layer: nn.Module, key: str) -> bool:
    """Whether a number on a layer is a rate of dropout: how it was trained, which decides nothing while it draws."""
    return (key == "p" and type(layer) is nn.Dropout) or key in ("dropout", "attention_dropout")


def _state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a part is in beside its weights: numbers and words on its layers (training, an attention's scale), the order
    of its layers, the config of a model of transformers, and buffers that no file and no hash holds (positions).
    """
    for name, layer in module.named_modules():
        yield f"{name} (order of layers)".strip(), tuple(layer._modules)
        for key, value in vars(layer).items():
            if key in HOLDING:  # a class of its own could give out other things than it shows
                yield f"{name}.{key}".removeprefix("."), Same(type(value))
            elif _drops(layer, key) and not layer.training:
                continue
            elif isinstance(value, bool | int | float | str | tuple) and not key.startswith("_"):
                yield f"{name}.{key}".removeprefix("."), repr(value)
                if unusual := _kinds(value):
                    yield f"{name}.{key} (class)".removeprefix("."), unusual
    if isinstance(module, transformers.PreTrainedModel):
        said = {k: v for k, v in module.config.to_dict().items() if not k.startswith("_")}
        kept = {k: v for k, v in vars(module.config).items() if not k.startswith("_")}
        kinds = {key: found for key, value in kept.items() if (found := _kinds(value))}
        yield "config", (Same(type(module.config)), _text(said), kinds, str(module.config._attn_implementation))
    buffers = dict(module.named_buffers())
    stored = module.state_dict(keep_vars=True).keys() if buffers else ()
    for name, buffer in buffers.items():
        if name not in stored and buffer.numel() <= LARGEST and not buffer.is_meta:
            yield name, io.blake2b(io.tensor_bytes(name, buffer), size=16)


def _attributes(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """A config of diffusers holds each value twice, as an item and as an attribute: models read the attributes."""
    own = getattr(config, "__dict__", {})
    return {key: _text(value) for key, value in own.items() if key[:1] != "_" and key not in without}


def _text(value: Any) -> Any:
    """A value in words, and whatever in it is of no usual class: such a class can say one thing and do another."""
    return json.dumps(value, sort_keys=True, default=repr), _kinds(value)


def _kinds(value: Any, also: Collection[type] = ()) -> tuple[Same, ...]:
    """The classes in a value, down to what lists and mappings hold, that are no usual ones."""
    if type(value) in (dict, list, tuple):
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return tuple(kind for one in inside for kind in _kinds(one, also))
    return () if type(value) in USUAL or type(value) in also else (Same(type(value)),)


__all__ = [
    "added", "around", "changes", "code_of", "differences", "exchanged", "reads_otherwise", "standing",
    "standing_around", "state_of",
]  # fmt: skip

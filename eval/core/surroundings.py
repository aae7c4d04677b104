"""What decides how a pipeline draws beside its weights: code, hooks, tokenizers, the scheduler, settings.

An edit of weights leaves all of it alone. It is compared, never run. What stands in a function of a Python module (and
in no class or object of the pipeline) is not seen: a function of PyTorch that somebody replaced, for example.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from erasure import io
from erasure.backbone.fingerprint import content
from erasure.eval.core.hashes import modules_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
SCHEDULE = ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod", "alpha_t", "sigma_t", "lambda_t")
NUMBERS = ("init_noise_sigma", "order")  # of a scheduler; where they follow from its steps they are no plain numbers
LARGEST = 2**20  # numbers of a buffer that is looked at
CAPTURES = str(Path(transformers.__file__).parent)  # whose models hook themselves at their first call


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
    plain = (bool, int, float, str)
    return {
        "class": (Same(type(pipe)), own, _code([type(pipe)])),
        **{name: _described(kept[name]) for name in parts},
        **{name: value for name, value in kept.items() if isinstance(value, plain) and not name.startswith("_")},
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names in which two of :func:`around` differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def code_of(pipe: Any) -> dict[str, Any]:
    """The code of the parts with weights, for :func:`added`: classes of layers, own methods, hooks, settings."""
    parts = modules_of(pipe)
    return {
        "parts": {
            part: (Same(module), dict(_layers(module)), _settings(module), dict(_state(module)))
            for part, module in parts.items()
        },
        "classes": _code({type(layer) for module in parts.values() for layer in module.modules()}),
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
                if key not in own_was or (was == module and own_was[key] != value)
            ]
            if any(hook not in hooks_was for hook in hooks) and (was == module or not hooks_was):
                found.append(f"a hook stands on {place}")
            if processor != processor_was:
                found.append(f"{place} has another processor")
        found += [f"{part}.config.{key} is another" for key in settings if known.get(key) != settings[key]]
        found += [f"{part}.{key} is another" for key in state if was == module and state_was.get(key) != state[key]]
    old_code = dict(before["classes"])
    found += [
        f"{kind.value.__name__}.{name} was replaced"
        for (kind, name), value in after["classes"]
        if old_code.get((kind, name), value) != value
    ]
    new = [one for one in after["everywhere"] if one not in before["everywhere"]]
    found += [f"{what} stands on everything that PyTorch runs" for what, _ in new]
    found += [f"PyTorch's {key} is another" for key, value in after["torch"].items() if before["torch"][key] != value]
    return list(dict.fromkeys(found))


def state_of(pipe: Any) -> dict[str, Any]:
    """What has to be as it was when a change is taken off, beside the weights."""
    return {"around": around(pipe), "code": code_of(pipe)}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In words, how a pipeline differs from what :func:`state_of` found before."""
    found = [f"its {name} is another" for name in changes(before["around"], after["around"])]
    return found + added(before["code"], after["code"])


# --- inside ----------------------------------------------------------------------------------------------------------


def _described(part: Any) -> Any:
    """An object beside the weights, by what decides how it works."""
    if part is None:
        return None
    facts: list[Any] = [Same(type(part)), _callables(part), _code([type(part)])]
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        facts.append({key: _text(value) for key, value in config.items() if not key.startswith("_")})
    if isinstance(part, nn.Module):  # a safety checker, a ControlNet
        facts += [content(part), dict(_layers(part)), dict(_state(part))]
    tables = [(name, value) for name in SCHEDULE if isinstance(value := getattr(part, name, None), Tensor)]
    facts += [(name, io.blake2b(io.tensor_bytes(name, table), size=16)) for name, table in tables]
    facts += [(name, value) for name in NUMBERS if isinstance(value := getattr(part, name, None), int | float)]
    words = getattr(part, "tokenizer", part)  # a processor of several inputs has one
    if isinstance(words, transformers.PreTrainedTokenizerBase):
        facts.append(_vocabulary(words))
    return facts


def _vocabulary(tokenizer: Any) -> list[Any]:
    """How a tokenizer reads: its words with their numbers, and what is done before and after them."""
    sides = tokenizer.padding_side, tokenizer.truncation_side
    found = [len(tokenizer), tokenizer.model_max_length, sides, _text(tokenizer.special_tokens_map)]
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return [*found, _text(tokenizer.get_vocab())]
    steps = ("normalizer", "pre_tokenizer", "post_processor")
    found += [_text(getattr(inner, step, None)) for step in steps]
    return [*found, _text(tokenizer.added_tokens_decoder), io.blake2b([inner.model.__getstate__()], size=16)]


def _layers(module: nn.Module) -> Iterator[tuple[str, tuple[Same, dict[str, Same], tuple[Same, ...], Any]]]:
    """Every layer by name: its class, what is its own and runs, hooks, and the class of its attention processor."""
    for name, layer in module.named_modules():
        own = vars(layer)
        hooks = tuple(Same(hook) for key in HOOKS for hook in own.get(key, {}).values() if not _captures(hook))
        processor = own.get("processor")
        known = None if processor is None else (Same(type(processor)), _callables(processor))
        yield name, (Same(type(layer)), {**_callables(layer), **_tensor_classes(layer)}, hooks, known)


def _tensor_classes(layer: nn.Module) -> dict[str, Same]:
    """The classes of a layer's tensors that are of no usual one: such a class has its own code for every operation."""
    own = (*vars(layer)["_parameters"].items(), *vars(layer)["_buffers"].items())
    return {name: Same(type(tensor)) for name, tensor in own if type(tensor) not in (nn.Parameter, Tensor, NoneType)}


def _everywhere() -> tuple[tuple[str, Same], ...]:
    """Hooks and modes that stand on everything that PyTorch runs."""
    hooks = [hook for key in HOOKS for hook in getattr(nn.modules.module, f"_global{key}").values()]
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


def _callables(thing: Any) -> dict[str, Same]:
    """What an object can be called by and has for itself, not by its class."""
    own = getattr(thing, "__dict__", {})
    return {
        k: Same(v) for k, v in own.items() if callable(v) and not isinstance(v, nn.Module | type) and k != "processor"
    }


def _captures(hook: Any) -> bool:
    """Whether a hook is one by which models of transformers hand out what is inside; it changes nothing."""
    file = getattr(getattr(hook, "__code__", None), "co_filename", "")
    return file.startswith(CAPTURES) and file.endswith("output_capturing.py")


def _settings(module: nn.Module) -> dict[str, str]:
    """The config of a model of diffusers; of transformers it names much that decides nothing."""
    config = getattr(module, "config", None) if isinstance(module, ModelMixin) else None
    return {key: _text(value) for key, value in (config or {}).items() if not key.startswith("_")}


def _code(kinds: Any) -> tuple[tuple[tuple[Same, str], Same], ...]:
    """Everything callable in some classes and those they inherit from."""
    classes = dict.fromkeys(parent for kind in kinds for parent in kind.__mro__ if parent is not object)
    wanted = (property, staticmethod, classmethod)
    return tuple(
        ((Same(kind), name), Same(value))
        for kind in classes
        for name, value in vars(kind).items()
        if callable(value) or isinstance(value, wanted)
    )


def _state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a part is in beside its weights: numbers and words on its layers (training, an attention's scale), the
    config of a model of transformers, and buffers that no file and no hash holds (positions).
    """
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if isinstance(value, bool | int | float | str | tuple) and not key.startswith("_"):
                yield f"{name}.{key}".removeprefix("."), repr(value)
    if isinstance(module, transformers.PreTrainedModel):
        yield "config", _text({k: v for k, v in module.config.to_dict().items() if not k.startswith("_")})
    buffers = dict(module.named_buffers())
    stored = module.state_dict(keep_vars=True).keys() if buffers else ()
    for name, buffer in buffers.items():
        if name not in stored and buffer.numel() <= LARGEST and not buffer.is_meta:
            yield name, io.blake2b(io.tensor_bytes(name, buffer), size=16)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


__all__ = ["added", "around", "changes", "code_of", "differences", "state_of"]

"""R18 and the structural rule: what was done to the parameters, and which parts were left unchanged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from erasure.backbone.checks import parameters_of
from erasure.backbone.text import Text, TooLong
from erasure.eval.core.models import Kind, denoisers_of, modules_of
from erasure.eval.core.surroundings import added, code_of
from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.denoising import backbone_for, predictions
from erasure.eval.probes.sampling import target_prompts
from erasure.eval.probes.weigh import average, of_family, share

WHOLE = "all parts"
AUTOENCODER = "through the autoencoder"
MOVED = "predictions of the denoiser"
PROMPTS = 2  # of the target, on which predictions are compared
DENOISERS = ("unet", "transformer", "transformer_2")  # in records of version 1, which do not name them
RULE: Mapping[Kind, str] = {
    "none": "the base itself",
    "filter": "not removal by construction: original parameters are present, a filter stands around them",
    "adapter": "not removal by construction: original parameters are present, an adapter can be taken off them",
    "weights": "not removal by construction: original parameters were edited, not trained again without the data",
    "retrained": "removal by construction if, as its maker says, the parameters come from training without the data",
}


@dataclasses.dataclass(frozen=True)
class Construction(Probe):
    """What kind of change a model is, how many parameters differ from the base's, and which parts do not at all.

    "changed" is the share of parameters that differ in any bit, for all parts and for each; the facts have the
    relative norm |W' - W| / |W| of a part and of the tensors that changed most. "denoiser_changed" is that of the
    denoisers alone, and "moved" the change of their predictions, |e' - e|^2 / |e|^2, on noise with the base's
    conditioning of the target's prompts; 0 is the base's denoiser. "beside" counts what stands on the parts and not
    on the base's: hooks, other classes of layers, replaced methods and settings, all of which can be taken off.
    "by_construction" is 1 for a model retrained without the data and 0 for every other; its gate "audit" fails
    without an audit record (:mod:`erasure.eval.core.audit`), named ``audit`` in the config of the change. "through
    the autoencoder" is the share of real pictures of the target in which the judge still sees it after encoding and
    decoding.

    Descriptive: a change of weights does not show that something was removed.

    Attributes:
        images: real pictures that are encoded and decoded; 0 leaves that out.
        times: times of the schedule at which predictions are compared.
        largest: how many of the tensors that changed most are named.
    """

    key, code, title = "construction", "R18", "what was done to the parameters"
    section, level, access = "removal", "weights", "white_box"
    presets = {
        "smoke": {"images": 4},
        "no-draw": {"images": 0},
        "quick": {"images": 32},
        "standard": {"images": 64},
        "full": {"images": 256},
    }
    version, reads = 2, (1,)  # which did not look at what stands beside the parameters
    descriptive = True
    own_autoencoder = True
    measures = {
        "changed": "parameters that differ",
        "denoiser_changed": "of the denoisers alone",
        "moved": "distance of the denoiser's predictions from the base's",
        "beside": "what stands on the parts beside their parameters",
        "by_construction": "retrained without the data",
    }
    licences = "which parameters differ from the base's, and whether a declared procedure left the data out"
    not_licensed = "that something was removed; that a record is true: other data can give the same model"
    reference = "Thudi et al. 2022 (auditable definitions); Bourtoule et al. 2021 (sharded retraining)"

    images: int = 64
    times: int = 2
    largest: int = 5
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        with context.open(context.base):  # copies: an edit in place would change what it is compared with
            before = {part: tensors(module, copy=True) for part, module in modules_of(context.pipe).items()}
            code = code_of(context.pipe)
            try:
                asked, why = self.asked(context), ""
            except (Missing, TooLong, ValueError) as reason:
                asked, why = None, str(reason)
            theirs = predictions(backbone_for(context.pipe), *asked, self.times) if asked else None
        with context.open(model):
            parts = {part: changed(before[part], tensors(module)) for part, module in modules_of(context.pipe).items()}
            denoisers = sorted(denoisers_of(context.pipe))
            beside = added(code, code_of(context.pipe))
            mine = predictions(backbone_for(context.pipe), *asked, self.times) if asked else None
            seen = self.through_autoencoder(model, context)
        facts = {
            "kind": model.kind,
            "scope": str(model.config.get("scope", "")),
            "audit": digest_of(model.config.get("audit")),
            "untouched": [part for part, own in parts.items() if not own["changed"]],
            "denoisers": denoisers,
            "beside": beside,
        }
        total = {
            name: sum(own[name] for own in parts.values()) for name in ("changed", "parameters", "tensors", "moved")
        }
        rows = {
            WHOLE: {**total, **facts},
            **{p: {**own, "largest": own["largest"][: self.largest]} for p, own in parts.items()},
        }
        return [
            Observation(model.name, part, part, self.seed, own["changed"] / own["parameters"], None, own)
            for part, own in rows.items()
        ] + [*self.moved(model, mine, theirs, why), *seen]

    def asked(self, context: Context) -> tuple[Text, Tensor]:
        """The base's conditioning of the target's prompts, and noised latents for them."""
        backbone = backbone_for(context.pipe)
        text = backbone.encode(target_prompts(context, PROMPTS)).text
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(text.hidden.shape[0], *backbone.latent_shape, generator=generator)
        return text, noise.to(backbone.device)

    def moved(self, model: Model, mine: Tensor | None, theirs: Tensor | None, why: str) -> list[Observation]:
        """How far the predictions moved, for each prompt."""
        if mine is None or theirs is None:
            return [Observation(model.name, MOVED, "", self.seed, None, why)]
        pairs = zip(mine.unbind(1), theirs.unbind(1), strict=True)
        far = [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]
        if not all(map(math.isfinite, far)):
            return [Observation(model.name, MOVED, "", self.seed, None, "the denoiser predicts what is no number")]
        return [Observation(model.name, MOVED, f"prompt {i}", self.seed, value) for i, value in enumerate(far)]

    def through_autoencoder(self, model: Model, context: Context) -> list[Observation]:
        """Whether the judge sees the target in its real pictures after encoding and decoding."""
        if not self.images:
            return []
        try:
            examples = context.real("target", self.images, seed=self.seed)
            backbone = backbone_for(context.pipe)
        except Missing as reason:
            return [Observation(model.name, AUTOENCODER, "", self.seed, None, str(reason))]
        restored = backbone.pictures(backbone.latents([example.image for example in examples]))
        keys = [example.key for example in examples]
        return context.observe(model, restored, family=AUTOENCODER, clusters=keys, seeds=[self.seed] * len(keys))

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = []
        for name, own in rows.items():
            parts = [row for row in own if row.family not in (AUTOENCODER, MOVED)]
            for row in parts:
                family, note = ("", sentence(row.facts)) if row.family == WHOLE else (row.family, "")
                number = counted(row.value, row.facts["parameters"])
                found.append(Evidence(self.key, name, "changed", number, family, note=note))
            (whole,) = (row.facts for row in of_family(parts, WHOLE))
            names = whole.get("denoisers", DENOISERS)
            if denoisers := [row.facts for row in parts if row.family in names]:
                count, size = (sum(facts[key] for facts in denoisers) for key in ("changed", "parameters"))
                found.append(Evidence(self.key, name, "denoiser_changed", counted(count / size, size)))
            if "beside" in whole:  # not in older records
                what = "; ".join(whole["beside"][: self.largest])
                found.append(Evidence(self.key, name, "beside", counted(float(len(whole["beside"])), 1), note=what))
            if far := of_family(own, MOVED):
                number = Estimate.missing(far[0].reason) if far[0].reason else average(far)
                found.append(Evidence(self.key, name, "moved", number, unit="number"))
            if models[name] in ("erased", "gold"):
                retrained = whole["kind"] == "retrained"
                gates: dict[str, Gate] = {"audit": "pass" if whole["audit"] else "fail"} if retrained else {}
                verdict = Estimate(float(retrained), None, None, "structural rule", 1, 1, 0, "a rule, no interval")
                note = sentence(whole)
                found.append(Evidence(self.key, name, "by_construction", verdict, "", None, gates, "number", note))
            if seen := of_family(own, AUTOENCODER):
                number = Estimate.missing(seen[0].reason) if seen[0].reason else share(seen)
                found.append(Evidence(self.key, name, "rate", number, AUTOENCODER))
        return found


def counted(value: float | None, n: int) -> Estimate:
    return Estimate(value, None, None, "counted", n, 1, 0, "counted, no interval")


def sentence(facts: Mapping[str, Any]) -> str:
    """The structural rule for one model, with its scope and the parts that are the base's."""
    text = RULE[facts["kind"]]
    if facts["kind"] == "retrained":
        audit = f"audit record {facts['audit']} was supplied" if facts["audit"] else "no audit record, only asserted"
        text += f"; scope: {facts['scope'] or 'not given'}; {audit}"
    if facts["kind"] == "weights" and not facts["changed"]:
        text = "not removal by construction: no parameter differs from the base's"
    if beside := facts.get("beside"):
        text += f"; beside the parameters: {', '.join(beside[:3])}"
    if facts["untouched"] and facts["changed"]:
        text += f"; as in the base: {', '.join(facts['untouched'])}"
    return text


def digest_of(audit: Any) -> str | None:
    """The digest of a supplied audit record; None without one."""
    return str(audit["digest"] if isinstance(audit, Mapping) and "digest" in audit else audit) if audit else None


def tensors(module: torch.nn.Module, *, copy: bool = False) -> dict[str, Tensor]:
    """Parameters by name, on the CPU; names are those without a PEFT adapter around a layer."""
    found = {name: p.detach().cpu() for name, p in parameters_of(module).items()}
    return {name: p.clone() for name, p in found.items()} if copy else found


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many parameters of a part differ, and by how much, relative to their norm; new ones count as changed."""
    moved: dict[str, float] = {}
    counts = {"parameters": 0, "changed": 0}
    gap, size = 0.0, 0.0
    for name, now in after.items():
        counts["parameters"] += now.numel()
        was = before.get(name)
        if was is None or was.shape != now.shape:
            counts["changed"] += now.numel()
            moved[name] = float("inf")
            continue
        size += float(was.double().square().sum())
        if differs := int((was != now).sum()):
            counts["changed"] += differs
            square = float((now.double() - was.double()).square().sum())
            gap += square
            moved[name] = (square / max(float(was.double().square().sum()), 1e-30)) ** 0.5
    order = sorted(moved, key=lambda name: -moved[name])
    return {
        **counts,
        "tensors": len(after),
        "moved": len(moved),
        "relative_norm": (gap / size) ** 0.5 if size else None,
        "largest": [[name, None if moved[name] == float("inf") else round(moved[name], 5)] for name in order],
    }

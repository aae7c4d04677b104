"""Distances from retrained models, membership, memorisation, what was done to the parameters: known answers, gates."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.backbone.noise import Diffusion, Flow
from erasure.backbone.text import Text
from erasure.eval.core.models import Model, Swapped
from erasure.eval.core.pictures import weights_hash
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Context, Missing, Observation, lacking
from erasure.eval.probes.features import features_of
from erasure.eval.probes.removal.construction import Construction, sentence
from erasure.eval.probes.removal.divergence import Divergence
from erasure.eval.probes.removal.linear_probe import LinearProbe, held_out
from erasure.eval.probes.removal.membership import ATTACKS, Membership, found_at
from erasure.eval.probes.removal.memorisation import Memorisation
from erasure.eval.probes.removal.output_distance import OutputDistance
from erasure.eval.stats import auc, auc_gap, ratio
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import ROLES, TinyMaterial, tiny_context
from tests.slow import first
from tests.tiny import make, tiny_pipeline

PROBES = {
    "divergence": Divergence(images=2, bins=2),
    "output_distance": OutputDistance(images_per_prompt=1, limit=3),
    "linear_probe": LinearProbe(images=4, timesteps=(300,), folds=2),
    "membership": Membership(images=3, others=3, times=2, noises=1, until=20),
    "memorisation": Memorisation(captions=1, images_per_caption=2, references=3),
    "construction": Construction(images=2),
}


class PixelEmbedding(PixelDetector):
    """A detector with features: the picture itself, four by four."""

    def image_features(self, images):
        return torch.tensor(np.array([np.asarray(image.resize((4, 4)), dtype=float).ravel() for image in images]))


@pytest.fixture(scope="module")
def context():
    return tiny_context()


@pytest.fixture(scope="module")
def ran(context):
    """Runs a probe on every model of the tiny assessment, once, and sees that it gave the weights back."""

    @functools.cache
    def rows(key):
        before = weights_hash(context.pipe)
        found = {name: PROBES[key].run(model, context) for name, model in context.models.items()}
        assert weights_hash(context.pipe) == before, key
        return found

    return rows


def evidence(probe, rows, models=ROLES):
    return {(e.model, e.measure, e.family): e for e in probe.weigh(rows, models)}


@pytest.mark.parametrize("key", first(PROBES, *(key for key in PROBES if key not in ("divergence", "membership"))))
def test_rows_are_the_same_again_and_survive_json(context, ran, key):
    probe, roles = PROBES[key], {model.name: model.role for model in context.models.values()}
    assert type(probe) is probe_class(key) and type(probe).preset("smoke") is not None
    assert probe.run(context.models["noise"], context) == ran(key)["noise"]
    read = {
        name: [Observation(**json.loads(json.dumps(dataclasses.asdict(row)))) for row in rows]
        for name, rows in ran(key).items()
    }
    weighed = probe.weigh(read, roles)
    assert weighed == probe.weigh(ran(key), roles)
    assert {e.model for e in weighed} == set(roles)


@pytest.mark.parametrize("key", ["divergence", "linear_probe", "membership", "memorisation"])
def test_without_pictures_there_is_no_number(context, key):
    assert "no real pictures" in lacking(PROBES[key], dataclasses.replace(context, material=None))


@pytest.mark.parametrize("key", ["divergence", "output_distance"])
def test_one_retrained_model_is_not_enough(context, key):
    models = {name: model for name, model in context.models.items() if name != "gold-1"}
    with pytest.raises(Missing, match="there is 1"):
        PROBES[key].run(context.base, dataclasses.replace(context, models=models))


def test_a_linear_probe_needs_a_model_that_never_saw_the_target(context):
    models = {name: context.models[name] for name in ("base", "noise")}
    assert "never saw the target" in lacking(PROBES["linear_probe"], dataclasses.replace(context, models=models))


# --- R11 ------------------------------------------------------------------------------------------------------------


def test_divergence_of_a_copy_of_the_base_is_the_bases_and_of_a_retrained_one_is_small(context):
    copies = {
        "base": context.base,
        "a copy": Model("a copy", "erased", Swapped("a copy", {"unet": context.pipe.unet})),
        "third": Model("third", "erased", Swapped("third", {"unet": tiny_pipeline(seed=3).unet})),
        **{name: context.models[name] for name in ("gold-0", "gold-1")},
    }
    own, probe = dataclasses.replace(context, models=copies), Divergence(images=4, bins=3)
    rows = {name: probe.run(model, own) for name, model in copies.items()}
    found = evidence(probe, rows, {name: model.role for name, model in copies.items()})
    values = {name: [row.value for row in rows[name]] for name in rows}
    assert values["a copy"] == values["base"]
    assert [row.family for row in rows["base"]].count("target, empty prompt") == 4
    for family in ("target", "unrelated"):
        assert found["third", "ratio", family].estimate.value == pytest.approx(1, abs=0.5)  # all four are random
        assert found["gold-0", "floor", family].estimate.value == found["gold-1", "floor", family].estimate.value > 0


def distances(levels, family="target", pictures=40):
    """Rows of R11 around some mean distances."""
    rng, each = np.random.default_rng(0), {}
    hard = rng.lognormal(0, 0.5, pictures)  # some pictures are harder than others, for every model
    golds = [name for name in levels if name.startswith("gold")]
    for name, level in levels.items():
        values = [float(level * hard[i] * rng.lognormal(0, 0.1)) for i in range(pictures)]
        each[name] = [
            Observation(name, family, f"picture {i}", 0, v, None, {"to": {g: v for g in golds if g != name}})
            for i, v in enumerate(values)
        ]
    return each


def test_a_judged_retrained_model_is_not_held_against_itself():
    between = {frozenset(pair): d for pair, d in ((("g0", "g1"), 10.0), (("g0", "g2"), 10.0), (("g1", "g2"), 1.0))}

    def row(name, i):
        to = {g: between.get(frozenset((name, g)), 20.0) for g in ("g0", "g1", "g2") if g != name}
        return Observation(name, "target", f"picture {i}", 0, sum(to.values()) / len(to), None, {"to": to})

    rows = {name: [row(name, i) for i in range(10)] for name in ("base", "g1", "g2")}
    rows["retrained"] = [dataclasses.replace(row("g0", i), model="retrained") for i in range(10)]  # g0, judged
    roles = {"base": "base", "retrained": "erased", "g1": "gold", "g2": "gold"}
    found = evidence(Divergence(), rows, roles)
    assert found["retrained", "ratio", "target"].estimate.value == pytest.approx(10.0)  # 10 of what they differ by, 1
    assert found["retrained", "residual", "target"].estimate.value == pytest.approx(9 / 19)


def test_divergence_is_in_units_of_retraining():
    rows = distances({"base": 5.0, "UCE": 1.0, "gold-0": 1.0, "gold-1": 1.0})
    found = evidence(Divergence(), rows)
    ratio_of = found["UCE", "ratio", "target"]
    assert ratio_of.estimate.low < 1 < ratio_of.estimate.high and ratio_of.conclusive
    assert found["base", "ratio", "target"].estimate.value == pytest.approx(5, rel=0.1)
    assert found["UCE", "residual", "target"].estimate.value == pytest.approx(0, abs=0.05)
    farther = evidence(Divergence(), distances({"base": 5.0, "UCE": 9.0, "gold-0": 1.0, "gold-1": 1.0}))
    assert farther["UCE", "residual", "target"].estimate.value == pytest.approx(2, rel=0.1)  # not clipped


def test_divergence_says_nothing_where_the_base_is_as_close_as_a_retrained_model():
    found = evidence(Divergence(), distances({"base": 1.0, "UCE": 1.0, "gold-0": 1.0, "gold-1": 1.0}))
    assert found["UCE", "ratio", "target"].gates == {"power": "fail"}
    assert not any(e.conclusive for e in found.values() if e.model == "UCE")


def test_a_stratum_without_pictures_keeps_its_reason(context):
    class Few(TinyMaterial):
        def kept(self, count, *, seed=0, member=False, labels=None):
            raise ValueError("none of that kind")

    own = dataclasses.replace(context, material=Few())
    probe = PROBES["divergence"]
    rows = {name: probe.run(context.models[name], own) for name in ("base", "gold-0", "gold-1")}
    found = evidence(probe, rows, {"base": "base", "gold-0": "gold", "gold-1": "gold"})
    assert found["base", "ratio", "neighbours"].estimate.reason == "none of that kind"
    assert found["base", "ratio", "target"].estimate.value is not None


# --- R13 ------------------------------------------------------------------------------------------------------------


def features(means, prompts=20, seeds=2, width=4):
    """Rows of R13: Gaussian features around a mean, sharing part of their noise, as pictures of one seed do."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(prompts, seeds, width))
    return {
        name: [
            Observation(
                name, "target", f"prompt {p}", s, None, None,
                {"features": (mean + 0.5 * shared[p, s] + 0.9 * rng.normal(size=width)).tolist()},
            )
            for p in range(prompts)
            for s in range(seeds)
        ]
        for name, mean in means.items()
    }  # fmt: skip


def test_gap_is_0_as_retrained_and_1_as_the_base():
    never = {"gold-0": 0.0, "gold-1": 0.0, "base": 1.5}
    like_gold = evidence(OutputDistance(), features({**never, "UCE": 0.0}))["UCE", "gap", "target"]
    assert like_gold.conclusive and abs(like_gold.estimate.value) < 0.1
    assert like_gold.estimate.low < 0 < like_gold.estimate.high
    rows = features({**never, "UCE": 1.5})
    rows["UCE"] = [dataclasses.replace(row, model="UCE") for row in rows["base"]]
    like_base = evidence(OutputDistance(), rows)["UCE", "gap", "target"]
    assert like_base.estimate.value == pytest.approx(1)
    assert "p = 0.0001" in like_base.note
    farther = evidence(OutputDistance(), features({**never, "UCE": 4.0}))["UCE", "gap", "target"]
    assert farther.estimate.value > 1


def test_gap_says_nothing_where_the_base_draws_as_retrained_models_do():
    found = evidence(OutputDistance(), features({"base": 0.0, "UCE": 0.0, "gold-0": 0.0, "gold-1": 0.0}))
    assert found["UCE", "gap", "target"].gates == {"power": "fail"}


def test_features_are_few_and_named():
    pictures = [example.image for example in TinyMaterial().target(3)]
    name, found = features_of(PixelDetector(), pictures)
    assert name == "answers of pixels" and found.shape == (3, 4)
    from erasure.eval.worldkit.detectors import load

    name, found = features_of(load("a"), pictures)
    assert name.startswith("penultimate layer") and found.shape == (3, 64)
    assert (found == features_of(load("a"), pictures)[1]).all()


# --- R14 ------------------------------------------------------------------------------------------------------------


def test_held_out_scores_find_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    y = np.arange(200) < 100
    x = rng.normal(size=(200, 30))
    noise = held_out(x, y, folds=5, ridge=0.01, seed=0)
    x[:, 0] += 3 * y
    found = held_out(x, y, folds=5, ridge=0.01, seed=0)
    assert auc(found[y], found[~y]).value > 0.95
    assert auc(noise[y], noise[~y]).low < 0.5 < auc(noise[y], noise[~y]).high


class Striped(TinyMaterial):
    """Everything but the target has stripes."""

    def kept(self, count, *, seed=0, member=False, labels=None):
        stripes = np.zeros((16, 16, 3), np.uint8)
        stripes[::4], stripes[1::4] = 250, 250
        return [
            dataclasses.replace(e, image=Image.fromarray(np.asarray(e.image) // 2 + stripes // 2))
            for e in super().kept(count, seed=seed, member=member, labels=labels)
        ]


def test_pictures_that_differ_in_their_pixels_are_told_apart_even_by_a_random_model(context):
    own, probe = dataclasses.replace(context, material=Striped()), LinearProbe(images=16, timesteps=(0,), folds=2)
    names = ("base", "noise", "random")
    rows = {name: probe.run(context.models[name], own) for name in names}
    found = evidence(probe, rows, {name: context.models[name].role for name in names})
    assert found["random", "auc", ""].estimate.value > 0.9
    gap = found["noise", "auc_gap", ""]
    assert gap.control == "null" and gap.estimate.low < 0 < gap.estimate.high
    assert gap.gates == {"power": "fail"}  # the base reads them no better than random weights do


def test_a_linear_probe_counts_where_the_base_reads_more_than_a_model_that_never_saw_it():
    def told(name, above):
        return [
            Observation(name, "", f"{name} {i}", 0, float(i % 20) + above * (i < 20), None, {"target": i < 20})
            for i in range(40)
        ]

    found = evidence(LinearProbe(), {"base": told("base", 20), "UCE": told("UCE", 0), "gold-0": told("gold-0", 0)})
    gap = found["UCE", "auc_gap", ""]
    assert gap.gates == {"power": "pass"} and gap.conclusive and gap.estimate.value == 0


# --- R15, R16 -------------------------------------------------------------------------------------------------------


class Learnt:
    """A model that knows some latents by heart and sees the nearest of them in everything."""

    plain_guidance = None

    def __init__(self, known, noise):
        self.known, self.noise = known, noise

    def predict_float(self, x, t, text, *, guidance=None):
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        signal, spread = self.noise.mix(one, zero, t), self.noise.mix(zero, one, t)
        clean = self.known[torch.cdist((x / signal).flatten(1), self.known.flatten(1)).argmin(1)]
        return self.noise.target(clean, (x - signal * clean) / spread.clamp_min(1e-6), t)


@pytest.mark.parametrize("noise", [Diffusion(torch.linspace(0.999, 0.01, 1000)), Flow("thousandths")])
def test_every_attack_finds_what_is_known_by_heart(context, noise):
    generator = torch.Generator().manual_seed(0)
    members, twins = (3 * torch.randn(10, 4, 8, 8, generator=generator) for _ in "ab")
    scores = Membership(times=2, noises=1).scores(
        Learnt(members, noise), torch.cat([members, twins]), Text(torch.zeros(20, 1, 1)), context
    )
    assert set(scores) == set(ATTACKS)
    for attack, values in scores.items():
        assert auc(values[:10].tolist(), values[10:].tolist()).value == 1, attack


def scores(shifts, count=80, groups=("target", "others")):
    """Rows of R15: members' scores are higher than twins' by a shift."""
    rng = np.random.default_rng(2)
    return {
        name: [
            Observation(
                name, attack, f"{group} {member} {i}", 0, float(rng.normal() + shift * member), None,
                {"member": bool(member), "of": group},
            )
            for group in groups
            for attack in ATTACKS
            for member in (1, 0)
            for i in range(count)
        ]
        for name, shift in shifts.items()
    }  # fmt: skip


def test_membership_is_judged_beside_models_that_never_saw_the_pictures():
    found = evidence(Membership(), scores({"base": 2.0, "UCE": 0.0, "gold-0": 0.0, "gold-1": 0.0}))
    for attack in ATTACKS:
        gap = found["UCE", "auc_gap", attack]
        assert gap.conclusive and gap.control == "gold" and gap.estimate.low < 0 < gap.estimate.high
        assert found["base", "auc", attack].estimate.value > 0.85
        assert found["UCE", "ks", attack].estimate.value < 0.3
    assert found["base", "effect", "set"].estimate.low > 0
    assert found["UCE", "effect", "set"].gates == {"power": "pass", "size": "pass"}
    kept = evidence(Membership(), scores({"base": 2.0, "UCE": 2.0, "gold-0": 0.0}))
    assert kept["UCE", "auc_gap", "loss"].estimate.low > 0.2


def test_a_base_that_learnt_nothing_by_heart_fails_the_gate():
    found = evidence(Membership(), scores({"base": 0.0, "UCE": 0.0, "gold-0": 0.0}))
    assert not any(e.conclusive for e in found.values() if e.model == "UCE")


def test_a_small_set_and_one_without_other_members_say_so():
    shifts = {"base": 2.0, "UCE": 0.0, "gold-0": 0.0}
    assert evidence(Membership(), scores(shifts, count=20))["UCE", "effect", "set"].gates["size"] == "fail"
    alone = evidence(Membership(), scores(shifts, groups=("target",)))
    assert alone["UCE", "effect", "set"].estimate.value is None


def test_membership_needs_to_know_who_is_a_member(context):
    class Unknown(TinyMaterial):
        def target(self, count, *, seed=0, member=False):
            return [dataclasses.replace(e, member=None) for e in super().target(count, seed=seed, member=member)]

    with pytest.raises(Missing, match="unknown whether"):
        PROBES["membership"].run(context.base, dataclasses.replace(context, material=Unknown()))


def test_true_positives_at_one_per_cent():
    twins = [i / 100 for i in range(100)]
    assert found_at(([0.995, 0.5, 2.0, 0.1], twins), 0.01).value == 0.5


# --- R17 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("member", "flagged"), [(True, 1.0), (False, 0.0)])
def test_a_picture_is_flagged_where_it_is_a_training_picture_and_not_where_it_is_a_twin(context, member, flagged):
    class Copying(Context):
        def draw(self, pipe, model, prompts, *, seeds=(0,), **sampler):
            shown = self.material.target(len(seeds), seed=0, member=member)
            return [[example.image for example in shown] for _ in prompts]

    given = {f.name: getattr(context, f.name) for f in dataclasses.fields(context)}
    own = Copying(**{**given, "judge": PixelEmbedding()})
    probe = Memorisation(captions=1, images_per_caption=6, references=20)
    rows = {"base": probe.run(context.base, own)}
    found = evidence(probe, rows, {"base": "base"})
    assert found["base", "rate", "captions of members"].estimate.value == flagged
    assert found["base", "copies", ""].estimate.value == flagged


# --- the structural rule ----------------------------------------------------------------------------------------------


def test_construction_counts_what_changed_and_names_what_did_not(context, ran):
    probe, roles = PROBES["construction"], {model.name: model.role for model in context.models.values()}
    found = evidence(probe, ran("construction"), roles)
    assert found["base", "changed", ""].estimate.value == 0
    assert 0 < found["noise", "changed", "unet"].estimate.value < 1
    assert found["noise", "changed", "vae"].estimate.value == 0
    assert "as in the base: text_encoder, vae" in found["noise", "changed", ""].note
    assert found["noise", "by_construction", ""].estimate.value == 0
    gold = found["gold-0", "by_construction", ""]
    assert gold.estimate.value == 1 and gold.gates == {"audit": "fail"} and "only asserted" in gold.note
    moved = next(row for row in ran("construction")["noise"] if row.family == "unet").facts
    assert moved["relative_norm"] > 0 and moved["largest"][0][1] >= moved["largest"][1][1]


def test_an_audit_record_a_filter_and_a_real_erasure_are_what_they_are(context):
    class Filter(Swapped):
        intervention = "filter"

    record = Swapped("gold", {"unet": tiny_pipeline(seed=1).unet}, config={"scope": "denoiser", "audit": "abc"})
    models = {
        "gold": Model("gold", "gold", record),
        "filter": Model("filter", "erased", Filter("filter", {})),
        "edit": Model("edit", "erased", make(context.pipe, context.suite.concept, method="uce")),
    }
    probe = Construction(images=0)
    rows = {name: probe.run(model, context) for name, model in models.items()}
    found = evidence(probe, rows, {name: model.role for name, model in models.items()})
    assert found["gold", "by_construction", ""].gates == {"audit": "pass"}
    assert "scope: denoiser; audit record abc" in found["gold", "changed", ""].note
    assert "original parameters are present, a filter" in found["filter", "changed", ""].note
    assert rows["edit"][0].facts["kind"] == "weights" and found["edit", "changed", "unet"].estimate.value > 0
    assert "no parameter differs" in sentence({"kind": "weights", "changed": 0, "untouched": ["unet"]})


# --- the statistics --------------------------------------------------------------------------------------------------


def test_areas_have_known_values_and_always_a_width():
    assert auc([1, 2], [1, 2]).value == 0.5
    perfect = auc(list(range(10, 30)), list(range(10)))
    assert perfect.value == 1 == perfect.high and 0.8 < perfect.low < 0.99
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 50))
    half = auc(x[0], x[1])
    assert half.high - half.low == pytest.approx(0.228, abs=0.01)  # +-0.114 from 50 and 50
    assert auc([], [1.0]).value is None
    gap = auc_gap(([3.0, 4, 5], [0.0, 1, 2]), [([3.0, 4, 5], [0.0, 1, 2])])
    assert gap.value == 0 and gap.low < 0 < gap.high


def test_the_interval_of_a_gap_is_narrower_for_scores_that_agree():
    rng = np.random.default_rng(0)
    y, a, b = (rng.normal(size=(2, 100)) + [[0.8], [0.0]] for _ in range(3))
    together = auc_gap((y[0], y[1]), [(y[0] + 0.1 * a[0], y[1] + 0.1 * a[1])])
    apart = auc_gap((y[0], y[1]), [(b[0], b[1])])
    assert together.high - together.low < 0.4 * (apart.high - apart.low)


def test_a_ratio_by_nothing_is_none():
    assert ratio([1.0, 2], [0.0, 0.0], "ab").value is None
    found = ratio([2.0, 4, 6, None], [1.0, 2, 3, 4], "abcd")
    assert found.value == found.low == found.high == 2 and found.excluded == 1

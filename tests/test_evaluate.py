"""An evaluation counts what was seen, gives weights back, refuses to guess, and survives being written down."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from erasure.concept import Concept, Suite
from erasure.eval import Assessment, Evaluation, assessment_of, evaluate
from erasure.eval.core.pictures import weights_hash
from erasure.eval.core.quality import clip_rows
from erasure.eval.core.records import BASE, Arm, Record, Verdict
from erasure.eval.core.tables import degenerate, labels, replacement, row
from erasure.eval.detectors.base import Detector, DetectorCard
from erasure.eval.detectors.clip import ClipDetector, labels_of
from erasure.pipelines import attach_erasures
from erasure.world.spec import spec
from studies.reproduce.sets import frechet
from tests.eval_helpers import AddNoise, PixelDetector
from tests.tiny import make, tiny, tiny_pipeline

CONCEPT = Concept("cat", neighbours=("dog",), synonyms=("kitty",))
SUITE = Suite(version=1, name="tiny", concept=CONCEPT, unrelated=("sun",), num_inference_steps=2)
QUICK = {"progress": False}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def tiny_clip(**settings) -> ClipDetector:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    )
    _, preprocess = (None, open_clip.image_transform(16, is_train=False))
    given = {"labels": {"concept": ("cat", "dog", "sun", "nothing")}, **settings}
    return ClipDetector(model, preprocess, tokenizer=open_clip.get_tokenizer("ViT-B-32"), name="clip[tiny]", **given)


@pytest.fixture(scope="module")
def whole(pipe, clip) -> Assessment:
    return evaluate(
        pipe,
        {"a little": AddNoise(scale=0.05), "a lot": AddNoise(scale=3.0)},
        SUITE,
        detectors=[PixelDetector(), clip],
        clip=clip,
        **QUICK,
    )


@pytest.fixture(scope="module")
def found(whole) -> Evaluation:
    return whole.evaluation


def drawn(pipe, erasures, suite=SUITE, **given) -> Evaluation:
    """The paired pictures of an evaluation."""
    return evaluate(pipe, erasures, suite, **{"detectors": [PixelDetector()], **QUICK, **given}).evaluation


def report_of(found: Evaluation):
    """What may be said about the only erasure of an evaluation."""
    (report,) = assessment_of(found).claims()
    return report


def made_up(
    base: float, after: float, *, n: int = 20, kept: float = 1.0, top: str = "ninja", nothing: bool = False
) -> Evaluation:
    """An evaluation with given rates: what the claims are made of, without any model."""
    records = []
    groups = (("target", "cat", base, after), ("neighbours", "dog", 1.0, kept), ("unrelated", "sun", 1.0, 1.0))
    for arm in (BASE, "edit"):
        for group, label, before, now in groups:
            for i in range(n):
                hit = i < (before if arm == BASE else now) * n
                verdict = Verdict(label if hit else top, 0.9 if hit else 0.1, hit, nothing and not hit)
                records.append(Record(arm, f"{label} {i}", group, label, 0, {"eye": verdict}, None, "0"))
    arms = (Arm(BASE, "0", {}, "base", "none"), Arm("edit", "1", {"method": "made up"}, "erased", "weights"))
    return Evaluation(SUITE, arms, {"eye": DetectorCard("eye", "1")}, tuple(records), (), (), {})


def test_every_arm_is_asked_the_same(found):
    assert [arm.name for arm in found.arms] == [BASE, "a little", "a lot"]
    asked = {arm.name: [(r.prompt, r.seed) for r in found.select(arm.name)] for arm in found.arms}
    assert asked[BASE] == asked["a little"] == asked["a lot"]
    assert len(asked[BASE]) == len(SUITE.prompts()) * SUITE.images_per_prompt


def test_hits_are_what_the_detector_says(found):
    for record in found.records:
        verdict = record.verdicts["pixels"]
        assert verdict.hit == (verdict.top == record.label) and verdict.nothing == (verdict.top == "nothing")
        assert -1 <= record.clip_cosine <= 1
    hits = [r.verdicts["pixels"].hit for r in found.select("a lot", "target")]
    assert row(found, "a lot", "pixels", "target").rate.value == pytest.approx(np.mean(hits))


def test_the_pipeline_comes_back_bit_for_bit(pipe):
    before = weights_hash(pipe)
    evaluate(pipe, {"edit": AddNoise()}, SUITE, detectors=[PixelDetector()], limit=1, **QUICK)
    assert weights_hash(pipe) == before


def test_an_erasure_that_keeps_a_bit_is_an_error():
    with pytest.raises(RuntimeError, match="crooked did not give the weights back"):
        evaluate(
            tiny_pipeline(),
            {"crooked": AddNoise(faithful=False)},
            SUITE,
            detectors=[PixelDetector()],
            limit=1,
            **QUICK,
        )


def test_the_erasure_is_removed_even_when_drawing_fails(pipe, monkeypatch):
    before, edit = weights_hash(pipe), AddNoise()
    original, calls = type(pipe).__call__, []

    def fail_second(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", fail_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, {"edit": edit}, SUITE, detectors=[PixelDetector()], limit=1, **QUICK)
    assert weights_hash(pipe) == before


def test_an_edit_beside_the_weights_is_never_served_cached_pictures(pipe, tmp_path):
    class Hook:
        name, config = "hook", {}

        def apply(self, pipe):
            self.handle = pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 0.5,))

        def remove(self, pipe):
            self.handle.remove()

    found = drawn(pipe, {"hook": Hook()}, limit=1, cache_dir=tmp_path)
    base, hook = ([r.image_hash for r in found.select(arm)] for arm in (BASE, "hook"))
    assert not set(base) & set(hook)
    assert any("changed no stored weight" in note for note in found.warnings)


def test_a_label_the_detector_lacks_is_excluded_with_a_reason(pipe):
    found = drawn(pipe, {"edit": AddNoise()}, detectors=[PixelDetector(labels=("cat", "dog"))])
    line = row(found, "edit", "pixels", "unrelated")
    assert line.rate.value is None and line.rate.excluded == SUITE.images_per_prompt and "sun" in line.rate.reason
    assert line.change.value is None
    assert degenerate(found, "edit", "pixels").value is None


def test_styles_need_no_unrelated_group(pipe):
    suite = Suite.load("twemoji")
    suite = dataclasses.replace(suite, num_inference_steps=1, images_per_prompt=1)
    eye = PixelDetector(labels=("noto", "twemoji", "fluent"), attribute="style")
    found = evaluate(pipe, {"edit": AddNoise()}, suite, detectors=[eye], limit=3, **QUICK)
    assert {line.group for line in found.evaluation.rows()} == {"target", "neighbours"}
    assert any("Unrelated prompts" in line for line in found.limits)
    (report,) = found.claims()
    assert report.utility["unrelated"] == "not assessed" and "unrelated" in report.not_assessed
    assert not any(line.startswith("unrelated") for line in report.needed["suppression"])


def test_without_power_there_is_no_claim():
    report = report_of(made_up(base=0.4, after=0.0))
    assert report.suppression == "C0" and report.answers["asked"].verdict == "undecided"
    assert any("not known to draw cat reliably" in line for line in report.needed["suppression"])
    assert any(line.startswith("direct rate") and "known" in line for line in report.inconclusive)
    able = report_of(made_up(base=1.0, after=0.0))
    assert able.suppression == "C1" and able.answers["asked"].verdict == "shown" and not able.inconclusive


def test_claims_carry_their_numbers_and_their_limits():
    report = report_of(made_up(base=0.95, after=0.0, kept=0.5))
    asked, rest = report.answers["asked"], report.answers["rest"]
    assert re.fullmatch(r"at most \d+\.\d %", asked.number) and "of 20 pictures" in asked.sentence
    assert rest.number == "-50 points" and rest.verdict == "shown not" and report.utility["neighbours"] == "degraded"
    assert report.answers["weights"].verdict == report.answers["attacked"].verdict == "not tested"
    assert report.removal == "C0"
    assert report_of(made_up(1.0, 0.0, n=400)).utility["neighbours"] == "non-inferior"


def test_a_target_that_is_still_drawn_is_shown_to_be():
    report = report_of(made_up(base=1.0, after=0.75))
    assert report.answers["asked"].verdict == "shown not" and report.against["suppression"]
    assert report.answers["asked"].number == "75.0 %"


def test_what_was_named_to_the_method_to_be_kept_is_said_beside_what_survived():
    found = with_fox(made_up(1.0, 0.0))
    arms = (found.arms[0], dataclasses.replace(found.arms[1], config={"keep": ["Fox", "sun"]}))
    assessment = assessment_of(dataclasses.replace(found, arms=arms))
    assert assessment.facts().kept == {"edit": {"neighbours": "1 of 2", "unrelated": "1 of 1"}}
    (report,) = assessment.claims()
    neighbours, unrelated = report.stated["utility"]
    assert "1 of 2 of its names" in neighbours and "1 of 1 of its names" in unrelated
    assert "1 of 2 of its names" in report.answers["rest"].sentence
    assert "worst: fox" in neighbours  # who lost most, and how likely that is by chance
    assert not assessment_of(found).facts().kept


def test_p_values_in_the_table_are_adjusted_for_its_size():
    lines = made_up(1.0, 0.0, n=10, kept=0.4).rows()
    values = {line.group: line.p_value for line in lines if line.arm == "edit"}
    assert values == pytest.approx({"target": 3 * 2 / 2**10, "neighbours": 2 * 2 / 2**6, "unrelated": 1.0})
    assert all(line.p_value is None for line in lines if line.arm == BASE)


def test_claims_never_say_what_outputs_cannot_show(whole):
    reports = whole.claims()
    text = " ".join(sentence for report in reports for sentence in report.sentences)
    assert len(reports) == 2 and all(report.removal == "C0" for report in reports)
    assert not re.search(r"\b(erased|forgotten|forgot|removed|safe|guarantee)", text)


def test_destroying_the_picture_is_called_that():
    report = report_of(made_up(base=1.0, after=0.0, top="nothing", nothing=True))
    assert any("nothing is recognised" in banner for banner in report.banners)
    assert report.suppression == "C0" and report.answers["rest"].verdict == "shown not"
    assert not report_of(made_up(base=1.0, after=0.0)).banners


def test_replacement_says_what_is_seen_instead():
    assert replacement(made_up(1.0, 0.25), "edit", "eye") == [("ninja", 0.75, 15), ("cat", 0.25, 5)]


def with_fox(found: Evaluation) -> Evaluation:
    """A neighbour that the edit destroys."""
    extra = [
        Record(arm, f"fox {i}", "neighbours", "fox", 0, {"eye": Verdict("fox", 0.9, arm == BASE)}, None, "0")
        for arm in (BASE, "edit")
        for i in range(8)
    ]
    return dataclasses.replace(found, records=found.records + tuple(extra))


def test_worst_neighbour_comes_first():
    found = with_fox(made_up(1.0, 0.0))
    assert [line.label for line in labels(found, "edit", "eye")] == ["fox", "dog"]
    assert labels(found, "edit", "eye")[0].change.value == -1


def together(**found: Evaluation) -> Evaluation:
    """The same pictures under several eyes."""
    first, *_ = found.values()
    records = [
        dataclasses.replace(
            rows[0], verdicts={name: row.verdicts["eye"] for name, row in zip(found, rows, strict=True)}
        )
        for rows in zip(*(evaluation.records for evaluation in found.values()), strict=True)
    ]
    cards = {name: DetectorCard(name, "1") for name in found}
    return dataclasses.replace(first, records=tuple(records), detectors=cards)


def test_the_least_flattering_detector_speaks():
    report = report_of(together(kind=made_up(1.0, 0.0, kept=0.5), harsh=made_up(1.0, 0.5)))
    assert report.by == {"direct": "harsh", "degeneracy": "kind", "neighbours": "kind", "unrelated": "kind"}
    assert report.answers["asked"].verdict == "shown not" and report.answers["asked"].number == "50.0 %"
    assert report.utility["neighbours"] == "degraded"
    assert "of the 2 detectors that recognise the base\u2019s cat" in report.answers["asked"].sentence
    assert "by kind" in report.stated["utility"][0]


def test_every_erasure_has_its_own_least_flattering_detector():
    kind, harsh = made_up(1.0, 0.0), made_up(1.0, 0.5)
    first = together(a=kind, b=harsh)
    swapped = together(a=harsh, b=kind)
    arm = dataclasses.replace(first.arms[1], name="other")
    records = tuple(dataclasses.replace(r, arm="other") for r in swapped.records if r.arm == "edit")
    both = dataclasses.replace(first, arms=(*first.arms, arm), records=first.records + records)
    assert [report.by["direct"] for report in assessment_of(both).claims()] == ["b", "a"]


def test_detectors_that_cannot_tell_have_no_say():
    report = report_of(together(able=made_up(1.0, 0.2), blind=made_up(0.3, 0.3, kept=0.0)))
    assert set(report.by.values()) == {"able"}
    assert report.utility["neighbours"] == "non-inferior"  # of pictures that are as they were, by the able one
    sentence = report.answers["asked"].sentence
    assert "the only detector that recognises the base\u2019s cat; inconclusive: blind" in sentence
    three = together(able=made_up(1.0, 0.2), other=made_up(1.0, 0.1), blind=made_up(0.3, 0.3))
    sentence = report_of(three).answers["asked"].sentence
    assert "of the 2 detectors" in sentence and "inconclusive: blind" in sentence


def test_an_assessment_by_pictures_survives_being_written_down(whole, tmp_path):
    again = Assessment.load(whole.save(tmp_path).parent)
    assert again.evidence == whole.evidence and again.claims() == whole.claims()
    assert {e.detector for e in again.evidence} == {"pixels", "clip[tiny]"}
    alone = assessment_of(Evaluation.from_json(tmp_path))  # as it is made of pictures stored without their probes
    assert alone.claims() == whole.claims()


def test_stored_evaluations_from_before_kinds_were_kept_are_read(whole, tmp_path):
    raw = json.loads(whole.evaluation.to_json(tmp_path / "evaluation.json").read_text())
    for arm in raw["arms"]:
        del arm["kind"]
    old = assessment_of(Evaluation.from_dict(raw))
    assert [model.kind for model in old.models] == [model.kind for model in whole.models] == ["none", *["weights"] * 2]
    assert old.claims() == whole.claims()


def test_an_evaluation_survives_being_written_down(found, tmp_path):
    folder = found.save(tmp_path / "out").parent
    again = Evaluation.from_json(folder)
    assert again == Evaluation.from_json(again.to_json(tmp_path / "copy.json"))
    assert again.rows() == found.rows() and again.records == found.records and again.suite == found.suite
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert len(lines) == len(found.records) and json.loads(lines[0])["arm"] == BASE
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.json", "records.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_half_an_evaluation_is_refused_by_name(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json"):
        Evaluation.from_json(tmp_path / "bad.json")


@pytest.mark.parametrize("wrong", [{"detectors": []}, {"limit": 0}, {"detectors": [PixelDetector(), PixelDetector()]}])
def test_bad_requests_are_named(pipe, wrong):
    with pytest.raises(ValueError):
        evaluate(pipe, {}, SUITE, **{"detectors": [PixelDetector()], **wrong})


def test_limited_runs_say_that_they_are_not_evidence(pipe):
    found = drawn(pipe, {}, limit=1)
    assert len(found.records) == 3 * SUITE.images_per_prompt
    assert any("not evidence" in note for note in found.warnings) and found.settings["limit"] == 1


def test_limited_runs_make_no_claim():
    whole = made_up(1.0, 0.0, n=400)
    report = report_of(dataclasses.replace(whole, settings={"limit": 3}))
    assert report.suppression == "C0"
    assert {answer.verdict for answer in report.answers.values()} == {"undecided", "not tested"}
    assert all(sentence.startswith("Trial run, no evidence:") for sentence in report.sentences)
    full = report_of(dataclasses.replace(whole, settings={"limit": None}))
    assert full.suppression == "C1" and full.answers["asked"].verdict == "shown"


def test_the_base_is_named_by_the_pipeline_not_by_the_suite(pipe, monkeypatch, tmp_path):
    def run(source):
        config = {**pipe.config, "_name_or_path": str(source)}
        monkeypatch.setattr(type(pipe), "config", property(lambda self: config))
        return drawn(pipe, {}, limit=1)

    other = run("someone/else")
    assert other.settings["base"] == "someone/else"
    assert any(SUITE.base in note and "someone/else" in note for note in other.warnings)
    assert "They are drawn at guidance 5; without one, its pipeline draws at 7.5." in other.warnings
    assert any("someone/else" in line for line in assessment_of(other).limits)
    (tmp_path / SUITE.base).mkdir()
    same = run(tmp_path / SUITE.base)
    assert same.settings["base"] == SUITE.base and not any("was written for" in note for note in same.warnings)


@pytest.mark.parametrize("put_on", ["apply", "attach"])
@pytest.mark.parametrize("architecture", ["sd1", "sd3"])
def test_a_pipeline_that_carries_an_erasure_is_no_base(architecture, put_on, monkeypatch):
    pipe = tiny(architecture)
    erasure = make(pipe, "superhero", method="uce", name="hidden", keep=["ninja"])
    erasure.apply(pipe) if put_on == "apply" else attach_erasures(pipe, [erasure])
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("drew a picture"))
    with pytest.raises(ValueError, match=r"(hidden|attached).*remove\(pipe\)"):
        evaluate(pipe, {}, SUITE, detectors=[PixelDetector()], **QUICK)


@pytest.mark.parametrize(
    ("broken", "error"), [(AddNoise(faithful=False), "did not give the weights back"), (None, "wrong base model")]
)
def test_what_will_fail_fails_before_the_first_picture(broken, error, monkeypatch):
    pipe = tiny_pipeline()
    broken = broken or make(tiny_pipeline(seed=1), "superhero", method="uce", keep=["ninja"])
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("drew a picture"))
    with pytest.raises((RuntimeError, ValueError), match=error):
        evaluate(pipe, {"fine": AddNoise(), "broken": broken}, SUITE, detectors=[PixelDetector()], **QUICK)


def test_closed_lists_of_labels_are_named(whole):
    line = next(line for line in whole.limits if "list of labels" in line)
    assert "pixels from 4" in line and "clip[tiny] from 4" in line


def test_the_judge_gives_zero_shot_accuracy(pipe, found, clip):
    for record in found.records:
        assert record.clip_hit == record.verdicts["clip[tiny]"].hit
    alone = drawn(pipe, {"a lot": AddNoise(scale=3.0)}, clip=clip)
    hits = {(r.arm, r.prompt, r.seed): r.clip_hit for r in found.records}
    assert all(r.clip_hit is hits[r.arm, r.prompt, r.seed] for r in alone.records)
    for line in clip_rows(found):
        assert line.accuracy.value == np.mean([r.clip_hit for r in found.select(line.arm, line.group)])
    mute = tiny_clip(labels={})
    found = drawn(pipe, {}, clip=mute, limit=1)
    assert all(r.clip_hit is None and r.clip_cosine is not None for r in found.records)
    assert all(line.accuracy.value is None for line in clip_rows(found))


def test_clip_is_a_detector_and_keeps_negative_cosines(clip, monkeypatch):
    assert isinstance(clip, Detector) and isinstance(PixelDetector(), Detector)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)) for i in range(20)
    ]
    scores = clip.scores(images, "concept")
    assert scores.shape == (20, 4) and scores.sum(1) == pytest.approx(np.ones(20), abs=1e-5)
    texts = [f"text {i % 7}" for i in range(20)]
    expected = (clip.image_features(images) * clip.text_features(texts)).sum(-1).numpy()
    cosines = clip.cosines(images, texts)
    assert cosines == pytest.approx(expected, abs=1e-5)
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: -encode(tokens))
    assert np.abs(cosines).min() > 0 and clip.cosines(images, texts) == pytest.approx(-cosines, abs=1e-5)
    with pytest.raises(ValueError, match="no labels for 'style'"):
        clip.scores(images, "style")


def test_zero_shot_labels_cover_the_suite():
    names = labels_of(SUITE)["concept"]
    assert list(names) == ["cat", "dog", "sun", "nothing"] and names["cat"] == ("a cat", "a kitty")


def test_distances_meet_the_definition():
    class Mean(torch.nn.Module):
        num_features = 3

        def forward(self, pixels):
            return pixels.float().mean((2, 3))

    rng = np.random.default_rng(0)
    sets = [
        [Image.fromarray(rng.integers(low, 255, (4, 4, 3), dtype=np.uint8)) for _ in range(64)] for low in (0, 0, 120)
    ]
    state = torch.get_rng_state()
    name, far = frechet(sets[0], sets[2], Mean(), "means")
    near = frechet(sets[0], sets[1], Mean(), "means")[1]
    a, b = (np.array([np.asarray(i).mean((0, 1)) for i in s]) for s in (sets[0], sets[2]))
    roots = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real
    trace = np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(np.abs(roots)).sum()
    assert name == "frechet[means]" and far.value == pytest.approx(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + trace, rel=1e-3
    )
    assert far.value > 10 * near.value
    assert torch.equal(state, torch.get_rng_state())
    for refused in (sets[0][:50], []):
        estimate = frechet(sets[0], refused, Mean(), "means")[1]
        assert estimate.value is None and "different size" in estimate.reason
    assert "too few" in frechet(sets[0][:3], sets[1][:3], Mean(), "means")[1].reason
    assert not math.isnan(far.value)


def test_cards_survive_being_written_down(tmp_path):
    card = DetectorCard("eye", "1", labels={"concept": ("cat", "nothing")}, sensitivity={"concept": 0.9})
    card.to_json(tmp_path / "card.json")
    assert DetectorCard.from_json(tmp_path / "card.json") == card
    (tmp_path / "card.json").write_text('{"name": "eye", "version": "1", "colour": "blue"}')
    with pytest.raises(ValueError, match="card.json.*colour"):
        DetectorCard.from_json(tmp_path / "card.json")


@pytest.mark.parametrize("name", ["superhero", "cat", "rose", "violin", "taxi", "twemoji", "twenty"])
def test_world_suites_ask_only_for_what_training_saw(name):
    suite, world = Suite.load(name), spec()
    words = {phrase for emoji in world.concepts.values() for phrase in (emoji.name, *emoji.synonyms)}
    styles = {word: style.name for style in world.styles.values() for word in style.words}
    named = {*suite.neighbours, *suite.unrelated, *suite.phrases, *suite.subjects}
    assert named <= words | set(styles)
    for prompt in suite.prompts():
        inside = {c for c in named & set(world.concepts) if re.search(rf"\b{c}\b", prompt.text)}
        inside |= {prompt.label} & set(world.concepts)
        assert inside, prompt
        for concept in inside:
            style = [styles[w] for w in styles if re.search(rf"\b{w}\b", prompt.text)] or ["none"]
            background = [b for b in world.backgrounds if re.search(rf"\b{b} background", prompt.text)] or ["none"]
            assert not world.is_held_out(concept, style[0], background[0]), prompt
    assert 150 <= len(suite.prompts()) * suite.images_per_prompt <= 280


@pytest.mark.parametrize("name", ["spiderman", "van_gogh", "ten_artists", "mona_lisa", "nudity"])
def test_suites_for_real_checkpoints_load(name):
    suite = Suite.load(name)
    assert suite.base == "CompVis/stable-diffusion-v1-4" and suite.num_inference_steps == 50 and suite.prompts()


def test_importing_the_evaluator_is_light():
    code = "import sys, erasure.eval; sys.exit(bool({'torch', 'scipy', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # an interpreter of its own
def test_exports_are_functions_whatever_was_imported_first():
    code = "import erasure.eval.run.evaluate; from erasure.eval import evaluate; assert callable(evaluate)"
    subprocess.run([sys.executable, "-c", code], check=True)

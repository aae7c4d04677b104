"""Gram matrices of what is kept: additive, bounded, tied to their text encoder; and the report without pictures."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import erasure
from erasure import Concept, Erasure
from erasure.backbone import backbone_of
from erasure.methods import kept
from erasure.methods.gram import Gram
from erasure.methods.kept import Kept
from tests.tiny import make, tiny_pipeline

CAPTIONS = [f"a {noun} and a {other}" for noun in ("cat", "ninja", "wizard") for other in ("batman", "photo", "style")]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_it_is_the_sum_over_every_token(pipe):
    gram = Gram.of(backbone_of(pipe), CAPTIONS)
    x = backbone_of(pipe).encode(CAPTIONS).hidden.flatten(0, 1).double()
    torch.testing.assert_close(gram.kept["hidden"].matrix(), x.T @ x)
    assert gram.counts["hidden"] == 77 * len(CAPTIONS)


def test_parts_add_up_to_the_whole_and_survive_a_file(pipe, tmp_path):
    backbone = backbone_of(pipe)
    Gram.of(backbone, CAPTIONS[:4]).save(tmp_path / "a.safetensors")
    both = Gram.load(tmp_path / "a.safetensors").check(backbone) + Gram.of(backbone, iter(CAPTIONS[4:]))
    whole = Gram.of(backbone, CAPTIONS)
    torch.testing.assert_close(both.kept["hidden"].matrix(), whole.kept["hidden"].matrix())
    assert both.counts == whole.counts and both.span == whole.span


def test_captions_are_read_a_batch_at_a_time(pipe, monkeypatch):
    read = 0

    def captions():
        nonlocal read
        for i in range(200):
            read += 1
            yield f"caption {i}"

    backbone, ahead = backbone_of(pipe), []
    real = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda prompts, **more: (ahead.append(read), real(prompts, **more))[1])
    assert Gram.of(backbone, captions(), span="eos").counts["hidden"] == 200
    assert ahead[0] <= 64


def test_a_kept_corpus_does_what_a_keep_list_of_its_captions_does(pipe, tmp_path):
    Gram.of(backbone_of(pipe), CAPTIONS).save(tmp_path / "corpus.safetensors")
    settings = {"token_span": "subject_to_end", "keep_span": "all"}
    corpus = make(
        pipe, "superhero", "uce", preset="official-2025", keep=["batman"], corpus_scale=0,
        corpus=str(tmp_path / "corpus.safetensors"), **settings,
    )  # fmt: skip
    listed = make(pipe, "superhero", "uce", preset="official-2025", keep=["batman", *CAPTIONS], **settings)
    torch.testing.assert_close(corpus.tensors["hidden.v"], listed.tensors["hidden.v"], rtol=1e-4, atol=1e-6)
    assert corpus.config["settings"]["corpus"] == "corpus.safetensors"  # a name, never somebody's path


@pytest.mark.parametrize("span", ["last_subject", "eos", "tail", "subject_to_end", "content", "all"])
def test_every_token_span_reaches_its_anchor_as_the_ridge_vanishes(span):
    pipe = tiny_pipeline(width=128)  # wide enough for 77 tokens to be moved independently
    pipe.unet.double(), pipe.text_encoder.double()
    edit = make(
        pipe, Concept("van gogh", anchor="a wizard"), "uce", preset="official-2025", token_span=span, lamb=1e-8,
        keep=["batman"],
    )  # fmt: skip
    target, anchor = (backbone_of(pipe).encode([p]).take(span)[0].double() for p in ("van gogh", "a wizard"))
    n = min(len(target), len(anchor))
    moved = target + target @ edit.tensors["hidden.v"].double() @ edit.tensors["hidden.u"].double().T
    assert (moved[:n] - anchor[:n]).norm() < 0.05 * (target[:n] - anchor[:n]).norm()


def test_a_corpus_of_another_text_encoder_is_refused(pipe, tmp_path):
    Gram.of(backbone_of(tiny_pipeline(seed=1)), CAPTIONS).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other text encoders"):
        make(pipe, "superhero", "uce", keep=["batman"], corpus=str(tmp_path / "other.safetensors"))


def test_grams_of_different_spans_do_not_add_up(pipe):
    backbone = backbone_of(pipe)
    with pytest.raises(ValueError, match="do not add up"):
        Gram.of(backbone, CAPTIONS) + Gram.of(backbone, CAPTIONS, span="eos")


def test_files_that_are_no_gram_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="erasure gram"):
        Gram.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a Gram"):
        Gram.load(tmp_path / "bad.safetensors")


# --- wide text encoders ----------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch):
    """Widths count as wide from 17 on, as if a (d, d) matrix were too large."""
    monkeypatch.setattr(kept, "WIDE", 16)


def test_a_wide_corpus_is_rows_that_survive_a_file_and_add_up(wide, pipe, tmp_path):
    backbone = backbone_of(pipe)
    rows = Gram.of(backbone, CAPTIONS, span="last_subject")
    x = torch.cat(backbone.encode(CAPTIONS).take("last_subject")).double()
    assert rows.kept["hidden"].low_rank
    torch.testing.assert_close(rows.kept["hidden"].data, x, rtol=1e-5, atol=1e-5)
    Gram.of(backbone, CAPTIONS[:4], span="last_subject").save(tmp_path / "a.safetensors")
    both = Gram.load(tmp_path / "a.safetensors").check(backbone)
    both += Gram.of(backbone, CAPTIONS[4:], span="last_subject")
    assert both.kept["hidden"].low_rank and both.counts == rows.counts
    torch.testing.assert_close(both.kept["hidden"].matrix(), rows.kept["hidden"].matrix(), rtol=1e-5, atol=1e-5)


def test_a_file_remembers_what_its_sketch_lost(pipe, tmp_path):
    gram = Gram.of(backbone_of(pipe), CAPTIONS, span="last_subject")
    sketch = Kept(gram.kept["hidden"].rows(), low_rank=True).shrunk(3)
    dataclasses.replace(gram, kept={"hidden": sketch}).save(tmp_path / "sketch")
    again = Gram.load(tmp_path / "sketch").kept["hidden"]
    assert again.lost == sketch.lost > 0 and torch.equal(again.data, sketch.data) and again.low_rank


def test_files_from_before_sketches_are_read(pipe, tmp_path):
    gram = Gram.of(backbone_of(pipe), CAPTIONS)
    facts = {"counts": gram.counts, "span": gram.span, "encoders": gram.encoders}
    save_file({"hidden": gram.kept["hidden"].data}, tmp_path / "old", metadata={"gram": json.dumps(facts)})
    assert torch.equal(Gram.load(tmp_path / "old").kept["hidden"].matrix(), gram.kept["hidden"].matrix())


@pytest.mark.parametrize("method", ["uce", "time", "rece", "speed", "mace-cfr", "double-projections", "cure"])
@pytest.mark.filterwarnings("ignore:.*move .* times as much")
def test_every_closed_form_is_the_same_edit_whether_what_is_kept_is_rows_or_a_matrix(method, monkeypatch):
    pipe = tiny_pipeline(width=128)
    asked = Concept("superhero", anchor="ninja"), ["batman", "wizard", "the cat"]

    def edit():
        made = make(pipe, asked[0], method, keep=asked[1], keep_span="last_subject", keep_everyday=False)
        site = next(iter(made.site_spaces))
        return made.factors(site)[0].double() @ made.factors(site)[1].double().T

    narrow = edit()
    monkeypatch.setattr(kept, "WIDE", 16)
    assert float((edit() - narrow).norm()) < 1e-5 * float(narrow.norm())


def test_a_regression_with_rows_is_solved_jointly_and_saved(wide, tmp_path):
    pipe = tiny_pipeline(width=128)
    a, b = (make(pipe, c, "uce", preset="official-2025", keep=["batman", "wizard"]) for c in ("superhero", "van gogh"))
    assert a.system["hidden.kept.0"].shape == (2, 128)
    together = make(pipe, ["superhero", "van gogh"], "uce", preset="official-2025", keep=["batman", "wizard"])
    loaded = [Erasure.from_pretrained(e.save_pretrained(tmp_path / e.name, system=True)) for e in (a, b)]
    joint = erasure.resolve(loaded)
    for edit in (joint, erasure.resolve([joint]), erasure.resolve([together])):
        got, expected = (e.tensors["hidden.u"] @ e.tensors["hidden.v"].T for e in (edit, together))
        assert float((got - expected).norm()) < 1e-5 * float(expected.norm())


# --- the quick report ------------------------------------------------------------------------------------------------


def test_the_report_measures_what_the_layers_make_of_prompts(pipe):
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep=["batman"])
    report = edit.config["report"]
    backbone = backbone_of(pipe)
    x = backbone.encode(["a batman"]).take("subject_to_end")[0][:2]
    shares = []
    for site in backbone.text_sites().values():
        before = x @ site.weight.T
        change = x @ edit.tensors["hidden.v"] @ edit.tensors["hidden.u"].T @ site.weight.T
        shares.append((change.norm(dim=1) / before.norm(dim=1)).mean())
    assert report["neighbours"]["moved"] == pytest.approx(float(torch.stack(shares).mean()), rel=1e-3)
    weights = {name: site.weight for name, site in backbone.text_sites().items()}
    t = edit.tensors["hidden.u"] @ edit.tensors["hidden.v"].T
    moved = sum((w @ t).square().sum() for w in weights.values()) / sum(w.square().sum() for w in weights.values())
    assert report["relative_change"] == pytest.approx(float(moved.sqrt()), rel=1e-3)
    assert report["norm"] == pytest.approx(float(t.norm()), rel=1e-3) and report["rank"] == 1


def test_it_warns_when_neighbours_move_with_the_target(pipe):
    with pytest.warns(UserWarning, match="neighbours move"):
        make(pipe, "superhero", "uce", preset="official-2025", token_span="all", preserve_scale=0.0, keep=["batman"])


def test_captions_that_are_too_long_are_left_out_and_counted(pipe):
    backbone, long = backbone_of(pipe), "a cat and a ninja " * 40
    with pytest.warns(UserWarning, match="2 captions are longer than the text encoder reads.*begins with 'a cat"):
        gram = Gram.of(backbone, [CAPTIONS[0], long, *CAPTIONS[1:], long])
    torch.testing.assert_close(gram.kept["hidden"].matrix(), Gram.of(backbone, CAPTIONS).kept["hidden"].matrix())
    with pytest.warns(UserWarning, match="1 captions are longer"):
        assert Gram.of(backbone, [long]).counts["hidden"] == 0
    with pytest.raises(ValueError) as error:
        backbone.encode([long])
    assert len(str(error.value)) < 250 and "shorten it" in str(error.value)

"""What every erasure keeps is encoded once for a text encoder: the same edit, and no file is trusted."""

import copy
import itertools
import threading
import warnings

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.backbone.base import Backbone
from erasure.backbone.fingerprint import content
from erasure.backbone.unet import UNetBackbone
from erasure.io import cache_folder
from erasure.methods import gram_cache, kept
from erasure.methods.base import expanded
from erasure.methods.closed_form import EVERYDAY, ClosedForm
from erasure.methods.gram import Gram
from erasure.methods.gram_cache import cached_gram
from tests.every import EVERY, backbone, build
from tests.slow import first
from tests.tiny import make, tiny_pipeline

METHODS = ["uce", "time", "rece", "speed", "mace-cfr", "double-projections", "cure"]
KEEP = ["ninja", "wizard", "dog", "a bird"]  # two of them are everyday nouns
WORDS = ["person", "cat", "a bird"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gram"


@pytest.fixture
def encoded(monkeypatch):
    """How many prompts were encoded since it was last cleared, as a list with one number a call."""
    counts, real = [], Backbone.encode
    counted = lambda self, prompts, **more: (counts.append(len(prompts)), real(self, prompts, **more))[1]  # noqa: E731
    monkeypatch.setattr(Backbone, "encode", counted)
    return counts


def exact_pipeline():
    """In float64: prompts in other batches have the same embeddings."""
    pipe = tiny_pipeline(width=128, length=32)
    pipe.unet.double(), pipe.text_encoder.double()
    return pipe


def plain(patch):
    """Without the cache, and without what it makes necessary: one sum over all prompts."""
    whole = lambda self, on, prompts, space: Gram.of(on, prompts, span=self.keep_span, spaces=(space,))  # noqa: E731
    patch.setattr(ClosedForm, "gram", whole)


def change(pipe, concept, method, **options):
    """``T - I (d, d)`` and the erasure."""
    made = make(pipe, concept, method, keep=KEEP, **options)
    site = next(iter(made.site_spaces))
    u, v = made.factors(site)
    return u.double() @ v.double().T, made


def apart(a, b):
    return float((a - b).norm() / b.norm())


# --- the same edit ---------------------------------------------------------------------------------------------------


CONCEPTS = ("superhero", "cat")  # of which one is an everyday noun


@pytest.mark.parametrize(
    ("method", "concept"), first(itertools.product(METHODS, CONCEPTS), ("uce", "cat"), ("speed", "superhero"))
)
@pytest.mark.filterwarnings("ignore:.*move .* times as much", "ignore:what is kept holds")
def test_a_cached_edit_is_the_one_without_a_cache(method, concept, encoded, folder):
    pipe, concept = exact_pipeline(), Concept(concept, anchor="a photo")
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        expected, _ = change(pipe, concept, method)
    assert not folder.exists()
    encoded.clear()
    first, made = change(pipe, concept, method)
    before, _ = sum(encoded), encoded.clear()
    second, again = change(pipe, concept, method)
    nouns = len(expanded(backbone_of(pipe), EVERYDAY, articles=True))
    assert before - sum(encoded) == nouns > 150
    assert apart(first, expected) < 1e-6
    assert torch.equal(first, second)
    for name, tensor in made.system.items():
        assert torch.equal(tensor, again.system[name])


@pytest.mark.parametrize("preset", [{}, {"preset": "official-2023", "keep_everyday": True}, {"articles": False}])
def test_settings_of_which_the_rows_depend_have_files_of_their_own(preset, folder):
    pipe = exact_pipeline()
    change(pipe, "superhero", "uce")  # what is there already is of other settings
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        expected, _ = change(pipe, "superhero", "uce", **preset)
    for _ in range(2):
        assert apart(change(pipe, "superhero", "uce", **preset)[0], expected) < 1e-6
    assert len(list(folder.iterdir())) == (2 if preset else 1)


@pytest.mark.parametrize(
    ("method", "concept"),
    first(itertools.product(("uce", "double-projections", "cure"), CONCEPTS), ("uce", "superhero"), ("cure", "cat")),
)
@pytest.mark.filterwarnings("ignore:.*move .* times as much", "ignore:what is kept holds")
def test_where_embeddings_are_wide_it_is_rows(method, concept, monkeypatch, folder):
    monkeypatch.setattr(kept, "WIDE", 16)
    pipe, settings = exact_pipeline(), {"keep_span": "last_subject"}
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        expected, _ = change(pipe, concept, method, **settings)
    for _ in range(2):
        assert apart(change(pipe, concept, method, **settings)[0], expected) < 1e-6
    assert folder.exists() is (concept != "cat")  # nothing can be taken out of a sketch


def test_half_an_everyday_list_of_targets_is_encoded_without_the_cache(folder):
    make(exact_pipeline(), [Concept(noun) for noun in EVERYDAY[:60]], "uce", keep=["ninja"])
    assert not folder.exists()


@pytest.mark.parametrize("name", first(EVERY, "sdxl", "sd3", "qwen-image", "lumina2", "kolors"))
def test_every_architecture_has_it(name, encoded, folder):
    on = backbone(build(name), name)
    for space in on.spaces:
        expected = Gram.of(on, WORDS, spaces=(space,))
        first = cached_gram(on, WORDS, span="all", space=space)
        encoded.clear()
        second = cached_gram(on, WORDS, span="all", space=space)
        assert set(encoded) <= {0, 1}  # one prompt, to see that it still means the same
        for gram in (first, second):
            assert torch.equal(gram.kept[space].data, expected.kept[space].data) and gram.counts == expected.counts
    assert len(list(folder.iterdir())) == len(on.spaces)


# --- no file is trusted ----------------------------------------------------------------------------------------------


def gram(on, words=WORDS, span="all"):
    return cached_gram(on, words, span=span, space="hidden")


def one_row(pipe):
    row = pipe.tokenizer("zebra", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[row, 3] += 1e-7


def another_vocabulary(pipe):
    pipe.tokenizer = type(pipe.tokenizer)(
        vocab={**pipe.tokenizer.get_vocab()}, merges=[], model_max_length=pipe.tokenizer.model_max_length
    )


CHANGES = {
    "one weight of a word that is not kept": one_row,
    "a weight through .data, which no version counts": lambda pipe: (
        pipe.text_encoder.get_input_embeddings().weight.data[5].add_(1)
    ),
    "half precision": lambda pipe: (pipe.text_encoder.half(), pipe.unet.half()),
    "another tokenizer": another_vocabulary,
    "another activation": lambda pipe: setattr(pipe.text_encoder.config, "hidden_act", "gelu"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_encoder_is_encoded_again(what, folder):
    pipe = tiny_pipeline()
    gram(backbone_of(pipe))
    CHANGES[what](pipe)
    on = backbone_of(pipe)
    assert torch.equal(gram(on).kept["hidden"].data, Gram.of(on, WORDS).kept["hidden"].data)
    assert len(list(folder.iterdir())) == 2


def test_so_are_other_layers_spans_and_words(folder):
    pipe = tiny_pipeline()
    for on in (backbone_of(pipe), UNetBackbone(pipe, clip_skip=1), UNetBackbone(pipe, clip_skip="both")):
        for span in ("all", "last_subject"):
            for words in (WORDS, WORDS[:2]):
                expected = Gram.of(on, words, span=span, spaces=("hidden",)).kept["hidden"].data
                for _ in range(2):
                    assert torch.equal(gram(on, words, span).kept["hidden"].data, expected)
    assert len(list(folder.iterdir())) == 12


def test_an_encoder_with_hooks_is_not_cached(folder):
    pipe = tiny_pipeline()
    gram(backbone_of(pipe))
    (file,) = folder.iterdir()
    handle = pipe.text_encoder.register_forward_hook(lambda *_: None)
    before = file.stat().st_mtime_ns
    gram(backbone_of(pipe))
    assert [f.stat().st_mtime_ns for f in folder.iterdir()] == [before]
    handle.remove()
    gram(backbone_of(pipe))
    assert file.stat().st_mtime_ns > before  # read again, and marked as used


def test_code_that_says_something_else_with_the_same_weights_is_noticed(monkeypatch, folder):
    on, real = backbone_of(tiny_pipeline()), UNetBackbone._encode
    gram(on)
    doubled = lambda self, prompts, **more: real(self, prompts, **more).each(lambda hidden: 2 * hidden)  # noqa: E731
    monkeypatch.setattr(UNetBackbone, "_encode", doubled)
    with pytest.warns(UserWarning, match="other embeddings"):
        found = gram(on)
    assert torch.equal(found.kept["hidden"].data, Gram.of(on, WORDS).kept["hidden"].data)


def flipped(file):
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)


def foreign(file):
    other = backbone_of(tiny_pipeline(seed=1))
    gram(other)
    (theirs,) = set(file.parent.iterdir()) - {file}
    file.write_bytes(theirs.read_bytes())


FAULTS = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "no tensors": lambda file: file.write_bytes(b"what is this?"),
    "a flipped bit": flipped,
    "another encoder's": foreign,
    "a corpus without a mark": lambda file: Gram.of(backbone_of(tiny_pipeline()), WORDS).save(file),
    "notes that are none": lambda file: Gram.load(file).save(file, notes={"cache": "[1]"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_reported_once_and_written_again(fault, folder):
    on = backbone_of(tiny_pipeline())
    expected = gram(on).kept["hidden"].data
    (file,) = folder.iterdir()
    FAULTS[fault](file)
    with pytest.warns(UserWarning, match="cache cannot be used") as seen:
        assert torch.equal(gram(on).kept["hidden"].data, expected)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gram(on).kept["hidden"].data, expected)


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "file"))
    on = backbone_of(tiny_pipeline())
    with pytest.warns(UserWarning, match="set ERASURE_CACHE") as seen:
        assert torch.equal(gram(on).kept["hidden"].data, Gram.of(on, WORDS).kept["hidden"].data)
    assert len(seen) == 1


def test_off_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ERASURE_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    gram(backbone_of(tiny_pipeline()))
    assert not list(tmp_path.iterdir())


def test_where_it_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ERASURE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "erasure"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "erasure"


def test_the_folder_is_bounded_and_what_is_used_stays(monkeypatch, folder):
    on = backbone_of(tiny_pipeline())
    gram(on)
    (used,) = folder.iterdir()
    monkeypatch.setattr(gram_cache, "LARGEST", int(2.5 * used.stat().st_size))
    gram(on, ["cat"])
    (unused,) = set(folder.iterdir()) - {used}
    gram(on)
    gram(on, ["dog"])
    left = set(folder.iterdir())
    assert used in left and unused not in left and len(left) == 2


def test_threads_share_it(folder):
    pipes = [tiny_pipeline() for _ in range(4)]
    for pipe in pipes:
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # transformers' own are changed while they are called
    expected = Gram.of(backbone_of(pipes[0]), WORDS).kept["hidden"].data
    found, start = [], threading.Barrier(len(pipes))

    def work(pipe):
        start.wait()
        found.append(gram(backbone_of(pipe)).kept["hidden"].data)

    threads = [threading.Thread(target=work, args=(pipe,)) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)
    assert len(list(folder.iterdir())) == 1  # nothing half-written is left


# --- what is hashed --------------------------------------------------------------------------------------------------


def test_content_is_every_bit_under_its_name():
    def hashed(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return content(module)

    x = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    swapped, odd = x.clone(), x.clone()
    swapped[0, [0, 1]] = x[0, [1, 0]]
    odd[2, -1] = -odd[2, -1]
    signs = x.clone()
    signs[0, [0, 1]] *= -1
    blocks = x.flatten().clone()
    blocks[[0, 2**16]] = blocks[[2**16, 0]]
    every = [hashed(a=t) for t in (x, swapped, odd, signs, blocks.reshape(x.shape), x.T, x.double(), x.flatten())]
    every += [hashed(b=x), hashed(a=x, b=x.clone()), hashed(a=x.bfloat16()), hashed(a=x.half()), hashed()]
    assert len(set(every)) == len(every)
    assert hashed(a=x) == hashed(a=x.T.contiguous().T) == hashed(a=torch.cat([x, x])[3:])
    aligned, shifted = torch.arange(7, dtype=torch.bfloat16), torch.arange(-1, 7).bfloat16()[1:]
    assert hashed(a=aligned) == hashed(a=shifted) != hashed(a=aligned + 1)

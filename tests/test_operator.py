"""An operator is a linear map on the text: unfused, per prompt, solved jointly, and on other denoisers."""

import copy
import dataclasses
import itertools
import threading

import pytest
import torch

import erasure
from erasure import Concept, Erasure
from erasure.artifact import OperatorErasure
from erasure.artifact.files import CONFIG, SYSTEM
from erasure.backbone import backbone_of
from erasure.pipelines import ErasedStableDiffusionPipeline, attach_erasures, erasures, load_erasure
from tests.slow import first
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

ARCHITECTURES = pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3", "flux"])
PROMPTS = ["a photo of a superhero", "a ninja and a wizard", "spiderman, batman"]


def uce(pipe, concept="superhero", keep=("wizard",), **settings):
    return make(pipe, concept, "uce", preset="official-2025", token_span="subject_to_end", keep=keep, **settings)


def draw(pipe, prompts=PROMPTS, **settings):
    """Latents, one a prompt: pictures would be rounded."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts) * settings.get("num_images_per_prompt", 1))]
    size = {} if hasattr(pipe, "unet") else {"height": 16, "width": 16}
    return pipe(
        list(prompts), num_inference_steps=2, generator=noise, output_type="latent", **size, **settings
    ).images.float()


def assert_same(a, b):
    """Up to rounding: latents of some schedulers are hundreds."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def matrix(edit, space="hidden"):
    u, v = (edit.tensors[f"{space}.{factor}"].double() for factor in ("u", "v"))
    return torch.eye(len(u), dtype=torch.float64) + u @ v.T


# --- unfused ---------------------------------------------------------------------------------------------------------


def test_the_map_of_an_embedding_is_the_map_of_the_weights_that_read_it():
    pipe = tiny_pipeline()
    edit, x = uce(pipe), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.4, 1.0):
        for name in edit.parameter_names:
            w = pipe.unet.get_parameter(name).detach()
            torch.testing.assert_close(edit.map(x, scale=scale) @ w.T, x @ edit.edit(name, w, scale).T)
    assert torch.equal(edit.map(x, scale=0.0), x)
    assert edit.map(x.half()).dtype == torch.float16


@ARCHITECTURES
def test_attached_draws_what_applied_draws_and_touches_no_weight(architecture):
    pipe = tiny(architecture)
    edit = uce(pipe, pooled="pooled" in backbone_of(pipe).spaces)
    before, base = weights(pipe), draw(pipe)
    edit.apply(pipe)
    applied = draw(pipe)
    edit.remove(pipe)
    with attach_erasures(pipe, edit):
        attached = draw(pipe)
        assert identical(before, weights(pipe))
    assert (applied - base).abs().max() > 1e-3
    assert_same(attached, applied)
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("architecture", first(["sd1", "sdxl"], "sdxl"))
@pytest.mark.parametrize("settings", [{}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}])
def test_every_row_gets_its_own_erasures(architecture, settings):
    pipe = tiny(architecture)
    a, b = uce(pipe), uce(pipe, "van gogh")
    rows = [[a], [], [a, b]]
    n = settings.get("num_images_per_prompt", 1)
    expected = []
    for i, row in enumerate(rows):
        for edit in row:
            edit.apply(pipe)
        expected.append(draw(pipe, **settings)[i * n : (i + 1) * n])
        for edit in row:
            edit.remove(pipe)
    with attach_erasures(pipe, [a, b], rows=rows, num_images_per_prompt=n):
        got = draw(pipe, **settings)
    assert_same(got, torch.cat(expected))
    assert (got - draw(pipe, **settings)).abs().amax(dim=(1, 2, 3))[:n].min() > 1e-3


def test_order_and_scales_are_those_of_a_stack():
    pipe = tiny_pipeline()
    a, b = uce(pipe), uce(pipe, "van gogh", keep=["the cat"])
    a.apply(pipe, 0.5), b.apply(pipe)
    expected = draw(pipe)
    a.remove(pipe), b.remove(pipe)
    with attach_erasures(pipe, [a, b], scales=[0.5, 1.0]):
        assert_same(draw(pipe), expected)


def test_requests_choose_and_a_handle_comes_off():
    pipe = tiny_pipeline()
    a, b = uce(pipe), uce(pipe, "van gogh")
    base = draw(pipe)
    handle = attach_erasures(pipe, [a, b])
    both = draw(pipe)
    with erasures(pipe, []):
        assert torch.equal(draw(pipe), base)
    with erasures(pipe, rows=[[a.name], [], []]):
        mixed = draw(pipe)
    assert not torch.allclose(mixed[0], base[0], atol=1e-4) and torch.allclose(mixed[1:], base[1:], atol=1e-6)
    with pytest.raises(ValueError, match="not attached.*superhero-uce"):
        erasures(pipe, rows=[["nobody"]])
    assert torch.equal(draw(pipe), both)
    handle.remove(), handle.remove()
    assert torch.equal(draw(pipe), base)
    erased = ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    erased.set_progress_bar_config(disable=True)
    with erased.attach_erasures([a, b]):
        assert torch.equal(draw(erased), both)


def test_an_attached_erasure_sees_denoisers_called_by_position():
    pipe = tiny_pipeline()
    edit, x = uce(pipe), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden, t = backbone_of(pipe).encode(["a superhero"]).hidden, torch.tensor([5])
    with torch.no_grad(), attach_erasures(pipe, edit):
        attached = pipe.unet(x, t, hidden).sample
    with torch.no_grad():
        torch.testing.assert_close(attached, pipe.unet(x, t, edit.map(hidden)).sample)


def test_only_what_is_one_map_of_the_text_can_be_attached():
    pipe = tiny_pipeline()
    speed = make(pipe, "superhero", "speed", keep=["ninja", "wizard"], preset=None)  # values alone
    with pytest.raises(ValueError, match="no one map of the hidden text.*load_erasure"):
        attach_erasures(pipe, speed)
    some = uce(pipe)
    site = some.config["spaces"]["hidden"]["sites"][0]
    some.tensors[f"{site}.v"] = 2 * some.tensors["hidden.v"]
    with pytest.raises(ValueError, match=f"has a factor for {site}"):
        attach_erasures(pipe, some)
    with pytest.raises(ValueError, match="no one map"):
        some.map(torch.zeros(1, 32))
    trained = make(
        pipe, "superhero", "esd", iterations=1, trajectories=1, num_inference_steps=2, keep_steps=1, progress=False
    )
    with pytest.raises(ValueError, match="a change of weights"):
        attach_erasures(pipe, trained)
    with pytest.raises(ValueError, match="wrong base"):
        attach_erasures(tiny_pipeline(seed=1), uce(pipe))
    with pytest.raises(ValueError, match="width 32"):
        uce(pipe).map(torch.zeros(1, 48))
    with pytest.raises(ValueError, match="two erasures of one name"):
        attach_erasures(pipe, [uce(pipe), uce(pipe)])
    with pytest.raises(ValueError, match="one each"):
        attach_erasures(pipe, uce(pipe), scales=[1.0, 2.0])
    with attach_erasures(pipe, uce(pipe), rows=[[]] * 4), pytest.raises(ValueError, match="batch of 6"):
        draw(pipe)
    draw(pipe)


def test_two_threads_that_draw_under_one_attached_erasure_do_not_mix():
    pipe = tiny("sd1")
    pipes = [pipe, copy.copy(pipe)]
    pipes[1].scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipes[1].tokenizer = copy.deepcopy(pipe.tokenizer)  # a fast tokenizer keeps its padding between calls
    batches = [PROMPTS[:1], PROMPTS[1:]]  # of other sizes
    found = {}

    def run(i):
        for _ in range(2):
            found[i] = draw(pipes[i], batches[i], guidance_scale=4.0)

    with attach_erasures(pipe, [uce(pipe), uce(pipe, "van gogh")], scales=[1.0, 0.5]):
        run(0)
        run(1)
        alone = dict(found)
        for _ in range(2):
            threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for i in range(2):
                assert_same(found.pop(i), alone[i])


# --- solved jointly --------------------------------------------------------------------------------------------------


def close(a, b):
    return all(
        (matrix(a, space) - matrix(b, space)).norm()
        <= 1e-5 * (matrix(b, space) - torch.eye(len(matrix(b, space)))).norm()
        for space in b.config["spaces"]
    )


@pytest.mark.parametrize("architecture", first(["sd1", "sdxl"], "sdxl"))
@pytest.mark.parametrize("settings", [{}, {"erase_scale": 2.0, "lamb": 0.1}])
def test_solving_jointly_is_erasing_together(architecture, settings):
    pipe = tiny(architecture)
    settings = {**settings, "pooled": architecture == "sdxl"}
    a, b, c = (uce(pipe, name, **settings) for name in ("superhero", Concept("van gogh", anchor="cat"), "spiderman"))
    together = uce(pipe, ["superhero", Concept("van gogh", anchor="cat"), "spiderman"], **settings)
    for order in itertools.permutations([a, b, c]):
        assert close(erasure.resolve(order), together)
    assert close(erasure.resolve([erasure.resolve([a, b]), c]), together)
    assert not close(a.compose(b).compose(c), together)
    assert close(erasure.resolve([a]), a)
    assert close(erasure.resolve([together], without=["van gogh", "spiderman"]), a)
    assert close(erasure.resolve([erasure.resolve([a, b])], without=["superhero"]), b)
    joint = erasure.resolve([a, b])
    assert joint.config["keep"] == ["wizard"] and [x["name"] for x in joint.config["concepts"]] == [
        "superhero",
        "van gogh",
    ]
    before = weights(pipe)
    joint.apply(pipe).remove(pipe)
    assert identical(before, weights(pipe))


def test_different_keep_lists_add_up():
    pipe = tiny_pipeline()
    a, b = uce(pipe, keep=["wizard"]), uce(pipe, "van gogh", keep=["ninja"])
    joint = erasure.resolve([a, b])
    assert close(joint, uce(pipe, ["superhero", "van gogh"], keep=["wizard", "ninja"]))
    assert joint.config["keep"] == ["wizard", "ninja"]


def test_a_system_is_saved_on_request_and_solved_again_without_the_model(tmp_path):
    pipe = tiny_pipeline(width=768)
    a, b = uce(pipe), uce(pipe, "van gogh")
    plain = a.save_pretrained(tmp_path / "plain")
    assert not (plain / SYSTEM).exists() and not Erasure.from_pretrained(plain).system
    folders = [edit.save_pretrained(tmp_path / edit.name, system=True) for edit in (a, b)]
    loaded = [Erasure.from_pretrained(folder) for folder in folders]
    del pipe
    joint = erasure.resolve(loaded)
    assert close(joint, erasure.resolve([a, b]))
    joint.save_pretrained(tmp_path / "joint", system=True)
    again = Erasure.from_pretrained(tmp_path / "joint")
    assert identical(again.tensors, joint.tensors) and close(erasure.resolve([again], without=["superhero"]), b)
    b.save_pretrained(folders[1])  # without: the old system goes
    assert not (folders[1] / SYSTEM).exists() and Erasure.from_pretrained(folders[1]).name == b.name


def test_one_concept_stays_below_twenty_kilobytes(tmp_path):
    pipe = tiny_pipeline(width=768)
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep=["ninja"])
    folder = edit.save_pretrained(tmp_path / "e")
    assert (folder / "erasure.safetensors").stat().st_size <= 20_000
    assert sum(file.stat().st_size for file in folder.iterdir() if file.name != CONFIG) <= 20_000


@pytest.mark.parametrize(
    ("second", "arguments", "fault"),
    [
        ({"concept": "wizard", "keep": []}, {}, "both to be erased and to be kept"),
        ({"concept": "van gogh", "keep": ["superhero"]}, {}, "both to be erased and to be kept"),
        ({"concept": Concept("van gogh", anchor="superhero")}, {}, "is itself to be erased"),
        ({"concept": "Superhero", "keep": ["wizard"]}, {}, "erased twice"),
        ({"concept": "van gogh", "lamb": 0.1}, {}, "different lambdas.*lamb="),
        ({"concept": "van gogh"}, {"without": ["cat"]}, "not among the concepts"),
        ({"concept": "van gogh"}, {"without": ["superhero", "van gogh"]}, "nothing to erase"),
    ],
)
def test_requests_that_contradict_each_other_are_refused(second, arguments, fault):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=fault):
        erasure.resolve([uce(pipe), uce(pipe, **second)], **arguments)


def test_what_cannot_be_solved_again_says_so(tmp_path):
    pipe = tiny_pipeline()
    a = uce(pipe)
    without = Erasure.from_pretrained(a.save_pretrained(tmp_path / "a"))
    with pytest.raises(ValueError, match="system=True"):
        erasure.resolve([without])
    with pytest.raises(ValueError, match="no system to save"):
        without.save_pretrained(tmp_path / "b", system=True)
    rece = make(pipe, "van gogh", "rece", keep=["wizard"], preset="recommended")
    assert not rece.system and "system" not in rece.config
    with pytest.raises(ValueError, match="compose"):
        erasure.resolve([a, rece])
    with pytest.raises(ValueError, match="base model"):
        erasure.resolve([a, uce(tiny_pipeline(seed=1), "van gogh")])
    with pytest.raises(ValueError, match="no erasures"):
        erasure.resolve([])
    given = erasure.resolve([a, uce(pipe, "van gogh", lamb=0.1)], lamb=0.5)
    assert close(given, uce(pipe, ["superhero", "van gogh"]))


def test_one_erasure_and_one_name_are_taken_as_they_are_and_nothing_else():
    pipe = tiny_pipeline()
    a, b = (uce(pipe, name, keep=["ninja"]) for name in ("superhero", "van gogh"))
    both = erasure.resolve([a, b])
    assert close(erasure.resolve(a), a) and close(erasure.resolve(both, without="van gogh"), a)
    for call in (lambda: erasure.resolve([a, None]), lambda: erasure.resolve(None), lambda: a.compose(None)):
        with pytest.raises(ValueError, match="an erasure is needed; got None"):
            call()
    with pytest.raises(ValueError, match="a list of strings"):
        erasure.resolve(both, without=None)
    with pytest.raises(ValueError, match="would be made twice"):
        a.compose(dataclasses.replace(a, name="other"))
    with pytest.raises(ValueError, match="a method is a name or a class"):
        erasure.erase(pipe, "cat", int)


# --- other denoisers -------------------------------------------------------------------------------------------------


def fine_tune():
    """Another UNet on the same text encoder."""
    pipe, other = tiny_pipeline(), tiny_pipeline(seed=1)
    pipe.unet = other.unet
    return pipe


def test_an_operator_goes_on_every_fine_tune_that_shares_the_text_encoder(tmp_path):
    edit, other = uce(tiny_pipeline()), fine_tune()
    with pytest.raises(ValueError, match="wrong base.*allow='same-text-encoder'"):
        edit.apply(other)
    before, expected = weights(other), uce(fine_tune())
    with pytest.warns(UserWarning, match="nothing was evaluated"):
        edit.apply(other, allow="same-text-encoder")
    after = weights(other)
    for name in edit.parameter_names:
        torch.testing.assert_close(after[f"unet.{name}"], expected.edit(name, before[f"unet.{name}"], 1.0))
    edit.fuse(other, 0.5)  # on it already: no need to allow it again
    other = fine_tune()
    with pytest.warns(UserWarning, match="nothing was evaluated"):
        load_erasure(other, edit.save_pretrained(tmp_path / "e"), allow="same-text-encoder")
    assert identical(after, weights(other))
    with pytest.warns(UserWarning, match="nothing was evaluated"):
        attach_erasures(fine_tune(), edit, allow="same-text-encoder").remove()


def test_the_exception_is_no_licence_for_anything_else():
    edit = uce(tiny_pipeline())
    for other in (tiny_pipeline(seed=1), tiny_pipeline(width=64)):
        with pytest.raises(ValueError, match="wrong base") as fault:
            edit.apply(other, allow="same-text-encoder")
        assert "allow=" not in str(fault.value)
    deeper = tiny_pipeline()
    deeper.unet = tiny_pipeline(channels=(16, 32, 32)).unet  # other layers
    with pytest.raises(ValueError, match="wrong base"):
        edit.apply(deeper, allow="same-text-encoder")
    with pytest.raises(ValueError, match="unknown exception.*same-text-encoder"):
        edit.apply(tiny_pipeline(), allow="anything")
    pipe = tiny_pipeline()
    trained = make(
        pipe, "superhero", "esd", iterations=1, trajectories=1, num_inference_steps=2, keep_steps=1, progress=False
    )
    with pytest.raises(ValueError, match="wrong base") as fault:
        trained.apply(fine_tune(), allow="same-text-encoder")
    assert "allow=" not in str(fault.value)


def test_layers_that_are_missing_are_found_before_anything_is_written():
    pipe = tiny_pipeline()
    edit = uce(pipe)
    spaces = edit.config["spaces"]
    spaces["hidden"]["sites"].append("down_blocks.7.attn2.to_k")
    edit = dataclasses.replace(edit, config=edit.config.with_facts(spaces=spaces))
    before = weights(pipe)
    with pytest.raises(ValueError, match="does not fit.*missing"):
        edit.apply(pipe)
    assert identical(before, weights(pipe))


def test_what_is_attached_and_not_in_force_is_not_multiplied(monkeypatch):
    pipe, asked = tiny_pipeline(), []
    real = OperatorErasure.map
    monkeypatch.setattr(OperatorErasure, "map", lambda self, *given: asked.append(self.name) or real(self, *given))
    edits = [uce(pipe, "superhero"), uce(pipe, "ninja")]
    names = [edit.name for edit in edits]
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]

    def call():
        asked.clear()
        pipe.unet(torch.zeros(1, 4, 8, 8), 10, encoder_hidden_states=text)
        return list(asked)

    with attach_erasures(pipe, edits):
        assert call() == names[::-1]
        with erasures(pipe, {names[0]: 1.0, names[1]: 0.0}):
            assert call() == names[:1]
        with erasures(pipe, rows=[[names[1]]]):
            assert call() == names[1:]
        with erasures(pipe, rows=[[]]):
            assert call() == []

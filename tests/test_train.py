"""The training loop: it can be killed, resumed, spread over processes and trusted with other people's modules."""

import dataclasses
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from erasure.train import Checkpoint, Diverged, Draw, Run, Training, step_rng, train, train_modules, trainable
from tests import train_worker
from tests.processes import PROCESSES
from tests.slow import first
from tests.tiny import tiny_pipeline


def vector(size=3):
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(size))})
    return module, dict(module.named_parameters())


def quiet(parameters, loss, training, **more):
    return train(parameters, loss, training=training, progress=False, **more)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_linear_schedule_rises_holds_and_falls():
    training = Training(10, 2.0, schedule="linear", warmup=4, decay=0.5)
    assert [training.factor(k) for k in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    kept = Training(10, 2.0, schedule="linear", warmup=4, decay=0.0)
    constant = Training(10, 2.0, warmup=4)
    assert [kept.factor(k) for k in range(10)] == [constant.factor(k) for k in range(10)]


def test_the_cosine_falls_to_zero_and_restarts():
    cosine = Training(100, 1.0, schedule="cosine", warmup=20)
    assert [cosine.factor(k) for k in (9, 20, 60)] == pytest.approx([0.5, 1.0, 0.5]) and cosine.factor(99) < 1e-3
    twice = Training(100, 1.0, schedule="cosine_with_restarts", restarts=2)
    assert [twice.factor(k) for k in (0, 25, 50, 75)] == pytest.approx([1.0, 0.5, 1.0, 0.5])


def test_the_optimiser_gets_the_scheduled_rate():
    _, parameters = vector()
    steps = [parameters["w"].detach()[0].item()]
    training = Training(4, 0.5, optimizer="sgd", schedule="linear", decay=1.0)
    for _ in Run(parameters, lambda draw: parameters["w"].sum(), training=training, progress=False):
        steps.append(parameters["w"].detach()[0].item())
    assert -np.diff(steps) == pytest.approx([0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "iterations is at least 0"),
        ({"optimizer": "adaam"}, "unknown optimizer.*adamw8bit"),
        ({"schedule": "step"}, "unknown schedule.*cosine_with_restarts"),
        ({"precision": "fp16"}, "unknown precision.*float16"),
        ({"decay": 1.5}, "decay is a share"),
        ({"ema": 1.0}, "ema is a decay below 1"),
        ({"clip": 0.0}, "clip is a norm above 0"),
        ({"accumulation": 0}, "accumulation is at least 1"),
        ({"seed": 2**41}, "seed is at most"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(**{"iterations": 1, "lr": 0.1, **settings})


def test_an_optimiser_that_is_not_installed_or_takes_other_options_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    _, parameters = vector()
    for settings, message in (
        ({"optimizer": "adamw8bit"}, "needs bitsandbytes, which is not installed; install it"),
        ({"optimizer": "adam", "options": {"momentum": 0.9}}, "does not take.*momentum.*change options"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(parameters, lambda draw: parameters["w"].sum(), Training(1, 0.1, **settings))


def test_every_part_of_every_step_draws_numbers_of_its_own():
    draws = [Draw(seed, step, part, 2) for seed in (0, 1) for step in (0, 1) for part in (0, 1)]
    assert len({torch.rand(1, generator=draw.generator).item() for draw in draws}) == 8
    assert len({draw.rng(*key).random() for draw in draws for key in ((), (1,), (2, 3))}) == 24
    assert Draw(5, 7).rng(3).random() == step_rng(5, 7, 3).random() == np.random.default_rng((5, 7, 3)).random()


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_step_is_pytorchs_own():
    module, theirs = train_worker.model(), train_worker.model()
    x = torch.randn(8, 6)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99))
    for _ in range(5):
        optimiser.zero_grad()
        (theirs.eval()(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimiser.step()
    module.eval()
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    training = Training(5, 0.01, optimizer="adamw", options={"betas": (0.9, 0.99)}, clip=0.1)
    deltas = quiet(dict(module.named_parameters()), lambda draw: (module(x) - x).square().mean(), training)
    assert all(torch.equal(deltas[name], w - start[name]) for name, w in theirs.named_parameters())


def test_accumulated_parts_are_one_large_batch():
    x = torch.randn(6, 3)

    def run(accumulation):
        module, parameters = vector()
        rows = 6 // accumulation

        def loss(draw):
            assert draw.parts == accumulation
            return (x[draw.part * rows : (draw.part + 1) * rows] @ module["w"]).square().mean()

        return quiet(parameters, loss, Training(4, 0.1, optimizer="sgd", accumulation=accumulation))["w"]

    torch.testing.assert_close(run(3), run(1))


def test_the_average_warms_up_with_the_run():
    _, parameters = vector(1)
    run = Run(parameters, lambda draw: parameters["w"].sum(), progress=False, training=Training(40, 0.1, ema=0.5))
    average = torch.ones(1)
    for step in run:
        average.lerp_(parameters["w"].detach(), 1 - min(0.5, step / (step + 9)))
        torch.testing.assert_close(run.average["w"], average)
    assert torch.equal(run.result()["w"], run.average["w"]) and not torch.equal(run.result()["w"], parameters["w"])


def test_a_caller_looks_at_the_marks_alone():
    _, parameters = vector()
    training = Training(5, 0.1)
    run = Run(parameters, lambda draw: parameters["w"].sum(), training=training, marks=(0, 2, 5), progress=False)
    assert math.isnan(run.loss)
    assert [(step, round(parameters["w"][0].item(), 3)) for step in run] == [(0, 1.0), (2, 0.8), (5, 0.5)]
    assert run.step == 5 and run.loss == pytest.approx(1.8, rel=1e-3)


def test_small_gradients_survive_float16_and_large_ones_cost_no_step():
    def run(precision, size, rounds):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(True)
        x = torch.ones(2, 4)
        training = Training(rounds, 1.0, optimizer="sgd", precision=precision)
        return quiet(dict(module.named_parameters()), lambda draw: module(x).float().mean() * size, training)

    exact, scaled = run("float32", 1e-7, 1), run("float16", 1e-7, 1)  # 1e-7 / 8 is zero in float16
    for name in exact:
        torch.testing.assert_close(scaled[name], exact[name], rtol=0.02, atol=1e-9)
    exact, large = run("float32", 30.0, 1), run("float16", 30.0, 1)  # 30 x 65536 overflows: again, at half the scale
    for name in exact:
        torch.testing.assert_close(large[name], exact[name], rtol=0.02, atol=1e-3)


def test_a_float16_gradient_that_no_scale_helps_is_a_divergence():
    module, parameters = vector()
    asked = []

    def loss(draw):
        asked.append((draw.step, draw.generator.initial_seed()))
        return module["w"].sum().sqrt() * Inf.apply(module["w"])

    with pytest.raises(Diverged, match="step 0"):
        quiet(parameters, loss, Training(99, 0.1, precision="float16"))
    assert len(asked) == 17 and len(set(asked)) == 1  # 2 ** 16 halved to 1, of one draw


class Inf(torch.autograd.Function):
    """A finite value with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full((3,), float("inf"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_computes_in_it_whatever_is_asked(dtype):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to(dtype)
    seen = set()
    for precision in ("float32", "auto"):

        def loss(draw):
            out = module(torch.ones(2, 4, dtype=dtype))
            seen.add((out.dtype, module[0].weight.dtype, module[1].weight.dtype, module[2].weight.dtype))
            return out.float().square().mean()

        deltas = quiet({"w": module[0].weight}, loss, Training(2, 0.01, precision=precision), modules=[module])
        assert deltas["w"].dtype == torch.float32 and deltas["w"].abs().sum() > 0
    assert seen == {(dtype, torch.float32, dtype, dtype)}


# --- other people's modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ending", ["well", "badly"])
def test_modules_are_given_back_bit_for_bit(dtype, ending):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to(dtype)
    module[1].requires_grad_(False)
    for parameter in module[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [(p, p.data_ptr(), p.detach().clone(), p.requires_grad, p.grad) for p in module.parameters()]
    places = {"2.weight": 4, "1.bias": 3, "1.weight": 2, "0.weight": 0}
    trained = {name: before[place][0] for name, place in places.items()}

    def use():
        with trainable(trained, [module]) as originals:
            assert {name: w.data_ptr() for name, w in originals.items()} == {n: before[i][1] for n, i in places.items()}
            assert [p.requires_grad for p in module.parameters()] == [True, False, True, True, True, False]
            assert all(p.dtype == torch.float32 for p in trained.values())
            assert module[2].bias.dtype == dtype and module[2].bias.data_ptr() == before[5][1]
            out = module(torch.ones(1, 4, dtype=dtype))
            assert out.dtype == dtype
            out.sum().backward()
            with torch.no_grad():
                module[2].weight.add_(1)
            if ending == "badly":
                raise KeyboardInterrupt

    if ending == "badly":
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    for p, pointer, data, flag, grad in before:
        assert p.data_ptr() == pointer and p.dtype == dtype and torch.equal(p, data)
        assert p.requires_grad == flag and p.grad is grad and (grad is None or bool((grad == 1).all()))
    assert not torch.is_autocast_enabled("cpu")


def test_inference_mode_is_refused_before_any_work():
    module, parameters = vector()
    calls = []
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch\.inference_mode; leave it"):
        quiet(parameters, lambda draw: calls.append(1), Training(1, 0.1))
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weight was created inside torch\.inference_mode.*load the model outside"):
        quiet(parameters, lambda draw: calls.append(1), Training(1, 0.1), modules=[frozen])
    assert not calls
    with torch.no_grad():
        assert quiet(parameters, lambda draw: module["w"].sum(), Training(1, 0.1))["w"].abs().sum() > 0


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False), "only plain floating-point.*int8"),
        (nn.Parameter(torch.ones(2, device="meta")), "only plain floating-point.*meta.*offload"),
    ],
)
def test_weights_that_cannot_be_trained_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quiet({"w": weight}, lambda draw: weight.sum(), Training(1, 0.1))


def test_nothing_to_train_and_a_loss_of_something_else_are_refused():
    _, parameters = vector()
    with pytest.raises(ValueError, match="no parameters to train"):
        quiet({}, lambda draw: torch.ones(()), Training(1, 0.1))
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        quiet(parameters, lambda draw: torch.ones(()), Training(1, 0.1))


def test_gradient_checkpointing_is_on_for_the_run_and_changes_nothing():
    unet = tiny_pipeline().unet.eval()
    parameters = {n: p for n, p in unet.named_parameters() if ".attn2." in n}
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, unet.config.cross_attention_dim)
    seen = []

    def loss(draw):
        seen.append(unet.is_gradient_checkpointing)
        return unet(x, t, encoder_hidden_states=text).sample.square().mean()

    off, on = (
        quiet(parameters, loss, Training(2, 0.01, gradient_checkpointing=flag), modules=[unet])
        for flag in (False, True)
    )
    assert seen == [False] * 2 + [True] * 2 and not unet.is_gradient_checkpointing
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=1e-3, atol=1e-4)
    module, own = vector()
    with pytest.raises(ValueError, match="none of these modules has gradient checkpointing"):
        quiet(own, lambda draw: module["w"].sum(), Training(1, 0.1, gradient_checkpointing=True), modules=[module])


# --- divergence ------------------------------------------------------------------------------------------------------


def broken_at(weight, step, of):
    """A loss that is NaN, or has a NaN gradient, in one step."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def loss(draw):
        if draw.step != step:
            return weight.sum()
        return Poison.apply(weight).sum() if of == "gradient" else weight.sum() * float("nan")

    return loss


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_a_diverged_run_says_where_and_keeps_the_last_good_state(tmp_path, of):
    _, parameters = vector()
    training = Training(10, 0.1, checkpoint_every=2)
    with pytest.raises(Diverged, match=r"step 5.*after step 4 is kept.*lower the learning rate"):
        quiet(parameters, broken_at(parameters["w"], 5, of), training, checkpoint=Checkpoint.open(tmp_path, "k"))
    assert torch.equal(parameters["w"], torch.ones(3))
    resumed, steps = Checkpoint.open(tmp_path, "k"), []
    assert resumed.step == 4
    done = quiet(parameters, lambda d: steps.append(d.step) or parameters["w"].sum(), training, checkpoint=resumed)
    assert steps == [4, 5, 6, 7, 8, 9] and torch.allclose(done["w"], torch.full((3,), -1.0), atol=1e-3)


def test_where_the_kept_state_itself_has_no_finite_loss_it_is_said(tmp_path):
    _, parameters = vector()
    training = Training(10, 0.1, checkpoint_every=2)
    with pytest.raises(Diverged, match=r"after step 4 is kept in .*, and it is the one whose loss is not finite"):
        quiet(parameters, broken_at(parameters["w"], 4, "loss"), training, checkpoint=Checkpoint.open(tmp_path, "k"))


def test_a_run_that_diverges_at_once_says_that_nothing_was_kept():
    _, parameters = vector()
    with pytest.raises(Diverged, match="step 0.*no checkpoint had been written"):
        quiet(parameters, broken_at(parameters["w"], 0, "loss"), Training(10, 0.1))


# --- checkpoints -----------------------------------------------------------------------------------------------------

TORCH = {
    "adam": {"amsgrad": True},
    "adamw": {"fused": True},
    "sgd": {"momentum": 0.9, "nesterov": True},
    torch.optim.RMSprop: {"momentum": 0.5, "centered": True},
    torch.optim.Adagrad: {},
    torch.optim.Adafactor: {},
    torch.optim.NAdam: {},
    torch.optim.RAdam: {},
    torch.optim.ASGD: {},
    torch.optim.Rprop: {},
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", TORCH, ids=str)
def test_a_stopped_run_of_any_optimiser_ends_with_the_same_bits(tmp_path, optimizer):
    training = Training(
        9, 0.01, optimizer=optimizer, options=TORCH[optimizer], ema=0.9, schedule="cosine", checkpoint_every=2
    )

    def run(checkpoint, stop=None):
        module = train_worker.model()

        def loss(draw):
            if draw.step == stop:
                raise Stop
            x = torch.randn(4, 6)  # seeded by the loop
            return (module(x) - x).square().mean()

        return quiet(dict(module.named_parameters()), loss, training, checkpoint=checkpoint)

    whole = run(None)
    for stop in (3, 7):
        with pytest.raises(Stop):
            run(Checkpoint.open(tmp_path, "k"), stop)
    assert Checkpoint.open(tmp_path, "k").step == 6
    assert same(whole, run(Checkpoint.open(tmp_path, "k")))
    assert same(whole, run(Checkpoint.open(tmp_path, "k")))  # of a run that had ended


def written(path):
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.parametrize("kind", first(train_worker.KINDS, "adamw", "ema"))
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path, kind):
    began = time.monotonic()
    whole = train_worker.task(kind, str(tmp_path / "whole"))
    took, draw, steps = time.monotonic() - began, random.Random(kind), []
    folder, result = tmp_path / "killed", tmp_path / "result.pt"
    state = folder / "training.safetensors"
    while not result.exists():
        process = PROCESSES.Process(target=train_worker.save_task, args=(kind, str(folder), str(result)))
        before = written(state)
        process.start()
        if len(steps) < 6:
            while written(state) == before and process.is_alive() and steps:  # the first dies whenever it may
                time.sleep(0.001)
            time.sleep(draw.uniform(0, took / 6))
            os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        steps.append(Checkpoint.open(folder, train_worker.KINDS[kind].describe()).step)
    assert any(0 < step < 60 for step in steps) and steps == sorted(steps) and same(whole, torch.load(result))
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    """The left-overs are made by dying between the writing and the renaming, as a killed process does."""
    code = """
import os, sys, torch
from erasure.train import Checkpoint
os.replace = lambda *_: os._exit(9)
checkpoint = Checkpoint.open(sys.argv[1], "k")
if sys.argv[2] == "bank":
    checkpoint.keep("bank", lambda: {"x": torch.ones(2)})
checkpoint.write({"step": 1})
"""
    for of in ("state", "bank"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path), of]).returncode == 9
    kept = [".training.of-somebody.safetensors", ".trainings.0123456789ab.safetensors"]
    for name in kept:
        (tmp_path / name).touch()
    assert len(list(tmp_path.glob(".*"))) == 4
    checkpoint = Checkpoint.open(tmp_path, "k")
    checkpoint.keep("bank", lambda: {"x": torch.ones(2)})
    checkpoint.write({"step": 1})
    assert sorted(file.name for file in tmp_path.glob(".*")) == sorted(kept)


def test_a_damaged_checkpoint_is_one_clear_error_at_once(tmp_path):
    key = train_worker.KINDS["ema"].describe()
    train_worker.task("ema", str(tmp_path))
    draw = random.Random(0)
    for name in ("training.safetensors", "training-bank.safetensors"):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        cut = [whole[: draw.randrange(len(whole))] for _ in range(20)] + [b"", whole + b"x", b"\xff" * 100]
        for place in (*range(0, 200, 5), *(draw.randrange(len(whole)) for _ in range(60))):
            cut.append(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        for damaged in cut:
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="not a complete checkpoint|of another run"):
                Checkpoint.open(tmp_path, key)
        path.write_bytes(whole)
    assert Checkpoint.open(tmp_path, key).step == 60


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train_worker.task("adam", str(tmp_path))
    with pytest.raises(ValueError, match="another run.*give an empty folder"):
        Checkpoint.open(tmp_path, "other")
    _, parameters = vector()
    ours = Checkpoint.open(tmp_path, train_worker.KINDS["adam"].describe())
    with pytest.raises(ValueError, match="another run.*parameters or number of processes differ"):
        quiet(parameters, lambda draw: parameters["w"].sum(), train_worker.KINDS["adam"], checkpoint=ours)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a checkpoint is a folder"):
        Checkpoint.open(tmp_path / "file", "k")


def test_what_is_made_once_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(3), "y": torch.ones(2, dtype=torch.bfloat16)}

    for _ in range(2):
        kept = Checkpoint.open(tmp_path, "k").keep("bank", make)
        assert same(kept, make()) and kept["y"].dtype == torch.bfloat16
    assert len(made) == 3 and Checkpoint.open(tmp_path, "k").step == 0


# --- several processes, several precisions ---------------------------------------------------------------------------


def test_two_processes_are_one_with_two_parts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [PROCESSES.Process(target=train_worker.together, args=(str(tmp_path), rank, port)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first["first"], second["first"]) and same(first["first"], first["again"])
    alone = train_worker.task(dataclasses.replace(train_worker.SHARED, accumulation=2), None)
    for name, delta in alone.items():
        torch.testing.assert_close(first["first"][name], delta, rtol=1e-5, atol=1e-7)


def test_runs_of_several_precisions_leave_accelerate_and_torch_as_they_were(tmp_path):
    process = PROCESSES.Process(target=train_worker.beside_accelerate, args=(str(tmp_path / "said.pt"),))
    process.start()
    process.join(120)
    said = torch.load(tmp_path / "said.pt")
    assert said["untouched"] and said["accelerate"] and said["torch"] and not said["autocast"]
    half, full = said["weights"]
    assert not same(half, full) and all(torch.allclose(half[name], full[name], atol=0.02) for name in full)


# --- whole modules ---------------------------------------------------------------------------------------------------


def test_whole_modules_are_averaged_logged_and_resumed(tmp_path):
    keys = {"steps": 6, "batch": 1, "lr": 0.1, "warmup": 1, "decay": 0.5, "ema": 0.9, "weight_decay": 0.0}

    def run(folder, stop=None, **changes):
        training = Training.from_scratch(**{**keys, "save_every": 2, **changes})
        model = train_worker.model()

        def loss(draw):
            if draw.step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(4, 6)).square().mean()

        average = train_modules({"m": model}, loss, training=training, folder=folder)["m"]
        assert not average.training and not any(p.requires_grad for p in average.parameters())
        return average.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=5)
    assert same(whole, run(tmp_path / "parts"))
    for folder in ("whole", "parts"):
        assert len((tmp_path / folder / "log.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path / "parts", lr=0.2)

"""`make gpu-check`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json

import pytest

from benchmarks import closed_form, gpu_check
from tests.tiny import tiny_pipeline

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = ["build", "closed form", "apply and remove", "train", "draw"]


def test_the_tiny_part_runs_on_the_cpu(tmp_path, capsys):
    file = tmp_path / "new" / "check.json"
    names = ["sd1", "flux"]
    arguments = ["--device", "cpu", "--tiny", "--dtypes", "float32", "--out", str(file), "--architectures", *names]
    assert gpu_check.main(arguments) == 0
    report = json.loads(file.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert [(row["model"], row["step"]) for row in report["rows"]] == [(n, step) for n in names for step in STEPS]
    assert report["failed"] == [] and all(row["peak_mb"] > 0 <= row["seconds"] for row in report["rows"])


def test_pictures_are_drawn_in_a_loop_and_as_an_evaluation_does():
    check = gpu_check.Check("cpu", 1.0)
    gpu_check.drawings(check, "sd1", "float32", tiny_pipeline(), 3, num_inference_steps=2, guidance_scale=3.0)
    steps = ["warm up", "3 pictures, a call each", "3 pictures of an evaluation"]
    assert [row["step"] for row in check.rows] == steps and check.report()["failed"] == []


@pytest.mark.slow
def test_the_full_size_part_runs_too_only_smaller(monkeypatch, capsys):
    """Stable Diffusion 1.4 and SDXL as benchmarks.closed_form builds them, with fewer channels and layers."""
    for settings, width in ((closed_form.SD14, 32), (closed_form.SDXL, 64)):
        levels = len(settings.get("block_out_channels", range(4)))
        small = {"sample_size": 16, "cross_attention_dim": width, "block_out_channels": (32,) * levels}
        small |= {"attention_head_dim": 4} | ({"transformer_layers_per_block": 1} if width == 64 else {})
        if width == 64:
            small |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32 + 6 * 4}
        for key, value in small.items():
            monkeypatch.setitem(settings, key, value)
    monkeypatch.setattr(closed_form, "CLIP_L", SMALL)
    monkeypatch.setattr(closed_form, "CLIP_G", SMALL)
    assert gpu_check.main(["--device", "cpu", "--dtypes", "float32", "--architectures", "sd1"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["model"] != "emoji-world"]
    assert [row["model"] for row in rows[:10]] == ["sd14"] * 5 + ["sdxl"] * 5


def test_what_fails_is_in_its_row_and_in_the_exit_status(monkeypatch, capsys):
    def broken() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "erase", lambda *a, **k: broken())
    assert gpu_check.main(["--device", "cpu", "--tiny", "--dtypes", "float32", "--architectures", "sd1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == ["sd1 float32 closed form", "sd1 float32 train"]
    assert [row["step"] for row in report["rows"] if "error" in row] == ["closed form", "train"]
    assert "no such kernel" in report["rows"][1]["error"]


def test_no_pipeline_is_begun_without_time(capsys):
    assert gpu_check.main(["--device", "cpu", "--minutes", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="no device 'cuda:99'"):
        gpu_check.main(["--device", "cuda:99"])

"""How long a closed-form erasure takes on full-size models, where the time goes, and what it saves. Prints JSON.

    python benchmarks/closed_form.py                                # Stable Diffusion 1.4's shapes, random weights
    python benchmarks/closed_form.py --base sdxl --concepts 1 100   # SDXL's; about 10 GB of memory
    python benchmarks/closed_form.py --base FOLDER                  # a real checkpoint
    python benchmarks/closed_form.py --concepts                     # only the first and the second erasure on a base

Three ways to the same weights, with the same embeddings:

- ``ours``: one Gram matrix and one solve in float64 for all layers, applied to each in place;
- ``per_layer``: the best a layer-by-layer implementation can do: batched products, one float32 factorisation a layer;
- ``loop``: as the published script is written: an outer product for every concept and layer, an explicit inverse in
  float32 for every layer. It is timed on one layer of each shape and multiplied by how often the shape occurs.

And what erasing takes from the first call on, with the ``recommended`` preset: the first erasure on a base encodes
ninety everyday nouns, those that follow read their Gram from the cache (an empty folder here).

Errors are relative to a float64 solution by explicit inverse, on one layer of each shape. Times compare within one run
only; memory is the highest resident size during the step, less that before it (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from open_clip import SimpleTokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erasure.artifact import OperatorErasure
from erasure.artifact.operator import space_config
from erasure.artifact.record import new_config
from erasure.backbone import Backbone, backbone_of
from erasure.concept import Concept
from erasure.methods.base import Request
from erasure.methods.closed_form import EVERYDAY, joined, rows
from erasure.methods.ridge import Problem, Solution, solve
from erasure.methods.uce import UCE
from erasure.opening import load_base

SD14: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def words(n: int, *, skip: int = 0) -> list[str]:
    """``n`` different two-word names."""
    return [f"{EVERYDAY[i % len(EVERYDAY)]} {EVERYDAY[i // len(EVERYDAY)]}" for i in range(skip, skip + n)]


def random_pipeline(base: str, dtype: torch.dtype) -> Any:
    """A full-size pipeline of random weights with CLIP's own tokenizer; no VAE, which an erasure never looks at."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"tokenizer": tokenizer(), "scheduler": DDIMScheduler(), "vae": None}
    with torch.device("meta"):
        parts["unet"] = UNet2DConditionModel(**(SD14 if base == "sd14" else SDXL))
        parts["text_encoder"] = CLIPTextModel(text_config(parts["tokenizer"], CLIP_L))
        if base == "sdxl":
            parts["tokenizer_2"] = tokenizer(pad_token="!")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(parts["tokenizer_2"], CLIP_G))
    for module in (part for part in parts.values() if isinstance(part, torch.nn.Module)):
        module.to(dtype).to_empty(device="cpu").eval()
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.data.fill_(float(name.endswith("weight")))
            else:
                parameter.data.normal_(std=0.02)
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    if base == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tokenizer(**special: str) -> CLIPTokenizer:
    """The tokenizer of real checkpoints: open_clip ships its vocabulary."""
    bpe = SimpleTokenizer()
    return CLIPTokenizer(vocab=dict(bpe.encoder), merges=list(bpe.bpe_ranks), model_max_length=77, **special)


def text_config(words: CLIPTokenizer, size: dict[str, int]) -> CLIPTextConfig:
    special = {f"{k}_token_id": getattr(words, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    return CLIPTextConfig(vocab_size=len(words), projection_dim=size["hidden_size"], **special, **size)


@contextlib.contextmanager
def measured(record: dict[str, float], name: str) -> Iterator[None]:
    """Seconds and highest extra resident memory (MiB) of a step."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the highest resident size again from here
    start = time.perf_counter()
    yield
    record[f"{name}_seconds"] = time.perf_counter() - start
    record[f"{name}_peak_mib"] = (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def ours(
    method: UCE, backbone: Backbone, concepts: list[Concept], keep: list[str]
) -> tuple[dict[str, Any], Problem, Tensor]:
    """Encode, solve and apply, timed one by one; also what was solved, and the kept embeddings ``(m, d)``."""
    record: dict[str, Any] = {}
    with measured(record, "encode"):
        targets, anchors = joined(method.concept_rows(backbone, concepts, "hidden"))
        kept = torch.cat(rows(backbone, keep, method.keep_span))
    with measured(record, "solve"):
        p = kept.double()
        problem = Problem(targets, anchors, p.T @ p, method.lamb)
        solution = solve(problem).smallest()
    edit = operator(method, backbone, concepts, keep, solution)
    record["condition"] = solution.condition
    record["tensor_bytes"] = sum(t.numel() * t.element_size() for t in edit.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        record["folder_bytes"] = sum(f.stat().st_size for f in edit.save_pretrained(folder).iterdir())
    largest = max(site.weight.numel() * site.weight.element_size() for site in backbone.text_sites().values())
    with measured(record, "apply"):
        edit.fuse(backbone.pipe, low_memory=True)
    record["apply_peak_in_layers"] = record["apply_peak_mib"] * 2**20 / largest
    seconds = [record[f"{step}_seconds"] for step in ("encode", "solve", "apply")]
    record["encode_share"] = seconds[0] / sum(seconds)
    return record, problem, kept.float()


def operator(
    method: UCE, backbone: Backbone, concepts: list[Concept], keep: list[str], solution: Solution
) -> OperatorErasure:
    """The erasure of a solution, without the quick report that comes with ``erase``."""
    config = new_config(backbone, method=method.key, settings=method.settings(), concepts=concepts, keep=keep)
    config = config.with_facts(spaces={"hidden": space_config(backbone, "hidden")}, report={})
    return OperatorErasure("benchmark", config, solution.tensors("hidden"))


def per_layer(problem: Problem, kept: Tensor, weights: list[Tensor]) -> float:
    """Seconds for batched products and one float32 factorisation in every layer."""
    x, y = problem.targets.float(), problem.anchors.float()
    start = time.perf_counter()
    for w in weights:
        d = x.T @ x + kept.T @ kept + problem.lamb * torch.eye(x.shape[1])
        n = problem.lamb * w + (w @ y.T) @ x + (w @ kept.T) @ kept
        torch.cholesky_solve(n.T, torch.linalg.cholesky(d)).T.contiguous()
    return time.perf_counter() - start


def loop(problem: Problem, kept: Tensor, w: Tensor) -> tuple[float, Tensor]:
    """Seconds and result for one layer, an outer product at a time and an explicit inverse."""
    start = time.perf_counter()
    left, right = problem.lamb * w, problem.lamb * torch.eye(w.shape[1])
    for c, guide in zip(problem.targets.float(), problem.anchors.float(), strict=True):
        left, right = left + torch.outer(w @ guide, c), right + torch.outer(c, c)
    for k in kept:
        left, right = left + torch.outer(w @ k, k), right + torch.outer(k, k)
    edited = left @ torch.linalg.inv(right)
    return time.perf_counter() - start, edited


def exactly(problem: Problem, w: Tensor) -> Tensor:
    """The float64 solution of one layer by explicit inverse."""
    x, y, w = problem.targets.double(), problem.anchors.double(), w.double()
    d = x.T @ x + problem.kept + problem.lamb * torch.eye(x.shape[1], dtype=torch.float64)
    return (problem.lamb * w + (w @ y.T) @ x + w @ problem.kept) @ torch.linalg.inv(d)


def compare(backbone: Backbone, n: int, kept: int) -> dict[str, Any]:
    """All three for ``n`` concepts."""
    layers = {name: site.weight.float().clone() for name, site in backbone.text_sites().items()}
    record, problem, rows_kept = ours(UCE(), backbone, [Concept(w) for w in words(n)], words(kept, skip=5000))
    solved = record["solve_seconds"] + record["apply_seconds"]
    edited = {name: site.weight for name, site in backbone.text_sites().items()}
    count = Counter(tuple(w.shape) for w in layers.values())
    one_of_each = {tuple(w.shape): name for name, w in layers.items()}
    truth = {name: exactly(problem, layers[name]) for name in one_of_each.values()}
    published = {shape: loop(problem, rows_kept, layers[name]) for shape, name in one_of_each.items()}
    times = {
        "per_layer": per_layer(problem, rows_kept, list(layers.values())),
        "loop": sum(count[shape] * seconds for shape, (seconds, _) in published.items()),
    }
    return {
        "concepts": n,
        "kept": kept,
        "layers": len(layers),
        "ours": record,
        **{f"{name}_seconds": seconds for name, seconds in times.items()},
        **{f"{name}_ratio": seconds / solved for name, seconds in times.items()},
        "error": max(relative(edited[name], truth[name]) for name in truth),
        "loop_error": max(relative(published[shape][1], truth[name]) for shape, name in one_of_each.items()),
    }


class Timed:
    """A backbone's ``encode``, with the seconds and prompts that went into it."""

    def __init__(self, backbone: Backbone) -> None:
        self.real, self.seconds, self.prompts = backbone.encode, 0.0, 0

    def __call__(self, prompts: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = self.real(prompts, **options)
        self.seconds, self.prompts = self.seconds + time.perf_counter() - start, self.prompts + len(prompts)
        return found


def erasures(backbone: Backbone) -> dict[str, Any]:
    """Seconds of the first erasure on a base, of a second one, and of a third whose target is an everyday noun."""
    method, encode, records = UCE.preset("recommended"), backbone.encode, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ERASURE_CACHE"] = folder
        for target in ("superhero", "pirate", "cat"):
            request = Request((Concept(target),), keep=("ninja", "wizard", "knight", "dog"))
            backbone.encode = timed = Timed(backbone)  # type: ignore[method-assign]
            start = time.perf_counter()
            method.validate(backbone, request)
            method.erase(backbone, request)
            seconds = time.perf_counter() - start
            backbone.encode = encode  # type: ignore[method-assign]
            records.append({"target": target, "seconds": seconds, "prompts_encoded": timed.prompts,
                            "encode_share": timed.seconds / seconds})  # fmt: skip
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    ratios = {"second_to_first": records[1]["seconds"] / records[0]["seconds"], "cache_bytes": size}
    return {"preset": "recommended", **ratios, "each": records}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd14", help="sd14, sdxl, or a pipeline's folder or hub id")
    parser.add_argument("--concepts", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--kept", type=int, default=1000)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if len(arguments.concepts) > 1:  # each in a process of its own: memory that was ever used is not given back
        common = [sys.executable, __file__, "--base", arguments.base, "--dtype", arguments.dtype]
        common += ["--kept", str(arguments.kept)]
        runs = [json.loads(subprocess.check_output([*common, "--concepts", str(n)])) for n in arguments.concepts]
        several = json.loads(subprocess.check_output([*common, "--concepts"]))
        print(json.dumps({**several, "runs": [run["runs"][0] for run in runs]}, indent=2))
        return
    random = arguments.base in ("sd14", "sdxl")
    dtype = getattr(torch, arguments.dtype)
    pipe = random_pipeline(arguments.base, dtype) if random else load_base(arguments.base)
    backbone = backbone_of(pipe)
    backbone.encode(["warm up"], padded=False)
    facts = {"base": arguments.base, "dtype": arguments.dtype, "threads": torch.get_num_threads()}
    if arguments.concepts:
        found: dict[str, Any] = {"runs": [compare(backbone, arguments.concepts[0], arguments.kept)]}
    else:
        found = {"erasures": erasures(backbone)}
    print(json.dumps({**facts, "random_weights": random, **found}, indent=2))


if __name__ == "__main__":
    main()

"""What erasures cost a server: requests a second with 0, 1 and 400 of them attached, against the bare pipeline. JSON.

    python benchmarks/serving.py                                   # Emoji World, some seconds a row
    python benchmarks/serving.py --requests 64 --threads 2         # and in two threads at once
    python benchmarks/serving.py --base org/name --steps 25 --device cuda

All rows are of one run and take turns, request by request, so that what else the machine does falls on all of them.
Seconds are of the processor where that draws, and of the clock on a GPU and for threads. A ratio is the time of the
bare pipeline's requests over that of the row's; 1 is no cost. Each request draws one prompt and chooses for itself:

    0 attached                 through a copy with its own scheduler, as threads need it
    1 attached                 every request is drawn with it
    400 attached, 1 chosen     every request is drawn with another one
    400 attached, none chosen
    400 attached, 20 chosen    what is in force costs, what is attached does not

The erasures are one of UCE's (``--preset``) under as many names: what one costs does not depend on its numbers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from erasure import erase
from erasure.opening import load_base
from erasure.pictures import usual_settings
from erasure.pipelines import attach_erasures, erasures
from erasure.pipelines.calls import Copies

Draw = Callable[[int], Any]


def rows(pipe: Any, edits: list[Any], call: dict[str, Any]) -> dict[str, Draw]:
    """What is measured: a function of the number of a request, for each row. Attaches everything it needs."""
    bare, copies, names = load_copy(pipe), Copies(), [edit.name for edit in edits]
    one, many = load_copy(pipe), load_copy(pipe)
    attach_erasures(one, edits[0])
    attach_erasures(many, edits)

    def request(drawing: Any, i: int) -> Any:
        return drawing("a superhero", generator=torch.Generator().manual_seed(i), **call)

    return {
        "bare": lambda i: request(bare, i),
        "0 attached": lambda i: request(copies.make(bare), i),
        "1 attached": lambda i: request(erasures(one, [names[0]]), i),
        f"{len(edits)} attached, 1 chosen": lambda i: request(erasures(many, [names[i % len(names)]]), i),
        f"{len(edits)} attached, none chosen": lambda i: request(erasures(many, []), i),
        f"{len(edits)} attached, 20 chosen": lambda i: request(erasures(many, names[:20]), i),
    }


def load_copy(pipe: Any) -> Any:
    """The pipeline again, with a denoiser of its own to attach to."""
    other = copy.copy(pipe)
    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    setattr(other, name, copy.deepcopy(getattr(pipe, name)))
    return other


def seconds(draws: dict[str, Draw], requests: int) -> dict[str, float]:
    """Seconds of the requests of each row, taken in turns."""
    spent = dict.fromkeys(draws, 0.0)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for draw in draws.values():
        draw(0)  # warm
    for i in range(requests):
        for name, draw in draws.items():
            start = clock()
            draw(i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name] += clock() - start
    return spent


def together(draw: Draw, requests: int, threads: int) -> float:
    """Seconds of requests in several threads at once."""
    workers = [
        threading.Thread(target=lambda k=k: [draw(i) for i in range(k, requests, threads)]) for k in range(threads)
    ]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-world")
    parser.add_argument("--device")
    parser.add_argument("--preset", default="recommended", help="of UCE; its erasures differ in rank")
    parser.add_argument("--requests", type=int, default=8, help="of each row")
    parser.add_argument("--erasures", type=int, default=400)
    parser.add_argument("--steps", type=int, help="of the sampler; the base's usual number by default")
    parser.add_argument("--threads", type=int, default=1, help="also measure so many threads at once")
    given = parser.parse_args()
    pipe = load_base(given.base, device=given.device)
    edit = erase(pipe, "superhero", preset=given.preset, keep=["a photo"], apply=False, progress=False)
    edits = [dataclasses.replace(edit, name=f"superhero-{i}") for i in range(given.erasures)]
    call = usual_settings(given.base) | ({"num_inference_steps": given.steps} if given.steps else {})
    draws = rows(pipe, edits, call)
    spent = seconds(draws, given.requests)
    found = {name: {"requests_a_second": given.requests / t, "of_bare": spent["bare"] / t} for name, t in spent.items()}
    if given.threads > 1:
        names = [name for name in draws if name != "bare"]  # whose scheduler is shared: it is wrong in threads
        spent = {name: together(draws[name], given.requests, given.threads) for name in names}
        for name, t in spent.items():
            found[name][f"in_{given.threads}_threads_of_none"] = spent["0 attached"] / t
    print(
        json.dumps(
            {"base": given.base, "device": str(pipe.device), "requests": given.requests, "rows": found}, indent=2
        )
    )


if __name__ == "__main__":
    main()

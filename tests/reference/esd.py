"""One ESD step as the paper's equation reads: three calls of a frozen copy, one of the student, plain Adam."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


def loss(pipe, student, x: Tensor, t: Tensor, prompt: str, *, eta: float, erase_from: str | None = None) -> Tensor:
    """|student(x, t, c0) - [e(x, t, c0) - eta (e(x, t, c) - e(x, t))]|^2, the frozen base being the pipeline's UNet."""
    embed = {p: pipe.encode_prompt(p, pipe.device, 1, False)[0] for p in {prompt, "", erase_from or prompt}}

    def base(p: str) -> Tensor:
        with torch.no_grad():
            return pipe.unet(x, t, encoder_hidden_states=embed[p].expand(len(x), -1, -1)).sample

    target = base(erase_from or prompt) - eta * (base(prompt) - base(""))
    predicted = student(x, t, encoder_hidden_states=embed[erase_from or prompt].expand(len(x), -1, -1)).sample
    return (predicted - target).square().mean()


def step(
    pipe, x: Tensor, t: Tensor, prompt: str, names: list[str], *, eta: float, lr: float, erase_from: str | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and parameter changes of one Adam step on the named parameters."""
    student = copy.deepcopy(pipe.unet)
    chosen = {name: parameter for name, parameter in student.named_parameters() if name in names}
    optimiser = torch.optim.Adam(chosen.values(), lr=lr)
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    value = loss(pipe, student, x, t, prompt, eta=eta, erase_from=erase_from)
    value.backward()
    optimiser.step()
    return value.item(), {name: parameter.detach() - before[name] for name, parameter in chosen.items()}

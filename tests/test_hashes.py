"""A hash of weights that were hashed before is never that of other weights, however they were written."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from erasure.eval.core import hashes
from erasure.eval.core.hashes import WeightHashes, modules_of, weights_hash
from tests.tiny import tiny, tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()


def weight(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight


def by_data(pipe):
    weight(pipe).data.add_(1e-3)


def by_data_of_one_element(pipe):
    weight(pipe).data[-1, -1] = 7.0


def by_data_exchanged(pipe):
    weight(pipe).data = weight(pipe).data * 2


def by_data_back_in_place(pipe):
    """Other data for a while, written to, and the old memory with other content afterwards."""
    own = weight(pipe).data
    weight(pipe).data = own.clone()
    own.mul_(3)
    weight(pipe).data = own


def by_copy(pipe):
    with torch.no_grad():
        weight(pipe).copy_(torch.randn_like(weight(pipe)))


def by_set(pipe):
    with torch.no_grad():
        weight(pipe).set_(torch.randn_like(weight(pipe)))


def by_numpy(pipe):
    weight(pipe).detach().numpy()[0, 0] += 1


def by_an_optimiser(pipe):
    weight(pipe).grad = torch.ones_like(weight(pipe))
    torch.optim.AdamW([weight(pipe)], lr=1e-3).step()


def by_a_fused_optimiser(pipe):
    weight(pipe).grad = torch.ones_like(weight(pipe))
    torch.optim.AdamW([weight(pipe)], lr=1e-3, fused=True).step()


def by_loading(pipe):
    pipe.unet.load_state_dict({k: v + 1e-3 for k, v in pipe.unet.state_dict().items()})


def by_assigning(pipe):
    state = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    next(iter(state.values())).add_(1)
    pipe.unet.load_state_dict(state, assign=True)


def by_another_module(pipe):
    pipe.unet = tiny_pipeline(seed=1).unet


def by_another_parameter(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight = nn.Parameter(weight(pipe) + 1)


def by_swapped_rows(pipe):
    weight(pipe).data = weight(pipe).data.flip(0).clone()


def by_swapped_columns(pipe):
    weight(pipe).data = weight(pipe).data.flip(1).contiguous()


def by_transposing(pipe):
    square = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    square.data = square.data.T.contiguous()


def by_dtype(pipe):
    pipe.unet.to(torch.bfloat16)


def by_the_other_encoder(pipe):
    pipe.text_encoder.get_input_embeddings().weight.data[0, 0] += 1


def by_the_autoencoder(pipe):
    next(pipe.vae.parameters()).data.zero_()


WRITES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("write", WRITES)
def test_no_write_is_missed(pipe, write):
    known = WeightHashes()
    before = known(pipe)
    assert before == weights_hash(pipe)
    write(pipe)
    after = weights_hash(pipe)
    assert after != before
    assert known(pipe) == after


def test_weights_that_are_back_have_their_hash_back_and_are_hashed_once(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(hashes, "weights_hash", lambda pipe: calls.append(1) or weights_hash(pipe))
    known, original = WeightHashes(), copy.deepcopy(pipe.unet.state_dict())
    before = known(pipe)
    by_loading(pipe)
    other = known(pipe)
    pipe.unet.load_state_dict(original)
    assert known(pipe) == before != other
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (4096,), (4097, 9), (300, 4096)])
def test_one_element_more_or_less_is_another_sum(shape, dtype):
    known, generator = WeightHashes(), torch.Generator().manual_seed(0)
    x = (10 * torch.rand(shape, generator=generator)).to(dtype)
    first, total = known.sum_of(x), x.numel()
    for place in {0, total // 2, total - 1}:
        y = x.clone()
        y.view(-1)[place] = 0 if y.view(-1)[place] else 1
        assert known.sum_of(y) != first
    assert known.sum_of(x.clone()) == first


def test_order_counts_across_and_within_rows():
    known, x = WeightHashes(), torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 2 * 4096)))
    sums = [known.sum_of(x), known.sum_of(x.T.contiguous()), known.sum_of(x.flip(0)), known.sum_of(x.flip(1))]
    assert len(set(sums)) == 4


def test_a_view_has_the_sum_of_what_it_shows():
    known, x = WeightHashes(), torch.randn(65, 67)
    assert known.sum_of(x[1:, 1:]) == known.sum_of(x[1:, 1:].clone())
    assert known.sum_of(x.view(-1)[1:]) == known.sum_of(x.view(-1)[1:].clone())


@pytest.mark.parametrize("architecture", ["sd3", "sdxl", "flux"])
def test_every_part_counts(architecture):
    pipe = tiny(architecture)
    known = WeightHashes()
    for part, module in modules_of(pipe).items():
        before = known(pipe)
        next(module.parameters()).data.add_(1)
        assert known(pipe) != before, part

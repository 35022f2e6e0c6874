"""Draws for a part of a minibatch: whatever the cuts, the parts together are the draw of one process."""

import itertools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.counts import CountAutoencoder
from scld_nb.draws import Dropout, Part, draw_entries, draw_rows, dropout, own, working_on
from scld_nb.unet import UNet


def cut(total: int, p: int, held: list[int] | None = None) -> list[Part]:
    """Parts of a minibatch for p processes; ``held`` are the entries that each of them has."""
    bounds = [total * r // p for r in range(p + 1)]
    places = [None] * p if held is None else [lambda n, r=r: (sum(held[:r]), sum(held)) for r in range(p)]
    return [Part(a, b, total, place) for (a, b), place in zip(itertools.pairwise(bounds), places)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**40))
def test_parts_of_a_draw_are_the_draw(total, p, width, seed):
    p = min(p, total)

    def draws(n):
        torch.manual_seed(seed)
        mask = Dropout(0.3)(torch.ones(n, width))
        return draw_rows(n, lambda m: torch.randn(m, width)), mask, draw_rows(n, torch.rand)

    alone, pieces = draws(total), []
    for part in cut(total, p):
        with working_on(part):
            pieces.append(draws(len(own(range(total)))))
    assert all(torch.equal(torch.cat(many), one) for many, one in zip(zip(*pieces), alone))
    assert sum(part.weight for part in cut(total, p)) == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**40))
def test_entries_find_their_place_whoever_holds_how_many(held, seed):
    values = torch.rand(sum(held))
    torch.manual_seed(seed)
    alone, after, pieces = dropout(values, 0.5, entries=True), torch.rand(2), []
    for part, mine in zip(cut(len(held), len(held), held), values.split(held)):
        with working_on(part):
            torch.manual_seed(seed)
            pieces.append(dropout(mine, 0.5, entries=True))
            assert torch.equal(torch.rand(2), after)             # what comes next is drawn alike, too
    assert torch.equal(torch.cat(pieces), alone)


def test_alone_the_dropout_is_that_of_torch():
    x = torch.randn(50, 4, requires_grad=True)
    for p, training in ((0.3, True), (0.3, False), (0.0, True)):
        results = []
        for module in (Dropout(p), torch.nn.Dropout(p)):
            module.train(training)
            torch.manual_seed(1)
            out = module(x)
            results.append((out, torch.autograd.grad(out.square().sum(), x)[0], torch.rand(1)))
        assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.manual_seed(1)
    expected = F.dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.3), expected)


def test_networks_in_parts_are_the_network():
    """Dropout in the U-Net, input dropout and posterior noise of the count autoencoder: two parts make the whole."""
    torch.manual_seed(0)
    unet = UNet(8, widths=(16, 8), blocks=1, dropout=0.2).train()
    torch.nn.init.normal_(unet.leave[-1].weight)
    for block in [*unet.down[0], *unet.up[0]]:
        torch.nn.init.normal_(block.linear2.weight)
    z, t = torch.randn(7, 8), torch.arange(7)
    autoencoder = CountAutoencoder(20, 4, hidden=16, dropout=0.2).train()
    x = torch.poisson(torch.rand(7, 20))
    x[:, 0] += 1
    held = [int((x[:3] > 0).sum()), int((x[3:] > 0).sum())]

    def run(z, t, x):
        torch.manual_seed(5)
        out = unet(z, t)
        torch.manual_seed(6)
        return out, autoencoder.loss(x)

    out, loss = run(z, t, x)
    assert not torch.allclose(out, unet.eval()(z, t))            # it does drop
    unet.train()
    outs, losses = [], []
    for part in (Part(0, 3, 7, lambda n: (0, sum(held))), Part(3, 7, 7, lambda n: (held[0], sum(held)))):
        with working_on(part):
            a, b = run(own(z), own(t), own(x))
            outs.append(a)
            losses.append(part.weight * b)
    assert torch.allclose(torch.cat(outs), out, atol=1e-6) and torch.isclose(sum(losses), loss, rtol=1e-5)


def test_the_part_ends_with_its_block_and_is_nobody_elses():
    part, seen = Part(0, 2, 4), []
    with working_on(part):
        assert own(np.arange(4)).tolist() == [0, 1]
        with working_on(None):
            assert len(own(np.arange(4))) == 4
        thread = threading.Thread(target=lambda: seen.append(len(own(np.arange(4)))))
        thread.start()
        thread.join()
        assert len(own(np.arange(4))) == 2
    assert len(own(np.arange(4))) == 4 and seen == [4]
    with pytest.raises(KeyError), working_on(part):
        raise KeyError
    assert len(own(np.arange(3))) == 3


def test_rows_that_are_not_ones_own_are_refused():
    with working_on(Part(0, 2, 4)):
        with pytest.raises(ValueError, match="given 3 rows, but the minibatch that is shared has 4"):
            own(np.arange(3))
        with pytest.raises(ValueError, match="4 rows are drawn for, but this process works on 2"):
            draw_rows(4, torch.rand)
        with pytest.raises(ValueError, match="offset_of"):
            draw_entries(3, torch.rand)
    assert draw_entries(3, torch.ones).tolist() == [1, 1, 1]

"""The denoiser: time embedding, dropout mask, residual block and U-Net, against independent formulas and invariants."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.data import InputError
from scld_nb.schedules import linear_schedule
from scld_nb.unet import ResBlock, UNet, dropout_mask, timestep_embedding

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def make(d=6, *args, seed=0, awake=True, **options):
    """A small network; ``awake`` replaces the zero-initialised weights, so that every path matters."""
    options = {"widths": (16, 8), "blocks": 1, "emb_width": 12, "time_width": 8, "dropout": 0.0} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(d, *args, **options)
        if awake:
            for p in net.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, std=0.3)
    return net


# --- time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_time_embedding_equals_diffusers_and_numpy(width, dtype):
    t = torch.tensor([0, 1, 17, 500, 1000]).to(dtype)
    e = timestep_embedding(t, width)
    assert e.shape == (5, width) and e.dtype == torch.float32
    assert torch.allclose(e, get_timestep_embedding(t, width, flip_sin_to_cos=False, downscale_freq_shift=0), atol=1e-6)
    angles = t.double().numpy()[:, None] * 10_000.0 ** (-np.arange(width // 2) * 2 / width)
    np.testing.assert_allclose(e.numpy(), np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=2e-4)


def test_time_embedding_tells_steps_apart_by_their_distance():
    e = timestep_embedding(torch.arange(1001)).double()
    products = e @ e.T
    for lag in (0, 1, 10, 400):
        same = products.diagonal(lag)
        assert same.max() - same.min() < 1e-2
    assert (torch.cdist(e, e) + 9 * torch.eye(1001)).min() > 0.5


def test_max_period_sets_the_slowest_hand():
    e = timestep_embedding(torch.tensor([1.0]), 4, max_period=100.0)
    np.testing.assert_allclose(e.numpy(), [[np.sin(1), np.sin(0.1), np.cos(1), np.cos(0.1)]], rtol=1e-5)


# --- dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_mask_share_scale_and_mean(p):
    torch.manual_seed(0)
    mask = dropout_mask((400, 501), p, CPU)
    assert mask.shape == (400, 501) and mask.dtype == torch.float32
    kept = mask[mask != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)))
    n = mask.numel()
    assert float((mask == 0).float().mean()) == pytest.approx(p, abs=4.5 * (p * (1 - p) / n) ** 0.5 + 1e-5)
    assert float(mask.mean()) == pytest.approx(1, abs=4.5 * (p / (1 - p) / n) ** 0.5 + 1e-4)


def test_mask_entries_are_independent():
    """Four neighbours are cut from one random word: neither they nor whole rows may be correlated."""
    torch.manual_seed(0)
    zero = (dropout_mask((20_000, 8), 0.3, CPU) == 0).numpy()
    assert np.abs(np.corrcoef(zero.T) - np.eye(8)).max() < 0.035
    assert abs(np.corrcoef(zero[:-1].ravel(), zero[1:].ravel())[0, 1]) < 0.02


def test_mask_is_a_function_of_the_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return dropout_mask((16, 33), 0.2, CPU)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.floats(0, 0.9))
def test_mask_of_any_shape(rows, columns, p):
    mask = dropout_mask((rows, columns), p, CPU)
    assert mask.shape == (rows, columns)
    assert ((mask == 0) | torch.isclose(mask, torch.tensor(1 / (1 - p), dtype=torch.float32))).all()


def test_mask_without_dropout_keeps_everything():
    assert dropout_mask((50, 50), 0.0, CPU).eq(1).all()


def test_mask_on_other_devices_is_drawn_there():
    mask = dropout_mask((3, 5), 0.1, torch.device("meta"))
    assert mask.shape == (3, 5) and mask.device.type == "meta" and mask.dtype == torch.float32


# --- residual block -------------------------------------------------------------------------------------------------------


def test_a_fresh_block_is_the_identity():
    h = randn(4, 10)
    assert torch.equal(ResBlock(10)(h, randn(4, 10, seed=1), torch.full((4, 10), 3.0)), h)


def test_block_equals_the_formula_in_numpy():
    block, h, e = ResBlock(5), randn(3, 5), randn(3, 5, seed=1)
    mask = torch.tensor([0.0, 2.0]).repeat(8)[:15].view(3, 5)
    for p in block.parameters():
        torch.nn.init.normal_(p, generator=generator(2))
    g1, c1, w1, b1, g2, c2, w2, b2 = (p.detach().double().numpy() for p in block.parameters())
    norm = lambda a: (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-5)
    silu = lambda a: a / (1 + np.exp(-a))
    x = h.double().numpy()
    u = silu(norm(x) * g1 + c1) @ w1.T + b1 + e.double().numpy()
    v = silu(norm(u) * g2 + c2)
    np.testing.assert_allclose(block(h, e, mask).detach().numpy(), x + (v * mask.numpy()) @ w2.T + b2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(block(h, e).detach().numpy(), x + v @ w2.T + b2, rtol=1e-3, atol=1e-4)


# --- the network ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
       st.integers(1, 6))
def test_shapes_for_any_widths(widths, blocks, d_in, d_out, n):
    net = make(d_in, d_out, widths=widths, blocks=blocks)
    out = net(randn(n, d_in), torch.arange(1, n + 1), randn(n, 12, seed=1))
    assert out.shape == (n, d_out) and torch.isfinite(out).all()
    assert net.block_widths == [w for w in [*widths, *widths[::-1]] for _ in range(blocks)]


def test_default_size_and_names_of_the_weights():
    net = UNet()
    names = set(net.state_dict())
    assert sum(p.numel() for p in net.parameters()) == 4_928_128
    assert {"time.0.weight", "time.2.bias", "emb.weight", "enter.weight", "down.0.1.norm1.weight", "down.2.0.linear2.weight",
            "shrink.1.weight", "merge.2.bias", "up.0.1.linear1.bias", "grow.1.weight", "leave.0.weight", "leave.2.bias"} <= names
    assert len(names) == 122 and net.enter.in_features == net.leave[-1].out_features == 128


def test_one_level_equals_the_formula():
    """The smallest network, put together by hand."""
    net = make(3, widths=(7,), blocks=1, emb_width=5)
    z, t, extra = randn(4, 3), torch.tensor([1, 50, 400, 1000]), randn(4, 5, seed=1)
    e = net.time[2](F.silu(net.time[0](timestep_embedding(t, 8)))) + extra
    first, second = net.emb(F.silu(e)).split(7, dim=1)
    h = net.down[0][0](net.enter(z), first)
    h = net.up[0][0](net.merge[0](torch.cat([h, h], dim=1)), second)
    h = net.leave[2](F.silu(F.layer_norm(h, (7,), net.leave[0].weight, net.leave[0].bias)))
    assert torch.allclose(net(z, t, extra), h, atol=1e-6)


def test_fresh_network_answers_zero():
    net = make(awake=False)
    assert net(randn(5, 6), torch.arange(5)).eq(0).all()


def test_gradients_reach_every_weight():
    """The zero-initialised ends wake first; from the third step on nothing is left out."""
    net = make(awake=False, widths=(16, 8, 4), blocks=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        eps_hat = net(randn(32, 6, seed=step), torch.arange(1, 33), randn(32, 12, seed=9))
        F.mse_loss(eps_hat, randn(32, 6, seed=step + 50)).backward()
        missing = [name for name, p in net.named_parameters() if not (p.grad != 0).any()]
        if step == 0:
            assert len(missing) == len(list(net.parameters())) - 2
        optimizer.step()
    assert missing == []


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_rows_do_not_see_each_other(order):
    net = make().eval()
    z, t, extra = randn(6, 6), torch.tensor([1, 5, 90, 300, 700, 1000]), randn(6, 12, seed=1)
    with torch.no_grad():
        whole = net(z, t, extra)
        assert torch.allclose(net(z[order], t[order], extra[order]), whole[order], atol=1e-5)
        assert torch.allclose(net(z[:1], t[:1], extra[:1]), whole[:1], atol=1e-5)


def test_time_and_extra_matter():
    net, z = make().eval(), randn(3, 6)
    t, extra = torch.tensor([10, 10, 10]), randn(3, 12, seed=1)
    with torch.no_grad():
        plain = net(z, t)
        assert not torch.allclose(net(z, t + 500), plain, atol=1e-3)
        assert not torch.allclose(net(z, t, extra), plain, atol=1e-3)
        assert torch.equal(net(z, t, torch.zeros(3, 12)), plain)


def test_dropout_only_in_training_and_by_the_seed():
    net, z, t = make(dropout=0.5), randn(8, 6), torch.arange(1, 9)

    def run(seed, training):
        torch.manual_seed(seed)
        with torch.no_grad():
            return net.train(training)(z, t)

    assert torch.equal(run(0, False), run(1, False))
    assert torch.equal(run(0, True), run(0, True))
    assert not torch.allclose(run(0, True), run(1, True), atol=1e-3)
    assert not torch.allclose(run(0, True), run(0, False), atol=1e-3)


def test_without_dropout_training_draws_nothing():
    net, z, t = make(dropout=0.0), randn(4, 6), torch.arange(1, 5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(net.train()(z, t), net.eval()(z, t))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_block_gets_its_own_part_of_the_mask(monkeypatch):
    """A mask that silences one block's columns changes the answer exactly as removing that block's correction does."""
    net, z, t = make(dropout=0.5), randn(4, 6), torch.arange(1, 5)
    starts = np.cumsum([0, *net.block_widths])
    blocks = [*(b for level in net.down for b in level), *(b for level in net.up for b in level)]
    assert len(blocks) == len(net.block_widths) == 4
    for i, block in enumerate(blocks):
        mask = torch.ones(4, int(starts[-1]))
        mask[:, starts[i]:starts[i + 1]] = 0
        monkeypatch.setattr("scld_nb.unet.dropout_mask", lambda *_, mask=mask: mask)
        twin = copy.deepcopy(net)
        same = [*(b for level in twin.down for b in level), *(b for level in twin.up for b in level)][i]
        torch.nn.init.zeros_(same.linear2.weight)
        with torch.no_grad():
            assert torch.allclose(net.train()(z, t), twin.eval()(z, t), atol=1e-5)
            assert not torch.allclose(net.eval()(z, t), twin.eval()(z, t), atol=1e-4)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_skip_is_used(level):
    net, z, t = make(widths=(16, 8, 4)).eval(), randn(5, 6), torch.arange(1, 6)
    cut = copy.deepcopy(net)
    width = cut.merge[level].out_features
    with torch.no_grad():
        cut.merge[level].weight[:, width:] = 0
        assert not torch.allclose(net(z, t), cut(z, t), atol=1e-4)


def test_skips_join_levels_of_equal_width():
    """With the way through the middle cut off, the outer skip alone still carries the input to the output."""
    net, t = make(widths=(16, 8)).eval(), torch.tensor([5, 5])
    with torch.no_grad():
        net.grow[0].weight.zero_()
        a, b = net(randn(2, 6), t), net(randn(2, 6, seed=1), t)
        assert not torch.allclose(a, b, atol=1e-3)
        net.merge[1].weight.zero_()
        a, b = net(randn(2, 6), t), net(randn(2, 6, seed=1), t)
        assert torch.allclose(a, b, atol=1e-6)


def test_half_precision_weights():
    net = make(dropout=0.3).to(torch.bfloat16).train()
    out = net(randn(4, 6).bfloat16(), torch.arange(1, 5))
    assert out.dtype == torch.bfloat16 and torch.isfinite(out.float()).all()


def test_it_learns_to_denoise():
    """Gaussian latents: the least possible error is the mean of alpha_bar, the start is 1."""
    schedule, net, g = linear_schedule(), make(4, awake=False, widths=(32, 16), emb_width=32, time_width=16), generator()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def batch(n):
        t, eps = torch.randint(1, 1001, (n,), generator=g), torch.randn(n, 4, generator=g)
        return schedule.q_sample(torch.randn(n, 4, generator=g), t, eps), t, eps

    for _ in range(250):
        z, t, eps = batch(128)
        optimizer.zero_grad()
        F.mse_loss(net(z, t), eps).backward()
        optimizer.step()
    z, t, eps = batch(4000)
    with torch.no_grad():
        error = float(F.mse_loss(net.eval()(z, t), eps))
    floor = float(schedule.alpha_bar[1:].mean())
    assert 0.9 * floor < error < 1.3 * floor < 0.5


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: timestep_embedding(torch.arange(3), 7), "got 7"),
    (lambda: timestep_embedding(torch.arange(3), 0), "got 0"),
    (lambda: UNet(4, widths=()), r"widths=\(\)"),
    (lambda: UNet(4, widths=(8, 0)), r"widths=\(8, 0\)"),
    (lambda: UNet(4, widths=(8,), blocks=0), "blocks=0"),
    (lambda: UNet(4, widths=(8,), dropout=1.0), "got 1.0"),
    (lambda: UNet(4, widths=(8,), dropout=-0.1), "got -0.1"),
    (lambda: UNet(4, widths=(8,), time_width=5), "got 5"),
])
def test_errors_are_one_line_and_name_the_value(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)

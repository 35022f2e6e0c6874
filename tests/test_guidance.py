"""Cluster means, Embed, the fusions and classifier-free guidance."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scld_nb.data import CellReader, InputError
from scld_nb.guidance import FUSIONS, CrossAttention, Denoiser, Embed, check_omega, cluster_means, guided_eps
from scld_nb.schedules import linear_schedule

K, GENES, D = 4, 30, 16


def some_counts(n: int, *, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).poisson(1.0, (n, GENES)).astype(np.float32)
    counts[:, 0] += 1
    return counts


@pytest.fixture()
def means() -> torch.Tensor:
    return torch.rand(K + 1, GENES, generator=torch.Generator().manual_seed(0))


@pytest.fixture()
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, D, generator=g), torch.randint(1, 1001, (12,), generator=g), torch.arange(12) % K


def opened(denoiser: Denoiser) -> Denoiser:
    """The layers that start at zero get random weights, as after some training."""
    g = torch.Generator().manual_seed(2)
    for p in denoiser.parameters():
        if not p.any():
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    return denoiser.eval()


# cluster means

@pytest.mark.parametrize("transform", ["log1p", "none"])
def test_cluster_means_equal_a_groupby(transform):
    counts = some_counts(50)
    labels = np.random.default_rng(3).permutation(np.arange(50) % K)
    x = 20_000 * counts.astype(np.float64) / counts.sum(1, keepdims=True)
    frame = pd.DataFrame(np.log1p(x) if transform == "log1p" else x)
    expected = np.vstack([frame.groupby(labels).mean().to_numpy(), frame.mean().to_numpy()[None]])
    got = cluster_means(CellReader(sp.csr_matrix(counts), transform=transform), labels, K)
    assert got.dtype == np.float32 and got.shape == (K + 1, GENES)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(K, 60), seed=st.integers(0, 10_000))
def test_cluster_means_weighted_by_size_are_the_global_mean_in_any_order(n, seed):
    rng = np.random.default_rng(seed)
    counts, labels = some_counts(n, seed=seed), np.concatenate([np.arange(K), rng.integers(0, K, n - K)])
    c = cluster_means(CellReader(sp.csr_matrix(counts)), labels, K)
    share = np.bincount(labels, minlength=K)[:, None] / n
    np.testing.assert_allclose((share * c[:K]).sum(0), c[K], atol=1e-4)
    order = rng.permutation(n)
    np.testing.assert_allclose(cluster_means(CellReader(sp.csr_matrix(counts[order])), labels[order], K), c, atol=1e-5)


def test_test_cells_have_no_say():
    import anndata as ad

    from scld_nb.data import split

    first = ad.AnnData(sp.csr_matrix(some_counts(80)), obs={"louvain": pd.Categorical((np.arange(80) % K).astype(str))})
    train, test = split(first, test_size=0.25, stratify="louvain", seed=0)
    second = first.copy()
    x = second.X.toarray()
    x[second.obs_names.isin(test.obs_names)] = 7
    second.X = sp.csr_matrix(x)
    again, _ = split(second, test_size=0.25, stratify="louvain", seed=0)
    both = [cluster_means(CellReader(a.X), a.obs["louvain"].cat.codes.to_numpy(), K) for a in (train, again)]
    assert np.array_equal(*both)
    every = [cluster_means(CellReader(a.X), a.obs["louvain"].cat.codes.to_numpy(), K) for a in (first, second)]
    assert not np.allclose(*every)


def test_a_cluster_without_cells_and_wrong_labels_are_input_errors():
    reader = CellReader(sp.csr_matrix(some_counts(10)))
    with pytest.raises(InputError, match="cluster 2 has no training cell"):
        cluster_means(reader, np.array([0, 1] * 5), 3)
    with pytest.raises(InputError, match=r"one cluster index per cell, shape \(10,\), got \(9,\)"):
        cluster_means(reader, np.zeros(9, dtype=int), 1)


# Embed

def test_embed_is_a_table_with_one_row_per_condition_and_ignores_the_scale(means):
    embed, louder = Embed(means, 8, hidden=10), Embed(500 * means, 8, hidden=10)
    louder.net.load_state_dict(embed.net.state_dict())
    assert embed().shape == (K + 1, 8)
    torch.testing.assert_close(louder(), embed(), atol=1e-5, rtol=1e-4)
    x = means.double().numpy() / means.double().numpy().std(ddof=1)
    w = {k: v.double().numpy() for k, v in embed.net.state_dict().items()}
    h = x @ w["0.weight"].T + w["0.bias"]
    expected = (h / (1 + np.exp(-h))) @ w["2.weight"].T + w["2.bias"]
    np.testing.assert_allclose(embed().detach().numpy(), expected, atol=1e-5)


def test_means_travel_with_the_weights_but_are_not_trained(means):
    embed = Embed(means, 8)
    assert "means" in embed.state_dict() and "means" not in dict(embed.named_parameters())
    other = Embed(torch.zeros_like(means), 8)
    other.load_state_dict(embed.state_dict())
    assert torch.equal(other(), embed())


def test_embed_of_equal_conditions_is_finite():
    assert torch.isfinite(Embed(torch.zeros(2, GENES), 8)()).all()


# fusions

@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_shapes_and_gradient_down_to_embed(fusion, means, batch):
    denoiser = Denoiser(means, D, fusion=fusion, e_width=32, widths=(24, 16))
    z, t, k = batch
    assert denoiser.n_clusters == K
    assert not denoiser(z, t, k).any()                          # a fresh network answers zero
    opened(denoiser).train()
    eps = denoiser(z, t, k)
    assert eps.shape == z.shape
    eps.square().mean().backward()
    for name, p in denoiser.embed.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is not None for p in denoiser.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_lets_the_condition_change_the_answer(fusion, means, batch):
    denoiser = opened(Denoiser(means, D, fusion=fusion, e_width=32, widths=(24,)))
    z, t, k = batch
    with torch.no_grad():
        assert (denoiser(z, t, k) - denoiser(z, t, (k + 1) % K)).abs().max() > 1e-4
        assert torch.equal(denoiser(z, t, k), denoiser(z, t, k, denoiser.embed()))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_training_reaches_embed_within_three_steps(fusion, means, batch):
    denoiser = Denoiser(means, D, fusion=fusion, e_width=32, widths=(24,))
    before = denoiser.embed.net[0].weight.detach().clone()
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    z, t, k = batch
    for _ in range(3):
        optimizer.zero_grad()
        (denoiser(z, t, k) - torch.ones_like(z)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(before, denoiser.embed.net[0].weight)


def test_where_each_fusion_puts_the_condition(means, batch):
    z, t, k = batch
    with torch.no_grad():
        for fusion in ("add", "cat", "add_input"):
            denoiser = opened(Denoiser(means, D, fusion=fusion, e_width=32, widths=(24,)))
            e, unet = denoiser.embed()[k], denoiser.unet
            expected = {"add": lambda: unet(z, t, denoiser.fuse(e)), "cat": lambda: unet(torch.cat([z, e], 1), t),
                        "add_input": lambda: unet(z + denoiser.fuse(e), t)}[fusion]()
            assert torch.equal(denoiser(z, t, k), expected)


def test_cross_attention_against_numpy():
    torch.manual_seed(0)
    layer = CrossAttention(D, 32, tokens=4, width=12, heads=3)
    z, e = torch.randn(5, D), torch.randn(5, 32)
    w = {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}
    zt, et = z.double().numpy().reshape(5, 4, D // 4), e.double().numpy().reshape(5, 4, 8)
    q = zt @ w["q.weight"].T + w["q.bias"] + w["place_q"]
    k = et @ w["k.weight"].T + w["k.bias"] + w["place_k"]
    v = et @ w["v.weight"].T + w["v.bias"]
    answer = np.empty_like(q)
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        score = np.einsum("nqc,nkc->nqk", q[..., part], k[..., part]) / math.sqrt(4)
        weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        answer[..., part] = weight @ v[..., part]
    expected = z.numpy() + (answer @ w["out.weight"].T + w["out.bias"]).reshape(5, D)
    np.testing.assert_allclose(layer(z, e).detach().numpy(), expected, atol=1e-5)


def test_one_token_degenerates_to_addition_and_several_do_not():
    torch.manual_seed(0)
    z, e = 3 * torch.randn(6, D), torch.randn(1, 32).expand(6, -1)
    spread = {}
    for tokens in (1, 4):
        layer = CrossAttention(D, 32, tokens=tokens)
        spread[tokens] = (layer(z, e) - z).std(0).max().item()
    assert spread[1] < 1e-5 < 1e-3 < spread[4]


def test_fusion_errors_name_the_thing_and_the_way_out(means):
    with pytest.raises(InputError, match="unknown fusion 'sum'; known: add, cat, attn, add_input"):
        Denoiser(means, D, fusion="sum")
    with pytest.raises(InputError, match="latent=10 and e_width=32 must be multiples of 8"):
        Denoiser(means, 10, fusion="attn", e_width=32)


# omega

@pytest.mark.parametrize("omega", [-1, -1.0, 0, 0.5, 3.0, np.float32(1)])
def test_omega_in_range_comes_back_as_float(omega):
    assert check_omega(omega) == float(omega) and type(check_omega(omega)) is float


@pytest.mark.parametrize("omega", [-1.01, 3.5, math.nan, math.inf])
def test_omega_out_of_range_is_one_line(omega):
    with pytest.raises(InputError, match=r"omega must lie in \[-1, 3\], got") as caught:
        check_omega(omega)
    assert "\n" not in str(caught.value)


class Counting(nn.Module):
    """A denoiser that counts the rows it is asked about."""

    def __init__(self, inner: Denoiser):
        super().__init__()
        self.inner, self.rows, self.n_clusters = inner, [], inner.n_clusters

    def forward(self, z, t, k, table=None):
        self.rows.append(len(z))
        return self.inner(z, t, k, table)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_guidance_identities_hold_exactly_and_cost_one_branch(fusion, means, batch):
    denoiser = Counting(opened(Denoiser(means, D, fusion=fusion, e_width=32, widths=(24,))))
    z, t, k = batch
    every = torch.full_like(k, K)
    with torch.no_grad():
        for other in range(K):                                            # omega = -1 forgets the cluster
            assert torch.equal(guided_eps(denoiser, z, t, torch.full_like(k, other), -1.0), denoiser.inner(z, t, every))
        assert torch.equal(guided_eps(denoiser, z, t, k, 0.0), denoiser.inner(z, t, k))
        assert denoiser.rows == [12] * (K + 1)
        guided_eps(denoiser, z, t, k, 0.5)
        assert denoiser.rows[-1] == 24


@pytest.mark.parametrize("omega", [-0.5, 0.3, 1.0, 3.0])
def test_one_guided_batch_equals_two_calls(omega, means, batch):
    denoiser = opened(Denoiser(means, D, e_width=32, widths=(24, 16))).double()
    denoiser.embed.means = denoiser.embed.means.double()
    z, t, k = batch
    z = z.double()
    with torch.no_grad():
        eps_k, eps_all = denoiser(z, t, k), denoiser(z, t, torch.full_like(k, K))
        expected = eps_k + omega * (eps_k - eps_all)
        assert (eps_k - eps_all).abs().max() > 1e-3
        torch.testing.assert_close(guided_eps(denoiser, z, t, k, omega), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(guided_eps(denoiser, z, t, k, omega, denoiser.embed()), expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(omega=st.floats(-1, 3), t=st.integers(1, 1000), centre=st.floats(-2, 2), spread=st.floats(0.2, 1.0))
def test_guided_noise_is_the_score_of_the_sharpened_density(omega, t, centre, spread):
    r"""$\tilde\epsilon=-\sqrt{1-\bar\alpha_t}\,\nabla\log\frac{p(z|k)^{1+\omega}}{p(z)^{\omega}}$, by autograd."""
    a = linear_schedule().alpha_bar[t]
    law = {k: (a.sqrt() * m, a * v + 1 - a) for k, (m, v) in {0: (centre, spread**2), 1: (0.0, 1.0)}.items()}

    class Exact:
        n_clusters = 1

        def __call__(self, z, t, k, table=None):
            mean, var = (torch.stack([law[int(i)][j] for i in k])[:, None] for j in (0, 1))
            return (1 - a).sqrt() * (z - mean) / var

    z = torch.linspace(-3, 3, 5, dtype=torch.float64)[:, None].requires_grad_()
    logs = [-(z - mean) ** 2 / (2 * var) for mean, var in (law[0], law[1])]
    expected = -(1 - a).sqrt() * torch.autograd.grad(((1 + omega) * logs[0] - omega * logs[1]).sum(), z)[0]
    got = guided_eps(Exact(), z.detach(), torch.full((5,), t), torch.zeros(5, dtype=torch.long), omega)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


# what the output stands for, and profiles in their own axes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_compact_profiles_keep_every_inner_product(k, n_genes, seed):
    profiles = torch.randn(k + 1, n_genes, generator=torch.Generator().manual_seed(seed))
    c = Embed(profiles, 8, compact=True).coordinates
    assert c.shape == (k + 1, k + 1)
    torch.testing.assert_close(c @ c.T, profiles @ profiles.T, rtol=1e-4, atol=1e-4 * n_genes)


def test_a_compact_embedding_does_not_grow_with_the_genes(means):
    wide = torch.rand(K + 1, 3000)
    small, large = (sum(p.numel() for p in Embed(m, 8, compact=True).parameters()) for m in (means, wide))
    assert small == large < sum(p.numel() for p in Embed(wide, 8).parameters()) / 100


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_noise_follows_from_every_prediction(means, prediction):
    schedule = linear_schedule(1000)
    denoiser = Denoiser(means, D, widths=(16,), prediction=prediction, alpha_bar=schedule.alpha_bar)
    z0, eps, t = torch.randn(6, D), torch.randn(6, D), torch.tensor([1, 10, 250, 500, 900, 1000])
    a = schedule.alpha_bar[t][:, None]
    truth = z0 if prediction == "z0" else (a.sqrt() * eps - (1 - a).sqrt() * z0).float()
    denoiser.output = lambda *_: truth
    torch.testing.assert_close(denoiser(schedule.q_sample(z0, t, eps), t, torch.zeros(6, dtype=torch.long)), eps, rtol=1e-3, atol=2e-3)


def test_a_prediction_is_checked_before_anything_is_built(means):
    with pytest.raises(InputError, match="unknown prediction 'x'; known: eps, v, z0"):
        Denoiser(means, D, prediction="x")
    with pytest.raises(InputError, match="prediction 'v' needs alpha_bar"):
        Denoiser(means, D, prediction="v")

"""Count heads: likelihood, gradient, draws, the pair, and the model that draws whole numbers."""

import math

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY, planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scld_nb import counts as counts_module
from scld_nb.counts import (
    DISPERSIONS,
    GAIN,
    HEADS,
    CountAutoencoder,
    CountMap,
    CountParameters,
    calibrate_means,
    count_nll,
    count_start,
    draw_counts,
    expected_counts,
    fit_count_statistics,
)
from scld_nb.data import CellReader, InputError
from scld_nb.evaluation import evaluate
from scld_nb.model import SCLD, count_autoencoder_steps, count_denoiser_steps, make_config
from scld_nb.training import train_autoencoder

SMALL = {k: v for k, v in TINY.items() if k not in ("head", "latent")} | {"latent": 6}


def random_parameters(n, n_genes, seed, *, head="zinb", outliers=True) -> CountParameters:
    g = torch.Generator().manual_seed(seed)
    mu, r, pi = (torch.randn(n, n_genes, generator=g, dtype=torch.double) for _ in range(3))
    epsilon, mean = torch.randn(2, n_genes, generator=g, dtype=torch.double)
    return CountParameters(mu, None if head == "poisson" else r, pi if head == "zinb" else None,
                           epsilon if outliers else None, mean.abs() + 0.7 if outliers else None)


def probability(x: np.ndarray, p: CountParameters) -> np.ndarray:
    """The distribution as scipy writes it, entry by entry."""
    mu = p.log_mu.numpy()
    if p.log_r is None:
        body = stats.poisson.pmf(x, np.exp(mu))
    else:
        r = np.exp(p.log_r.numpy())
        body = stats.nbinom.pmf(x, r, r / (r + np.exp(mu)))
    if p.logit is not None:
        pi = 1 / (1 + np.exp(-p.logit.numpy()))
        body = (1 - pi) * body + pi * (x == 0)
    if p.outlier is not None:
        epsilon = 1 / (1 + np.exp(-p.outlier.numpy()))
        body = (1 - epsilon) * body + epsilon * stats.geom.pmf(x, np.exp(-p.outlier_mean.numpy()))
    return body


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(HEADS), st.booleans())
def test_likelihood_is_that_of_scipy(n, n_genes, seed, head, outliers):
    p = random_parameters(n, n_genes, seed, head=head, outliers=outliers)
    x = torch.from_numpy(np.random.default_rng(seed).poisson(1.5, (n, n_genes)).astype(float))
    expected = -np.log(probability(x.numpy().astype(int), p)).sum(1)
    np.testing.assert_allclose(count_nll(x, p).numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("outliers", [True, False])
def test_gradient_is_that_of_finite_differences(head, outliers):
    p = random_parameters(3, 5, 1, head=head, outliers=outliers)
    x = torch.tensor([[0, 1, 0, 7, 2], [0, 0, 0, 0, 0], [3, 0, 1, 0, 40.0]], dtype=torch.double)
    parts = [part.clone().requires_grad_() for part in p if part is not None]
    where = [part is not None for part in p]

    def loss(*given):
        rest = iter(given)
        return count_nll(x, CountParameters(*(next(rest) if w else None for w in where)))

    assert torch.autograd.gradcheck(loss, parts)


def test_one_dispersion_per_gene_is_shared_by_all_cells():
    p = random_parameters(4, 6, 2)
    x = torch.poisson(torch.full((4, 6), 2.0, dtype=torch.double))
    shared = p._replace(log_r=p.log_r[0])
    np.testing.assert_allclose(count_nll(x, shared), count_nll(x, p._replace(log_r=p.log_r[:1].expand(4, -1))))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(HEADS), st.booleans())
def test_probabilities_sum_to_one(seed, head, outliers):
    p = random_parameters(1, 3, seed, head=head, outliers=outliers)
    p = p._replace(log_r=None if p.log_r is None else p.log_r.clamp_min(0), outlier_mean=None if p.outlier_mean is None else p.outlier_mean.clamp_max(2))
    most = 600
    one = CountParameters(*(None if part is None else part.reshape(-1)[:1].expand(most, 1) if part.ndim == 2 else part[:1] for part in p))
    x = torch.arange(float(most), dtype=torch.double)[:, None]
    assert abs(float(torch.exp(-count_nll(x, one)).sum()) - 1) < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_draws_follow_the_distribution(head):
    p = random_parameters(1, 3, 5, head=head)
    p = p._replace(log_mu=torch.full((1, 3), 1.5, dtype=torch.double), outlier_mean=torch.full((3,), 1.5, dtype=torch.double))
    many = CountParameters(*(None if part is None else part.float().expand(20_000, -1) if part.ndim == 2 else part.float() for part in p))
    x = draw_counts(many, generator=torch.Generator().manual_seed(0)).numpy()
    x = x[x.sum(1) > 1]                                      # cells that came out empty got a count
    assert (x == np.round(x)).all() and x.min() >= 0
    grid = np.arange(1, 6)                                   # shares among the not so small counts are untouched by that
    for gene in range(3):
        single = CountParameters(*(None if q is None else q[:, [gene]] if q.ndim == 2 else q[[gene]] for q in p))
        wanted = probability(grid[:, None], CountParameters(*(None if q is None else q.expand(5, -1) if q.ndim == 2 else q for q in single)))[:, 0]
        found = np.array([(x[:, gene] == k).mean() for k in grid])
        np.testing.assert_allclose(found[1:] / found[1:].sum(), wanted[1:] / wanted[1:].sum(), atol=0.02)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mu, r, pi, epsilon, height", [
    (0.01, 1.0, 0.0, 0.0, 0.0), (0.5, 0.05, 0.3, 0.0, 0.0), (2.0, 100.0, 0.1, 0.02, 20.0), (3.9, 0.3, 0.0, 0.001, 50.0),
    (3.9, 0.02, 0.0, 0.0, 0.0), (30.0, 0.05, 0.2, 0.01, 8.0), (30.0, 0.002, 0.0, 0.0, 0.0), (50.0, 5.0, 0.0, 0.0, 0.0), (0.3, None, 0.0, 0.0, 0.0), (3.5, None, 0.2, 0.05, 3.0),
    (40.0, None, 0.0, 0.0, 0.0),
])
def test_draws_have_the_frequencies_that_scipy_gives(dense, mu, r, pi, epsilon, height):
    """Chi-squared test of either way of drawing, means below and above where it changes, and sums that do not end in 64 steps."""
    n = 200_000                                              # a second gene that is never zero, so that no cell is empty

    def of(value, other):
        return torch.tensor([value, other], dtype=torch.float32).expand(n, 2)

    logit = None if pi == 0 else of(math.log(pi / (1 - pi)), -20.0)
    outliers = (None, None) if epsilon == 0 else (torch.tensor([math.log(epsilon / (1 - epsilon)), -30.0]), torch.tensor([height, 2.0]).log())
    p = CountParameters(of(math.log(mu), 3.5), None if r is None else of(math.log(r), 8.0), logit, *outliers)
    x = draw_counts(p, generator=torch.Generator().manual_seed(4), dense=dense).numpy()[:, 0]
    grid = np.arange(int(x.max()) + 2)
    body = stats.poisson.pmf(grid, mu) if r is None else stats.nbinom.pmf(grid, r, r / (r + mu))
    body = (1 - epsilon) * ((1 - pi) * body + pi * (grid == 0)) + (epsilon * stats.geom.pmf(grid, 1 / height) if epsilon else 0)
    above = body[1:].cumsum() / body[1:].sum()
    bins = np.unique(1 + np.searchsorted(above, np.linspace(0, 1, 40)[:-1]))
    bins = np.append(0, bins[1:] if n * body[0] < 5 else bins)                # zeros by themselves, if there are any
    wanted = np.add.reduceat(body, bins)
    wanted[-1] += 1 - body.sum()
    found = np.add.reduceat(np.bincount(x.astype(int), minlength=len(grid)), bins)
    assert stats.chisquare(found, n * wanted).pvalue > 1e-3
    assert found.sum() == n and (n * wanted > 5).all() and len(bins) > 1


def test_only_a_cpu_draws_by_inversion(monkeypatch):
    """Other devices may have no double precision."""
    def every(parameters, generator):
        raise RuntimeError("a gamma for every entry")

    monkeypatch.setattr(counts_module, "_draw_every_entry", every)
    assert draw_counts(CountParameters(torch.zeros(2, 3), torch.zeros(2, 3))).shape == (2, 3)
    with pytest.raises(RuntimeError, match="a gamma for every entry"):
        draw_counts(CountParameters(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta")))


def test_no_drawn_cell_is_empty_and_the_seed_decides():
    p = CountParameters(torch.full((50, 4), -9.0))
    a, b, c = (draw_counts(p, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert (a.sum(1) >= 1).all() and torch.equal(a, b)
    rich = CountParameters(torch.full((50, 4), 3.0))
    assert not torch.equal(*(draw_counts(rich, generator=torch.Generator().manual_seed(s)) for s in (1, 2))) and c.shape == a.shape


def test_start_finds_shares_dispersion_and_outliers():
    rng = np.random.default_rng(3)
    library = rng.gamma(6.0, 100.0, 3000)
    shares = rng.dirichlet(np.full(200, 5.0))
    x = rng.poisson(np.outer(library, shares) * rng.gamma(5.0, 0.2, (3000, 200)))
    x[rng.choice(3000, 12, replace=False), 7] = 400
    start = count_start(sp.csr_matrix(x))
    assert all(part.dtype == np.float32 and np.isfinite(part).all() for part in start)
    assert abs(np.exp(np.median(start.log_r)) / 5 - 1) < 0.2
    assert np.argmax(start.outlier) == 7 and abs(np.exp(start.outlier[7]) * 3000 - 12) < 2
    assert abs(np.exp(start.outlier_mean[7]) / 400 - 1) < 0.1
    np.testing.assert_allclose(start.shares, x.sum(0) / x.sum(), rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_start_is_finite_whatever_the_counts(n, n_genes, seed):
    x = np.random.default_rng(seed).poisson(0.3, (n, n_genes))
    x[0, 0] += 1
    assert all(np.isfinite(part).all() for part in count_start(sp.csr_matrix(x)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_means_add_up_to_the_library(head, dispersion):
    decoder = CountMap(30, 5, head=head, dispersion=dispersion)
    p = decoder(torch.randn(4, 5), torch.tensor([[100.0], [1.0], [5000.0], [33.0]]).log())
    total = p.log_mu.exp().sum(1) / torch.tensor([100.0, 1.0, 5000.0, 33.0])
    assert ((total > 0.5) & (total <= 2.0001)).all()
    assert (p.log_r is None) == (head == "poisson") and (p.logit is not None) == (head == "zinb")
    assert head == "poisson" or (p.log_r.ndim == 2) == (dispersion != "gene")


def test_unknown_head_and_dispersion_are_named():
    with pytest.raises(InputError, match="unknown head 'gauss'; known: zinb, nb, poisson"):
        CountMap(3, head="gauss")
    with pytest.raises(InputError, match="unknown dispersion 'cell'; known: gene-cell, gene, trend"):
        CountMap(3, dispersion="cell")


def test_prior_holds_loadings_back():
    decoder = CountMap(20, 3, width=8)
    with torch.no_grad():
        decoder.mean.weight.fill_(0.25)
        for part in decoder.low.values():
            part[-1].weight.zero_()
    assert decoder.penalty(0.5).item() == pytest.approx(8 * 20 * 8 * 0.25**2 / (2 * 0.25))


@pytest.fixture(scope="module")
def trained():
    cells = planted_cells(400, 60, seed=4)
    reader = CellReader(cells.X, target_sum=None, transform="none")
    torch.manual_seed(0)
    pair = CountAutoencoder(60, 6, hidden=64, width=32, n_cells=400, start=count_start(cells.X))
    done = train_autoencoder(pair, reader, steps=300, seed=0, device=torch.device("cpu"), batch_size=64, ema=0.95, lr=3e-3, show=False)
    return cells, reader, pair, done


def test_training_lowers_the_loss_and_standardises_draws(trained):
    _, reader, pair, done = trained
    assert done.losses[-1] < done.losses[0]
    mean, spread = fit_count_statistics(pair, reader, device=torch.device("cpu"))
    z = mean + spread * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert z.shape == (400, 7) and (spread[:, -1] == 0).all()
    np.testing.assert_allclose(z.mean(0), 0, atol=0.12)
    np.testing.assert_allclose(z.std(0), 1, atol=0.12)
    library = mean[:, -1] * pair.latent_std[-1] + pair.latent_mean[-1]
    np.testing.assert_allclose(library.exp(), reader.library_size, rtol=1e-3)


def test_of_a_large_set_some_blocks_do_for_the_means(monkeypatch):
    """A decoder whose means are off by known factors gets nearly the offsets that all cells would give it, from a quarter of them."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(20.0, 1.0, 40), (2000, 40)).astype(np.float32))
    reader, seen, steps = CellReader(counts, target_sum=None, transform="none"), [], {}
    read = reader.read_sparse
    monkeypatch.setattr(reader, "read_sparse", lambda rows: seen.append(rows.start) or read(rows))
    for most in (2000, 500, 499):
        torch.manual_seed(0)
        pair = CountAutoencoder(40, 3, n_cells=2000, hidden=16, width=8, start=count_start(counts)).eval()
        with torch.no_grad():
            pair.map.mean.bias.add_(torch.linspace(-0.3, 0.3, 40))
        steps[most] = calibrate_means(pair, reader, device=torch.device("cpu"), size=100, most=most)
    assert seen == [*range(0, 2000, 100), *range(0, 2000, 400), *range(0, 2000, 500)]
    assert steps[2000].std() > 0.1 and (steps[500] - steps[2000]).abs().max() < 0.05 < (steps[500] - steps[500].flip(0)).abs().max()


def test_an_abundant_scattered_gene_keeps_its_mean_beside_switched_genes():
    """A softmax over genes lets such a gene pay for the extra zeros of all others."""
    rng = np.random.default_rng(0)
    n, others = 600, 60
    on = rng.random((n, others)) < 0.5
    x = rng.poisson(on * rng.gamma(20.0, 4.0 / 20.0, (n, others)))
    x = np.column_stack([rng.poisson(rng.gamma(1.0, 100.0, n)), x]).astype(np.float32)
    x[:, 1] += 1
    counts = sp.csr_matrix(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = CountAutoencoder(others + 1, 4, n_cells=n, hidden=32, width=32, start=count_start(counts))
        optimizer = torch.optim.AdamW(pair.parameters(), lr=3e-3)
        for step in range(400):
            rows = np.random.default_rng(step).choice(n, 128, replace=False)
            loss = pair.loss(torch.from_numpy(x[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fit_count_statistics(pair, CellReader(counts, target_sum=None, transform="none"), device=torch.device("cpu"))
        with torch.no_grad():
            mean, spread = pair.posterior(torch.from_numpy(x))
            drawn = torch.cat([pair.draw(mean + spread * torch.randn(mean.shape)) for _ in range(5)])
    assert abs(float(drawn[:, 0].mean()) / x[:, 0].mean() - 1) < 0.08
    assert abs(float(drawn.sum(1).mean()) / x.sum(1).mean() - 1) < 0.05


def test_no_library_leaves_the_range_of_training_cells(trained):
    _, reader, pair, _ = trained
    fit_count_statistics(pair, reader, device=torch.device("cpu"))
    far = torch.zeros(2, 7)
    far[:, -1] = torch.tensor([-50.0, 50.0])
    total = pair.parameters_of(far).log_mu.exp().sum(1)
    np.testing.assert_allclose(total.detach(), [reader.library_size.min(), reader.library_size.max()], rtol=0.15)


def test_reconstructions_have_the_zeros_of_real_cells(trained):
    cells, reader, pair, _ = trained
    fit_count_statistics(pair, reader, device=torch.device("cpu"))
    with torch.no_grad():
        x = torch.from_numpy(reader.read(slice(None)))
        drawn, expected = pair.draw(pair.encode(x), generator=torch.Generator().manual_seed(0)), pair.decode(pair.encode(x))
    assert abs(float((drawn == 0).float().mean()) - float((x == 0).float().mean())) < 0.03
    np.testing.assert_allclose(expected.sum(1), x.sum(1), rtol=0.35)
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), rtol=0.5, atol=0.5)


@pytest.fixture(scope="module")
def counted():
    return SCLD(planted_cells(), "cell_type", device="cpu", **SMALL).train(300, ae_steps=300, progress=False)


def test_default_model_draws_integer_counts_with_their_labels(counted):
    cells = counted.sample(90, seed=3, progress=False)
    assert cells.X.dtype == np.int32 and cells.uns["scld"]["scale"] == "counts" and cells.uns["scld"]["head"] == "zinb"
    assert np.asarray(cells.X.sum(1)).min() >= 1 and list(cells.var_names) == [f"gene{g}" for g in range(60)]
    assert cells.obs["cell_type"].value_counts().to_dict() == {"B": 54, "NK": 27, "T": 9}
    real = np.asarray(planted_cells().X.sum(1)).ravel()
    made = np.asarray(cells.X.sum(1)).ravel()
    assert stats.ks_2samp(real, made).statistic < 0.3
    again = counted.sample(90, seed=3, stream=False, progress=False)
    assert (again.X != cells.X).nnz == 0 and again.obs.equals(cells.obs)
    assert (counted.sample(90, seed=4, progress=False).X != cells.X).nnz > 0


def test_counts_survive_saving_and_are_judged_as_counts(counted, tmp_path):
    counted.save(tmp_path / "m")
    loaded = SCLD.load(tmp_path / "m", device="cpu")
    a, b = counted.sample(60, keep=1, progress=False), loaded.sample(60, keep=1, progress=False)
    assert (a.X != b.X).nnz == 0 and loaded.config == counted.config
    a.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").X.dtype == np.int32
    report = evaluate(planted_cells(seed=9), a, train=planted_cells(), labels_key="cell_type", n_trees=20, progress=False)
    assert report.value("rf_auc", "log1p") < 0.95


def test_a_label_of_its_own_has_its_profile(counted):
    train = planted_cells()
    logged = np.log1p(train.X.toarray() / train.X.toarray().sum(1, keepdims=True) * 1000)
    means = np.stack([logged[(train.obs["cell_type"] == t).to_numpy()].mean(0) for t in counted.labels])
    drawn = counted.sample(60, "NK", omega=0.5, keep=1, progress=False).X.toarray()
    drawn = np.log1p(drawn / drawn.sum(1, keepdims=True) * 1000)
    nearest = ((drawn[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == counted.labels.index("NK")).mean() > 0.7


def test_reconstruct_keeps_the_library_and_latents_hold_it(counted):
    cells = planted_cells(100, seed=5)
    again, z = counted.reconstruct(cells), counted.get_latent_representation(cells)
    assert again.X.dtype == np.int32 and again.uns["scld"]["scale"] == "counts" and z.shape == (100, 7)
    a, b = (np.asarray(m.sum(1), dtype=float).ravel() for m in (cells.X, again.X))
    assert np.corrcoef(a, b)[0, 1] > 0.8 and np.corrcoef(z[:, -1], np.log(a))[0, 1] > 0.999


@pytest.mark.parametrize("head", ["nb", "poisson"])
def test_the_other_heads_train_and_draw(head):
    model = SCLD(planted_cells(120), "cell_type", device="cpu", head=head, **SMALL).train(20, ae_steps=20, scorer=False, progress=False)
    assert model.sample(10, keep=1, progress=False).X.dtype == np.int32


@pytest.mark.parametrize("prediction", ["eps", "v", "z0"])
def test_every_prediction_trains(prediction):
    options = SMALL | {"prediction": prediction, "min_snr": 5.0}
    model = SCLD(planted_cells(120), "cell_type", device="cpu", **options).train(150, ae_steps=20, scorer=False, progress=False)
    losses = model.history["denoiser"]["losses"]
    assert np.isfinite(losses).all() and model.sample(10, keep=1, progress=False).n_obs == 10


def test_mse_brings_the_widths_of_the_paper():
    assert (make_config(head="mse").latent, make_config().latent) == (128, 30)
    assert make_config("paper").head == "mse" and make_config(head="mse", latent=32).latent == 32
    assert make_config().width == 31 and make_config(head="mse").width == 128
    assert make_config().widths == (256, 128) and make_config(head="mse").widths == (512, 256, 128)


def test_steps_follow_head_and_cells():
    model = SCLD(planted_cells(), "cell_type", device="cpu", **SMALL)
    assert model.training_steps() == (6000, 600) and model.training_steps(50) == (50, 600) and model.training_steps(50, 7) == (50, 7)
    assert SCLD(planted_cells(), "cell_type", device="cpu", **TINY).training_steps() == (20_000, 20_000)
    sizes = (300, 2_114, 3_840, 7_933, 15_571, 16_000, 10**6)
    assert [count_autoencoder_steps(n) for n in sizes] == [600, 1652, 3000, 3000, 3000, 3000, 3000]
    assert [count_denoiser_steps(n) for n in sizes] == [6000, 6000, 6000, 6000, 17356, 18000, 18000]
    assert count_denoiser_steps(15_571, 256) == 11_678


def test_an_interrupted_training_of_counts_is_resumed_bit_for_bit(tmp_path):
    def model():
        return SCLD(planted_cells(120), "cell_type", device="cpu", **SMALL)

    whole = model().train(30, ae_steps=30, scorer=False, progress=False)
    part = model()
    part.train(30, ae_steps=30, scorer=False, progress=False, checkpoint_dir=tmp_path, checkpoint_every=10)
    (tmp_path / "denoiser.safetensors").unlink()
    again = model().train(30, ae_steps=30, scorer=False, progress=False, checkpoint_dir=tmp_path, resume=True)
    a, b = whole.sample(20, keep=1, progress=False), again.sample(20, keep=1, progress=False)
    assert (a.X != b.X).nnz == 0


# ------------------------------------------------------------------ a dispersion that follows the mean

def with_trend(seed=0, n_genes=12):
    torch.manual_seed(seed)
    decoder = CountMap(n_genes, 3, dispersion="trend").eval()
    return decoder, torch.randn(5, 3), torch.full((5, 1), 1000.0).log()


def test_the_slope_ties_log_r_to_the_log_fold_of_the_share():
    decoder, z, library = with_trend()
    flat = decoder(z, library)
    with torch.no_grad():
        decoder.trend.copy_(torch.linspace(-0.2, 0.2, 12) / GAIN)
    h = torch.nn.functional.layer_norm(decoder.net(z), (128,))
    fold = h @ decoder.mean.weight.T
    found = decoder(z, library)
    assert torch.equal(found.log_mu, flat.log_mu)
    np.testing.assert_allclose((found.log_r - flat.log_r).detach(), (torch.linspace(-0.2, 0.2, 12) * fold).detach(), atol=1e-5)


def test_mending_the_means_leaves_r_alone():
    decoder, z, library = with_trend(1)
    with torch.no_grad():
        decoder.trend.fill_(0.3 / GAIN)
        before = decoder(z, library)
        decoder.mean.bias[4] -= 0.7
        after = decoder(z, library)
    assert torch.allclose(before.log_r, after.log_r, atol=1e-5) and torch.allclose(after.log_mu[:, 4], before.log_mu[:, 4] - 0.7, atol=1e-5)


def test_r_of_a_trend_has_a_floor_and_starts_at_one_or_above():
    start = count_start(sp.csr_matrix(np.random.default_rng(0).negative_binomial(0.05, 0.01, (400, 6))))
    assert (start.log_r < 0).any()
    for dispersion, least in (("gene-cell", -6.0), ("trend", -2.0)):
        decoder = CountMap(6, 2, dispersion=dispersion, start=start)
        assert torch.allclose(GAIN * decoder.log_r.detach(), torch.from_numpy(start.log_r).clamp_min(0.0 if dispersion == "trend" else -9.0))
        with torch.no_grad():
            decoder.log_r.fill_(-9.0 / GAIN)
            assert decoder(torch.zeros(1, 2), torch.zeros(1, 1)).log_r.eq(least).all()


def test_slopes_have_a_prior_of_their_own():
    decoder, *_ = with_trend()
    before = decoder.penalty(0.7)
    with torch.no_grad():
        decoder.trend[3] = 0.6 / GAIN
    assert float(decoder.penalty(0.7) - before) == pytest.approx(0.6**2 / (2 * 0.3**2), rel=1e-4)
    assert CountMap(4, 2, head="poisson", dispersion="trend").trend is None

def small_pair(**options) -> CountAutoencoder:
    torch.manual_seed(0)
    return CountAutoencoder(12, 3, hidden=8, width=4, rank=2, **options).eval()


def test_the_parts_of_the_loss_are_weighed_as_asked():
    x, noise = torch.poisson(torch.full((5, 12), 3.0), generator=torch.Generator().manual_seed(1)), torch.zeros(5, 3)
    with torch.no_grad():
        mean, log_var = small_pair().round(x)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(1).mean()
        by_kl = [float(small_pair(kl=weight).loss(x, noise)) for weight in (0.0, 2.0)]
        by_tau = [float(small_pair(tau=tau, n_cells=10).loss(x, noise)) for tau in (1e6, 0.5)]
        penalty = small_pair().map.penalty(0.5)
    assert by_kl[1] - by_kl[0] == pytest.approx(2 * float(kl) / 12, rel=1e-3)
    assert by_tau[1] - by_tau[0] == pytest.approx(float(penalty) / 10 / 12, rel=1e-3)


def test_settings_of_the_pair_reach_its_halves():
    pair = small_pair(input_dropout=0.4, dropout=0.3, head="nb", dispersion="gene", outliers=False)
    shares = [part.p for part in pair.modules() if isinstance(part, counts_module.Dropout)]
    assert pair.round.input_dropout == 0.4 and shares == [0.3] * 4
    assert pair.map.logit is None and pair.map.outlier is None and not pair.map.low


@pytest.mark.parametrize("far", [-50.0, 50.0])
def test_dispersion_and_outliers_stay_within_bounds(far):
    pair = small_pair()
    with torch.no_grad():
        pair.map.log_r.fill_(far)
        pair.map.outlier_mean.fill_(far)
        parameters = pair.map(torch.zeros(2, 3), torch.zeros(2, 1))
    assert parameters.log_r.unique().item() == (8.0 if far > 0 else -6.0)
    assert parameters.outlier_mean.unique().item() == pytest.approx(9.0 if far > 0 else 0.7)


def test_means_are_moved_by_a_bounded_step():
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(5.0, (200, 12)).astype(np.float32))
    pair = small_pair(n_cells=200, start=count_start(counts))
    with torch.no_grad():
        pair.map.mean.bias.add_(torch.linspace(-3.0, 3.0, 12))
    step = calibrate_means(pair, CellReader(counts, target_sum=None, transform="none"), device=torch.device("cpu"))
    assert step.max() == 0.5 and step.min() == -0.5


def test_the_count_of_an_empty_cell_goes_to_its_likeliest_gene():
    log_mu = torch.tensor([[-30.0, -29.0, -31.0], [-28.0, -29.0, -31.0]])
    assert draw_counts(CountParameters(log_mu, torch.zeros(3))).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("head", HEADS)
def test_expected_counts_are_the_means_of_draws(head):
    p = random_parameters(1, 6, 3, head=head)._replace(outlier=torch.linspace(-4.0, -1.0, 6), outlier_mean=torch.full((6,), 2.0))
    p = p._replace(log_r=None if p.log_r is None else p.log_r.clamp_min(0.0))
    many = CountParameters(*(None if part is None else part.float().expand(20_000, -1) if part.ndim == 2 else part.float() for part in p))
    drawn = draw_counts(many, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), expected_counts(many)[0], rtol=0.1, atol=0.02)


def test_decoded_cells_leave_outliers_out():
    pair = small_pair()
    with torch.no_grad():
        pair.map.outlier.fill_(0.0)
        pair.map.outlier_mean.fill_(0.9)                       # half of all counts would be of e^9
        assert pair.decode(torch.zeros(2, 4)).sum(1).max() < 10


def test_rare_genes_start_like_the_others():
    """Four single counts say nothing of a dispersion, and a gene without outliers is not given any."""
    rng = np.random.default_rng(3)
    x = rng.poisson(np.outer(rng.gamma(6.0, 100.0, 3000), rng.dirichlet(np.full(50, 5.0))) * rng.gamma(5.0, 0.2, (3000, 50)))
    x[:, 0] = 0
    x[[5, 500, 1000, 2000], 0] = 1
    start = count_start(sp.csr_matrix(x))
    assert abs(start.log_r[0] - np.median(start.log_r)) < 1 and np.median(start.outlier) == start.outlier[0] == -14

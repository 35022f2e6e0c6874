"""scIGANs: pictures, losses and balance by hand, conditioning and imputation on planted cells, refusals."""

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.baselines import scigans
from scld_nb.baselines.random import RandomBaseline
from scld_nb.baselines.scigans import CellCritic, CellGenerator, ScIGANs, equilibrium, fold, image_side, unfold
from scld_nb.data import InputError, default_split, load
from scld_nb.evaluation import expression

SMALL = {"width": 4, "grid": 8, "code": 8, "latent_dim": 8, "device": "cpu", "progress": False}
LEARNS = SMALL | {"width": 32, "latent_dim": 16, "batch_size": 32, "lr": 2e-3}


def blocks(n: int = 300, n_genes: int = 48, seed: int = 0) -> ad.AnnData:
    """Poisson counts of three types; every type has a third of the genes sixteen times as high as the others have them."""
    rng = np.random.default_rng(seed)
    types = rng.choice(3, n, p=[0.4, 0.35, 0.25])
    base = np.random.default_rng(1).gamma(2.0, 1.0, n_genes) + 0.5
    profile = np.where(np.arange(n_genes) % 3 == np.arange(3)[:, None], 8 * base, base / 2)
    x = rng.poisson(profile[types] * rng.gamma(5.0, 0.2, (n, 1))).astype(np.float32)
    x[:, 0] += 1
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["a", "b", "c"])[types])}, index=[f"cell{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)]))


@pytest.fixture(scope="module")
def planted() -> tuple[ad.AnnData, ad.AnnData, np.ndarray]:
    """Whole cells, the same with 30 % of their positive counts dropped, and which those are."""
    whole = blocks()
    x = whole.X.toarray()
    lost = (np.random.default_rng(0).random(x.shape) < 0.3) & (x > 0)
    lost[:, 0] = False
    return whole, ad.AnnData(sp.csr_matrix(np.where(lost, 0, x)), obs=whole.obs.copy(), var=whole.var.copy()), lost


@pytest.fixture(scope="module")
def trained(planted):
    """Small networks after 400 steps on the cells with dropped counts."""
    return ScIGANs(steps=400, **LEARNS).fit(planted[1], "kind")


@given(g=st.integers(1, 400), n=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_fold_then_unfold_is_the_identity(g, n, seed):
    x = torch.rand(n, g, generator=torch.Generator().manual_seed(seed))
    side = image_side(g)
    assert (side - 1) ** 2 < g <= side**2 and side == math.ceil(math.sqrt(g))
    images = fold(x)
    assert images.shape == (n, 1, side, side) and torch.equal(unfold(images, g), x)
    assert images.flatten(1)[:, g:].abs().sum() == 0
    assert torch.equal(images[0, 0].flatten()[:g], x[0])                # row by row


def test_large_sides():
    assert [image_side(g) for g in (1, 2, 17_689, 17_690, 17_789)] == [1, 2, 133, 134, 134]


@pytest.mark.parametrize("n_genes", [1, 7, 60, 101])
def test_networks_fit_any_number_of_genes(n_genes):
    generator, critic = CellGenerator(n_genes, 3, latent_dim=5, width=4), CellCritic(n_genes, 3, width=4, grid=6, code=3)
    y, side = torch.tensor([0, 2]), image_side(n_genes)
    images = generator(torch.randn(2, 5), y)
    assert images.shape == critic(images, y).shape == (2, 1, side, side)
    assert images.flatten(1)[:, n_genes:].abs().sum() == 0 and (unfold(images, n_genes) > 0).all() and (images < 1).all()


def test_published_shapes():
    """At the published sizes: 100 numbers of noise, 40 planes, a middle of 24 planes of 32 by 32, 16 numbers in the narrowest place."""
    generator, critic = CellGenerator(124**2, 4), CellCritic(124**2, 4)
    assert generator.spread.in_features == 100 and generator.mix[1].in_channels == 40 and generator.mix[0].eps == 0.8
    assert critic.squeeze.weight.shape == (64**2, 124**2) and critic.narrow[0].weight.shape == (16, 24 * 32**2)
    assert critic.up[0].size == (128, 128)                              # a fourfold enlargement of 32, as published
    std = [m.weight.std().item() for m in generator.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 1000]
    assert np.allclose(std, 0.02, rtol=0.1)


def test_places_left_over_do_not_count():
    critic, y = CellCritic(7, 2, width=4, grid=4, code=2).eval(), torch.tensor([0, 1, 1])
    images = fold(torch.rand(3, 7))
    error = critic.error(images, y)
    error.backward()
    assert critic.squeeze.weight.grad[:, 7:].abs().sum() == 0           # zero pixels move no weight
    recon = critic(images, y).detach()
    by_hand = np.abs(recon.numpy().reshape(3, 9)[:, :7] - images.numpy().reshape(3, 9)[:, :7]).mean()
    assert np.isclose(error.item(), by_hand, rtol=1e-5)


def test_equilibrium_by_hand():
    assert equilibrium(0.2, 1.0, 0.5, gamma=0.9, lambda_k=0.1) == (pytest.approx(0.24), pytest.approx(1.4))
    assert equilibrium(0.2, 0.5, 1.0, gamma=0.5, lambda_k=0.1) == (pytest.approx(0.125), pytest.approx(1.25))
    assert equilibrium(0.0, 0.0, 1.0)[0] == 0.0 and equilibrium(1.0, 1.0, 0.0)[0] == 1.0


@given(st.floats(0, 1), st.floats(0, 5), st.floats(0, 5), st.floats(0.01, 1), st.floats(0, 10))
def test_equilibrium_stays_within_bounds(k, real, fake, gamma, lambda_k):
    new, convergence = equilibrium(k, real, fake, gamma=gamma, lambda_k=lambda_k)
    assert 0 <= new <= 1 and convergence >= real
    if gamma * real > fake:
        assert new >= k
    if gamma * real < fake:
        assert new <= k


def test_first_step_by_hand(cells):
    """One step against the losses written out: generator first, then the critic on the same fakes, then k."""
    model = ScIGANs(steps=1, gamma=0.8, lambda_k=0.5, **SMALL).fit(cells, "cell_type")
    noted = model.history["losses"][0]
    ref = ScIGANs(steps=1, **SMALL)
    ref.label_counts = model.label_counts
    generator, critic = ref._networks(cells.n_vars)
    rows = scigans.batch_rows(cells.n_obs, 8, 0, seed=0, stage="scigans")
    x = cells.X[rows].toarray()
    x = torch.tensor(x / x.max(1, keepdims=True))
    y = torch.tensor(model.codes[rows])
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(scigans.counter_seed(0, "scigans", "noise")))
    fake = generator(z, y)
    loss_g = (critic(fake, y) - fake).abs().flatten(1)[:, :60].mean()
    real = (critic(fold(x), y) - fold(x)).abs().flatten(1)[:, :60].mean()
    assert noted["generator"] == pytest.approx(loss_g.item(), abs=2e-6) and noted["fake"] == pytest.approx(loss_g.item(), rel=0.05)
    assert noted["real"] == pytest.approx(real.item(), abs=2e-6)
    assert noted["k"] == pytest.approx(max(0, 0.5 * (0.8 * noted["real"] - noted["fake"])), abs=2e-6)
    assert noted["convergence"] == pytest.approx(noted["real"] + abs(0.8 * noted["real"] - noted["fake"]), abs=5e-6)


def test_history_and_settings(trained):
    k = [entry["k"] for entry in trained.history["losses"]]
    assert trained.history["steps"] == 400 and min(k) >= 0 and max(k) <= 1
    assert trained.history["losses"][-1]["real"] < trained.history["losses"][0]["real"] / 2
    assert trained.history["steps_published"] == 200 * (300 // 32) and ScIGANs(device="cpu").steps_published(20_000) == 500_000
    assert trained.settings()["width"] == 32 and trained.settings()["method"] == "scigans"


def test_label_decides_what_is_drawn(trained, planted):
    real, kinds = expression(planted[1], "log1p").toarray(), planted[1].obs["kind"]
    means = np.stack([real[kinds == kind].mean(0) for kind in "abc"])
    for i, kind in enumerate("abc"):
        fake = trained.sample(100, label=kind)
        assert set(fake.obs["kind"]) == {kind}
        distance = ((expression(fake, "log1p").toarray()[:, None] - means[None]) ** 2).sum(2)
        assert (distance.argmin(1) == i).mean() > 0.8, kind


def test_samples_have_the_promised_scale(trained, planted):
    fake = trained.sample(2_100)
    assert sp.issparse(fake.X) and fake.shape == (2_100, 48) and fake.uns["scld"]["scale"] == "counts20k"
    assert np.allclose(fake.X.sum(1), 20_000, rtol=1e-4) and fake.X.min() >= 0 and list(fake.var_names) == list(planted[0].var_names)


def test_labels_are_drawn_by_their_shares(trained, monkeypatch):
    seen, original = [], trained._pictures
    monkeypatch.setattr(trained, "_pictures", lambda codes, seed: (seen.append(codes), original(codes, seed))[1])
    trained.sample(3_000)
    assert np.allclose(np.bincount(seen[0]) / 3_000, trained.label_counts / 300, atol=0.03)


def test_seeds(cells):
    a, b = (ScIGANs(steps=5, **SMALL).fit(cells, "cell_type") for _ in range(2))
    x = a.sample(20).X.toarray()
    assert np.array_equal(x, b.sample(20).X.toarray()) and a.history["losses"] == b.history["losses"]
    assert np.array_equal(x, a.sample(20, seed=0).X.toarray()) and not np.allclose(x, a.sample(20, seed=1).X.toarray())
    assert not np.allclose(x, ScIGANs(steps=5, seed=1, **SMALL).fit(cells, "cell_type").sample(20).X.toarray())
    assert np.allclose(a.sample(5, label="B").X.toarray(), a.sample(9, label="B").X.toarray()[:5], rtol=1e-4)   # no cell depends on others
    assert np.array_equal(a.impute(cells[:9]).X, b.impute(cells[:9]).X)


def test_budget_ends_training(cells):
    model = ScIGANs(steps=10**9, budget_s=0.3, **SMALL).fit(cells)
    assert 0 < model.history["steps"] < 10**6 and model.history["train_seconds"] >= 0.3
    assert model.sample(3).shape == (3, 60)


def test_without_labels_there_is_one_class(cells):
    model = ScIGANs(steps=3, **SMALL).fit(cells)
    assert model.generator.n_classes == 1 and model.sample(4).shape == (4, 60)
    filled = model.impute(cells[:5])
    assert filled.X.shape == (5, 60)
    with pytest.raises(InputError, match="unknown label"):
        model.sample(2, label="B")


def test_impute_keeps_what_was_seen_and_beats_zeros(trained, planted):
    whole, holes, lost = planted
    before, x = holes.X.toarray(), whole.X.toarray()
    filled, seen = trained.impute(holes), before > 0
    assert np.array_equal(filled.X[seen], before[seen]) and (filled.X[~seen] > 0).all()
    assert np.array_equal(holes.X.toarray(), before) and np.array_equal(filled.layers["counts"].toarray(), before)
    assert filled.uns["scld"]["imputed"] == (~seen).sum() and list(filled.obs_names) == list(whole.obs_names)
    assert np.abs(filled.X - x)[lost].mean() < 0.8 * x[lost].mean()      # the error of leaving the zeros
    assert np.corrcoef(filled.X[lost], x[lost])[0, 1] > 0.4


def test_fill_by_hand():
    """Nearest over the seen genes only, median of the neighbours, times the largest count."""
    cells = np.array([[4.0, 0.0, 2.0]], dtype=np.float32)
    voters = np.array([[1.0, 0.1, 0.5], [0.9, 0.3, 0.5], [1.0, 0.2, 0.4], [0.0, 0.9, 0.0]], dtype=np.float32)
    assert np.allclose(scigans._fill(cells, voters, 3), [[4.0, 4 * 0.2, 2.0]])
    assert np.allclose(scigans._fill(cells, voters, 1), [[4.0, 4 * 0.1, 2.0]])


@given(seed=st.integers(0, 200), k=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_fill_against_loops(seed, k):
    rng = np.random.default_rng(seed)
    cells, voters = rng.poisson(1.0, (6, 8)).astype(np.float32), rng.random((9, 8)).astype(np.float32)
    cells[:, 0] += 1
    filled = scigans._fill(cells, voters, k)
    for cell, got in zip(cells, filled, strict=True):
        seen, top = cell > 0, cell.max()
        near = np.argsort([((cell / top - v)[seen] ** 2).sum() for v in voters])[:k]
        assert np.allclose(got, np.where(seen, cell, np.median(voters[near], 0) * top), atol=1e-5)


def test_label_order_does_not_mix_the_classes(trained, planted, monkeypatch):
    """A cell is filled from its own class: cells of kind c from pictures of kind c."""
    asked, original = [], trained._pictures
    monkeypatch.setattr(trained, "_pictures", lambda codes, seed: (asked.append(set(codes)), original(codes, seed))[1])
    trained.impute(planted[1][np.flatnonzero(planted[1].obs["kind"] == "c")[:4]].copy(), generated=20)
    assert asked == [{trained.labels.index("c")}]


@pytest.mark.parametrize(("change", "message"), [
    ({"width": 6}, "width must be a positive multiple of 4, got 6"), ({"grid": 7}, "grid must be a positive even number, got 7"),
    ({"batch_size": 1}, "batch_size must be 2 or more, got 1"), ({"gamma": 1.5}, r"gamma must be in \(0, 1\], got 1.5"),
    ({"lr": 0}, "lr must be above 0, got 0"), ({"lambda_k": -1}, "lambda_k must be 0 or more, got -1"), ({"latent_dim": 0}, "latent_dim must be"),
    ({"code": 0}, "code must be a positive integer, got 0"),
])
def test_bad_settings(change, message):
    with pytest.raises(InputError, match=message):
        ScIGANs(**(SMALL | change))


def test_refusals(cells, trained, planted, monkeypatch):
    with pytest.raises(InputError, match="at least 8 cells, one batch, got 5; lower batch_size"):
        ScIGANs(steps=1, **SMALL).fit(cells[:5])
    lone = cells[np.r_[np.flatnonzero(cells.obs["cell_type"] == "B")[:20], np.flatnonzero(cells.obs["cell_type"] == "T")[:1]]].copy()
    with pytest.raises(InputError, match="needs 2 cells of every label, 'T' has 1; drop or merge it"):
        ScIGANs(steps=1, **SMALL).fit(lone, "cell_type")
    with pytest.raises(InputError, match=r"not fitted; call fit\(adata\) first"):
        ScIGANs(**SMALL).impute(cells)
    whole = planted[0]
    for wrong in ({"neighbours": 0}, {"neighbours": 30, "generated": 20}):
        with pytest.raises(InputError, match="neighbours must be between 1 and generated"):
            trained.impute(whole, **wrong)
    with pytest.raises(InputError, match="impute needs the 48 genes of the training in their order, got 47"):
        trained.impute(whole[:, 1:].copy())
    with pytest.raises(InputError, match="no column 'kind' in obs; there are: none"):
        trained.impute(ad.AnnData(whole.X, var=whole.var))
    strange = whole[:4].copy()
    strange.obs["kind"] = pd.Categorical(["a", "mast", "b", "b"])
    with pytest.raises(InputError, match="unknown label 'mast' in 'kind'; known: b, a, c"):
        trained.impute(strange)
    monkeypatch.setattr("scld_nb.baselines.base.free_memory", lambda: 10**6)
    with pytest.raises(InputError, match="scigans with 60 genes needs about .* GiB of memory"):
        ScIGANs(steps=1, **(SMALL | {"width": 64, "grid": 64})).fit(cells)


def test_memory_needed_is_of_the_right_size(monkeypatch):
    """The weights reckoned before they are made are those that are made, within a few per cent."""
    model, asked = ScIGANs(**(SMALL | {"width": 32, "grid": 64, "code": 16, "latent_dim": 100})), []
    model.label_counts = np.array([5, 5])
    monkeypatch.setattr(scigans, "require_memory", lambda need, what, mend: asked.append(need))
    generator, critic = model._networks(900)
    weights = sum(p.numel() for net in (generator, critic) for p in net.parameters())
    pixels = 8 * 32 * (12 * 30**2 + 6 * 64**2)
    assert asked[0] == pytest.approx(4 * (4 * weights + 3 * pixels), rel=0.05)


@pytest.mark.slow
def test_real_cells_against_random():
    """Held-out blood cells: gene-gene correlation of the 100 most variable genes is nearer to the real one than Random's."""
    train, test = default_split(load("pbmc68k_reduced"))
    model = ScIGANs(steps=300, width=16, lr=2e-3, batch_size=16, device="cpu", progress=False).fit(train, "louvain")
    real = expression(test, "log1p").toarray()
    top, upper = np.argsort(-real.var(0))[:100], np.triu_indices(100, 1)

    def agreement(cells):
        return np.corrcoef(np.corrcoef(expression(cells, "log1p").toarray()[:, top].T)[upper], np.corrcoef(real[:, top].T)[upper])[0, 1]

    assert agreement(model.sample(test.n_obs)) > agreement(RandomBaseline().fit(train).sample(test.n_obs)) + 0.15

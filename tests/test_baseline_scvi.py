"""scVI: count and mixture draws against closed forms, the one-line refusal, training through a stand-in, and the real thing where installed."""

import importlib.util
import itertools
import os
import random
import sys
import types

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scld_nb.baselines import scvi as ours
from scld_nb.baselines.random import RandomBaseline
from scld_nb.baselines.scvi import ScVI, ScVIPrior, draw_counts, draw_mixture, fit_mixture
from scld_nb.data import InputError, default_split, load
from scld_nb.evaluation import expression
from scld_nb.metrics import label_classifier, purity

QUIET = {"device": "cpu", "progress": False}
SMALL = QUIET | {"n_latent": 4, "n_hidden": 16, "batch_size": 64}


# ------------------------------------------------------------------ draws
@pytest.mark.parametrize(("mean", "theta"), [(3.0, 1.5), (0.2, 0.5), (40.0, 10.0)])
def test_counts_follow_the_negative_binomial(mean, theta):
    x = draw_counts(np.full(100_000, mean), np.array(theta), np.random.default_rng(0))
    assert (x == np.round(x)).all() and x.min() >= 0 and x.dtype == np.float32
    law = stats.nbinom(theta, theta / (theta + mean))
    assert x.mean() == pytest.approx(law.mean(), rel=0.03) and x.var() == pytest.approx(law.var(), rel=0.06)
    assert (x == 0).mean() == pytest.approx(law.pmf(0), abs=0.01)


def test_counts_take_a_dispersion_per_gene():
    mean, theta = np.tile([2.0, 30.0], (50_000, 1)), np.array([0.5, 100.0])
    x = draw_counts(mean, theta, np.random.default_rng(1))
    assert np.allclose(x.var(0), mean[0] + mean[0] ** 2 / theta, rtol=0.08)


@given(n=st.integers(2, 90), d=st.integers(1, 4), components=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_mixture_is_one_at_every_size(n, d, components, seed):
    codes = np.random.default_rng(seed).normal(size=(n, d))
    weights, means, factors = fit_mixture(codes, components=components, seed=2**62 + seed)
    c = max(1, min(components, n // 20))
    assert weights.sum() == pytest.approx(1) and means.shape == (c, d) and factors.shape == (c, d, d)
    assert np.allclose(factors, np.tril(factors)) and (np.diagonal(factors, axis1=1, axis2=2) > 0).all()
    assert np.allclose(weights @ means, codes.mean(0), atol=1e-6)           # maximum likelihood keeps the mean


def test_mixture_draws_have_the_moments():
    weights, means = np.array([0.2, 0.8]), np.array([[0.0, 5.0], [4.0, -1.0]])
    factors = np.array([[[1.0, 0.0], [0.7, 0.2]], [[0.5, 0.0], [-0.3, 0.4]]])
    x = draw_mixture((weights, means, factors), 200_000, np.random.default_rng(0))
    centre = weights @ means
    covariance = sum(w * (f @ f.T + np.outer(m - centre, m - centre)) for w, m, f in zip(weights, means, factors, strict=True))
    assert np.allclose(x.mean(0), centre, atol=0.03) and np.allclose(np.cov(x.T), covariance, atol=0.05)


# --------------------------------------------------------------- refusals
def test_one_line_where_scvi_tools_is_missing(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)                          # import scvi fails, installed or not
    monkeypatch.setattr(ours, "require_memory", lambda *a: pytest.fail("went on"))
    for method in (ScVI, ScVIPrior):
        with pytest.raises(InputError) as error:
            method(**QUIET).fit(cells, "cell_type")
        assert str(error.value) == "scvi needs scvi-tools: pip install 'scld-nb[scvi]'"


def test_a_folder_of_that_name_is_no_installation(cells, monkeypatch, tmp_path):
    (tmp_path / "scvi").mkdir()
    monkeypatch.delitem(sys.modules, "scvi", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    try:
        with pytest.raises(InputError, match=r"scvi needs scvi-tools: pip install 'scld-nb\[scvi\]' \(a folder named scvi was found in its place: .*scvi\)"):
            ours._import_scvi()
    finally:
        sys.modules.pop("scvi", None)


def test_a_broken_installation_is_named(cells, monkeypatch, tmp_path):
    (tmp_path / "scvi").mkdir()
    (tmp_path / "scvi" / "__init__.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.delitem(sys.modules, "scvi", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="scvi-tools cannot be imported: No module named 'a_library_that_is_not_there'; reinstall it"):
        ScVI(**QUIET).fit(cells)


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "posterior"}, "mode must be 'aggregated' or 'prior', got 'posterior'"), ({"n_latent": 0}, "n_latent must be 1 or more, got 0"),
    ({"batch_size": 1}, "batch_size must be 2 or more, got 1"), ({"components": 0}, "components must be 1 or more, got 0"),
    ({"steps": 0}, "steps must be a whole number of at least 1"),
])
def test_bad_settings(change, message):
    with pytest.raises(InputError, match=message):
        ScVI(**(QUIET | change))


def test_names_scales_and_published_steps():
    assert (ScVI.name, ScVIPrior.name, ScVI.scale) == ("scvi", "scvi_prior", "counts")
    assert (ScVI(**QUIET).mode, ScVIPrior(**QUIET).mode) == ("aggregated", "prior")
    model = ScVI(**QUIET)
    assert model.steps_published(564) == 400 * 5 and model.steps_published(512) == 400 * 4 and model.steps_published(513) == 400 * 4
    assert model.steps_published(68_000) == 118 * 532 and model.steps_published(10**8) == 781_250
    assert model.settings()["components"] == 5 and ScVIPrior(**QUIET).settings()["method"] == "scvi_prior"


# ------------------------------------------------------------- a stand-in
class StandIn:
    """The few calls of scvi-tools' SCVI that are used, with a fixed linear decoder; counts batches, breaks nothing."""

    made: list["StandIn"] = []

    @staticmethod
    def setup_anndata(adata):
        assert sp.issparse(adata.X)

    def __init__(self, adata, *, n_latent, gene_likelihood, **sizes):
        assert gene_likelihood == "nb"
        self.adata, self.n_latent, self.drawn = adata, n_latent, np.random.random()
        self.module = torch.nn.Linear(n_latent, adata.n_vars)
        self.module.generative = self.generative
        StandIn.made.append(self)

    def train(self, *, max_epochs, batch_size, callbacks, datasplitter_kwargs, train_size, shuffle_set_split, plan_kwargs, **options):
        n, self.asked = self.adata.n_obs, {"epochs": max_epochs, "kl": plan_kwargs["n_epochs_kl_warmup"]} | options
        sizes = [min(batch_size, n - i) for i in range(0, n, batch_size)]
        sizes = sizes[:-1] if datasplitter_kwargs["drop_last"] and sizes[-1] < batch_size else sizes
        assert min(sizes) > 1 and train_size == 1.0 and not shuffle_set_split
        trainer, self.batches, self.weights = types.SimpleNamespace(should_stop=False), 0, []
        plan = types.SimpleNamespace(n_epochs_kl_warmup=plan_kwargs["n_epochs_kl_warmup"], n_steps_kl_warmup=None, global_step=0)
        for callback in callbacks:
            callback.on_train_start(trainer, plan)
        for step in range(max_epochs * len(sizes)):
            self.batches, plan.global_step = self.batches + 1, step
            for callback in callbacks:
                callback.on_train_batch_start(trainer, plan, None, step)
            self.weights.append(min(1.0, step // len(sizes) / plan.n_epochs_kl_warmup if plan.n_epochs_kl_warmup else step / plan.n_steps_kl_warmup))
            for callback in callbacks:
                callback.on_train_batch_end(trainer, plan, {"loss": torch.tensor(5.0 - step, requires_grad=True)}, None, step)
            if trainer.should_stop:
                return

    def get_latent_representation(self):
        return self.adata.X.toarray()[:, :self.n_latent] / 10

    def generative(self, *, z, library, batch_index):
        assert batch_index.shape == library.shape == (len(z), 1) and batch_index.dtype == torch.long
        return {"px": types.SimpleNamespace(mu=torch.exp(library) * torch.softmax(torch.nn.Linear.forward(self.module, z), 1), theta=torch.ones(1))}


@pytest.fixture
def stand_in(monkeypatch):
    """A module `scvi` and as much of lightning as is imported."""
    scvi, callbacks = types.ModuleType("scvi"), types.ModuleType("lightning.pytorch.callbacks")
    scvi.model, callbacks.Callback = types.SimpleNamespace(SCVI=StandIn), object
    for name, module in (("scvi", scvi), ("lightning", types.ModuleType("lightning")), ("lightning.pytorch", types.ModuleType("lightning.pytorch")),
                         ("lightning.pytorch.callbacks", callbacks)):
        monkeypatch.setitem(sys.modules, name, module)
    StandIn.made.clear()
    return StandIn


def test_steps_end_the_training(cells, stand_in):
    model = ScVI(steps=7, **SMALL).fit(cells, "cell_type")                  # 300 cells: 5 batches an epoch
    assert model.history["steps"] == stand_in.made[0].batches == 7 and model.history["steps_asked"] == 7
    assert stand_in.made[0].asked["epochs"] == 2 and stand_in.made[0].asked["kl"] == 2 and stand_in.made[0].asked["accelerator"] == "cpu"
    assert model.history["losses"] == [{"step": 0, "loss": 5.0}]
    model = ScVI(budget_s=0.05, **SMALL).fit(cells)
    assert 0 < model.history["steps"] <= model.history["steps_published"] == 2_000


def test_the_divergence_gets_its_whole_weight_whatever_ends_the_training(cells, stand_in, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("scld_nb.baselines.scvi.time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr("scld_nb.baselines.base.time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    ScVI(budget_s=400.0, **SMALL).fit(cells)                                # two looks at the clock a step
    weights = stand_in.made[-1].weights
    assert 150 < len(weights) < 250 and weights[0] == 0 and weights[-1] > 0.9
    assert np.allclose(np.diff(weights[5:]), 1 / len(weights), rtol=0.3)
    ScVI(steps=40, **SMALL).fit(cells)                                      # by steps it is scvi-tools' own, in epochs
    assert stand_in.made[-1].weights[-1] == 7 / 8


@pytest.mark.parametrize("n", [256, 257, 258, 40])
def test_a_last_batch_of_one_cell_is_left_out(cells, stand_in, n):
    model = ScVI(steps=9, **SMALL).fit(cells[:n])
    assert model.history["steps"] == stand_in.made[0].batches == 9


def test_draws_of_both_modes(cells, stand_in):
    model = ScVI(steps=2, **SMALL).fit(cells, "cell_type")
    prior = ScVIPrior(steps=2, **SMALL).fit(cells, "cell_type")
    for method in (model, prior):
        x = method.sample(2_050)
        assert x.shape == (2_050, 60) and x.uns["scld"] == {"scale": "counts", "method": method.name}
        assert (x.X.data == np.round(x.X.data)).all() and np.array_equal(x.X.toarray(), method.sample(2_050).X.toarray())
        assert not np.array_equal(x.X.toarray(), method.sample(2_050, seed=1).X.toarray())
    seen = []
    decode = model._decode
    model._decode = lambda z, totals: (seen.append((z, totals)), decode(z, totals))[1]
    model.sample(4_000, label="NK")
    z, totals = (np.concatenate(part) for part in zip(*seen, strict=True))
    own = cells.X[(cells.obs["cell_type"] == "NK").to_numpy()].toarray()
    assert np.isin(totals, own.sum(1)).all() and np.allclose(z.mean(0), own[:, :4].mean(0) / 10, atol=0.05)
    assert np.allclose(np.cov(z.T), np.cov(own[:, :4].T / 10), atol=0.1)
    prior._decode = lambda z, totals: (seen.append((z, totals)), decode(z, totals))[1]
    seen.clear()
    prior.sample(4_000, label="NK")
    z = np.concatenate([part for part, _ in seen])
    assert np.allclose(z.mean(0), 0, atol=0.06) and np.allclose(np.cov(z.T), np.eye(4), atol=0.08)


def test_decoded_means_add_up_to_the_library(cells, stand_in):
    model = ScVI(steps=1, **SMALL).fit(cells)
    mean, theta = model._decode(np.zeros((3, 4)), np.array([10.0, 100.0, 1000.0]))
    assert np.allclose(mean.sum(1), [10, 100, 1000], rtol=1e-4) and theta.shape == mean.shape


def test_the_global_random_state_is_put_back(cells, stand_in):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    first, second = (ScVI(steps=1, **SMALL).fit(cells).model for _ in range(2))
    assert first.drawn == second.drawn and torch.equal(first.module.weight, second.module.weight)      # seeded inside
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1]) and torch.equal(torch.get_rng_state(), before[2])
    assert ScVI(steps=1, seed=1, **SMALL).fit(cells).model.drawn != first.drawn


def test_lone_cells_are_refused(cells, stand_in):
    lone = cells[np.r_[np.flatnonzero(cells.obs["cell_type"] == "B")[:20], np.flatnonzero(cells.obs["cell_type"] == "T")[:1]]].copy()
    with pytest.raises(InputError, match="scvi needs 2 cells or more of every label, label 'T' has 1; drop or merge it"):
        ScVI(steps=1, **SMALL).fit(lone, "cell_type")
    with pytest.raises(InputError, match="the data has 1"):
        ScVI(steps=1, **SMALL).fit(cells[:1])
    assert not stand_in.made


# --------------------------------------------------------- the real thing
real_scvi = pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed")


@real_scvi
def test_real_training_counts_steps_and_repeats(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (ScVI(steps=12, **SMALL).fit(cells[:257], "cell_type") for _ in range(2))
    assert a.history["steps"] == 12 and a.model.is_trained_
    x = a.sample(30, label="T")
    assert (x.X.data == np.round(x.X.data)).all() and np.array_equal(x.X.toarray(), b.sample(30, label="T").X.toarray())
    assert a.history["losses"] == b.history["losses"] and os.listdir(tmp_path) == []
    budget = ScVI(budget_s=0.5, **SMALL).fit(cells)
    assert 0 < budget.history["steps"] < budget.history["steps_published"]


@real_scvi
def test_real_decoder_agrees_with_scvi(cells):
    """Our means, averaged over draws of each cell's posterior, are the normalised expression scVI itself reports."""
    model = ScVI(steps=20, **SMALL).fit(cells)
    means, variances = model.model.get_latent_representation(return_dist=True)
    totals, rng = np.asarray(cells.X.sum(1)).ravel(), np.random.default_rng(0)
    by_us = np.mean([model._decode(rng.normal(means, np.sqrt(variances)), totals)[0] / totals[:, None] for _ in range(100)], axis=0)
    by_scvi = model.model.get_normalized_expression(n_samples=100, return_mean=True, return_numpy=True, library_size=1.0)
    assert np.allclose(by_us.sum(1), 1, rtol=1e-3)
    assert np.corrcoef(np.log(by_us).ravel(), np.log(by_scvi).ravel())[0, 1] > 0.98
    assert np.allclose(model._decode(means[:5], totals[:5])[0].sum(1), totals[:5], rtol=1e-3)


@real_scvi
@pytest.mark.slow
def test_real_cells_against_random_and_the_prior():
    """Held-out blood cells: both ways beat Random in gene-gene correlation; a label is heeded by the aggregated way only."""
    train, test = default_split(load("pbmc68k_reduced"))
    model = ScVI(steps=800, **QUIET).fit(train, "louvain")
    prior = ScVIPrior(steps=800, **QUIET).fit(train, "louvain")
    logs = expression(test, "log1p").toarray()
    top, upper = np.argsort(-logs.var(0))[:100], np.triu_indices(100, 1)

    def agreement(cells):
        other = np.corrcoef(expression(cells, "log1p").toarray()[:, top].T)[upper]
        return np.corrcoef(np.nan_to_num(other), np.corrcoef(logs[:, top].T)[upper])[0, 1]

    chance = agreement(RandomBaseline().fit(train).sample(test.n_obs))
    for method in (model, prior):
        assert agreement(method.sample(test.n_obs)) > chance + 0.4
    judge, labels = label_classifier(expression(train, "log1p"), train.obs["louvain"].to_numpy()), model.labels[:4]
    asked = {m.name: np.mean([purity(judge, expression(m.sample(50, label=label), "log1p"), label) for label in labels]) for m in (model, prior)}
    assert asked["scvi"] > 0.7 and asked["scvi_prior"] < 0.5

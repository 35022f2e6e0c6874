"""Every setting of the model reaches what it is for, and the Scorer learns from what it should."""

import numpy as np
import pytest
import torch

import scld_nb.model as model_module
from scld_nb.data import InputError
from scld_nb.model import SCLD

SMALL = {"T": 20, "beta_T": 0.6, "latent": 7, "hidden": 16, "widths": (16, 8), "e_width": 8, "batch_size": 64, "scorer_cells": 32}


def trained(cells, **options):
    return SCLD(cells, "cell_type", device="cpu", **SMALL | options).train(3, ae_steps=3, scorer=False, progress=False)


def weights(model):
    return torch.cat([p.flatten() for part in (model.autoencoder, model.denoiser) for p in part.parameters()])


@pytest.fixture(scope="module")
def usual(cells):
    return {head: weights(trained(cells, head=head)) for head in ("zinb", "mse")}


@pytest.mark.parametrize("setting", [
    {"kl": 5.0}, {"tau": 0.05}, {"weight_decay": 5.0}, {"clip": 1e-9}, {"min_snr": 0.5}, {"drop": "first_k"}, {"p_uncond": 0.9},
    {"dropout": 0.6}, {"beta_1": 0.05}, {"lr_schedule": "constant"}, {"ema": None}, {"lr": 1e-4}, {"outliers": False}, {"dispersion": "gene"},
    {"head": "mse", "latent_act": "relu"}, {"head": "mse", "out_act": "softplus"}], ids=str)
def test_every_setting_reaches_the_training(cells, usual, setting):
    found, before = weights(trained(cells, **setting)), usual[setting.get("head", "zinb")]
    assert found.shape != before.shape or not torch.equal(found, before)


def test_the_variance_of_the_settings_is_that_of_the_sampler(cells):
    large, small = (trained(cells, head="mse", variance=v).sample(20, keep=1, progress=False).X.toarray() for v in ("fixed_large", "fixed_small"))
    assert not np.array_equal(large, small)


@pytest.mark.parametrize("other", [{"decoder_width": 64}, {"decoder_rank": 4}])
def test_an_autoencoder_of_another_width_is_refused_and_nothing_is_taken(cells, other):
    model, share = trained(cells, **other), trained(cells)
    before = weights(model)
    with pytest.raises(InputError):
        model.train(3, autoencoder=share, scorer=False, progress=False)
    assert torch.equal(weights(model), before)


def test_the_fakes_are_half_holistic_and_drawn_with_the_steps_asked_for(cells, monkeypatch):
    seen, original = [], SCLD._generate

    def noted(self, k, omega, **options):
        seen.append((k.copy(), omega, options["steps"]))
        return original(self, k, omega, **options)

    monkeypatch.setattr(SCLD, "_generate", noted)
    SCLD(cells, "cell_type", device="cpu", **SMALL).train(3, ae_steps=3, sampling_steps=4, progress=False)
    (k, omega, steps), = seen
    assert len(k) == 32 and (k == 3).sum() == 16 and omega == 0.0 and steps == 4


def test_the_scorer_learns_from_fakes_in_model_space(cells, monkeypatch):
    seen = []
    monkeypatch.setattr(model_module, "train_scorer", lambda scorer, real, fake, **o: seen.append((real, fake)) or {"epochs": 1})
    SCLD(cells, "cell_type", device="cpu", **SMALL).train(3, ae_steps=3, progress=False)
    (real, fake), = seen
    for part in (real.read_sparse(slice(None)), fake):
        assert np.allclose(np.expm1(part.toarray()).sum(1), 20_000, rtol=1e-3)


def test_the_autoencoder_of_counts_ends_with_its_last_weights_and_not_an_average(cells, monkeypatch):
    seen, original = {}, model_module.train_autoencoder
    monkeypatch.setattr(model_module, "train_autoencoder", lambda *a, **o: seen.update({a[0].__class__.__name__: o["ema"]}) or original(*a, **o))
    for head in ("zinb", "mse"):
        trained(cells, head=head)
    assert seen == {"CountAutoencoder": None, "Autoencoder": 0.999}


def test_scores_of_counts_do_not_depend_on_the_library(cells):
    model = SCLD(cells, "cell_type", device="cpu", **SMALL).train(3, ae_steps=3, progress=False)
    x = torch.randint(0, 5, (6, 60)).float()
    assert torch.allclose(model._in_model_space(x), model._in_model_space(3 * x), atol=1e-4)


def test_reconstructions_of_counts_are_draws_around_the_posterior(cells, monkeypatch):
    model, seen = trained(cells), []
    original = SCLD._decoded
    monkeypatch.setattr(SCLD, "_decoded", lambda self, z, seed: seen.append(z) or original(self, z, seed))
    model.reconstruct(cells)
    from scld_nb.data import CellReader, counts_matrix
    x = torch.from_numpy(CellReader(counts_matrix(cells), target_sum=None, transform="none").read(slice(None)))
    with torch.no_grad():
        mean, spread = model.autoencoder.posterior(x)
    z = ((torch.cat(seen) - mean) / spread)[:, :-1]
    assert z.std() == pytest.approx(1.0, abs=0.1)


def test_most_fakes_are_scorer_cells(cells):
    model = SCLD(cells, "cell_type", device="cpu", **SMALL).train(3, ae_steps=3, progress=False)
    assert model.history["scorer"]["n_fake"] == 32

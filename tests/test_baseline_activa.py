"""ACTIVA: its losses by hand, who learns from which, the three stages, and honest rejection sampling."""

import numpy as np
import pytest
import torch
from conftest import planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.baselines import activa, base
from scld_nb.baselines.activa import (
    Actinn,
    Activa,
    Decoder,
    Encoder,
    encoder_loss,
    generator_loss,
    introspective_step,
    kl_divergence,
    recalibrate_norms,
    squared_error,
    stage_of,
)
from scld_nb.data import InputError, library_normalize
from scld_nb.training import TrainingError

TINY = {"latent": 8, "widths": (32, 16), "actinn_widths": (16,), "margin": 10.0, "batch_size": 64, "device": "cpu", "progress": False}
QUICK = TINY | {"stages": (1, 1, 2), "steps": 40}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def networks(n_genes=12, latent=4, widths=(10, 6), n_labels=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nets = Encoder(n_genes, latent, widths), Decoder(n_genes, latent, widths), Actinn(n_genes, n_labels, (7,))
    nets[2].requires_grad_(False)
    return nets


@pytest.fixture(scope="module")
def learnt(cells):
    """Trained long enough to hold two of the three planted types well apart."""
    return Activa(**TINY, stages=(1, 1, 3), steps=600, lr=5e-2, actinn_lr=3e-3).fit(cells, "cell_type")


# ---- networks and losses


def test_layers_are_the_published_ones():
    encoder, decoder, actinn = Encoder(30), Decoder(30), Actinn(30, 10)
    sizes = [[m.out_features for m in net.modules() if isinstance(m, torch.nn.Linear)] for net in (encoder, decoder, actinn)]
    assert sizes == [[1024, 512, 256, 256], [256, 512, 1024, 30], [100, 50, 25, 10]]
    kinds = [[type(m).__name__ for m in net.layers] for net in (encoder, decoder, actinn)]
    assert kinds[0] == ["Linear", "ReLU", "BatchNorm1d"] * 4  # on mu and logvar too
    assert kinds[1] == ["Linear", "ReLU", "BatchNorm1d"] * 3 + ["Linear", "ReLU"]
    assert kinds[2] == ["Linear", "ReLU"] * 3 + ["Linear"]
    mu, logvar = encoder(rand(5, 30).abs())
    assert mu.shape == logvar.shape == (5, 128) and (decoder(mu) >= 0).all()
    assert torch.allclose(mu.mean(0), torch.zeros(128), atol=1e-5)  # batch norm centres every coordinate


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-4, 3)), min_size=1, max_size=6))
def test_kl_agrees_with_torch_distributions(pairs):
    mu, logvar = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(kl_divergence(mu, logvar), torch.distributions.kl_divergence(q, p).sum(1))


def test_kl_by_closed_form():
    mu = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.0, 0.0]])
    logvar = torch.tensor([[0.0, 0.0], [0.0, 0.0], [np.log(4.0), 0.0]], dtype=torch.float32)
    torch.testing.assert_close(kl_divergence(mu, logvar), torch.tensor([0.0, 2.5, 0.5 * (4 - 1 - np.log(4))], dtype=torch.float32))


def test_squared_error_sums_genes_and_averages_cells():
    a, b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(squared_error(a, b)) == (4 + 9 + 1) / 2


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ((7.0, 100.0, 90.0), 7 + 0.25 * (10 + 20) + 0.05 * (40 + 2)),  # both inside the margin
        ((7.0, 110.0, 500.0), 7 + 0.05 * 42),  # both beyond it: no reward for more
        ((0.0, 120.0, 0.0), 0.25 * 110 + 0.05 * 42),
    ],
)
def test_encoder_loss_by_hand(kl, expected):
    loss = encoder_loss(*map(torch.tensor, kl), torch.tensor(40.0), torch.tensor(2.0))
    assert float(loss) == pytest.approx(expected)


def test_weights_and_margin_can_be_changed():
    ones = [torch.tensor(1.0)] * 5
    assert float(encoder_loss(*ones, margin=3.0, weight_margin=2.0, weight_rec=10.0)) == 1 + 2 * (2 + 2) + 10 * 2
    assert float(generator_loss(torch.tensor(8.0), torch.tensor(4.0))) == 6
    assert float(generator_loss(torch.tensor(8.0), torch.tensor(4.0), weight=0.25)) == 3


def test_the_hinges_pull_only_inside_the_margin():
    kl = [torch.tensor(v, requires_grad=True) for v in (50.0, 109.0, 111.0)]
    encoder_loss(*kl, torch.tensor(0.0), torch.tensor(0.0)).backward()
    assert [float(k.grad) for k in kl] == [1.0, -0.25, 0.0]


# ---- who learns from which


def one_step(**options):
    """Networks before and after one introspective step of plain gradient descent."""
    encoder, decoder, actinn = networks()
    before = [[p.detach().clone() for p in net.parameters()] for net in (encoder, decoder, actinn)]
    sgd = tuple(torch.optim.SGD(net.parameters(), lr=1e-3) for net in (encoder, decoder))
    parts = introspective_step(
        encoder, decoder, actinn, sgd, rand(9, 12, seed=1).abs(), rand(9, 4, seed=2), rand(9, 4, seed=3), margin=5.0, **options
    )
    moved = [max(float((p.detach() - q).abs().max()) for p, q in zip(net.parameters(), old)) for net, old in zip((encoder, decoder, actinn), before)]
    return moved, parts, (encoder, decoder), before


def test_generator_loss_reaches_the_decoder_unless_detached():
    (encoder, decoder, actinn), *_ = one_step(weight_rec=0.0)
    assert encoder > 0 and decoder > 0 and actinn == 0
    (encoder, decoder, _), *_ = one_step(weight_rec=0.0, detach_bug=True)
    assert encoder > 0 and decoder == 0  # the released program: nothing but copies teaches the decoder
    (_, decoder, _), *_ = one_step(detach_bug=True)
    assert decoder > 0


@pytest.mark.parametrize("detach_bug", [False, True])
def test_one_step_is_the_two_updates_of_the_paper(detach_bug):
    """The same step written in the plainest way: every loss from scratch, whole-graph gradients, no shared tensors."""
    _, parts, (encoder, decoder), _ = one_step(detach_bug=detach_bug)
    enc, dec, actinn = networks()
    cells, noise, eps = rand(9, 12, seed=1).abs(), rand(9, 4, seed=2), rand(9, 4, seed=3)

    def forward():
        mu, logvar = enc(cells)
        rec, fake = dec(mu + eps * torch.exp(logvar / 2)), dec(noise)
        return mu, logvar, rec, fake, ((rec - cells) ** 2).sum(1).mean(), ((actinn(rec) - actinn(cells)) ** 2).sum(1).mean()

    mu, logvar, rec, fake, copy, logits = forward()
    kl_real, kl_rec, kl_fake = kl_divergence(mu, logvar).mean(), kl_divergence(*enc(rec.detach())).mean(), kl_divergence(*enc(fake.detach())).mean()
    loss_e = kl_real + 0.25 * ((5 - kl_rec).clamp(min=0) + (5 - kl_fake).clamp(min=0)) + 0.05 * (copy + logits)
    for key, value in zip(("kl_real", "kl_rec", "kl_fake", "reconstruction", "classification"), (kl_real, kl_rec, kl_fake, copy, logits)):
        torch.testing.assert_close(parts[key], value)
    gradients = torch.autograd.grad(loss_e, list(enc.parameters()))
    old_copies = torch.autograd.grad(0.05 * sum(forward()[4:]), list(dec.parameters()))
    with torch.no_grad():
        latent = mu + eps * torch.exp(logvar / 2)
        for p, g in zip(enc.parameters(), gradients):
            p -= 1e-3 * g
    made = [dec(latent), dec(noise)]  # from the latents of before the update
    loss_g = 0.5 * sum(kl_divergence(*enc(x.detach() if detach_bug else x)).mean() for x in made)
    extra = [torch.zeros_like(p) for p in dec.parameters()] if detach_bug else torch.autograd.grad(loss_g, list(dec.parameters()))
    with torch.no_grad():
        for p, g, h in zip(dec.parameters(), old_copies, extra):
            p -= 1e-3 * (g + h)
    for mine, plain in ((encoder, enc), (decoder, dec)):
        for p, q in zip(mine.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# ---- stages and budgets


@pytest.mark.parametrize(("steps", "expected"), [(500, (5, 5, 490)), (1500, (15, 15, 1470)), (100, (1, 1, 98)), (10, (1, 1, 8)), (3, (1, 1, 1))])
def test_stages_keep_their_shares(steps, expected):
    stage, seen = -1, [0, 0, 0]
    for step in range(steps):
        stage = stage_of(step / steps, before=stage)
        seen[stage] += 1
    assert tuple(seen) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 400), st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(100, 200)))
def test_no_stage_is_skipped_or_revisited(steps, stages):
    seen = [-1]
    for step in range(steps):
        seen.append(stage_of(step / steps, stages, seen[-1]))
    assert set(np.diff(seen)) <= {0, 1} and set(seen[1:]) == {0, 1, 2}
    shares = np.bincount(seen[1:], minlength=3) / steps
    assert np.abs(shares - np.array(stages) / sum(stages)).max() <= 2 / steps + 1e-9


def test_published_steps_and_stages_of_a_run(cells):
    assert Activa(device="cpu").steps_published(61_579) == 500 * 482  # 481.1 batches of 128 are 482
    model = Activa(**TINY, stages=(1, 1, 2)).fit(cells, "cell_type")  # 5 batches of 64 hold 300 cells
    assert model.history["steps"] == model.history["steps_published"] == 20
    assert model.history["stage_steps"] == [5, 5, 10]


def test_seconds_alone_are_shared_out_by_the_clock(cells, monkeypatch):
    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls):
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(activa, "time", Clock)
    monkeypatch.setattr(base, "time", Clock)
    model = Activa(**TINY, stages=(100, 100, 800), budget_s=300.0).fit(cells, "cell_type")
    spent = np.array(model.history["stage_steps"])
    assert model.history["steps"] < model.history["steps_asked"] == 5000
    np.testing.assert_allclose(spent / spent.sum(), [0.1, 0.1, 0.8], atol=0.03)  # not 500 classifier steps before anything else


def test_steps_rule_the_stages_where_both_are_given(cells):
    model = Activa(**QUICK, budget_s=1e6).fit(cells, "cell_type")
    assert model.history["stage_steps"] == [10, 10, 20]


# ---- fitting


def test_same_seed_same_cells(cells):
    first, again, other = (Activa(**QUICK, seed=s).fit(cells, "cell_type").sample(20).X.toarray() for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_options_change_the_result(cells):
    plain = Activa(**QUICK).fit(cells, "cell_type")
    for option in ({"detach_bug": True}, {"recalibrate": False}):
        model = Activa(**QUICK, **option).fit(cells, "cell_type")
        assert not np.array_equal(model.sample(5).X.toarray(), plain.sample(5).X.toarray())
        assert model.settings().items() >= option.items()
    assert plain.settings()["margin"] == 10.0 and plain.settings()["widths"] == [32, 16]


def test_actinn_learns_planted_types_it_has_not_seen(learnt):
    assert learnt.history["actinn_accuracy"] > 0.9
    fresh = planted_cells(seed=5)
    with torch.no_grad():
        given = learnt.actinn(torch.from_numpy(library_normalize(fresh.X).toarray())).argmax(1).numpy()
    assert (np.array(learnt.labels)[given] == fresh.obs["cell_type"].to_numpy()).mean() > 0.9


def test_training_improves_the_mean_and_the_correlations(cells, learnt):
    real = library_normalize(cells.X).toarray()
    raw = Activa(**TINY, stages=(1, 1, 3), steps=3, lr=1e-9, actinn_lr=1e-9).fit(cells, "cell_type")
    pairs = np.triu_indices(real.shape[1], 1)
    found = {}
    for key, model in (("learnt", learnt), ("raw", raw)):
        fake = model.sample(500).X.toarray()
        off = np.linalg.norm(fake.mean(0) - real.mean(0)) / np.linalg.norm(real.mean(0))
        found[key] = off, np.corrcoef(np.corrcoef(fake.T)[pairs], np.corrcoef(real.T)[pairs])[0, 1]
    assert found["learnt"][0] < 0.4 < 0.5 < found["raw"][0]
    assert found["learnt"][1] > 0.5 > 0.2 > found["raw"][1]


def test_recalibrated_statistics_are_those_of_the_given_batches():
    _, decoder, _ = networks()
    batches = [rand(50, 4, seed=s) for s in range(3)]
    weights = [p.detach().clone() for p in decoder.parameters()]
    recalibrate_norms(decoder, batches)
    first = decoder.layers[2]
    with torch.no_grad():
        hidden = [torch.relu(decoder.layers[0](z)) for z in batches]
    torch.testing.assert_close(first.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert not decoder.training and all(torch.equal(p, q) for p, q in zip(decoder.parameters(), weights))


def test_fitted_statistics_are_those_of_prior_draws(learnt):
    with torch.no_grad():
        hidden = torch.relu(learnt.decoder.layers[0](rand(4000, 8, seed=9)))
    torch.testing.assert_close(learnt.decoder.layers[2].running_mean, hidden.mean(0), atol=0.1, rtol=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_mean_divergence_depends_on_cells_through_sigma_only(seed):
    encoder = networks(seed=1)[0]
    with torch.no_grad():
        for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)):
            norm.eps = 1e-12
        mu, logvar = encoder(100 * rand(64, 12, seed=seed).abs())
    alive = mu.std(0) > 0
    torch.testing.assert_close(mu.square().mean(0)[alive], torch.ones(int(alive.sum())), rtol=1e-3, atol=1e-3)
    assert logvar.mean(0).abs().max() < 1e-3


def test_loss_that_is_not_finite_ends_training(cells):
    with pytest.raises(TrainingError, match="activa: the loss '.*' is not finite at step"):
        Activa(**QUICK | {"lr": 1e30}).fit(cells, "cell_type")


def test_last_step_is_checked_too(cells, monkeypatch):
    model = Activa(**QUICK)
    real_finish = model._finish

    def spoil(reader):
        with torch.no_grad():
            next(model.decoder.parameters()).fill_(float("nan"))
        real_finish(reader)

    monkeypatch.setattr(model, "_finish", spoil)
    with pytest.raises(TrainingError, match="decoder's weights are not finite"):
        model.fit(cells, "cell_type")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (5, 5)}, "stages must be three positive numbers"),
        ({"stages": (5, 0, 5)}, r"got \(5, 0, 5\)"),
        ({"steps": 2}, "at least 3 steps, one for each stage, got 2"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(InputError, match=message):
        Activa(**options)


def test_labels_are_needed(cells):
    with pytest.raises(InputError, match="needs labels with at least 2 classes, labels_key is None; name a column"):
        Activa(**QUICK).fit(cells)
    one = cells[cells.obs["cell_type"] == "B"].copy()
    with pytest.raises(InputError, match="'cell_type' has only 'B'"):
        Activa(**QUICK).fit(one, "cell_type")


def test_a_class_of_one_cell_is_no_obstacle(cells):
    few = cells[np.r_[np.flatnonzero(cells.obs["cell_type"] == "B"), np.flatnonzero(cells.obs["cell_type"] == "T")[:1]]].copy()
    assert Activa(**QUICK).fit(few, "cell_type").sample(3).shape == (3, 60)


def test_more_genes_than_memory(cells, monkeypatch):
    monkeypatch.setattr(base, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match="activa with 60 genes needs about .* use fewer genes"):
        Activa(**QUICK).fit(cells, "cell_type")


# ---- sampling


def test_cells_sum_to_20000_and_say_so(learnt):
    fake = learnt.sample(1200)
    assert fake.shape == (1200, 60) and fake.uns["scld"]["scale"] == "counts20k"
    np.testing.assert_allclose(np.asarray(fake.X.sum(1)).ravel(), 20_000, rtol=1e-4)
    assert fake.X.min() >= 0 and fake.uns["scld"]["drawn"] == 1200 and fake.uns["scld"]["discarded"] == 0
    assert np.array_equal(learnt.sample(7).X.toarray(), fake.X[:7].toarray())
    assert not np.array_equal(learnt.sample(7, seed=3).X.toarray(), fake.X[:7].toarray())


def test_a_label_is_got_by_rejection_and_the_discarded_are_counted(learnt):
    pool = learnt.sample(1000)
    with torch.no_grad():
        given = np.array(learnt.labels)[learnt.actinn(torch.from_numpy(pool.X.toarray())).argmax(1).numpy()]
    label = "NK"
    hits = np.flatnonzero(given == label)
    assert 30 < len(hits) < 970
    fake = learnt.sample(25, label)
    assert np.array_equal(fake.X.toarray(), pool.X[hits[:25]].toarray()) and set(fake.obs["cell_type"]) == {label}
    assert fake.uns["scld"]["drawn"] == hits[24] + 1 and fake.uns["scld"]["discarded"] == hits[24] + 1 - 25
    assert learnt.history["last_sample"] == {"label": label, "drawn": hits[24] + 1, "kept": 25, "discarded": hits[24] - 24}
    many = learnt.sample(1500, label)
    assert many.n_obs == 1500 and many.uns["scld"]["drawn"] > 1500


def test_a_label_that_never_comes_is_refused(cells):
    model = Activa(**QUICK).fit(cells, "cell_type")
    with torch.no_grad():
        model.actinn.layers[-1].weight.zero_()
        model.actinn.layers[-1].bias.copy_(torch.tensor([1.0, 2.0, 0.0]))
    with pytest.raises(InputError, match=f"ACTINN gave label '{model.labels[2]}' to 0 of 10000 prior draws; cannot deliver 4") as caught:
        model.sample(4, model.labels[2])
    assert "\n" not in str(caught.value)
    assert model.sample(4, model.labels[1]).uns["scld"]["discarded"] == 0


def test_a_decoder_that_gives_nothing_is_refused(cells):
    model = Activa(**QUICK).fit(cells, "cell_type")
    with torch.no_grad():
        model.decoder.layers[-2].weight.zero_()
        model.decoder.layers[-2].bias.fill_(-1.0)
    with pytest.raises(InputError, match="the decoder gave expression to 0 of 1000. prior draws; cannot deliver 4"):
        model.sample(4)


@pytest.mark.slow
def test_better_than_random_on_held_out_real_cells():
    """A small network with a fast rate: correlations of genes and the forest's AUC, in both spaces. (In MMD Random is better.)"""
    from scld_nb.baselines.random import RandomBaseline
    from scld_nb.data import default_split, load
    from scld_nb.metrics import rf_auc

    train, test = default_split(load("pbmc68k_reduced"))
    small = {"latent": 16, "widths": (128, 64), "margin": 20.0, "lr": 2e-2, "actinn_lr": 1e-3, "device": "cpu", "progress": False}
    made = {"activa": Activa(**small, steps=2000).fit(train, "louvain"), "random": RandomBaseline().fit(train)}
    fakes = {name: model.sample(test.n_obs).X for name, model in made.items()}
    real = library_normalize(test.layers["counts"])
    auc = {name: (rf_auc(real, x, n_trees=200).auc, rf_auc(real.log1p(), x.log1p(), n_trees=200).auc) for name, x in fakes.items()}
    assert auc["activa"][0] < auc["random"][0] - 0.03 and auc["activa"][1] < auc["random"][1]
    top = np.argsort(-np.asarray(real.mean(0)).ravel())[:200]
    pairs = np.triu_indices(200, 1)
    rho = {name: np.corrcoef(x[:, top].log1p().toarray().T)[pairs] for name, x in (fakes | {"real": real}).items()}
    agree = {name: np.corrcoef(rho[name], rho["real"])[0, 1] for name in fakes}
    assert agree["activa"] > 0.4 > 0.1 > agree["random"]

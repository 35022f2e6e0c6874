"""scGAN and cscGAN against closed forms, layers by hand, and planted classes."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scld_nb.baselines import base, scgan
from scld_nb.baselines.cscgan import ClassScore, ConditionalBatchNorm, ConditionalCritic, ConditionalGenerator, CscGAN
from scld_nb.baselines.scgan import (
    Critic,
    Generator,
    LibrarySizeLayer,
    ScGAN,
    critic_loss,
    gradient_penalty,
    learning_rate,
    shuffled_batches,
    wasserstein_losses,
)
from scld_nb.data import InputError, library_normalize
from scld_nb.training import TrainingError

SMALL = {"noise": 8, "widths": (16, 32), "critic_widths": (32, 16), "batch_size": 32, "lr": 1e-3, "lr_end": 1e-4, "device": "cpu"}


def two_types(n: int = 200, share: float = 0.75, n_genes: int = 20, seed: int = 0) -> ad.AnnData:
    """Poisson cells of "many" and "few"; the first half of the genes is high in one, the second half in the other."""
    rng = np.random.default_rng(seed)
    few = np.arange(n) >= round(share * n)
    rate = np.where(few[:, None] == (np.arange(n_genes) >= n_genes // 2), 20.0, 2.0)
    obs = pd.DataFrame({"type": pd.Categorical(np.where(few, "few", "many"))}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def noise_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- gradient penalty and losses


def test_penalty_of_a_linear_critic_is_its_closed_form():
    w = noise_like(5, seed=1).requires_grad_()
    real, fake, a = noise_like(7, 5, seed=2), noise_like(7, 5, seed=3), torch.rand(7, 1, dtype=torch.float64)
    found = gradient_penalty(lambda x: x @ w, real, fake, a)
    norm = w.norm()
    assert found.item() == pytest.approx((norm.item() - 1) ** 2)
    slope, = torch.autograd.grad(found, w)
    assert torch.allclose(slope, (2 * (norm - 1) * w / norm).detach())


def test_penalty_of_a_quadratic_critic_depends_on_the_place_on_the_line():
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    real, fake, a = noise_like(9, 4, seed=2), noise_like(9, 4, seed=3), torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    found = gradient_penalty(lambda x: 0.5 * s * x.square().sum(1), real, fake, a)
    place = ((1 - a) * real + a * fake).numpy()          # a = 0 is the real cell
    length = np.sqrt((place**2).sum(1))
    assert found.item() == pytest.approx(((0.7 * length - 1) ** 2).mean())
    slope, = torch.autograd.grad(found, s)
    assert slope.item() == pytest.approx((2 * (0.7 * length - 1) * length).mean())


def test_penalty_of_a_flat_critic_is_one_and_its_gradient_finite():
    critic = Critic(6, widths=(4, 3))
    nn.init.zeros_(critic.first.weight)                  # every slope is 0, where a norm has no derivative
    real, fake, a = torch.rand(5, 6), torch.rand(5, 6), torch.rand(5, 1)
    for loss in (gradient_penalty(critic, real, fake, a), critic_loss(critic, real, fake, a, penalty=1.0)):
        assert loss.item() == pytest.approx(1.0)
        critic.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in critic.parameters() if p.grad is not None)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 10**6), st.floats(0.0, 20.0))
def test_fused_critic_loss_equals_the_definition_and_so_do_its_gradients(n, genes, seed, weight):
    torch.manual_seed(seed)
    plain, classed = Critic(genes, widths=(9, 7, 5)).double(), ConditionalCritic(genes, 3, widths=(9, 7, 5)).double()
    real, fake = noise_like(n, genes, seed=seed), noise_like(n, genes, seed=seed + 1)
    a, y, y_fake = torch.rand(n, 1, dtype=torch.float64), torch.randint(3, (n,)), torch.randint(3, (n,))
    ends = noise_like(n, genes, seed=seed + 2)
    cases = [
        (plain, {}, plain(fake).mean() - plain(real).mean() + weight * gradient_penalty(plain, real, fake, a)),
        # points between a real and a generated cell are judged as the class of the real one
        (classed, {"classes": y, "fake_classes": y_fake}, classed(fake, y_fake).mean() - classed(real, y).mean()
         + weight * gradient_penalty(lambda x: classed(x, y), real, fake, a)),
        (classed, {"classes": y, "fake_classes": y_fake, "ends": ends}, classed(fake, y_fake).mean() - classed(real, y).mean()
         + weight * gradient_penalty(lambda x: classed(x, y), real, ends, a)),
    ]
    for critic, classes, wanted in cases:
        found = critic_loss(critic, real, fake, a, penalty=weight, **classes)
        assert torch.allclose(found, wanted)
        parameters = list(critic.parameters())
        for g, w in zip(torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True),
                        torch.autograd.grad(wanted, parameters, allow_unused=True, materialize_grads=True), strict=True):
            assert torch.allclose(g, w, atol=1e-9)


def test_lines_of_the_penalty_end_in_cells_of_the_class_they_begin_in(cells, monkeypatch):
    fitted = CscGAN(steps=1, device="cpu", progress=False)
    asked, losses = [], []
    monkeypatch.setattr(scgan, "critic_loss", lambda critic, real, fake, a, **given: losses.append(given) or critic.first.weight.sum() * 0)
    networks = fitted._networks

    def watched(n_genes):
        generator, critic = networks(n_genes)
        generator.register_forward_pre_hook(lambda _, given: asked.append(given))
        return generator, critic

    monkeypatch.setattr(fitted, "_networks", watched)
    fitted.fit(cells, "cell_type")
    pairs = list(zip(asked[0:10:2], asked[1:10:2], losses[:5], strict=True))
    for (z, own), (again, classes), told in pairs:
        assert torch.equal(z, again) and torch.equal(own, told["fake_classes"]) and torch.equal(classes, told["classes"])
    assert any(not torch.equal(own, classes) for (_, own), (_, classes), _ in pairs)


def test_first_weights_of_the_critic_are_the_released_ones():
    torch.manual_seed(0)
    critic = ConditionalCritic(17789, 5)
    assert critic.first.weight.std().item() == pytest.approx((4 / (17789 + 1024)) ** 0.5, rel=0.01)
    assert critic.linears[0].weight.std().item() == pytest.approx((4 / (1024 + 512)) ** 0.5, rel=0.01)
    assert critic.out.scores.weight.abs().max().item() <= (6 / (256 + 5)) ** 0.5


def test_signs_of_the_losses():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    critic, generator = wasserstein_losses(fake, real)
    assert (critic.item(), generator.item()) == (1.5 - 4.0, -1.5)
    better_for_critic, _ = wasserstein_losses(fake - 1, real)
    _, better_for_generator = wasserstein_losses(fake + 1)
    assert better_for_critic < critic and better_for_generator < generator
    assert wasserstein_losses(fake)[0].item() == 1.5     # what is left of the critic's loss without real cells


def test_training_the_critic_alone_separates_real_from_fake():
    torch.manual_seed(0)
    critic, real, fake = Critic(4, widths=(16, 8)), torch.randn(64, 4) + 2, torch.randn(64, 4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        critic_loss(critic, real, fake, torch.rand(64, 1)).backward()
        optimizer.step()
    gap = (critic(real).mean() - critic(fake).mean()).item()
    assert 2.0 < gap < 6.0                               # a slope of one over a distance of 4 gives about 4


# --- layers


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6), st.floats(1e-2, 1e5))
def test_library_size_layer(n, genes, seed, scale):
    x = torch.from_numpy(np.random.default_rng(seed).gamma(0.5, scale, (n, genes)).astype(np.float32) + np.float32(scale))
    x[0] = 0
    out = LibrarySizeLayer()(x)
    assert (out[0] == 0).all() and torch.allclose(out[1:].sum(1), torch.full((n - 1,), 20_000.0), rtol=1e-3)
    assert torch.allclose(out[1:] / 20_000, x[1:] / x[1:].sum(1, keepdim=True), rtol=1e-3)   # proportions stay


def test_library_size_layer_passes_finite_gradients_through_empty_cells():
    x = torch.zeros(2, 3)
    x[1] = 1
    x.requires_grad_()
    (LibrarySizeLayer()(torch.relu(x)) * torch.arange(3.0)).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[0] == 0).all()


def test_networks_have_the_published_shape():
    generator, critic = Generator(7), Critic(7)
    assert [(m.in_features, m.out_features, m.bias is None) for m in generator.modules() if isinstance(m, nn.Linear)] == [
        (128, 256, True), (256, 512, True), (512, 1024, True), (1024, 7, False)]
    assert [(m.eps, m.momentum, m.num_features) for m in generator.norms] == [(1e-5, 1e-3, w) for w in (256, 512, 1024)]
    assert [(m.in_features, m.out_features) for m in critic.modules() if isinstance(m, nn.Linear)] == [
        (7, 1024), (1024, 512), (512, 256), (256, 1)]
    hidden, last, judge = (m.weight.detach().numpy() for m in (generator.linears[0], generator.out, critic.linears[0]))
    bound = (6 / (128 + 256)) ** 0.5                     # Xavier, uniform; the others He, normal
    assert np.abs(hidden).max() <= bound and hidden.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert last.std() == pytest.approx((4 / (1024 + 7)) ** 0.5, rel=0.05)
    assert judge.std() == pytest.approx((4 / (1024 + 512)) ** 0.5, rel=0.05)


def test_generator_by_hand():
    torch.manual_seed(0)
    generator = Generator(5, noise=3, widths=(4,))
    generator.norms[0].weight.data, generator.norms[0].bias.data = torch.rand(4), torch.rand(4)
    z = torch.randn(6, 3)
    h = z.numpy() @ generator.linears[0].weight.detach().numpy().T
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * generator.norms[0].weight.detach().numpy() + generator.norms[0].bias.detach().numpy()
    x = np.maximum(np.maximum(h, 0) @ generator.out.weight.detach().numpy().T + generator.out.bias.detach().numpy(), 0)
    assert np.allclose(generator(z).detach().numpy(), 20_000 * x / (x.sum(1, keepdims=True) + 1e-6), rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_conditional_batch_norm_is_a_batch_norm_with_the_affine_part_of_the_class(training):
    torch.manual_seed(0)
    layer, classes = ConditionalBatchNorm(4, 3).train(training), torch.tensor([0, 2, 1, 2, 0, 1, 1])
    assert (layer.gain.weight == 1).all() and (layer.bias.weight == 0).all()     # starts as a plain batch norm
    layer.gain.weight.data, layer.bias.weight.data = torch.randn(3, 4), torch.randn(3, 4)
    layer.norm.running_mean, layer.norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    h, found = torch.randn(7, 4), torch.zeros(7, 4)
    for k in range(3):                                   # statistics over all cells, gain and bias of one class
        plain = nn.BatchNorm1d(4, eps=1e-5).train(training)
        plain.running_mean, plain.running_var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
        plain.weight.data, plain.bias.data = layer.gain.weight.data[k], layer.bias.weight.data[k]
        found[classes == k] = plain(h)[classes == k]
    assert torch.allclose(layer(h, classes), found, atol=1e-6)


def test_class_score_by_hand():
    torch.manual_seed(0)
    layer, h, classes = ClassScore(4, 3), torch.randn(5, 4), torch.tensor([2, 0, 1, 1, 0])
    layer.scores.bias.data = torch.tensor([1.0, 2.0, 3.0])
    w, b = layer.scores.weight.detach().numpy(), layer.scores.bias.detach().numpy()
    wanted = [w[k] @ row + b[k] for k, row in zip(classes.tolist(), h.numpy(), strict=True)]
    assert np.allclose(layer(h, classes).detach().numpy().ravel(), wanted, atol=1e-6)
    critic = ConditionalCritic(6, 3, widths=(4, 4))
    x = torch.randn(5, 6)
    scores = torch.stack([critic(x, torch.full((5,), k)) for k in range(3)], 1)
    assert torch.allclose(critic(x, classes), scores.gather(1, classes[:, None])[:, 0], atol=1e-6)


# --- schedule and batches


def test_learning_rate_decays_exponentially():
    assert learning_rate(0.0) == pytest.approx(1e-4) and learning_rate(1.0) == pytest.approx(1e-5) == learning_rate(7.0)
    assert learning_rate(0.5) == pytest.approx((1e-4 * 1e-5) ** 0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 10**6))
def test_a_pass_takes_no_cell_twice(n, size, seed):
    batches = shuffled_batches(n, size, np.random.default_rng(seed))
    for _ in range(2):
        rows = np.concatenate([next(batches) for _ in range(n // min(n, size))])
        assert len(set(rows)) == len(rows) > n - min(n, size) and set(rows) <= set(range(n))


@pytest.mark.parametrize(("budget", "steps"), [(None, 8), (0.4, 10**9)])
def test_learning_rate_follows_steps_or_clock(monkeypatch, budget, steps):
    shares = []
    monkeypatch.setattr(scgan, "learning_rate", lambda share, *_: shares.append(share) or 1e-4)
    model = ScGAN(steps=steps, budget_s=budget, **SMALL).fit(two_types(64))
    assert shares[::2] == shares[1::2] == sorted(shares[::2]) and len(shares) == 2 * model.history["steps"]   # one per network
    if budget is None:
        assert shares[::2] == [k / 8 for k in range(8)]
    else:
        assert 0.5 < shares[-1] <= 1.0 and 0 < model.history["steps"] < steps
        assert model.history["train_seconds"] >= budget


def test_one_step_is_five_critic_updates_then_one_of_the_generator(monkeypatch):
    turns = []
    for name, mark in (("_critic_update", "c"), ("_generator_update", "g")):
        real = getattr(ScGAN, name)
        monkeypatch.setattr(ScGAN, name, lambda self, *a, real=real, mark=mark: turns.append(mark) or real(self, *a))
    model = ScGAN(steps=2, **SMALL).fit(two_types(64))
    assert "".join(turns) == "cccccg" * 2 and model.steps_published(64) == model.history["steps_published"] == 1_000_000


def test_optimisers_and_penalty_are_the_published_ones(monkeypatch):
    made, weights, adam, loss = [], [], torch.optim.Adam, scgan.critic_loss
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **options: made.append(options) or adam(parameters, **options))
    monkeypatch.setattr(scgan, "critic_loss", lambda *a, penalty, **k: weights.append(penalty) or loss(*a, penalty=penalty, **k))
    sizes = {key: SMALL[key] for key in ("noise", "widths", "critic_widths", "device")}
    ScGAN(steps=1, **sizes).fit(two_types(40))
    assert [(o["lr"], o["betas"], o["amsgrad"]) for o in made] == [(1e-4, (0.5, 0.9), True)] * 2 and weights == [10.0] * 5
    ScGAN(steps=1, penalty=3.0, critic_steps=2, **sizes).fit(two_types(40))
    assert weights[5:] == [3.0] * 2


def test_each_turn_moves_only_its_own_network():
    model, cells = ScGAN(steps=1, **SMALL), two_types(64)
    model.codes = np.zeros(64, dtype=int)
    with model._seeded("init"):
        model.generator, model.critic = model._networks(20)
    reader = scgan.CellReader(cells.X, transform="none")
    assert np.allclose(reader.read([0, 1]).sum(1), 20_000)                  # the input is not logged
    before = [[p.clone() for p in net.parameters()] for net in (model.generator, model.critic)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (model.generator, model.critic)]
    model._critic_update(optimizers[1], reader, np.arange(32), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.generator.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1][::2], list(model.critic.parameters())[::2], strict=True))
    before[1] = [p.clone() for p in model.critic.parameters()]
    model._generator_update(optimizers[0], 32, torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.critic.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[0], model.generator.parameters(), strict=True))
    assert all(p.requires_grad for p in model.critic.parameters())


# --- fit and sample


@pytest.fixture(scope="module")
def fitted():
    """Both models trained for a few seconds on planted cells; treat as read-only."""
    cells = two_types()
    faster = SMALL | {"lr": 1e-2, "lr_end": 1e-3}
    return {cls.name: cls(steps=steps, **faster).fit(cells, "type") for cls, steps in ((ScGAN, 100), (CscGAN, 200))}


def test_classes_follow_their_planted_means(fitted):
    cells, model = two_types(), fitted["cscgan"]
    x = library_normalize(cells.X).toarray()
    means = {k: x[(cells.obs["type"] == k).to_numpy()].mean(0) for k in ("many", "few")}
    drawn = {k: model.sample(300, label=k) for k in means}
    for k, other in (("many", "few"), ("few", "many")):
        mean = np.asarray(drawn[k].X.mean(0)).ravel()
        assert np.corrcoef(mean, means[k])[0, 1] > 0.9 > 0 > np.corrcoef(mean, means[other])[0, 1]
        assert set(drawn[k].obs["type"]) == {k}
    high = np.asarray(drawn["many"].X[:, :10].sum(1)).ravel() > 10_000
    assert high.mean() > 0.95                            # cell by cell, not only on average


def test_unlabelled_draws_have_the_shares_of_the_training_cells(fitted):
    for model, tolerance in ((fitted["cscgan"], 0.07), (fitted["scgan"], 0.2)):
        x = model.sample(1203).X
        assert abs((np.asarray(x[:, :10].sum(1)).ravel() > 10_000).mean() - 0.75) < tolerance
    classes = fitted["cscgan"]._draw_classes(20_000, torch.Generator().manual_seed(0))
    assert np.allclose(np.bincount(classes.numpy()) / 20_000, [0.75, 0.25], atol=0.015)


def test_cells_sum_to_20000_and_depend_on_the_seed_of_the_draw(fitted):
    for model in fitted.values():
        cells, other = model.sample(1003), model.sample(1003, seed=5)      # two blocks
        assert cells.shape == (1003, 20) and np.allclose(np.asarray(cells.X.sum(1)).ravel(), 20_000, rtol=1e-4)
        assert np.array_equal(cells.X.toarray(), model.sample(1003).X.toarray())
        assert not np.array_equal(cells.X.toarray(), other.X.toarray())
        assert len(np.unique(cells.X.toarray()[:, 0])) > 500 and cells.uns["scld"]["scale"] == "counts20k"


def test_batch_norm_statistics_are_those_of_the_finished_weights(fitted):
    for model in (fitted["scgan"], ScGAN(steps=1, **SMALL).fit(two_types())):
        h = model.generator.linears[0](torch.randn(20_000, 8)).detach()
        norm = model.generator.norms[0]
        assert torch.allclose(norm.running_var, h.var(0), rtol=0.1) and torch.allclose(norm.running_mean, h.mean(0), atol=0.1)
        with torch.no_grad():
            kept = model.generator(torch.zeros(1, 8)), model.generator(torch.cat([torch.zeros(1, 8), torch.randn(30, 8)]))
        assert torch.allclose(kept[0][0], kept[1][0], rtol=1e-4) and norm.momentum == 1e-3   # a cell does not depend on its block


@pytest.mark.parametrize("cls", [ScGAN, CscGAN])
def test_same_seed_same_model(cls):
    cells = two_types(60)
    torch.manual_seed(1)
    first = cls(steps=4, seed=3, **SMALL).fit(cells, "type")
    state = torch.random.get_rng_state()
    again, other = (cls(steps=4, seed=s, **SMALL).fit(cells, "type") for s in (3, 4))
    assert torch.equal(state, torch.random.get_rng_state())                 # the global generator is left alone
    assert np.array_equal(first.sample(9).X.toarray(), again.sample(9).X.toarray())
    assert not np.array_equal(first.sample(9).X.toarray(), other.sample(9, seed=3).X.toarray())
    assert first.history["losses"] == again.history["losses"] and [r["step"] for r in first.history["losses"]] == [0, 3]
    assert first.settings()["widths"] == (16, 32) and first.settings()["method"] == cls.name


@pytest.mark.parametrize("n", [2, 5])
def test_a_handful_of_cells_is_one_batch(n):
    assert ScGAN(steps=2, **SMALL).fit(two_types(n)).sample(3).shape == (3, 20)


def test_one_class_is_enough():
    cells = two_types(40, share=1.0)
    model = CscGAN(steps=2, **SMALL).fit(cells, "type")
    assert model.labels == ["many"] and model.sample(2, label="many").n_obs == 2


def test_a_loss_that_is_not_finite_ends_training():
    with pytest.raises(TrainingError, match=r"scgan: the loss '\w+' is not finite at step \d+"):
        ScGAN(steps=60, **SMALL | {"lr": 1e12, "lr_end": 1e12}).fit(two_types(64))


# --- refusals


def test_scgan_points_to_cscgan_for_labels(fitted):
    with pytest.raises(InputError, match="'few'.*use cscgan"):
        fitted["scgan"].sample(3, label="few")
    with pytest.raises(InputError, match="unknown label 'B cell'; known: many, few"):
        fitted["cscgan"].sample(3, label="B cell")


def test_cscgan_needs_labels_and_two_cells_of_each():
    cells = two_types(40)
    with pytest.raises(InputError, match="labels_key, or use scgan"):
        CscGAN(steps=1, **SMALL).fit(cells)
    cells.obs["type"] = pd.Categorical(["rare"] + ["usual"] * 39)
    with pytest.raises(InputError, match="at least 2 cells of every class, 'rare' in 'type' has 1; leave that class out"):
        CscGAN(steps=1, **SMALL).fit(cells, "type")
    with pytest.raises(InputError, match="at least 2 training cells, got 1"):
        ScGAN(steps=1, **SMALL).fit(cells[:1].copy())


def test_memory_is_asked_for_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(base, "free_memory", lambda: 2**20)
    with pytest.raises(InputError, match="scgan on 20 genes needs about .* GiB of memory.*use fewer genes"):
        ScGAN(steps=1, device="cpu").fit(two_types(40))


@pytest.mark.parametrize("bad", [{"noise": 0}, {"batch_size": 1}, {"critic_steps": 0}, {"widths": (8, 0)}, {"critic_widths": ()},
                                 {"lr": 1e-5, "lr_end": 1e-4}, {"lr_end": 0.0}, {"steps": 0}, {"budget_s": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(InputError, match="lr" if "lr_end" in bad else next(iter(bad))) as caught:
        CscGAN(**bad)
    assert "\n" not in str(caught.value)


def test_generator_with_classes_starts_the_same_for_every_class():
    torch.manual_seed(0)
    generator, z = ConditionalGenerator(5, 3, noise=4, widths=(6, 6)), torch.randn(8, 4)
    first, second = (generator(z, torch.full((8,), k)) for k in (0, 2))
    assert torch.equal(first, second)


# --- real cells


@pytest.mark.slow
@pytest.mark.parametrize("cls", [ScGAN, CscGAN])
def test_better_than_random_on_held_out_cells(cls):
    from scld_nb.baselines.random import RandomBaseline
    from scld_nb.data import default_split, load
    from scld_nb.metrics import mmd, mmd_bandwidth, rf_auc

    train, test = default_split(load("pbmc68k_reduced"))
    model = cls(steps=300, widths=(64, 128), critic_widths=(128, 64), lr=1e-2, lr_end=1e-3, device="cpu").fit(train, "louvain")
    fake, random = model.sample(test.n_obs).X, RandomBaseline().fit(train).sample(test.n_obs).X
    m = mmd_bandwidth(test.X)                            # at 20,000 per cell, not logged, as the paper's tables
    assert rf_auc(test.X, fake, n_trees=100).auc < rf_auc(test.X, random, n_trees=100).auc - 0.04
    assert mmd(test.X, fake, bandwidth=m).biased < mmd(test.X, random, bandwidth=m).biased - 0.03

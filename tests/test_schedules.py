"""Noise schedules against diffusers' DDPMScheduler, against Bayes' rule, and against their own step-by-step definition."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.data import InputError
from scld_nb.schedules import Schedule, linear_schedule

F64 = torch.float64


def make(betas):
    """A schedule from the inner betas."""
    betas = torch.tensor([0.0, *betas], dtype=F64)
    return Schedule(betas=betas, timesteps=torch.arange(len(betas)))


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(variance_type="fixed_small", **options):
    """diffusers' scheduler with the paper's settings; ours counts from 1, theirs from 0."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                         variance_type=variance_type, clip_sample=False, **options)


def in_float64(scheduler):
    """The same scheduler with its tables in double precision, so that formulas are compared and not rounding."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = torch.ones((), dtype=F64)
    return scheduler


def diffusers_mean(scheduler, eps, t, z_t):
    """The mean of diffusers' reverse step from our step ``t``: its sample less the noise it added."""
    sample = scheduler.step(eps, t - 1, z_t, generator=torch.Generator().manual_seed(7)).prev_sample
    if t == 1:
        return sample
    noise = torch.randn(eps.shape, generator=torch.Generator().manual_seed(7), dtype=eps.dtype)
    return sample - scheduler._get_variance(t - 1) ** 0.5 * noise


betas_lists = st.lists(st.floats(1e-5, 0.05), min_size=1, max_size=120)


# --- the paper's schedule -------------------------------------------------------------------------------------------------


def test_constants_of_the_paper():
    s = linear_schedule()
    assert s.T == 1000 and len(s.betas) == len(s.alpha_bar) == len(s.timesteps) == 1001
    assert float(s.betas[1]) == 1e-4 and float(s.betas[-1]) == 0.02
    assert float(s.alpha_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    assert float(s.alpha_bar[-1]) ** 0.5 == pytest.approx(6.353e-3, rel=1e-4)
    assert s.betas.dtype == F64


def test_linear_schedule_is_linear():
    s = linear_schedule(7, beta_1=0.1, beta_T=0.4)
    np.testing.assert_allclose(s.betas.numpy(), [0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    assert s.timesteps.tolist() == list(range(8))
    assert linear_schedule(1).betas.tolist() == [0.0, 1e-4]


def test_tables_equal_diffusers():
    s, d = linear_schedule(), reference()
    assert torch.allclose(s.betas[1:], d.betas.double(), atol=1e-6, rtol=0)
    assert torch.allclose(s.alphas[1:], d.alphas.double(), atol=1e-6, rtol=0)
    assert torch.allclose(s.alpha_bar[1:], d.alphas_cumprod.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(F64, 1e-12), (torch.float32, 1e-6)])
def test_q_sample_equals_diffusers_add_noise(dtype, atol):
    s, d = linear_schedule(), in_float64(reference())
    t = torch.tensor([1, 2, 10, 259, 500, 999, 1000])
    z0, eps = randn(7, 5, dtype=dtype), randn(7, 5, seed=1, dtype=dtype)
    z_t = s.q_sample(z0, t, eps)
    assert z_t.dtype == dtype
    assert torch.allclose(z_t.double(), d.add_noise(z0.double(), eps.double(), t - 1), atol=atol, rtol=0)


def test_posterior_variance_equals_diffusers():
    s, d = linear_schedule(), in_float64(reference())
    theirs = torch.stack([d._get_variance(t - 1) for t in range(1, 1001)])
    assert torch.allclose(s.posterior_variance[1:], theirs, atol=1e-12, rtol=1e-9)
    shipped = torch.stack([reference()._get_variance(t - 1) for t in (2, 500, 1000)]).double()
    assert torch.allclose(s.posterior_variance[[2, 500, 1000]], shipped, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", [1, 2, 17, 500, 1000])
def test_reverse_step_equals_diffusers(t):
    s, d = linear_schedule(), in_float64(reference())
    z_t, eps = randn(4, 6), randn(4, 6, seed=1)
    z0 = s.predict_z0(z_t, t, eps)
    assert torch.allclose(z0, d.step(eps, t - 1, z_t, generator=torch.Generator()).pred_original_sample, rtol=1e-9, atol=1e-9)
    assert torch.allclose(s.posterior_mean(z0, z_t, t), diffusers_mean(d, eps, t, z_t), rtol=1e-8, atol=1e-8)


def test_respaced_reverse_step_equals_diffusers_on_the_same_levels():
    s = linear_schedule().respace(40)
    d = in_float64(reference())
    d.set_timesteps(timesteps=(s.timesteps[1:] - 1).flip(0).tolist())
    z_t, eps = randn(3, 4), randn(3, 4, seed=1)
    for i in (2, 20, 40):
        t = int(s.timesteps[i])
        mean = s.posterior_mean(s.predict_z0(z_t, i, eps), z_t, i)
        assert torch.allclose(mean, diffusers_mean(d, eps, t, z_t), rtol=1e-8, atol=1e-8)
        assert torch.isclose(s.posterior_variance[i], d._get_variance(t - 1), rtol=1e-9)


# --- closed forms against definitions -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(betas_lists)
def test_iterated_steps_equal_the_closed_form(betas):
    s, mean, var = make(betas), 1.0, 0.0
    for t, beta in enumerate(betas, start=1):
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta
        assert mean == pytest.approx(math.sqrt(float(s.alpha_bar[t])), rel=1e-12)
        assert var == pytest.approx(1 - float(s.alpha_bar[t]), rel=1e-9)
    assert (s.alpha_bar.diff() < 0).all() and (s.snr.diff() < 0).all() and len(s.snr) == s.T
    assert torch.allclose(s.snr * (1 - s.alpha_bar[1:]), s.alpha_bar[1:])


@settings(max_examples=40, deadline=None)
@given(betas_lists.filter(lambda b: len(b) > 1), st.data())
def test_posterior_equals_conditioning_the_joint_gaussian(betas, data):
    """z_{t-1} and z_t given z_0 are jointly Gaussian; condition the first on the second."""
    s = make(betas)
    t = data.draw(st.integers(2, s.T))
    a, before, alpha = (float(x) for x in (s.alpha_bar[t], s.alpha_bar[t - 1], s.alphas[t]))
    var_before, var_now, covariance = 1 - before, 1 - a, math.sqrt(alpha) * (1 - before)
    gain = covariance / var_now
    z0, z_t = randn(5, 2), randn(5, 2, seed=1)
    mean = math.sqrt(before) * z0 + gain * (z_t - math.sqrt(a) * z0)
    assert torch.allclose(s.posterior_mean(z0, z_t, t), mean, atol=1e-7)
    assert float(s.posterior_variance[t]) == pytest.approx(var_before - gain * covariance, rel=1e-6, abs=1e-12)
    assert float(s.posterior_variance[t]) < float(s.betas[t])


def test_posterior_at_the_first_step_is_the_clean_latent():
    s, z0 = linear_schedule(), randn(3, 4)
    assert s.posterior_variance[0] == s.posterior_variance[1] == 0
    assert torch.allclose(s.posterior_mean(z0, randn(3, 4, seed=1), 1), z0)


def test_mean_loss_is_the_weighted_noise_loss():
    s, z0, eps, guess = linear_schedule(), randn(6, 8), randn(6, 8, seed=1), randn(6, 8, seed=2)
    for t in (1, 2, 100, 1000):
        z_t = s.q_sample(z0, torch.full((6,), t), eps)
        gap = s.posterior_mean(z0, z_t, t) - s.posterior_mean(s.predict_z0(z_t, t, guess), z_t, t)
        beta, alpha, a = s.betas[t], s.alphas[t], s.alpha_bar[t]
        weight = beta**2 / (alpha * (1 - a))
        assert torch.allclose(gap.square().sum(1), weight * (eps - guess).square().sum(1), rtol=1e-8)


def test_bound_is_tight_for_unit_gaussian_latents_with_the_large_variance():
    """Eq. 10 added up in closed form for z_0 ~ N(0, 1) and the exact denoiser equals the entropy."""
    s = linear_schedule()
    a, beta, small = s.alpha_bar[1:], s.betas[1:], s.posterior_variance[1:]
    gap = beta**2 / (s.alphas[1:] * (1 - a)) * a                      # weight times the error a of the best noise guess
    terms = 0.5 * (small / beta - 1 - torch.log(small / beta) + gap / beta)
    total = -0.5 * torch.log(1 - a[-1]) + terms[1:].sum() + 0.5 * (torch.log(2 * torch.pi * beta[0]) + gap[0] / beta[0])
    assert float(total) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-9)


# --- q_sample -------------------------------------------------------------------------------------------------------------


def test_q_sample_gives_every_row_its_own_step():
    s, z0, eps = linear_schedule(10), randn(11, 3), randn(11, 3, seed=1)
    together = s.q_sample(z0, torch.arange(11), eps)
    assert torch.equal(together[0], z0[0])
    for t in range(11):
        assert torch.equal(together[t:t + 1], s.q_sample(z0[t:t + 1], torch.tensor([t]), eps[t:t + 1]))


@pytest.mark.parametrize("t", [1, 259, 1000])
def test_q_sample_statistics(t):
    s, n = linear_schedule(), 40_000
    z = s.q_sample(torch.full((n, 1), 3.0), torch.full((n,), t), randn(n, 1, dtype=torch.float32))
    a = float(s.alpha_bar[t])
    assert float(z.mean()) == pytest.approx(3 * math.sqrt(a), abs=5 * math.sqrt((1 - a) / n) + 1e-5)
    assert float(z.var()) == pytest.approx(1 - a, rel=5 * math.sqrt(2 / n))


def test_q_sample_keeps_unit_variance_and_ends_at_the_prior():
    s, z0 = linear_schedule(), randn(20_000, 2)
    for t in (1, 300, 1000):
        z = s.q_sample(z0, torch.full((20_000,), t), randn(20_000, 2, seed=1))
        assert float(z.var()) == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(z[:, 0], z0[:, 0])[0, 1]) < 0.03


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2**31))
def test_predict_z0_undoes_q_sample(t, seed):
    s, z0, eps = linear_schedule(), randn(4, 3, seed=seed), randn(4, 3, seed=seed + 1)
    assert torch.allclose(s.predict_z0(s.q_sample(z0, torch.full((4,), t), eps), t, eps), z0, atol=1e-9)


# --- re-spacing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(betas_lists, st.data())
def test_respace_keeps_noise_levels(betas, data):
    s = make(betas)
    steps = data.draw(st.integers(1, s.T))
    short = s.respace(steps)
    assert short.T == steps and len(short.timesteps) == steps + 1
    assert short.timesteps[0] == 0 and short.timesteps[-1] == s.T and (short.timesteps.diff() >= 1).all()
    assert torch.allclose(short.alpha_bar, s.alpha_bar[short.timesteps], rtol=1e-9)
    assert short.timesteps.diff().max() - short.timesteps.diff().min() <= 1
    again = short.respace(data.draw(st.integers(1, steps)))
    assert torch.allclose(again.alpha_bar, s.alpha_bar[again.timesteps], rtol=1e-9)


@pytest.mark.parametrize("T", [2, 3, 10, 1000])
def test_every_number_of_steps_can_be_had(T):
    s = linear_schedule(T)
    for steps in range(1, T + 1):
        keep = s.respace(steps).timesteps
        assert len(keep) == steps + 1 and (keep.diff() >= 1).all()


@settings(max_examples=60, deadline=None)
@given(betas_lists, st.data())
def test_respace_by_ratio_keeps_different_levels_and_the_last_one(betas, data):
    s = make(betas)
    steps = data.draw(st.integers(1, s.T))
    keep = s.respace(steps, spacing="logsnr", smallest=data.draw(st.floats(0.0, 2.0))).timesteps
    assert len(keep) == steps + 1 and keep[0] == 0 and keep[-1] == s.T and (keep.diff() >= 1).all()


def test_respace_by_ratio_is_even_in_log_snr_and_starts_at_the_smallest_noise():
    s = linear_schedule()
    for steps, smallest in ((10, 0.1), (20, 0.1), (25, 0.05)):
        short = s.respace(steps, spacing="logsnr", smallest=smallest)
        jumps = short.snr.log().diff()
        assert float((jumps / jumps.mean() - 1).abs().max()) < 0.1
        noise = (1 - s.alpha_bar).sqrt()
        assert noise[short.timesteps[1]] >= smallest > noise[short.timesteps[1] - 1]


def test_respace_rounds_to_the_nearest_step():
    assert linear_schedule(10).respace(3).timesteps.tolist() == [0, 3, 7, 10]
    assert linear_schedule(1000).respace(4).timesteps.tolist() == [0, 250, 500, 750, 1000]


def test_respace_to_all_steps_is_the_schedule_itself():
    s = linear_schedule(50)
    assert s.respace(None) is s and s.respace(50) is s


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: make([]), "must be one row"),
    (lambda: Schedule(betas=torch.zeros(0), timesteps=torch.zeros(0)), "must be one row"),
    (lambda: Schedule(betas=torch.tensor([0.1, 0.2]), timesteps=torch.arange(2)), "must be one row"),
    (lambda: Schedule(betas=torch.tensor([[0.0, 0.2]]), timesteps=torch.arange(2)), r"\(1, 2\)"),
    (lambda: make([0.1, 0.0]), "from 0 to 0.1"),
    (lambda: make([0.1, 1.0]), "from 0.1 to 1"),
    (lambda: make([-0.1]), "from -0.1"),
    (lambda: make([float("nan")]), "between 0 and 1"),
    (lambda: Schedule(betas=torch.tensor([0.0, 0.1]), timesteps=torch.arange(3)), "3 timesteps for 2 betas"),
    (lambda: linear_schedule(0), "got 0"),
    (lambda: linear_schedule(-3), "got -3"),
    (lambda: linear_schedule(10, beta_T=2.0), "to 2"),
    (lambda: linear_schedule(10).respace(0), r"1\.\.10, got 0"),
    (lambda: linear_schedule(10).respace(11), r"1\.\.10, got 11"),
    (lambda: linear_schedule(10).respace(5, spacing="log"), "unknown spacing 'log'; known: time, logsnr"),
    (lambda: linear_schedule(10).posterior_mean(torch.zeros(1, 2), torch.zeros(1, 2), 0), r"1\.\.10, got 0"),
    (lambda: linear_schedule(10).posterior_mean(torch.zeros(1, 2), torch.zeros(1, 2), 11), r"1\.\.10, got 11"),
])
def test_errors_are_one_line_and_name_the_value(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_schedule_does_not_change():
    s = linear_schedule(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.betas = torch.zeros(3)
    assert s == s and s != linear_schedule(5) and len({s, s}) == 1

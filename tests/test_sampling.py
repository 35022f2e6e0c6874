"""The samplers against diffusers, closed forms and each other."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb import sampling
from scld_nb.data import InputError
from scld_nb.guidance import Denoiser, guided_eps
from scld_nb.sampling import SAMPLERS, VARIANCES, ddim_step, ddpm_step, default_steps, dpmpp_step, guided_sampler, sample_latents
from scld_nb.schedules import linear_schedule
from scld_nb.training import counter_seed

SCHEDULE = linear_schedule(1000)
M, S = 1.5, 0.4
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def oracle(z, t):
    """Exact noise predictor of N(M, S^2) in every coordinate."""
    a = SCHEDULE.alpha_bar[t][:, None]
    return ((1 - a).sqrt() / (a * S**2 + 1 - a) * (z - a.sqrt() * M)).to(z.dtype)


def in_double(scheduler):
    """diffusers keeps its tables in fp32; the comparison is of formulas, so they are made again in fp64."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.one
    return scheduler


def latents(n=6, d=4, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# one step against diffusers, whose index t - 1 is our t

@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [1, 2, 3, 10, 250, 999, 1000])
def test_ddpm_step_equals_diffusers(t, variance):
    z, eps = latents(seed=1), latents(seed=2)
    noise = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ours = ddpm_step(SCHEDULE, z, t, eps, noise, variance=variance)
    double = in_double(DDPMScheduler(**LINEAR, variance_type=variance))
    theirs = double.step(eps, t - 1, z, generator=torch.Generator().manual_seed(7)).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    plain = DDPMScheduler(**LINEAR, variance_type=variance)       # as it comes: 1 - alpha_bar in fp32 loses digits at small t
    theirs = plain.step(eps, t - 1, z, generator=torch.Generator().manual_seed(7)).prev_sample
    torch.testing.assert_close(ours, theirs.double(), atol=5e-4 if t <= 10 else 1e-6, rtol=0)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [20, 1000])
def test_whole_ancestral_walk_equals_diffusers(steps, variance):
    """Without noise in the last step, as in Algorithm 2; diffusers' "fixed large" adds some there on a respaced walk."""
    scheduler, quiet = (in_double(DDPMScheduler(**LINEAR, variance_type=v, timestep_spacing="trailing"))
                        for v in (variance, "fixed_small"))
    scheduler.set_timesteps(steps)
    quiet.set_timesteps(steps)
    plan, g = SCHEDULE.respace(steps), torch.Generator().manual_seed(3)
    assert (scheduler.timesteps + 1).tolist() == plan.timesteps[1:].flip(0).tolist()
    ours = theirs = latents()
    for t, their_t in zip(range(plan.T, 0, -1), scheduler.timesteps):
        state = g.get_state()
        eps = oracle(theirs, torch.full((6,), int(their_t) + 1))
        theirs = (scheduler if t > 1 else quiet).step(eps, their_t, theirs, generator=g).prev_sample
        g.set_state(state)
        noise = torch.randn(ours.shape, dtype=torch.float64, generator=g) if t > 1 else None
        ours = ddpm_step(plan, ours, t, oracle(ours, plan.timesteps[torch.full((6,), t)]), noise, variance=variance)
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)


@pytest.mark.parametrize("steps", [5, 20, 100, 1000])
def test_ddim_walk_equals_diffusers(steps):
    scheduler = in_double(DDIMScheduler(**LINEAR, timestep_spacing="trailing", set_alpha_to_one=True))
    scheduler.set_timesteps(steps)
    z = latents()
    ours = sample_latents(oracle, SCHEDULE, z.shape, sampler="ddim", steps=steps, start=z.float())
    theirs = z.float().double()
    for t in scheduler.timesteps:
        theirs = scheduler.step(oracle(theirs, torch.full((6,), int(t) + 1)), int(t), theirs, eta=0.0).prev_sample
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


def test_ddim_step_equals_diffusers_step_by_step():
    scheduler = in_double(DDIMScheduler(**LINEAR, timestep_spacing="trailing"))
    scheduler.set_timesteps(20)
    plan, z, eps = SCHEDULE.respace(20), latents(), latents(seed=4)
    for t in range(1, 21):
        theirs = scheduler.step(eps, int(plan.timesteps[t]) - 1, z, eta=0.0).prev_sample
        torch.testing.assert_close(ddim_step(plan, z, t, eps), theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dpmpp_walk_equals_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    plan, z = SCHEDULE.respace(steps), latents().float()
    assert (scheduler.timesteps + 1).tolist() == plan.timesteps[1:].flip(0).tolist()
    ours = sample_latents(oracle, SCHEDULE, z.shape, sampler="dpm++", steps=steps, start=z, spacing="time")
    theirs = z
    for t in scheduler.timesteps:
        theirs = scheduler.step(oracle(theirs, torch.full((6,), int(t) + 1)), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_stochastic_walk_equals_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="sde-dpmsolver++",
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(counter_seed(9, "sampling"))
    theirs = torch.randn(6, 4, generator=g)
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(6, 4, generator=g) if i < steps - 1 else torch.zeros(6, 4)
        theirs = scheduler.step(oracle(theirs, torch.full((6,), int(t) + 1)), t, theirs, variance_noise=noise).prev_sample
    ours = sample_latents(oracle, SCHEDULE, (6, 4), seed=9, sampler="sde-dpm++", steps=steps, spacing="time")
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(2, 40), steps=st.sampled_from([40, 100, 1000]))
def test_a_stochastic_step_without_memory_is_the_posterior(t, steps):
    """With one prediction of z0, the first-order stochastic step draws from q(z_{t-1} | z_t, z0), as DDPM with its small variance."""
    plan, z, eps, noise = SCHEDULE.respace(steps), latents(), latents(seed=5), latents(seed=8)
    z0 = plan.predict_z0(z, t, eps)
    expected = plan.posterior_mean(z0, z, t) + float(plan.posterior_variance[t]) ** 0.5 * noise
    torch.testing.assert_close(dpmpp_step(plan, z, t, z0, None, noise), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [10, 20])
def test_solvers_on_even_log_snr_hit_the_law(steps):
    n = 40_000
    for sampler in ("dpm++", "sde-dpm++"):
        z = sample_latents(oracle, SCHEDULE, (n, 1), sampler=sampler, steps=steps)
        assert abs(float(z.mean()) - M) < 4 * S / n**0.5 + 0.005
        assert abs(float(z.std()) - S) < (0.045 if steps == 10 else 0.02)
        coarse = sample_latents(oracle, SCHEDULE, (n, 1), sampler=sampler, steps=steps, spacing="time")
        assert abs(float(z.std()) - S) < abs(float(coarse.std()) - S)


def test_dpmpp_step_is_the_papers_formula():
    """Algorithm 2 of Lu et al. in float64 numpy, with alpha, sigma and lambda written out."""
    plan = SCHEDULE.respace(12)
    a = plan.alpha_bar.numpy()
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    z, z0, before = (latents(seed=s) for s in (1, 2, 3))
    for t in range(2, 12):
        h, h_before = lam[t - 1] - lam[t], lam[t] - lam[t + 1]
        r = h_before / h
        d = (1 + 1 / (2 * r)) * z0.numpy() - 1 / (2 * r) * before.numpy()
        expected = sigma[t - 1] / sigma[t] * z.numpy() - alpha[t - 1] * (np.exp(-h) - 1) * d
        np.testing.assert_allclose(dpmpp_step(plan, z, t, z0, before).numpy(), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(dpmpp_step(plan, z, 1, z0, before), z0)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 40), steps=st.sampled_from([40, 100, 1000]))
def test_without_memory_dpmpp_is_ddim(t, steps):
    plan, z, eps = SCHEDULE.respace(steps), latents(), latents(seed=5)
    torch.testing.assert_close(dpmpp_step(plan, z, t, plan.predict_z0(z, t, eps), None), ddim_step(plan, z, t, eps),
                               atol=1e-9, rtol=1e-9)


# the ancestral step from its definition

@settings(deadline=None, max_examples=30)
@given(t=st.integers(2, 1000))
def test_the_mean_of_a_step_is_the_posterior_mean_of_the_predicted_latent(t):
    z, eps = latents(), latents(seed=6)
    expected = SCHEDULE.posterior_mean(SCHEDULE.predict_z0(z, t, eps), z, t)
    torch.testing.assert_close(ddpm_step(SCHEDULE, z, t, eps, None), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("t", [2, 300, 1000])
def test_the_variance_of_a_step(t):
    z, eps, one = latents(), latents(seed=6), torch.ones(6, 4, dtype=torch.float64)
    mean = ddpm_step(SCHEDULE, z, t, eps, None)
    beta, a, before = (float(x) for x in (SCHEDULE.betas[t], SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t - 1]))
    for variance, expected in (("fixed_large", beta), ("fixed_small", beta * (1 - before) / (1 - a))):
        added = ddpm_step(SCHEDULE, z, t, eps, one, variance=variance) - mean
        np.testing.assert_allclose(added.numpy() ** 2, expected, rtol=1e-7)
    assert torch.equal(ddpm_step(SCHEDULE, z, 1, eps, one), ddpm_step(SCHEDULE, z, 1, eps, None))   # no noise at the end


# whole walks with an oracle

def recursion(plan, variance):
    mean, var = 0.0, 1.0
    for t in range(plan.T, 0, -1):
        beta, a = float(plan.betas[t]), float(plan.alpha_bar[t])
        pull = beta / (a * S**2 + 1 - a)
        sigma2 = 0.0 if t == 1 else beta if variance == "fixed_large" else float(plan.posterior_variance[t])
        mean = ((1 - pull) * mean + pull * a**0.5 * M) / (1 - beta) ** 0.5
        var = (1 - pull) ** 2 / (1 - beta) * var + sigma2
    return mean, var**0.5


@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_sampling_returns_mean_and_variance(variance):
    z = sample_latents(oracle, SCHEDULE, (5000, 4), seed=0, variance=variance)
    n = z.numel()
    assert abs(z.mean().item() - M) < 4 * S / n**0.5 + 1e-3
    assert abs(z.std().item() - S) < 4 * S / (2 * n) ** 0.5 + 0.01 * S
    assert np.abs(np.corrcoef(z.numpy().T) - np.eye(4)).max() < 4 / 5000**0.5


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_short_ancestral_walks_follow_their_recursion(steps, variance):
    mean, sd = recursion(SCHEDULE.respace(steps), variance)
    z = sample_latents(oracle, SCHEDULE, (10_000, 4), seed=1, steps=steps, variance=variance)
    assert abs(z.mean().item() - mean) < 4 * sd / 200 + 1e-3 and abs(z.std().item() - sd) < 4 * sd / 280 + 1e-3


def exact_flow(z_T):
    a = float(SCHEDULE.alpha_bar[-1])
    return M + S * (z_T - a**0.5 * M) / (a * S**2 + 1 - a) ** 0.5


def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order():
    z_T = latents(200, 1).float()

    def error(name, n):
        return (sample_latents(oracle, SCHEDULE, z_T.shape, sampler=name, steps=n, start=z_T, spacing="time") - exact_flow(z_T)).abs().max().item()

    errors = {name: [error(name, n) for n in (25, 50, 100)] for name in ("ddim", "dpm++")}
    assert errors["ddim"][2] < 0.06 and errors["dpm++"][2] < 0.006
    order = {name: np.log2(np.array(e[:-1]) / np.array(e[1:])) for name, e in errors.items()}
    assert (np.abs(order["ddim"] - 1) < 0.25).all() and order["dpm++"].max() > 1.5


# the loop

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seed_fixes_the_draw_and_the_callers_generator_is_untouched(sampler):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (sample_latents(oracle, SCHEDULE, (20, 3), sampler=sampler, steps=15, seed=s) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (20, 3) and first.dtype == torch.float32 and not first.requires_grad


def test_noise_comes_from_one_counter_stream():
    g = torch.Generator().manual_seed(counter_seed(9, "sampling"))
    plan, z = SCHEDULE.respace(4), torch.randn(7, 2, generator=g)
    for t in range(4, 0, -1):
        z = ddpm_step(plan, z, t, oracle(z, plan.timesteps[torch.full((7,), t)]), torch.randn(7, 2, generator=g) if t > 1 else None)
    assert torch.equal(z, sample_latents(oracle, SCHEDULE, (7, 2), seed=9, steps=4))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, levels", [(4, [1000, 750, 500, 250]), (1, [1000]), (3, [1000, 667, 333])])
def test_the_network_hears_the_original_step_numbers(sampler, steps, levels):
    if sampler.endswith("dpm++"):
        levels = SCHEDULE.respace(steps, spacing="logsnr").timesteps[1:].flip(0).tolist()

    heard, done = [], []

    def listening(z, t):
        assert t.shape == (5,) and (t == t[0]).all()
        heard.append(int(t[0]))
        return oracle(z, t)

    sample_latents(listening, SCHEDULE, (5, 2), sampler=sampler, steps=steps, on_step=done.append)
    assert heard == levels and done == list(range(steps, 0, -1))


def test_all_steps_are_visited_by_default():
    heard = []
    sample_latents(lambda z, t: heard.append(int(t[0])) or torch.zeros_like(z), SCHEDULE, (1, 1))
    assert heard == list(range(1000, 0, -1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_start_replaces_the_draw(sampler):
    start = torch.full((3, 2), 0.3)
    z = sample_latents(oracle, SCHEDULE, (3, 2), sampler=sampler, steps=5, start=start)
    assert (start == 0.3).all()
    if sampler in ("ddim", "dpm++"):
        assert torch.allclose(z, z[:1].expand_as(z))                  # nothing random is left
    else:
        assert not torch.allclose(z, z[:1].expand_as(z))


@pytest.mark.parametrize("options, message", [
    ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddpm, ddim, dpm++, sde-dpm++"),
    ({"spacing": "cosine", "steps": 3}, "unknown spacing 'cosine'; known: time, logsnr"),
    ({"variance": "learned"}, "unknown variance 'learned'; known: fixed_large, fixed_small"),
    ({"steps": 0}, "sampling steps must lie in 1..1000, got 0"),
    ({"steps": 1001}, "sampling steps must lie in 1..1000, got 1001")])
def test_input_errors(options, message):
    with pytest.raises(InputError) as caught:
        sample_latents(oracle, SCHEDULE, (2, 2), **options)
    assert str(caught.value) == message


# guided

@pytest.fixture(scope="module")
def denoiser():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Denoiser(torch.rand(4, 20), 6, widths=(16,), e_width=16).eval()
        for p in made.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
    return made


def draw(denoiser, k, omega, **options):
    return sample_latents(guided_sampler(denoiser, k, omega), SCHEDULE, (len(k), 6), **({"steps": 12} | options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_holistic_sampling_ignores_the_cluster_and_others_do_not(denoiser, sampler):
    k = torch.arange(9) % 3
    holistic = [draw(denoiser, c, -1.0, sampler=sampler) for c in (k, (k + 1) % 3, torch.full_like(k, 3))]
    assert torch.equal(holistic[0], holistic[1]) and torch.equal(holistic[0], holistic[2])
    assert not torch.allclose(draw(denoiser, k, 0.0, sampler=sampler), draw(denoiser, (k + 1) % 3, 0.0, sampler=sampler))


def test_omega_zero_is_the_plain_conditional_model(denoiser):
    k = torch.arange(9) % 3
    with torch.no_grad():
        plain = sample_latents(lambda z, t: denoiser(z, t, k), SCHEDULE, (9, 6), steps=12)
    assert torch.equal(plain, draw(denoiser, k, 0.0))


@pytest.mark.parametrize("omega", [-1.0, -0.5, 0.0, 1.0])
def test_embed_runs_once_and_the_answer_is_guided_eps(denoiser, omega):
    k, calls = torch.arange(9) % 3, []
    hook = denoiser.embed.register_forward_hook(lambda *_: calls.append(1))
    eps_of = guided_sampler(denoiser, k, omega)
    z, t = torch.randn(9, 6), torch.full((9,), 500)
    with torch.no_grad():
        got = [eps_of(z, t) for _ in range(3)][-1]
    hook.remove()
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(got, guided_eps(denoiser, z, t, k, omega))


def test_bf16_sampling_on_cpu_is_close_and_leaves_the_global_setting(denoiser):
    before, k = torch.get_float32_matmul_precision(), torch.arange(9) % 3
    plain = draw(denoiser, k, 0.5, sampler="ddim")
    reduced = sample_latents(guided_sampler(denoiser, k, 0.5, precision="bf16"), SCHEDULE, (9, 6), steps=12, sampler="ddim")
    assert torch.get_float32_matmul_precision() == before
    assert (reduced - plain).norm() / plain.norm() < 0.1


def test_a_solver_takes_no_more_steps_than_there_are():
    assert [default_steps(s, 5) for s in sampling.SAMPLERS] == [5, 5, 5, 5] and default_steps("dpm++", 1000) == 20


def test_the_denoiser_is_asked_in_the_precision_given(monkeypatch):
    seen, net = [], Denoiser(torch.randn(3, 9), 6, widths=(8,), e_width=8)
    monkeypatch.setattr(sampling, "reduced_precision", lambda device, precision: seen.append(precision) or nullcontext())
    sampling.guided_sampler(net, torch.zeros(4, dtype=torch.long), 0.0, precision="bf16")(torch.randn(4, 6), torch.full((4,), 3))
    assert seen == ["bf16"]


def test_a_start_of_another_shape_is_refused_and_doubles_are_taken():
    schedule = linear_schedule(8, beta_1=0.05, beta_T=0.6)
    draw = lambda start: sample_latents(lambda z, t: torch.zeros_like(z), schedule, (3, 2), sampler="ddim", start=start)  # noqa: E731
    with pytest.raises(InputError, match=r"start must have shape \(3, 2\), got \(3, 5\)"):
        draw(torch.zeros(3, 5))
    assert torch.equal(draw(torch.ones(3, 2, dtype=torch.float64)), draw(torch.ones(3, 2)))


def test_a_denoiser_without_embeddings_can_be_guided():
    class Own(torch.nn.Module):
        n_clusters = 2

        def forward(self, z, t, k, table=None):
            return z * (k + 1)[:, None]

    z, t, k = torch.ones(2, 3), torch.full((2,), 4), torch.tensor([0, 1])
    out = guided_sampler(Own(), k, 1.0)(z, t)
    assert torch.allclose(out, 2 * z * (k + 1)[:, None] - 3 * z)

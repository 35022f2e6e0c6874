"""Compiled loops: elementary functions, likelihood and slopes, the bound, draws; any number of threads."""

import math
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from scld_nb import cpu
from scld_nb.counts import CountParameters, count_nll
from scld_nb.cpu import bounded_cpu, by_rows, compiled, count_nll_cpu, counted_cpu, draw_counts_cpu, gamma_ratio

float32s = st.floats(-80, 80, width=32)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@numba.njit
def four(x):
    return cpu.exp32(x), cpu.expm1_32(x), cpu.log32(cpu.exp32(x)), cpu.log1p_32(cpu.exp32(x))


@settings(max_examples=300, deadline=None)
@given(float32s)
def test_elementary_functions_are_right_to_the_last_digits(value):
    x = np.float32(value)
    exp, expm1, log, log1p = four(x)
    exact = float(x)
    assert exp == pytest.approx(math.exp(exact), rel=3e-7) and expm1 == pytest.approx(math.expm1(exact), rel=3e-7)
    assert log == pytest.approx(math.log(float(exp)), rel=3e-7, abs=1e-9)
    assert log1p == pytest.approx(math.log1p(float(exp)), rel=3e-7)


def test_elementary_functions_stay_finite_beyond_their_range():
    assert cpu.exp32(np.float32(-1e9)) > 0 and np.isfinite(cpu.exp32(np.float32(1e9)))
    assert np.isfinite(cpu.log32(np.float32(0.0))) and cpu.expm1_32(np.float32(-100.0)) == -1.0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.floats(-6, 8, width=32))
def test_ratios_of_gammas_are_those_of_scipy(y, log_r):
    """Counts up to 8 in single precision, as a product; beyond in double, as a series."""
    r = np.exp(np.float32(log_r))
    if y <= cpu.FEW:
        product, slope = np.empty((2, 1), np.float32)
        cpu._products(1, np.float32([y]), np.array([r]), product, slope)
        value, slope, most = np.log(product[0]) - cpu.LOG_FACTORIAL[y], slope[0], 2e-6
    else:
        (value, slope), most = gamma_ratio(float(y), float(r)), 1e-8
    r = float(r)
    wanted = special.gammaln(y + r) - special.gammaln(r) - special.gammaln(y + 1.0)
    assert value == pytest.approx(wanted, rel=most, abs=most)
    assert slope == pytest.approx(special.digamma(y + r) - special.digamma(r), rel=most)


def leaves(n, n_genes, seed, *, inflated=True, outliers=True) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    mu, r, logit = (torch.randn(n, n_genes, generator=g) * s + m for s, m in ((1.5, -0.5), (2.0, 1.0), (2.0, -2.0)))
    parts = [mu, r.clamp(-6, 8), logit if inflated else None, torch.randn(n_genes, generator=g) - 4 if outliers else None,
             torch.rand(n_genes, generator=g) * 5 + 0.7 if outliers else None]
    return [None if p is None else p.requires_grad_() for p in parts]


def some_counts(n, n_genes, seed) -> torch.Tensor:
    x = np.random.default_rng(seed).negative_binomial(0.4, 0.25, (n, n_genes))
    x[0, 0] = 700
    return torch.from_numpy(x.astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_value_and_slopes_are_those_of_double_precision(n, n_genes, seed, inflated, outliers):
    """Against PyTorch's operations and its differentiation, with another weight for every cell."""
    own = leaves(n, n_genes, seed, inflated=inflated, outliers=outliers)
    long = [None if p is None else p.detach().double().requires_grad_() for p in own]
    x, weights = some_counts(n, n_genes, seed), torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    value, wanted = count_nll_cpu(x, *own), count_nll(x.double(), CountParameters(*long), dense=True)
    assert torch.allclose(value.double(), wanted, rtol=2e-6, atol=1e-3)
    (value * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    for a, b in zip(own, long, strict=True):
        if a is not None:
            assert torch.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=2e-5 * max(1.0, float(b.grad.abs().max())))


@pytest.mark.parametrize("inflated", [True, False])
def test_probabilities_sum_to_one(inflated):
    own = [None if p is None else p.detach().expand(3000, 1) if p.ndim == 2 else p.detach() for p in leaves(1, 1, 3, inflated=inflated)]
    own[4] = torch.tensor([2.0])
    assert float(torch.exp(-count_nll_cpu(torch.arange(3000.0)[:, None], *own).double()).sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("spoiled", range(3))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("count", [0.0, 1.0, 40.0])
def test_what_is_not_a_number_is_not_lost(spoiled, bad, count):
    """The limits of `exp32` must not make a finite loss of it; other cells keep theirs."""
    own, x = [p.detach() for p in leaves(4, 9, 0)], torch.full((4, 9), count)
    good = count_nll_cpu(x, *own)
    own[spoiled][2, 5] = bad
    value = count_nll_cpu(x, *own)
    assert not value[2].isfinite() and torch.equal(value[[0, 1, 3]], good[[0, 1, 3]])


def test_slopes_can_be_had_once_and_say_so():
    own = leaves(3, 4, 0)
    value = count_nll_cpu(torch.ones(3, 4), *own).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the likelihood again"):
        value.backward()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_counted_entries_are_found_in_their_order(n, n_genes, seed):
    x = torch.from_numpy(np.random.default_rng(seed).poisson(0.4, (n, n_genes)).astype(np.float32))
    assert torch.equal(counted_cpu(x), x.view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_number_of_threads_changes_nothing(k, threads):
    results = []
    for number in (1, k):
        threads(number)
        own, x = leaves(70, 33, 1), some_counts(70, 33, 1)
        value = count_nll_cpu(x, *own)
        value.sum().backward()
        shares = own[0].detach().clone().requires_grad_()
        bounded = bounded_cpu(shares, torch.zeros(70, 1))
        bounded.square().sum().backward()
        drawn = draw_counts_cpu(*(p.detach() for p in own), generator=torch.Generator().manual_seed(0))
        results.append((value.detach(), counted_cpu(x), *(p.grad for p in own[:3]), bounded.detach(), shares.grad, drawn, *(p.grad for p in own[3:])))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:-2], results[1][:-2]))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(results[0][-2:], results[1][-2:]))       # summed over cells


def test_rows_are_dealt_out_once_each(threads):
    @numba.njit
    def add(part, first, last, out):
        for i in range(first, last):
            out[i] += 1 + part

    for n, k, most in ((1, 4, 1), (7, 4, 1), (64, 3, 3), (1000, 2, 2)):
        threads(k)
        out = torch.zeros(n)
        by_rows(add, n, out)
        assert out.min() == 1 and out.max() == most


def test_an_error_in_a_thread_arrives(threads):
    threads(2)

    def broken(part, first, last, out):
        if part:
            raise ValueError("in the second part")

    with pytest.raises(ValueError, match="in the second part"):
        by_rows(broken, 100, torch.zeros(1))


def test_a_forked_process_has_threads_of_its_own():
    script = textwrap.dedent("""
        import os, sys, torch
        from scld_nb.cpu import bounded_cpu
        torch.set_num_threads(2)
        shares = torch.randn(64, 5)
        before = bounded_cpu(shares, torch.zeros(64, 1))
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(bounded_cpu(shares, torch.zeros(64, 1)), before) else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch):
    plain = numba.njit

    def read_only(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*args, **options)

    monkeypatch.setattr(cpu.numba, "njit", read_only)
    assert compiled()(lambda x: x + 1)(2) == 3


def test_slices_and_shared_rows_are_read_rightly():
    """Inputs need not lie in memory as they look."""
    own = [p.detach() for p in leaves(6, 8, 5)]
    x = some_counts(6, 8, 5)
    wide = [torch.cat([p, p], dim=1)[:, :8] if p.ndim == 2 else p for p in own]
    assert torch.equal(count_nll_cpu(x.t().contiguous().t(), *wide), count_nll_cpu(x, *own))
    one = own[1][:1]
    assert torch.equal(count_nll_cpu(x, own[0], one.expand(6, 8), *own[2:]), count_nll_cpu(x, own[0], one.repeat(6, 1), *own[2:]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**31), st.floats(-9, 3))
def test_the_bound_is_that_of_the_formula(n, n_genes, seed, level):
    g = torch.Generator().manual_seed(seed)
    shares, library, weights = torch.randn(n, n_genes, generator=g) * 2 + level, torch.rand(n, 1, generator=g) * 9, torch.randn(n, n_genes, generator=g)
    found = []
    for kind in (torch.float32, torch.float64):
        s, lib = (t.to(kind).requires_grad_() for t in (shares, library))
        out = bounded_cpu(s, lib) if kind == torch.float32 else s - torch.relu(torch.logsumexp(s, 1, keepdim=True) - math.log(2.0)) + lib
        found.append((out.detach(), *torch.autograd.grad((out * weights.to(kind)).sum(), (s, lib))))
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=2e-5) for a, b in zip(*found))


def test_bound_holds_for_the_largest_numbers():
    out = bounded_cpu(torch.tensor([[1e4, 0.0, -1e4]]), torch.zeros(1, 1))
    assert torch.allclose(out, torch.tensor([[math.log(2.0), math.log(2.0) - 1e4, math.log(2.0) - 2e4]]), atol=2e-3)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(-6, 4), st.floats(-5, 7))
def test_quantiles_are_those_of_scipy(v, log_mu, log_r):
    mu, r = math.exp(log_mu), math.exp(log_r)
    x = cpu._quantile(v, log_mu, log_r, math.inf)
    body = stats.nbinom(r, r / (r + mu))
    above = -math.expm1(-r * math.log1p(mu / r))
    assert x >= 1 and (body.cdf(x - 1) - body.pmf(0)) / above <= v + 1e-9 and (body.cdf(x) - body.pmf(0)) / above >= v - 1e-9


def test_the_last_uniform_number_ends_the_sum():
    for log_mu in (-9.0, 0.0, 4.0):
        for log_r in (-6.0, 0.0, 8.0):
            assert 1 <= cpu._quantile(1.0 - 2.0**-53, log_mu, log_r, math.inf) < 1e6


@pytest.mark.parametrize("r", [0.05, 1.0, 20.0, 130.0, 2000.0])
@pytest.mark.parametrize("mu", [0.02, 1.0, 20.0, 37.0, 45.0, 60.0, 63.9, 70.0, 300.0])
def test_draws_have_the_mean_and_the_quantiles_of_the_law(mu, r):
    n = 4000
    shape = (n, 1)
    x = draw_counts_cpu(torch.full(shape, math.log(mu)), torch.full(shape, math.log(r)), generator=torch.Generator().manual_seed(0)).double().numpy().ravel()
    law = stats.nbinom(r, r / (r + mu))
    assert abs(x.mean() - mu) < 5 * law.std() / n**0.5
    for q in (0.02, 0.1, 0.5, 0.9, 0.98):
        edge = law.ppf(q)
        assert abs((x <= edge).mean() - law.cdf(edge)) < 5 * (0.25 / n) ** 0.5

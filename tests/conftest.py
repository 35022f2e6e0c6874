"""Shared by all tests: one thread (so that every process gets the same bits), planted cells, a tiny model."""

import importlib.util
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")                # its first loop sets the number for all libraries

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import settings

# The same cases in every run, so that a red run is a change of the code; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeat", derandomize=True, database=None, deadline=None)     # a GPU wakes up in the first case
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

torch.set_num_threads(1)

TINY = {
    "T": 20,
    "beta_T": 0.6,
    "latent": 16,
    "hidden": 32,
    "widths": (64, 32),
    "e_width": 16,
    "ema": 0.95,
    "lr": 3e-3,
    "head": "mse",
    "batch_size": 64,
}


def benchmark_script(name: str):
    """``benchmarks/<name>.py`` as a module of its own, fresh at every call."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted_cells(n: int = 300, n_genes: int = 60, shares=(0.6, 0.3, 0.1), seed: int = 0) -> ad.AnnData:
    """Gamma-Poisson counts of three cell types "B", "NK" and "T"; most genes tell the types apart."""
    rng = np.random.default_rng(seed)
    counts = np.floor(np.array(shares) * n).astype(int)
    counts[0] += n - counts.sum()
    types = rng.permutation(np.repeat(np.arange(len(shares)), counts))
    profile = np.random.default_rng(1).gamma(0.7, 4.0, (len(shares), n_genes)) + 0.3
    rate = profile[types] * rng.gamma(5.0, 0.2, (n, 1))
    x = rng.poisson(rng.gamma(2.0, rate / 2.0)).astype(np.float32)
    x[:, 0] += 1  # no cell without a count
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(np.array(["B", "NK", "T"])[types])}, index=[f"cell{seed}_{i}" for i in range(n)]
    )
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)]))


@pytest.fixture(autouse=True)
def ctrl_c_works():
    """A process started in the background inherits an ignored SIGINT, also when it runs tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def cells() -> ad.AnnData:
    """300 cells x 60 genes of 3 types; treat as read-only."""
    return planted_cells()


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Settings of a model that trains in a second or two."""
    return dict(TINY)


@pytest.fixture(scope="session")
def tiny_model(cells):
    """A model trained on `cells`; treat as read-only."""
    from scld_nb.model import SCLD

    return SCLD(cells, "cell_type", device="cpu", **TINY).train(300, progress=False)

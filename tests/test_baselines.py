"""What all competitors share: reading, budgets, refusals, the Scorer for everybody, and draws that are kept."""
import json
import sys
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scld_nb import baselines
from scld_nb.baselines import BASELINES, TITLES, base, compete, installed_baselines, make_baseline, model_space, remaining
from scld_nb.data import CellReader, InputError, counts_matrix
from scld_nb.scorer import n_to_generate
from scld_nb.training import TrainingError

FAST = {"scgan": {"steps": 2}, "cscgan": {"steps": 2}, "activa": {"steps": 3}, "scigans": {"steps": 2}}
HERE = [name for name in BASELINES if not name.startswith("scvi")]


class Counter(base.Baseline):
    """Trains nothing, but counts its steps; gives cells of one count."""

    name, trains, scale = "counter", True, "counts"

    def steps_published(self, n_cells):
        return 7

    def _learn(self, counts):
        for step in self._training_steps(counts.shape[0]):
            self._note_loss(step, loss=self.seed if self.seed < 9 else float("nan"))

    def _draw(self, n, code, seed):
        x = np.zeros((n, len(self.genes)))
        x[:, seed % len(self.genes)] = 1
        return x


def test_classes_are_ordered_by_size_and_steps_default_to_the_published_ones(cells):
    fitted = Counter(seed=3).fit(cells, "cell_type")
    assert fitted.labels == ["B", "NK", "T"] and list(fitted.label_counts) == [180, 90, 30]
    assert (np.array(fitted.labels)[fitted.codes] == cells.obs["cell_type"].to_numpy(str)).all()
    assert fitted.history["steps"] == fitted.history["steps_published"] == 7 and fitted.history["seconds"] >= fitted.history["train_seconds"]
    drawn = fitted.sample(4, "NK")
    assert drawn.X.argmax(1).ravel().tolist()[0] == [3] * 4 and list(drawn.obs["cell_type"]) == ["NK"] * 4
    assert fitted.sample(2, seed=11).X[0, 11] == 1 and fitted.sample(2).uns["scld"] == {"scale": "counts", "method": "counter"}


def test_a_budget_in_seconds_stops_at_the_next_step(cells, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(base.time, "perf_counter", lambda: float(next(ticks)))
    fitted = Counter(steps=500, budget_s=20).fit(cells)
    assert 5 < fitted.history["steps"] < 25 and fitted.history["steps_asked"] == 500


def test_ctrl_c_keeps_what_was_learnt(cells):
    class Interrupted(Counter):
        def _note_loss(self, step, **losses):
            if step == 3:
                import signal
                signal.raise_signal(signal.SIGINT)

    fitted = Interrupted().fit(cells)
    assert fitted.history["interrupted"] and fitted.history["steps"] == 4 and fitted.sample(1).n_obs == 1


@pytest.mark.parametrize("act, message", [
    (lambda c: Counter(steps=0), "steps must be a whole number of at least 1, got 0"),
    (lambda c: Counter(budget_s=0), "budget_s must be a positive number of seconds, got 0"),
    (lambda c: Counter().sample(1), "counter is not fitted; call fit"),
    (lambda c: Counter().fit(c, "type"), "no column 'type' in obs; there are: cell_type"),
    (lambda c: Counter().fit(c).sample(0), "n must be a whole number of at least 1, got 0"),
    (lambda c: Counter().fit(c).sample(1, "B"), "unknown label 'B'; known: none, fit with labels_key"),
    (lambda c: Counter().fit(c, "cell_type").sample(1, "x"), "unknown label 'x'; known: B, NK, T"),
    (lambda c: make_baseline("gan"), "unknown baseline 'gan'; known: random, splatter"),
    (lambda c: base.require_memory(2.0**60, "it", "use fewer cells"), "it needs about 1073741824.0 GiB of memory, .* are free; use fewer cells"),
])
def test_refusals_are_one_line(cells, act, message):
    with pytest.raises(InputError, match=message) as caught:
        act(cells)
    assert "\n" not in str(caught.value)


def test_missing_labels_and_losses_that_are_not_finite(cells):
    gaps = cells.copy()
    gaps.obs["cell_type"] = gaps.obs["cell_type"].astype(object)
    gaps.obs.iloc[:3, 0] = None
    with pytest.raises(InputError, match="'cell_type' has 3 missing values; drop those cells or name them"):
        Counter().fit(gaps, "cell_type")
    with pytest.raises(TrainingError, match="counter: the loss 'loss' is not finite at step 0"):
        Counter(seed=9).fit(cells)
    with pytest.raises(InputError, match="counter needs a number of steps"):
        type("Endless", (Counter,), {"steps_published": lambda self, n: None})().fit(cells)


@pytest.mark.parametrize("name", HERE)
def test_every_baseline_keeps_the_contract(cells, name):
    options = dict(seed=1, device="cpu", progress=False, **FAST.get(name, {}))
    fitted = make_baseline(name, **options).fit(cells, "cell_type")
    drawn = fitted.sample(12)
    assert drawn.shape == (12, cells.n_vars) and list(drawn.var_names) == list(cells.var_names) and sp.issparse(drawn.X)
    values = drawn.X.toarray()
    assert np.isfinite(values).all() and (values >= 0).all() and drawn.uns["scld"]["scale"] == fitted.scale
    if fitted.scale == "counts":
        assert (values == np.rint(values)).all() and (values.sum(1) > 0).all()
    else:
        assert np.allclose(values.sum(1), 20_000, rtol=1e-3)
    assert (fitted.sample(12).X != drawn.X).nnz == 0 and (fitted.sample(12, seed=77).X != drawn.X).nnz > 0
    again = make_baseline(name, **options).fit(cells, "cell_type")
    assert np.allclose(again.sample(12).X.toarray(), values, rtol=1e-5) and json.dumps(fitted.settings())
    assert {"method", "seed"} <= set(fitted.settings())


@pytest.mark.parametrize("name", HERE)
def test_every_baseline_refuses_values_that_are_no_counts(cells, name):
    bad = cells.copy()
    bad.X = bad.X.astype(np.float32)
    bad.X.data[0] = -1
    with pytest.raises(InputError, match="negative"):
        make_baseline(name, **FAST.get(name, {})).fit(bad, "cell_type")


def test_the_registry_names_every_baseline_and_leaves_out_what_is_not_installed(monkeypatch):
    assert set(TITLES) == set(BASELINES) and all(cls.name == name for name, cls in BASELINES.items())
    monkeypatch.setitem(sys.modules, "scvi", None)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert installed_baselines() == HERE
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))      # a folder of that name
    assert installed_baselines() == HERE
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="scvi/__init__.py"))
    assert installed_baselines() == list(BASELINES)


def test_model_space_is_that_of_the_readers(cells):
    counts = counts_matrix(cells)
    drawn = ad.AnnData(counts, var=cells.var)
    assert np.allclose(model_space(drawn).toarray(), CellReader(counts).read(np.arange(cells.n_obs)), rtol=1e-5)
    empty = ad.AnnData(sp.csr_matrix((2, 5), dtype=np.float32))
    assert model_space(empty).nnz == 0


def test_draws_are_kept_and_made_again_for_other_settings(cells, tmp_path, monkeypatch):
    path, options = tmp_path / "a" / "random.h5ad", {"n": 40, "clusters": {"NK": 8}, "seed": 2, "device": "cpu", "progress": False}
    drawn = compete("random", cells, "cell_type", path, **options)
    assert list(drawn.obs["requested"].value_counts()) == [n_to_generate(40, 0.8), n_to_generate(8, 0.8)]
    about = json.loads(drawn.uns["competitor"])
    assert about["scorer"]["n_real"] == cells.n_obs and about["failed"] == {} and about["cost"]["train_seconds"] >= 0
    monkeypatch.setattr(baselines, "make_baseline", lambda name, **o: _Unfit(name, **o))
    again = compete("random", cells, "cell_type", path, **options)
    assert (again.X != drawn.X).nnz == 0 and np.array_equal(again.obs["score"], drawn.obs["score"])
    with pytest.raises(AssertionError, match="fitted again"):
        compete("random", cells, "cell_type", path, **options | {"n": 41})
    assert [p.name for p in path.parent.iterdir()] == ["random.h5ad"]


class _Unfit:
    """A baseline that may only be asked for its settings."""

    def __init__(self, name, **options):
        self.settings = BASELINES[name](**options).settings

    def fit(self, *args):
        raise AssertionError("fitted again")


def test_the_scorer_ranks_within_a_request_and_the_plain_row_takes_the_first(cells, tmp_path):
    drawn = compete("random", cells, "cell_type", tmp_path / "r.h5ad", n=40, clusters={"NK": 8}, device="cpu", progress=False)
    pool = drawn[drawn.obs["requested"] == ""]
    assert list(remaining(drawn, 40).obs_names) == list(pool.obs_names[:40])
    best = remaining(drawn, 40, post=True)
    assert best.n_obs == 40 and best.obs["score"].min() >= pool.obs["score"].sort_values().iloc[10]
    own = remaining(drawn, 8, label="NK", post=True)
    assert own.n_obs == 8 and set(own.obs["requested"]) == {"NK"}
    with pytest.raises(InputError, match="no cells of 'T' were drawn"):
        remaining(drawn, 3, label="T")


def test_a_cluster_that_is_not_delivered_keeps_its_reason(cells, tmp_path, monkeypatch):
    class Half(baselines.RandomBaseline):
        def _draw(self, n, code, seed):
            if code == 2:
                raise InputError("nothing but B and NK")
            return super()._draw(n, code, seed)

    monkeypatch.setitem(BASELINES, "random", Half)
    drawn = compete("random", cells, "cell_type", tmp_path / "r.h5ad", n=20, clusters={"T": 5, "NK": 5}, device="cpu", progress=False)
    assert remaining(drawn, 5, label="NK").n_obs == 5
    with pytest.raises(InputError, match="nothing but B and NK"):
        remaining(drawn, 5, label="T")


def test_a_scorer_tells_shuffled_from_real(cells):
    reader = CellReader(counts_matrix(cells))
    fakes = model_space(make_baseline("random", seed=5).fit(cells).sample(300))
    scorer, report = baselines.fit_scorer(reader, fakes, seed=0, device=torch.device("cpu"))
    real = baselines.score(scorer, reader.read_sparse(np.arange(300)), device=torch.device("cpu"))
    fresh = baselines.score(scorer, model_space(make_baseline("random", seed=6).fit(cells).sample(300)), device=torch.device("cpu"))
    assert report["accuracy"] > 0.6 and real.mean() > fresh.mean() + 0.1
    assert baselines.score(scorer, fakes[:0], device=torch.device("cpu")).shape == (0,)


def test_a_refused_refit_leaves_nothing_to_sample_from(cells):
    fitted = make_baseline("cscgan", steps=1, device="cpu", progress=False).fit(cells, "cell_type")
    assert fitted.sample(2, "T").n_obs == 2
    few = cells[np.r_[np.flatnonzero(cells.obs["cell_type"] == "T"), np.flatnonzero(cells.obs["cell_type"] == "B")[:1]]].copy()
    with pytest.raises(InputError, match="at least 2 cells of every class"):
        fitted.fit(few, "cell_type")
    with pytest.raises(InputError, match="is not fitted"):
        fitted.sample(3, "T")


def test_labels_that_read_alike_are_refused(cells):
    mixed = cells.copy()
    mixed.obs["mixed"] = pd.Categorical([1 if i % 2 else "1" for i in range(mixed.n_obs)], categories=[1, "1"])
    with pytest.raises(InputError, match="two labels that read '1'"):
        make_baseline("random").fit(mixed, "mixed")


def test_losses_are_those_of_the_last_fit(cells):
    fitted = make_baseline("scgan", steps=1, device="cpu", progress=False).fit(cells)
    once = len(fitted.history["losses"])
    assert len(fitted.fit(cells).history["losses"]) == once > 0


def test_random_rounds_of_two_seeds_differ():
    few = ad.AnnData(sp.csr_matrix(np.random.default_rng(0).poisson(3.0, (3, 8)).astype(np.float32) + 1))
    one, two = (make_baseline("random", seed=s).fit(few).sample(n).X.toarray() for s, n in ((0, 3003), (1, 3)))
    assert not (one[3000:] == two).all()


@pytest.mark.parametrize("make", ["baseline", "scorer"])
def test_generators_of_the_user_are_left_alone(make, cells, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the generators of the GPUs are not ours to set"))
    kept = torch.get_rng_state()

    def weights(seed):
        if make == "scorer":
            reader = CellReader(counts_matrix(cells[:40]))
            monkeypatch.setattr(baselines, "train_scorer", lambda *_, **__: {})
            network = baselines.fit_scorer(reader, reader.read_sparse(np.arange(40)), seed=seed, device=torch.device("cpu"))[0]
        else:
            fitted = make_baseline("scgan", seed=seed, steps=1, device="cpu", progress=False).fit(cells)
            network = next(v for v in vars(fitted).values() if isinstance(v, torch.nn.Module))
        return torch.cat([p.detach().ravel() for p in network.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))
    assert torch.equal(torch.get_rng_state(), kept)


def test_weights_are_counted(cells):
    fitted = make_baseline("scgan", steps=1, device="cpu", progress=False).fit(cells)
    networks = [v for v in vars(fitted).values() if isinstance(v, torch.nn.Module)]
    assert baselines.count_parameters(fitted) == sum(p.numel() for m in networks for p in m.parameters()) > 0
    assert baselines.count_parameters(make_baseline("random").fit(cells)) == 0
    wrapped = make_baseline("random").fit(cells)
    wrapped.model = SimpleNamespace(module=torch.nn.Linear(3, 2))          # as scvi-tools keeps its network
    assert baselines.count_parameters(wrapped) == 8


def test_memory_is_that_of_the_system_or_of_the_container(tmp_path, monkeypatch):
    assert 2**20 < base.free_memory() < 2**50
    with monkeypatch.context() as mac:                         # it does not know how much is free, and nothing is refused
        mac.setattr(base.os, "sysconf_names", {"SC_PAGE_SIZE": 29})
        mac.setattr(base, "Path", lambda _: tmp_path / "not there")
        assert base.free_memory() == 2**63
    monkeypatch.setattr(base, "free_memory", lambda: 2**30)
    base.require_memory(2.0**29, "it", "x")
    with pytest.raises(InputError, match="it needs about 2.0 GiB of memory, 1.0 GiB are free; x"):
        base.require_memory(2.0**31, "it", "x")
    assert pd.Series(BASELINES).notna().all()

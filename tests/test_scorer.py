"""The Scorer, the cut, and the queue between sampling and scoring."""

import ctypes
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.data import CellReader, InputError
from scld_nb.scorer import Scorer, bounded_queue, keep_by_odds, keep_top, n_to_generate, train_scorer

CPU = torch.device("cpu")


def new_scorer(n_genes: int, seed: int = 0) -> Scorer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Scorer(n_genes)


def test_three_linear_maps_two_outputs():
    scorer = new_scorer(7)
    shapes = [tuple(m.weight.shape) for m in scorer.net if isinstance(m, torch.nn.Linear)]
    assert shapes == [(256, 7), (64, 256), (2, 64)]
    assert scorer(torch.zeros(5, 7)).shape == (5, 2)
    assert Scorer(7, hidden=(5, 3))(torch.zeros(1, 7)).shape == (1, 2)


def test_score_is_the_softmax_probability_of_real():
    scorer, x = new_scorer(7), torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fake, real = scorer(x).T.double()
        np.testing.assert_allclose(scorer.score(x), np.exp(real) / (np.exp(real) + np.exp(fake)), rtol=1e-5)


@pytest.fixture(scope="module")
def planted(cells):
    """Real cells, and fakes of which a third are real cells and the rest have ten genes shuffled among cells."""
    rng = np.random.default_rng(0)
    x = cells.X.toarray()
    fakes = x[150:].copy()
    bad = np.arange(150) % 3 > 0
    for g in range(10, 20):
        fakes[bad, g] = rng.permutation(x[:, g].max() + fakes[bad, g])
    return CellReader(cells.X[:150]), CellReader(sp.csr_matrix(fakes)), bad


def test_learns_a_planted_difference_and_ranks_unseen_fakes_by_it(planted):
    real, fake, bad = planted
    taught = np.arange(150) < 100
    scorer = new_scorer(60)
    found = train_scorer(scorer, real, fake.read_sparse(taught), device=CPU, show=False)
    assert found["n_real"] == found["n_fake"] == 100 and 1 <= found["epochs"] <= 30
    assert found["accuracy"] > 0.6 and not scorer.training
    with torch.no_grad():
        scores = scorer.score(torch.from_numpy(fake.read(~taught))).numpy()
    good, poor = scores[~bad[~taught]], scores[bad[~taught]]
    auc = (good[:, None] > poor).mean()  # the share of pairs in the right order
    assert auc > 0.9


def test_cannot_tell_real_from_real(cells):
    scorer = new_scorer(60)
    found = train_scorer(
        scorer, CellReader(cells.X[:150]), CellReader(cells.X[150:]).read_sparse(slice(None)), device=CPU, show=False
    )
    held = np.sqrt(0.25 / (2 * 15))  # sd of a coin over 2 x 15 held-out cells
    assert abs(found["accuracy"] - 0.5) < 4 * held and found["loss"] > 0.6


def test_training_is_a_function_of_the_seed(planted):
    real, fake, _ = planted
    runs = []
    for seed in (0, 0, 1):
        scorer = new_scorer(60)
        train_scorer(scorer, real, fake.read_sparse(slice(None)), seed=seed, device=CPU, epochs=2, show=False)
        runs.append(scorer.net[0].weight.detach().clone())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_stops_early_and_keeps_the_best_epoch(planted):
    real, fake, _ = planted
    fakes = fake.read_sparse(slice(None))
    scorer, again = new_scorer(60), new_scorer(60)
    found = train_scorer(scorer, real, fakes, device=CPU, epochs=200, patience=2, lr=0.02, show=False)
    assert found["epochs"] < 198  # ended long before the last epoch
    train_scorer(again, real, fakes, device=CPU, epochs=found["epochs"], patience=2, lr=0.02, show=False)
    assert all(torch.equal(a, b) for a, b in zip(scorer.parameters(), again.parameters()))


@pytest.mark.parametrize(("n_real", "n_fake"), [(9, 50), (50, 9)])
def test_too_few_cells(cells, n_real, n_fake):
    reader = CellReader(cells.X[:n_real])
    with pytest.raises(
        InputError, match=f"at least 10 real and 10 generated cells, got {n_real} and {n_fake}; pass scorer=False"
    ):
        train_scorer(
            new_scorer(60), reader, CellReader(cells.X[:n_fake]).read_sparse(slice(None)), device=CPU, show=False
        )


# ---- the cut


@settings(max_examples=400, deadline=None)
@given(
    n=st.integers(1, 20_000),
    keep=st.floats(0.01, 1.0) | st.sampled_from([0.1, 0.2, 0.29, 0.57, 0.58, 0.7, 0.8, 0.9, 0.99, 1.0]),
)
def test_exactly_n_remain(n, keep):
    m = n_to_generate(n, keep)
    assert len(keep_top(np.linspace(1, 0, m), keep=keep)) == n
    assert m - 1 < n / keep + 1e-6  # and none is generated in vain


def test_keeps_exactly_80_percent_of_each_label():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(["a", "b", "c"], [1000, 25, 7]))
    scores = rng.random(1032) - 0.9 * (labels != "a")
    kept = labels[keep_top(scores, labels)]
    assert {k: int((kept == k).sum()) for k in "abc"} == {"a": 800, "b": 20, "c": 5}


def test_one_ranking_deletes_the_rare_label():
    labels = np.repeat(["common", "rare"], [80, 20])
    scores = np.r_[np.full(80, 0.9), np.full(20, 0.1)]
    assert set(labels[keep_top(scores)]) == {"common"}
    assert (labels[keep_top(scores, labels)] == "rare").sum() == 16


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=60), st.floats(0.05, 1))
def test_kept_cells_are_the_best_of_their_label_in_order(pairs, keep):
    labels, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    kept = keep_top(scores, labels, keep=keep)
    assert (np.diff(kept) > 0).all()
    for g in set(labels):
        inside = np.isin(np.flatnonzero(labels == g), kept)
        own = scores[labels == g]
        assert inside.any() and own[inside].min() >= (own[~inside].max() if (~inside).any() else 0)


def test_cut_edges():
    assert keep_top(np.zeros(0)).tolist() == []
    assert keep_top(np.array([0.5])).tolist() == [0]  # at least one
    assert keep_top(np.array([0.2, 0.9, 0.2]), keep=0.67).tolist() == [0, 1]  # ties: the earlier one
    for keep in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(InputError, match="keep must lie in"):
            keep_top(np.ones(3), keep=keep)


# ---- the queue


def sampling_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "scld-sampling"]


def test_order_is_kept_and_the_thread_ends():
    assert list(bounded_queue(iter(range(100)), maxsize=3)) == list(range(100))
    assert list(bounded_queue([])) == []
    assert not sampling_threads()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells which threads are there")
def test_the_thread_is_gone_for_the_system_as_well():
    """A process forked while a thread clears up would inherit its locks; here clearing up takes a fifth of a second."""
    libc, key, ids = ctypes.CDLL(None), ctypes.c_uint(), []
    libc.pthread_setspecific.argtypes = [ctypes.c_uint, ctypes.c_void_p]
    assert libc.pthread_key_create(ctypes.byref(key), libc.usleep) == 0  # called with the key's value when a thread ends

    def produce():
        libc.pthread_setspecific(key, 200_000)
        ids.append(threading.get_native_id())
        yield 1

    try:
        assert list(bounded_queue(produce())) == [1]
        assert not Path(f"/proc/self/task/{ids[0]}").exists()
    finally:
        libc.pthread_key_delete(key)


def test_producer_works_in_another_thread():
    where = []

    def produce():
        where.append(threading.current_thread())
        yield 1

    assert list(bounded_queue(produce())) == [1]
    assert where[0] is not threading.current_thread()


def test_sampling_and_scoring_overlap():
    """The consumer of item i ends only once item i + 1 is begun: without overlap no wait would succeed."""
    begun = [threading.Event() for _ in range(6)]

    def produce():
        for i in range(5):
            begun[i].set()
            yield i
        begun[5].set()

    assert all(begun[i + 1].wait(timeout=30) for i in bounded_queue(produce()))


def test_at_most_maxsize_wait():
    """The producer may be ahead by the items that wait, the one in its hand and the one being handed over."""
    made, reached = 0, threading.Event()

    def produce():
        nonlocal made
        for made in itertools.count(1):
            if made == 5:
                reached.set()  # 1 taken, 3 waiting, 1 in hand
            yield made

    queue = bounded_queue(produce(), maxsize=3)
    assert next(queue) == 1
    assert reached.wait(timeout=30)  # it does run ahead
    for taken in range(2, 200):
        assert next(queue) == taken
        assert made <= taken + 3 + 1
    queue.close()
    assert not sampling_threads()


def test_producer_error_arrives_behind_the_items_made():
    def produce():
        yield "a"
        yield "b"
        raise RuntimeError("accelerator lost")

    got = []
    with pytest.raises(RuntimeError, match="accelerator lost"):
        for item in bounded_queue(produce(), maxsize=1):
            got.append(item)
    assert got == ["a", "b"] and not sampling_threads()


@pytest.mark.parametrize("how", ["break", "raise", "close"])
def test_consumer_that_leaves_ends_the_producer(how):
    stop = threading.Event()
    queue = bounded_queue(itertools.count(), maxsize=2, stop=stop)
    try:
        for item in queue:
            if item == 5:
                if how == "raise":
                    raise KeyError("scoring failed")
                break
    except KeyError:
        assert how == "raise"
    queue.close()
    assert stop.is_set() and not sampling_threads()


def test_a_slow_producer_can_watch_stop():
    """A producer in the middle of a long item leaves when the consumer is gone, instead of finishing it."""
    stop, steps = threading.Event(), []

    def produce():
        yield "first"
        while not stop.wait(timeout=0.001):  # an item that would never be finished
            steps.append(1)
        raise InterruptedError

    for _ in bounded_queue(produce(), stop=stop):
        break
    assert stop.is_set() and not sampling_threads()


def test_selection_weights_are_odds_held_within_a_twentieth_and_twenty():
    s = np.random.default_rng(0).uniform(0.06, 0.94, 400)
    keys = np.log(s / (1 - s)) + np.random.default_rng(7).gumbel(size=400)
    assert np.array_equal(keep_by_odds(s, keep=0.5, seed=7), np.sort(np.argsort(-keys)[:200]))
    certain, likely = (keep_by_odds(np.array([p] + [0.5] * 99), keep=0.5, seed=3) for p in (1 - 1e-12, 20 / 21))
    assert np.array_equal(certain, likely)
    kept = [np.isin(0, keep_by_odds(np.array([1e-12] + [0.5] * 99), keep=0.5, seed=seed)) for seed in range(200)]
    assert 2 < sum(kept) < 30        # odds 1:20, not none at all

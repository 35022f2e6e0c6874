"""Metrics against independent implementations, closed forms and limits."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline

from scld_nb.data import InputError, library_normalize
from scld_nb.metrics import (
    _votes_cut_at,
    auc_null_sd,
    label_classifier,
    mmd,
    mmd_bandwidth,
    permute_genes,
    purity,
    rf_auc,
    rf_aucs,
    tsne,
)


def gamma_poisson(n, genes=60, types=4, seed=0, depth=2.0):
    """Counts of a few cell types and the types; profiles are the same for every seed."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(99).gamma(0.5, 1, (types, genes)) + 0.02
    labels = rng.integers(types, size=n)
    mean = profiles[labels] * rng.gamma(4, 0.25, (n, 1)) * depth
    return sp.csr_matrix(rng.poisson(rng.gamma(2, mean / 2)).astype(np.float32)), labels


def logged(counts):
    return library_normalize(counts).log1p()


# --- forest


@pytest.mark.parametrize("depth", [None, 3])
def test_rf_auc_equals_a_scikit_learn_pipeline(depth):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(80, 20)), rng.normal(0.4, 1, size=(80, 20))
    judge = make_pipeline(
        PCA(5, svd_solver="full"), RandomForestClassifier(60, max_features="sqrt", max_depth=depth, random_state=3)
    )
    folds = StratifiedKFold(4, shuffle=True, random_state=3)
    wanted = cross_val_score(judge, np.vstack([real, fake]), np.repeat([1, 0], 80), cv=folds, scoring="roc_auc")
    found = rf_auc(real, fake, n_pcs=5, n_trees=60, max_depth=depth, folds=4, seed=3)
    # signs of the components differ between solvers, so trees break ties differently
    assert np.allclose(found.fold_aucs, wanted, atol=0.06) and abs(found.auc - wanted.mean()) < 0.03
    assert found.auc == pytest.approx(np.mean(found.fold_aucs))
    assert found.fold_sd == pytest.approx(np.std(found.fold_aucs, ddof=1))
    assert found.n == 80 and found.distance == abs(found.auc - 0.5)


def test_rf_auc_in_gene_space_equals_scikit_learn_exactly():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(60, 8)), rng.normal(0.5, 1, size=(60, 8))
    judge = RandomForestClassifier(40, max_features="sqrt", random_state=7)
    folds = StratifiedKFold(5, shuffle=True, random_state=7)
    wanted = cross_val_score(judge, np.vstack([real, fake]), np.repeat([1, 0], 60), cv=folds, scoring="roc_auc")
    found = rf_auc(real, fake, n_pcs=None, n_trees=40, seed=7)
    assert np.allclose(found.fold_aucs, wanted, atol=1e-12)


def test_real_against_real_is_a_half_and_shuffled_cells_are_caught():
    counts, _ = gamma_poisson(2000, seed=1)
    cells = logged(counts)
    control = rf_auc(cells[:1000], cells[1000:], n_pcs=20, n_trees=100)
    assert abs(control.auc - 0.5) <= 0.03
    shuffled = permute_genes(library_normalize(counts[1000:]), target_sum=20_000).log1p()
    assert rf_auc(cells[:1000], shuffled, n_pcs=20, n_trees=100).auc > 0.9


def test_components_are_fitted_inside_the_folds():
    """Pure noise with more genes than cells: a basis that had seen one side only would separate the sides."""
    rng = np.random.default_rng(2)
    train, fresh = rng.normal(size=(100, 400)), rng.normal(size=(100, 400))
    basis = PCA(20, random_state=0).fit(train)
    trap = rf_auc(basis.transform(fresh), basis.transform(train), n_pcs=None, n_trees=60)
    right = rf_auc(fresh, train, n_pcs=20, n_trees=60)
    assert trap.auc > 0.9 and right.distance < 4 * auc_null_sd(100)


@pytest.mark.parametrize("depth", [0.2, 2.0])  # mostly zeros: stacked sparse; else dense
def test_dense_and_sparse_cells_give_the_same_area(depth):
    real = logged(gamma_poisson(150, seed=3, depth=depth)[0])
    fake = logged(gamma_poisson(150, seed=4, types=3, depth=depth)[0])
    found = rf_auc(real, fake, n_pcs=10, n_trees=60)
    assert found == rf_auc(real.toarray(), fake.toarray(), n_pcs=10, n_trees=60)
    assert found == rf_auc(real, sp.csr_array(fake.toarray()), n_pcs=10, n_trees=60)
    judge = make_pipeline(PCA(10, svd_solver="full"), RandomForestClassifier(60, random_state=0))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    both = np.vstack([real.toarray(), fake.toarray()])
    wanted = cross_val_score(judge, both, np.repeat([1, 0], 150), cv=folds, scoring="roc_auc").mean()
    assert abs(found.auc - wanted) < 0.03


def test_rf_auc_is_deterministic_and_independent_of_cores():
    rng = np.random.default_rng(5)
    real, fake = rng.normal(size=(2, 60, 12))
    one = rf_auc(real, fake, n_trees=40, max_depth=5, seed=1)
    assert one == rf_auc(real, fake, n_trees=40, max_depth=5, seed=1, n_jobs=2)
    assert one != rf_auc(real, fake, n_trees=40, max_depth=5, seed=2)


def test_several_depths_share_folds_and_components():
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(50, 12)), rng.normal(0.3, 1, size=(50, 12))
    both = rf_aucs(real, fake, max_depths=(None, 2), n_trees=30)
    assert both[None] == rf_auc(real, fake, n_trees=30)
    shallow = rf_aucs(real, fake, max_depths=(2, 4), n_trees=300)
    assert shallow[4] == rf_auc(real, fake, n_trees=300, max_depth=4)
    grown = [rf_auc(real, fake, n_trees=300, max_depth=2, seed=0).fold_aucs, shallow[2].fold_aucs]
    assert np.abs(np.subtract(*grown)).max() < 0.06 and grown[0] != grown[1]


@pytest.mark.parametrize("depth", [0, 1, 3, 5, 40])
def test_a_tree_is_cut_where_scikit_learn_says_its_paths_lead(depth):
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(150, 6)), np.repeat([0, 1], 75)
    x[75:, 0] += 1
    fresh = rng.normal(size=(40, 6))
    forest = RandomForestClassifier(25, random_state=0).fit(x, y)
    wanted = np.zeros(40)
    for tree in forest.estimators_:
        paths = tree.decision_path(fresh.astype(np.float32))
        for k in range(40):
            nodes = np.sort(paths[k].indices)                   # a node's number is above its parent's
            shares = tree.tree_.value[nodes[min(depth, len(nodes) - 1)], 0]
            wanted[k] += shares[1] / shares.sum() / 25
    assert np.allclose(_votes_cut_at(forest, fresh, depth), wanted, atol=1e-12)
    assert np.array_equal(_votes_cut_at(forest, sp.csr_matrix(fresh), depth), _votes_cut_at(forest, fresh, depth))
    if depth == 40:
        assert np.allclose(wanted, forest.predict_proba(fresh)[:, 1], atol=1e-12)


def test_more_components_than_the_data_has():
    rng = np.random.default_rng(7)
    for real, fake in (rng.normal(size=(2, 10, 3)), rng.normal(size=(2, 5, 40))):
        assert 0 <= rf_auc(real, fake, n_pcs=50, n_trees=10).auc <= 1


def test_integers_are_accepted_and_left_alone():
    counts = np.random.default_rng(0).poisson(3, size=(20, 6))
    kept = counts.copy()
    assert rf_auc(counts[:10], counts[10:], n_trees=5).n == 10 and (counts == kept).all()


@pytest.mark.parametrize(
    "real, fake, message",
    [
        (np.zeros((9, 3)), np.zeros((8, 3)), "9 cells and fake 8"),
        (np.zeros((9, 3)), np.zeros((9, 4)), "3 genes and fake 4"),
        (np.zeros((4, 3)), np.zeros((4, 3)), "at least 5"),
        (np.zeros(9), np.zeros((9, 3)), "shape (9,)"),
        (np.full((9, 3), np.nan), np.zeros((9, 3)), "not finite"),
        (np.full((9, 3), "a"), np.zeros((9, 3)), "give numbers"),
        (np.zeros((9, 3)), sp.csr_matrix(np.full((9, 3), np.inf)), "fake holds 27 values"),
    ],
)
def test_rf_auc_refuses(real, fake, message):
    with pytest.raises(InputError) as error:
        rf_auc(real, fake, n_trees=5)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_forest_needs_two_folds():
    cells = np.random.default_rng(0).normal(size=(2, 9, 4))
    for folds in (1, 0, -1):
        with pytest.raises(InputError, match=f"folds is {folds}: cross-validation needs at least 2"):
            rf_auc(*cells, folds=folds, n_trees=2)


def test_null_sd_is_that_of_the_mann_whitney_statistic():
    rng, n = np.random.default_rng(0), 40
    ranks = np.array([rng.permutation(2 * n)[:n].sum() for _ in range(20_000)])
    areas = (ranks - n * (n - 1) / 2) / n**2
    assert auc_null_sd(n) == pytest.approx(areas.std(), rel=0.02)
    assert auc_null_sd(140) == pytest.approx(0.035, abs=5e-4) and auc_null_sd(7000) == pytest.approx(0.005, abs=2e-4)
    with pytest.raises(InputError):
        auc_null_sd(0)


# --- MMD


def naive_kernel(a, b, m, w):
    squared = float(((a - b) ** 2).sum())
    return w * sum(np.exp(-squared / s**2) for s in (m / 2, m, 2 * m))


def naive_mmd(real, fake, m, w):
    n = len(real)
    rr = [[naive_kernel(a, b, m, w) for b in real] for a in real]
    ff = [[naive_kernel(a, b, m, w) for b in fake] for a in fake]
    rf = [[naive_kernel(a, b, m, w) for b in fake] for a in real]
    biased = np.mean(rr) + np.mean(ff) - 2 * np.mean(rf)
    own = np.trace(rr) + np.trace(ff)
    unbiased = (np.sum(rr) + np.sum(ff) - own) / (n * (n - 1)) - 2 * np.mean(rf)
    return np.sqrt(max(0, biased)), unbiased


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_mmd_equals_a_double_loop(weight):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(100, 1, size=(23, 4)), rng.normal(100.5, 1, size=(23, 4))
    found = mmd(real, fake, bandwidth=1.7, weight=weight)
    assert (found.biased, found.unbiased_squared) == pytest.approx(naive_mmd(real, fake, 1.7, weight), abs=1e-10)
    assert (found.n, found.bandwidth, found.weight) == (23, 1.7, weight)


@pytest.mark.parametrize("n", [23, 1100])
def test_mmd_of_twins_leaves_the_twins_out(n):
    rng = np.random.default_rng(0)
    real = rng.normal(100, 1, size=(n, 4))
    twins = real + rng.normal(0, 0.3, size=(n, 4))

    def kernel(x, y):
        return sum(np.exp(-cdist(x, y, "sqeuclidean") / s**2) for s in (0.85, 1.7, 3.4))

    across = kernel(real, twins)
    across = (across.sum() - np.trace(across)) / (n * (n - 1))
    own = [kernel(x, x) for x in (real, twins)]
    found = mmd(sp.csr_matrix(real), sp.csr_matrix(twins), bandwidth=1.7, paired=True)
    assert found.biased**2 == pytest.approx(own[0].mean() + own[1].mean() - 2 * across, abs=1e-9)
    assert found.unbiased_squared == pytest.approx(sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in own) - 2 * across, abs=1e-9)
    assert mmd(real, twins, bandwidth=1.7).biased < found.biased       # what the twins hide


def test_mmd_over_several_blocks_and_sparse_cells():
    real, fake = (logged(gamma_poisson(1100, genes=12, seed=s)[0]) for s in (0, 1))
    a, b = real.toarray().astype(float), fake.toarray().astype(float)

    def mean_kernel(x, y, off=False):
        k = sum(np.exp(-cdist(x, y, "sqeuclidean") / s**2) for s in (2.0, 4.0, 8.0))
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)) if off else k.mean()

    found = mmd(real, fake, bandwidth=4.0)
    biased = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    unbiased = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b)
    assert found.biased == pytest.approx(np.sqrt(biased), rel=1e-6)
    assert found.unbiased_squared == pytest.approx(unbiased, abs=1e-9)
    assert mmd(real, b, bandwidth=4.0).biased == pytest.approx(found.biased, rel=1e-9)


numbers = st.floats(-50, 50, width=32)
pairs = st.integers(2, 7).flatmap(lambda n: st.tuples(arrays(float, (n, 3), elements=numbers), arrays(float, (n, 3), elements=numbers)))


@settings(max_examples=40, deadline=None)
@given(pairs, st.floats(0.1, 50), st.randoms(use_true_random=False))
def test_mmd_properties(groups, bandwidth, random):
    real, fake = groups
    found = mmd(real, fake, bandwidth=bandwidth)
    swapped = mmd(fake, real, bandwidth=bandwidth)
    order = random.sample(range(len(real)), len(real))
    mixed = mmd(real[order], fake[order[::-1]], bandwidth=bandwidth)
    moved = mmd(real + 7, fake + 7, bandwidth=bandwidth)
    for other in (swapped, mixed, moved):
        assert other.biased**2 == pytest.approx(found.biased**2, abs=1e-7)
        assert other.unbiased_squared == pytest.approx(found.unbiased_squared, abs=1e-7)
    assert 0 <= found.biased <= np.sqrt(6) + 1e-9
    assert mmd(real, real, bandwidth=bandwidth).biased**2 < 1e-9
    assert mmd(3 * real, 3 * fake, bandwidth=3 * bandwidth).biased**2 == pytest.approx(found.biased**2, abs=1e-7)


def test_unbiased_mmd_scatters_around_zero_under_the_null():
    rng = np.random.default_rng(0)
    draws = np.array([mmd(*rng.normal(size=(2, 60, 5)), bandwidth=2.0).unbiased_squared for _ in range(100)])
    assert draws.min() < 0 < draws.max() and abs(draws.mean()) < 4 * draws.std() / 10


def test_far_cells_keep_their_digits():
    """Distances of 1 at coordinates of 1e7 need the centring."""
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(2, 30, 3)).round(3)
    near, far = mmd(real, fake, bandwidth=1.0), mmd(real + 2.0**23, fake + 2.0**23, bandwidth=1.0)
    assert far.biased == pytest.approx(near.biased, abs=1e-6)


@pytest.mark.parametrize("options", [{"bandwidth": 0.0}, {"bandwidth": np.nan}, {"bandwidth": 1.0, "weight": -1}])
def test_mmd_refuses_options(options):
    with pytest.raises(InputError, match="positive"):
        mmd(np.zeros((3, 2)), np.ones((3, 2)), **options)


def test_mmd_refuses_unequal_sides():
    with pytest.raises(InputError, match="same n"):
        mmd(np.zeros((3, 2)), np.ones((4, 2)), bandwidth=1.0)
    with pytest.raises(InputError, match="at least 2"):
        mmd(np.zeros((1, 2)), np.ones((1, 2)), bandwidth=1.0)


# --- bandwidth


def test_bandwidth_of_all_cells_equals_nearest_neighbours():
    cells = np.random.default_rng(0).normal(5, 1, size=(200, 6))
    lists = NearestNeighbors(n_neighbors=26).fit(cells).kneighbors(cells)[0]
    assert mmd_bandwidth(cells) == pytest.approx(np.median(lists[:, 1:25]))
    assert mmd_bandwidth(cells, rule="mean25") == pytest.approx(np.median(lists[:, 1:26].mean(axis=1)))
    assert mmd_bandwidth(sp.csr_matrix(cells)) == pytest.approx(mmd_bandwidth(cells))
    assert mmd_bandwidth(cells, k=3) == pytest.approx(np.median(lists[:, 1:3]))


def test_bandwidth_of_draws():
    cells = np.random.default_rng(1).normal(size=(300, 4))
    rng, medians = np.random.default_rng(9), []
    for _ in range(5):
        sample = cells[np.sort(rng.choice(300, 80, replace=False))]
        medians.append(np.median(np.sort(cdist(sample, sample), axis=1)[:, 1:25]))
    found = mmd_bandwidth(cells, n_sample=80, repeats=5, seed=9)
    assert found == pytest.approx(np.median(medians))
    assert found == mmd_bandwidth(cells, n_sample=80, repeats=5, seed=9) != mmd_bandwidth(cells, n_sample=80, repeats=5, seed=8)


def test_bandwidth_of_few_cells_uses_all_neighbours():
    assert mmd_bandwidth(np.array([[0.0], [3.0]])) == 3.0


@pytest.mark.parametrize(
    "cells, options, message",
    [
        (np.zeros((1, 2)), {}, "at least 2"),
        (np.zeros((9, 2)), {}, "bandwidth is 0"),
        (np.eye(4), {"rule": "mean"}, "'mean25'"),
        (np.eye(4), {"k": 1}, "k is 1"),
    ],
)
def test_bandwidth_refuses(cells, options, message):
    with pytest.raises(InputError, match=message):
        mmd_bandwidth(cells, **options)


# --- shuffled genes


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csr_array, sp.csc_matrix, lambda m: m.toarray()])
def test_permuted_genes_keep_genes_and_library_sizes(form):
    counts, _ = gamma_poisson(300, seed=1)
    linear = library_normalize(counts)
    cells = form(linear)
    found = permute_genes(cells, seed=5)
    assert sp.issparse(found) == sp.issparse(cells) and found.shape == cells.shape
    dense = found.toarray() if sp.issparse(found) else found
    assert np.allclose(dense.sum(axis=1), 20_000, rtol=1e-4)
    assert ((dense > 0).sum(axis=0) == (linear.toarray() > 0).sum(axis=0)).all()
    again = permute_genes(cells, seed=5)
    assert (abs(found - again)).max() == 0 and (abs(found - permute_genes(cells, seed=6))).max() > 0
    assert np.allclose((cells.toarray() if sp.issparse(cells) else cells), linear.toarray())  # input left alone


@settings(max_examples=40, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(0, 9)), st.integers(0, 99))
def test_permuted_genes_own_totals(counts, seed):
    counts = np.hstack([counts, np.ones((len(counts), 1), int)])  # no cell is empty
    found = permute_genes(sp.csr_matrix(counts), seed=seed).toarray()
    assert ((found > 0).sum(axis=0) == (counts > 0).sum(axis=0)).all()
    assert np.allclose(found.sum(axis=1), counts.sum(axis=1)) and (found >= 0).all()


def test_permuted_genes_of_empty_cells():
    cells = np.array([[0.0, 0.0], [1.0, 3.0], [0.0, 0.0]])
    for seed in range(5):
        own = permute_genes(cells, seed=seed)
        assert own[[0, 2]].sum() == 0 and own[1].sum() in (0, 4)
        even = permute_genes(cells, target_sum=10.0, seed=seed).sum(axis=1)
        assert set(even.round(6)) <= {0.0, 10.0} and even.any()


def test_permuted_genes_are_independent():
    rng = np.random.default_rng(0)
    driver = rng.gamma(2, 2, size=(3000, 1))
    cells = np.hstack([driver, driver, rng.gamma(50, 20, size=(3000, 8))])
    found = permute_genes(cells, target_sum=1000.0)
    assert np.corrcoef(cells[:, 0], cells[:, 1])[0, 1] > 0.99 and abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 0.1
    assert np.allclose(found.sum(axis=1), 1000)


@pytest.mark.parametrize("cells, options", [(-np.eye(3), {}), (np.eye(3), {"target_sum": 0.0}), (np.full((2, 2), np.inf), {})])
def test_permute_genes_refuses(cells, options):
    with pytest.raises(InputError):
        permute_genes(cells, **options)


# --- t-SNE


def test_tsne_keeps_groups_apart_and_is_deterministic():
    rng = np.random.default_rng(0)
    left, right = rng.normal(0, 1, size=(40, 30)), rng.normal(6, 1, size=(30, 30))
    a, b = tsne([left, sp.csr_matrix(right)], seed=1, n_pcs=5)
    assert a.shape == (40, 2) and b.shape == (30, 2)
    nearest = NearestNeighbors(n_neighbors=2).fit(np.vstack([a, b])).kneighbors(return_distance=False)[:, 0]
    assert np.mean((nearest < 40) == (np.arange(70) < 40)) > 0.95
    again = tsne([left, sp.csr_matrix(right)], seed=1, n_pcs=5)
    assert (a == again[0]).all() and (b == again[1]).all()


@pytest.mark.parametrize("groups", [[], [np.zeros((9, 2)), np.zeros((9, 3))], [np.eye(3)]])
def test_tsne_refuses(groups):
    with pytest.raises(InputError):
        tsne(groups)


# --- labels


def test_purity_of_real_cells_and_of_a_wrong_label():
    counts, labels = gamma_poisson(600, genes=80, seed=2)
    cells, names = logged(counts), np.array(["a", "b", "c", "d"])[labels]
    judge = label_classifier(cells[:400], names[:400], n_pcs=20)
    assert purity(judge, cells[400:], names[400:]) > 0.9
    assert purity(judge, cells[400:].toarray(), "a") == pytest.approx(np.mean(names[400:] == "a"), abs=0.05)
    other = np.roll(["a", "b", "c", "d"], 1)[labels]
    assert purity(judge, cells[400:], other[400:]) < 0.1


def test_labels_of_any_type_are_compared_as_text():
    rng = np.random.default_rng(0)
    cells = np.vstack([rng.normal(0, 1, size=(30, 5)), rng.normal(5, 1, size=(30, 5))])
    assert purity(label_classifier(cells, np.repeat([0, 1], 30)), cells[:30], 0) == 1.0


@pytest.mark.parametrize("labels, message", [(["a"] * 3, "one label per cell"), (["a"] * 9, "at least 2 labels")])
def test_label_classifier_refuses(labels, message):
    with pytest.raises(InputError, match=message):
        label_classifier(np.random.default_rng(0).normal(size=(9, 4)), labels)


@pytest.mark.parametrize(
    "fake, requested, message",
    [
        (np.zeros((3, 4)), ["a", "b"], "one per cell"),
        (np.zeros((0, 4)), "a", "no cells"),
        (np.zeros((3, 5)), "a", "5 genes"),
        (np.zeros((3, 4)), "z", "requested label 'z' is unknown: the classifier knows a, b"),
    ],
)
def test_purity_refuses(fake, requested, message):
    judge = label_classifier(np.random.default_rng(0).normal(size=(20, 4)), ["a", "b"] * 10)
    with pytest.raises(InputError, match=message):
        purity(judge, fake, requested)


def test_twins_share_a_fold_and_no_longer_betray_each_other():
    """Fakes that are their real cell plus a little noise: apart, each twin's label misleads about the other."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(120, 8)).astype(np.float32)
    fake = real + 0.01 * rng.normal(size=real.shape).astype(np.float32)
    options = {"max_depths": (None,), "n_pcs": None, "n_trees": 60, "seed": 1}
    apart, together = (rf_aucs(real, fake, paired=p, **options)[None] for p in (False, True))
    assert apart.auc < 0.2 and abs(together.auc - 0.5) < 0.12 and together.n == 120 and len(together.fold_aucs) == 5


def test_copies_of_a_few_cells_have_no_bandwidth():
    few = np.random.default_rng(0).gamma(2.0, 300.0, (6, 80)).astype(np.float32)
    with pytest.raises(InputError, match="remove duplicate cells"):
        mmd_bandwidth(np.repeat(few, 40, axis=0))


def test_cells_that_do_not_differ_have_no_components():
    with pytest.raises(InputError, match="hardly any gene varies"):
        rf_auc(np.ones((60, 500)), np.ones((60, 500)), n_trees=5)


def test_few_cells_have_a_third_of_them_as_perplexity_and_the_components_asked_for():
    cells = np.random.default_rng(0).normal(size=(25, 8))
    lowered, direct, two = (tsne([cells], **o)[0] for o in ({}, {"perplexity": 8.0}, {"n_pcs": 2}))
    assert (lowered == direct).all() and not np.allclose(lowered, two)


def test_some_equal_cells_leave_a_bandwidth():
    cells = np.random.default_rng(0).normal(size=(60, 7)) * 100 + 3
    cells[30:] = cells[:30]
    lists = np.sort(cdist(cells, cells), axis=1)[:, 1:25]
    assert mmd_bandwidth(cells) == pytest.approx(np.median(lists))


def test_folds_of_twins_are_drawn_with_the_seed():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 4))
    real[:8] += 3                                              # an order that folds must not follow
    fake = real + rng.normal(size=(40, 4))
    found = rf_aucs(real, fake, n_pcs=None, n_trees=5, paired=True, max_depths=(None,))[None]
    splits = KFold(5, shuffle=True, random_state=0).split(real)
    both, truth = np.vstack([real, fake]), np.repeat([1, 0], 40)
    for (fit, held), area in zip(splits, found.fold_aucs):
        fit, held = np.r_[fit, fit + 40], np.r_[held, held + 40]
        forest = RandomForestClassifier(5, random_state=0).fit(both[fit], truth[fit])
        assert area == pytest.approx(roc_auc_score(truth[held], forest.predict_proba(both[held])[:, 1]))

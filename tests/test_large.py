"""Cells on disk: the reader, the order of minibatches, training, the growing file, and the command line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb import growing, large, running, training
from scld_nb.autoencoder import Autoencoder, encode_cells, fit_latent_statistics, fit_latent_statistics_on_disk
from scld_nb.cli import main
from scld_nb.counts import CountAutoencoder, count_start, fit_count_statistics, fit_count_statistics_on_disk
from scld_nb.data import CellReader, InputError, default_split, load
from scld_nb.guidance import cluster_means
from scld_nb.large import (
    CellWriter,
    DiskCounts,
    DiskReader,
    Moments,
    load_on_disk,
    open_cells,
    scratch_array,
    split_on_disk,
)
from scld_nb.model import SCLD, proportional
from scld_nb.scorer import n_to_generate
from scld_nb.training import BlockShuffle, batch_rows, counter_seed, minibatches

CPU = torch.device("cpu")


def put_matrix(path: Path, x: sp.csr_matrix, **replaced) -> Path:
    """A file with nothing but ``X``, its arrays as they are; some may be replaced by damaged ones."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(x.shape)})
        for name in ("data", "indices", "indptr"):
            group[name] = replaced.get(name, getattr(x, name))
    return path


def sparse_counts(n: int, genes: int, density: float, seed: int) -> sp.csr_matrix:
    """Counts with at least one per cell."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(2.0, (n, genes)) * (rng.random((n, genes)) < density)
    x[np.arange(n), rng.integers(0, genes, n)] += 1
    return sp.csr_matrix(x.astype(np.float32))


def same(a, b) -> bool:
    return a.shape == b.shape and (a != b).nnz == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """300 planted cells in a file; treat as read-only."""
    path = tmp_path_factory.mktemp("large") / "cells.h5ad"
    planted_cells().write_h5ad(path)
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 cells, two in a buffer: a tiny set has many of them."""
    monkeypatch.setattr(running, "BLOCK", 16)
    monkeypatch.setattr(running, "BUFFER", 2)


# ---- reading


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_are_those_of_the_matrix_in_memory(tmp_path_factory, data):
    n, genes = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    x = sparse_counts(n, genes, data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99)))
    counts = DiskCounts(put_matrix(tmp_path_factory.mktemp("x") / "x.h5ad", x))
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    columns = np.array(data.draw(st.permutations(range(genes)))[: data.draw(st.integers(1, genes))])
    asked = np.array(data.draw(st.lists(st.integers(0, len(kept) - 1), max_size=20)), dtype=int)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    reads, original = [], DiskCounts._entries
    limit, gap = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 10))
    with (
        patch.object(large, "SLICE", limit),
        patch.object(large, "GAP", gap),
        patch.object(DiskCounts, "_entries", lambda self, a, b: (reads.append(b - a), original(self, a, b))[1]),
    ):
        assert same(counts[start:stop], x[start:stop])
        some = counts.take(rows=kept, genes=columns)
        assert same(some[asked], x[kept][:, columns][asked]) and same(some[:], x[kept][:, columns])
        assert same(some.take(rows=np.arange(len(kept))[::2])[:], x[kept][:, columns][::2])
        last = np.arange(len(columns))[::-2]
        assert same(some.take(genes=last)[:], x[kept][:, columns][:, last])
        mask = np.arange(n) % 2 == 0
        assert same(counts[mask], x[mask])
        parts = list(some.slices())
    assert max(reads, default=0) <= max(limit, genes)
    assert np.array_equal(np.concatenate([np.arange(n)[rows] for rows, _ in parts]), np.arange(len(kept)))
    assert same(sp.vstack([part for _, part in parts]), x[kept][:, columns])


def test_entries_out_of_order_or_twice(tmp_path):
    messy = sp.csr_matrix((np.ones(5, np.float32), np.array([3, 1, 1, 0, 2]), np.array([0, 3, 5])), shape=(2, 4))
    x = DiskCounts(put_matrix(tmp_path / "x.h5ad", messy))[:]
    assert x.has_canonical_format and x.toarray().tolist() == [[0, 2, 0, 1], [1, 0, 1, 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.sampled_from(["log1p", "none"]), st.integers(1, 40), st.integers(0, 99))
def test_reader_is_a_cell_reader(tmp_path_factory, n, genes, transform, limit, seed):
    x = sparse_counts(n, genes, 0.3, seed)
    groups = np.random.default_rng(seed).integers(0, 3, n)
    memory = CellReader(x, transform=transform)
    path = put_matrix(tmp_path_factory.mktemp("x") / "x.h5ad", x)
    whole = DiskReader(DiskCounts(path), transform=transform)
    with patch.object(large, "SLICE", limit):
        disk = DiskReader(DiskCounts(path), groups=groups, n_groups=3, transform=transform)
        again = disk.group_sums(groups[::-1].copy(), 3)
    assert (disk.n_obs, disk.n_vars, len(disk)) == (memory.n_obs, memory.n_vars, len(memory))
    assert np.array_equal(disk.library_size, memory.library_size) and disk.digest == whole.digest
    assert np.array_equal(disk.gene_sums, np.asarray(x.sum(0, dtype=np.float64)).ravel())
    rows = np.random.default_rng(seed).integers(0, n, 7)
    for asked in (rows, slice(1, n), np.arange(n) % 3 == 0):
        assert np.array_equal(disk.read(asked), memory.read(asked))
    assert all(np.array_equal(a, b) for a, b in zip(disk.blocks(4), memory.blocks(4), strict=True))
    assert np.array_equal(disk.mean(), memory.mean())
    dense = memory.read(slice(None)).astype(np.float64)
    for sums, own in ((disk.group_sums(groups, 3), groups), (again, groups[::-1])):
        assert np.allclose(sums, [dense[own == k].sum(0) for k in range(3)], rtol=1e-6)
    assert np.array_equal(disk.as_counts().read(slice(None)), x.toarray())
    assert np.array_equal(disk.in_memory(np.arange(n)[::2]).read(slice(None)), memory.read(np.arange(n)[::2]))


def test_digest_tells_cells_apart(tmp_path):
    x = sparse_counts(9, 5, 0.5, 0)
    other = x.copy()
    other.data[3] += 1
    digests = {DiskReader(DiskCounts(put_matrix(tmp_path / f"{i}.h5ad", m))).digest for i, m in enumerate((x, other, x[::-1], x))}
    assert len(digests) == 3


# ---- what is refused


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: sp.csc_matrix(x), "X of cells.h5ad is CSC, .* rewrite it once: adata.X = adata.X.tocsr()"),
        (lambda x: x.toarray(), "X of cells.h5ad is dense, .* adata.X = scipy.sparse.csr_matrix"),
        (lambda x: x * np.float32(np.nan), "X of cells.h5ad holds NaN or infinite values; put raw counts there"),
        (lambda x: -x, "X of cells.h5ad holds negative values"),
        (lambda x: x * 0.7, "X of cells.h5ad holds non-integer values .* it looks"),
        (lambda x: sp.vstack([x[:5], sp.csr_matrix((2, x.shape[1])), x[7:]], format="csr"), "has 2 cells without a single count, e.g. 'cell0_5'"),
    ],
)
def test_matrices_that_are_refused(tmp_path, change, message):
    cells = planted_cells(40, 8)
    cells.X = change(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=message) as error:
        SCLD(tmp_path / "cells.h5ad")
    assert "\n" not in str(error.value)


def test_a_layer_is_named_in_the_mend(tmp_path):
    cells = planted_cells(20, 5)
    cells.layers["umi"] = cells.X.toarray()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=r"layers\['umi'\] of cells.h5ad is dense.*adata.layers\['umi'\] = scipy.sparse.csr_matrix\(adata.layers"):
        DiskCounts(tmp_path / "cells.h5ad", layer="umi")
    with pytest.raises(InputError, match="no layer 'x'; layers there: umi"):
        DiskCounts(tmp_path / "cells.h5ad", layer="x")


def test_files_that_are_refused(tmp_path, file):
    with pytest.raises(InputError, match="no such file: .*nothing.h5ad"):
        SCLD(tmp_path / "nothing.h5ad")
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(InputError, match="not HDF5, or cut off"):
        open_cells(tmp_path / "text.h5ad")
    shutil.copy(file, tmp_path / "half.h5ad")
    cut_off(tmp_path / "half.h5ad")
    with pytest.raises(InputError, match="cannot read .*half.h5ad"):
        SCLD(tmp_path / "half.h5ad", "cell_type")
    with h5py.File(tmp_path / "empty.h5ad", "w"):
        pass
    with pytest.raises(InputError, match="X of empty.h5ad is empty"):
        open_cells(tmp_path / "empty.h5ad")
    with h5py.File(tmp_path / "old.h5ad", "w") as old:
        old.create_group("X").attrs["h5sparse_format"] = "csr"
    with pytest.raises(InputError, match="rewrite it with a current anndata"):
        open_cells(tmp_path / "old.h5ad")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"indptr": np.array([0, 2, 99])}, "do not fit together"),
        ({"indptr": np.array([0, 3, 2])}, "do not fit together"),
        ({"indptr": np.array([0, 3])}, "do not fit together"),
        ({"indices": np.array([0, 1, 7])}, "names columns beyond its 4 genes"),
        ({"indices": np.array([0, 1, -1])}, "names columns beyond its 4 genes"),
        ({"data": np.array([b"a", b"b", b"c"])}, "has dtype .*; give numbers"),
    ],
)
def test_damaged_arrays_are_refused_before_they_reach_compiled_code(tmp_path, replaced, message):
    x = sp.csr_matrix(np.array([[1, 0, 2, 0], [0, 0, 0, 3]], dtype=np.float32))
    with pytest.raises(InputError, match=message):
        DiskReader(DiskCounts(put_matrix(tmp_path / "x.h5ad", x, **replaced)))


def test_a_file_that_is_overwritten_while_it_is_read_is_refused(tmp_path):
    """In place, as `cp` does it; a new file under the old name leaves the open one as it is."""
    path, cells = tmp_path / "a.h5ad", planted_cells(60)
    cells.write_h5ad(path), planted_cells(60, seed=1).write_h5ad(tmp_path / "b.h5ad")
    (tmp_path / "c.h5ad").write_bytes(path.read_bytes())
    os.replace(tmp_path / "c.h5ad", path)
    open_first = open_cells(path)
    path.rename(tmp_path / "moved.h5ad")
    shutil.copy(tmp_path / "b.h5ad", path)                      # another file
    assert same(open_first.counts[:], cells.X) and open_first.obs("cell_type").shape == (60, 1)
    reader = open_first.reader()
    shuffle = BlockShuffle(reader, 8, seed=0, stage="a", block=8, buffer=2)
    assert shuffle.read(0).shape == (8, 60)
    shutil.copyfile(tmp_path / "b.h5ad", tmp_path / "moved.h5ad")
    with pytest.raises(InputError, match=r"a.h5ad was changed while it was read; start again") as caught:
        for step in range(1, 12):
            shuffle.read(step)
    shuffle.close()
    assert "\n" not in str(caught.value)
    for read in (lambda: open_first.counts[:3], lambda: open_first.take(np.arange(5)).counts[:], lambda: open_first.obs("cell_type")):
        with pytest.raises(InputError, match="was changed while it was read"):
            read()


def test_rows_beyond_the_file(tmp_path):
    counts = DiskCounts(put_matrix(tmp_path / "x.h5ad", sparse_counts(4, 3, 0.5, 0)))
    for rows in ([4], [-1]):
        with pytest.raises(IndexError):
            counts[np.array(rows)]


def test_names_and_labels_that_are_refused(tmp_path):
    cells = planted_cells(30, 6)
    cells.var_names = ["a", "a", *cells.var_names[2:]]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="var_names repeat 1 times, e.g. 'a'"):
        open_cells(tmp_path / "cells.h5ad")
    planted_cells(30, 6).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="no column 'louvain' in obs; it has: cell_type"):
        SCLD(tmp_path / "cells.h5ad", "louvain")
    with pytest.raises(InputError, match="no column 'louvain' .* cannot be computed from disk; name a column .*--labels"):
        load_on_disk(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="nothing is left of 30 x 6"):
        load_on_disk(tmp_path / "cells.h5ad", labels="cell_type", min_genes=7)


# ---- cells, filters, split


def test_load_and_split_are_those_in_memory(tmp_path):
    cells = planted_cells(250, 40, seed=5)
    x = cells.X.toarray()
    x[3] = 0
    x[3, :4] = 1            # too few genes
    x[:, 7] = 0
    x[[3, 9, 11], 7] = 1    # in three cells, one of which is filtered
    cells.X = sp.csr_matrix(x)
    cells.obs["type"] = np.where(cells.obs["cell_type"] == "B", 10, 9)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    memory, disk = load(tmp_path / "cells.h5ad", labels="type"), load_on_disk(tmp_path / "cells.h5ad", labels="type")
    assert (disk.n_obs, disk.n_vars) == memory.shape == (249, 39)
    assert list(disk.var_names) == list(memory.var_names) and same(disk.counts[:], memory.layers["counts"])
    assert list(disk.obs("type")["type"].cat.categories) == list(memory.obs["type"].cat.categories) == ["9", "10"]
    assert {k: v for k, v in memory.uns["scld_data"].items() if k in disk.uns["scld_data"]} == disk.uns["scld_data"]
    for part, other in zip(split_on_disk(disk, seed=3), default_split(memory, seed=3), strict=True):
        assert part.names(np.arange(part.n_obs)) == list(other.obs_names)
        assert same(part.counts[:], other.layers["counts"])
        assert part.obs("type")["type"].tolist() == other.obs["type"].tolist() and part.uns["scld_data"]["split"] == other.uns["scld_data"]["split"]
    train, test = split_on_disk(disk, most=20)
    assert test.n_obs <= 20 and train.n_obs == disk.n_obs - test.n_obs


def test_to_memory_and_columns(file):
    whole, cells = ad.read_h5ad(file), open_cells(file)
    some = cells.take(np.arange(0, 300, 7), np.array([5, 2]))
    back = some.to_memory(np.array([1, 4]), columns=["cell_type"])
    assert list(back.obs_names) == ["cell0_7", "cell0_28"] and list(back.var_names) == ["gene5", "gene2"]
    assert same(back.X, whole[[7, 28], [5, 2]].X) or np.array_equal(back.X.toarray(), whole.X[[7, 28]][:, [5, 2]].toarray())
    assert back.obs["cell_type"].tolist() == whole.obs["cell_type"].iloc[[7, 28]].tolist()
    assert cells.columns == ["cell_type"] and open_cells(cells) is cells and some.names(np.array([], int)) == []


# ---- statistics


def test_statistics_of_the_model_are_those_in_memory(file, monkeypatch):
    whole = planted_cells()
    codes = whole.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
    monkeypatch.setattr(large, "SLICE", 700)
    disk, memory = open_cells(file).reader(groups=codes, n_groups=3), CellReader(whole.X)
    assert np.allclose(cluster_means(disk, codes, 3), cluster_means(memory, codes, 3), rtol=1e-6)
    with pytest.raises(InputError, match="cluster 3 has no training cell"):
        cluster_means(disk, codes, 4)
    for a, b in zip(count_start(disk), count_start(whole.X), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 2**26])
def test_latents_are_those_in_memory(file, limit, monkeypatch, tmp_path):
    monkeypatch.setattr(large.scratch_array, "__kwdefaults__", {"folder": None, "limit": limit})
    whole, disk = planted_cells(), open_cells(file).reader()
    torch.manual_seed(0)
    plain = Autoencoder(60, 4, hidden=8)
    raw = fit_latent_statistics_on_disk(plain, disk, device=CPU, size=64, folder=tmp_path, standardize=False)
    assert plain.latent_std.eq(1).all() and raw.mean(0).abs().max() > 1e-3
    found = fit_latent_statistics_on_disk(plain, disk, device=CPU, size=64, folder=tmp_path)
    own = plain.latent_mean.clone(), plain.latent_std.clone()
    expected = fit_latent_statistics(plain, CellReader(whole.X), device=CPU)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(own[0], plain.latent_mean, atol=1e-6) and torch.allclose(own[1], plain.latent_std, rtol=1e-5)
    counts = CountAutoencoder(60, 4, n_cells=300, hidden=16, width=8, start=count_start(whole.X))
    before = {k: v.clone() for k, v in counts.state_dict().items()}
    found = fit_count_statistics_on_disk(counts, disk.as_counts(), device=CPU, size=64, folder=tmp_path)
    own = {k: v.clone() for k, v in counts.state_dict().items()}
    counts.load_state_dict(before)
    expected = fit_count_statistics(counts, CellReader(whole.X, target_sum=None, transform="none"), device=CPU, size=64)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert all(torch.allclose(own[k], v, atol=1e-5) for k, v in counts.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_moments(sizes, seed):
    z = np.random.default_rng(seed).normal(1e6, 1e-2, (sum(sizes), 2))
    moments = Moments(2)
    for block in np.split(z, np.cumsum(sizes)[:-1]):
        moments.add(block)
    assert moments.n == len(z) and np.allclose(moments.mean, z.mean(0), rtol=1e-14)
    assert np.allclose(moments.variance, z.var(0), rtol=1e-5, atol=1e-16)


def test_scratch_arrays(tmp_path, monkeypatch):
    small, big = scratch_array((5, 3), folder=tmp_path), scratch_array((5, 3), folder=tmp_path / "new", limit=59)
    assert type(small) is np.ndarray and isinstance(big, np.memmap) and small.shape == big.shape == (5, 3)
    big[2] = 7
    assert big.sum() == 21 and torch.from_numpy(big)[2, 1] == 7
    assert list((tmp_path / "new").iterdir()) == []          # the file has no name: nothing stays behind

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(large.os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="has no room for .* MiB of latents .No space left on device.; make room"):
        scratch_array((5, 3), folder=tmp_path, limit=0)


# ---- the order of minibatches


class Counting:
    """Stands for a reader: cell i is the number i; remembers what was read."""

    def __init__(self, n: int):
        self.n_obs, self.counts, self.asked = n, sp.csr_matrix((n, 2)), []

    def read_sparse(self, rows):
        numbers = np.arange(*rows.indices(self.n_obs))
        self.asked.append(len(numbers))
        return sp.csr_matrix(numbers[:, None].astype(np.float32) + 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 17), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_every_cell_once_per_epoch_and_a_pure_function_of_the_step(n, batch_size, block, buffer, seed, ahead):
    def make(seed=seed, stage="a", ahead=False):
        return BlockShuffle(Counting(n), batch_size, seed=seed, stage=stage, block=block, buffer=buffer, ahead=ahead)

    shuffle, epochs = make(), 3
    if n <= batch_size:
        assert np.array_equal(shuffle.rows(5), np.arange(n)) and np.array_equal(shuffle.read(5)[:, 0], np.arange(n) + 1)
        return
    steps = -(-epochs * n // batch_size)
    rows = [shuffle.rows(s) for s in range(steps)]
    assert all(len(r) == batch_size for r in rows)
    order = np.concatenate(rows)[: epochs * n].reshape(epochs, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    for s in np.random.default_rng(0).permutation(steps):    # any step first, any instance
        assert np.array_equal(make().rows(int(s)), rows[s])
    reading = make(ahead=ahead)
    try:
        for s in [*range(steps), 0, steps - 1, 1]:
            assert np.array_equal(reading.read(s)[:, 0], rows[s] + 1)
            assert len(reading._held) <= len(reading.order.pieces(s)) and len(reading._coming) <= 1
    finally:
        reading.close()
    if n > 30:
        assert not np.array_equal(order[0], order[1])
        for other in (make(seed=seed + 1), make(stage="b")):
            assert not np.array_equal(np.concatenate([other.rows(s) for s in range(n // batch_size)]), order[0][: n // batch_size * batch_size])


def test_blocks_stay_together_within_a_buffer_only():
    shuffle = BlockShuffle(Counting(640), 64, seed=0, stage="a", block=16, buffer=4, ahead=False)
    first = np.concatenate([shuffle.rows(0)])
    assert len(np.unique(first // 16)) == 4                   # four blocks fill a buffer of 64 cells
    assert (np.diff(first) != 1).mean() > 0.8                 # and are shuffled inside it
    assert len(np.unique(first // 16 // 4)) > 1               # blocks come from different places of the file


def test_a_buffer_is_bounded_in_bytes():
    reader = Counting(10_000)
    reader.counts = sp.csr_matrix(np.ones((10_000, 3)))
    per_block = 8 * running.BLOCK * 3
    with patch.object(running, "BUFFER_BYTES", 5 * per_block):
        assert BlockShuffle(reader, 8, seed=0, stage="a", ahead=False).order.buffer == 5
    with patch.object(running, "BUFFER_BYTES", 1):
        assert BlockShuffle(reader, 8, seed=0, stage="a", ahead=False).order.buffer == 1
    assert BlockShuffle(reader, 8, seed=0, stage="a", ahead=False).order.buffer == running.BUFFER


def test_errors_of_the_thread_are_raised():
    class Failing(Counting):
        def read_sparse(self, rows):
            if len(self.asked) >= 2:
                raise InputError("cut off")
            return super().read_sparse(rows)

    shuffle = BlockShuffle(Failing(60), 10, seed=0, stage="a", block=10, buffer=1)
    with pytest.raises(InputError, match="cut off"):
        for step in range(6):
            shuffle.read(step)
    shuffle.close()


def test_minibatches_choose_by_where_the_cells_are(file, small_blocks):
    memory, disk = CellReader(planted_cells().X), open_cells(file).reader()
    with minibatches(memory, 32, seed=1, stage="a") as batch_of:
        assert np.array_equal(batch_of(3), memory.read(batch_rows(300, 32, 3, seed=1, stage="a")))
    with minibatches(disk, 32, seed=1, stage="a") as batch_of:
        rows = BlockShuffle(disk, 32, seed=1, stage="a", ahead=False).rows(12)
        assert np.array_equal(batch_of(12), memory.read(rows))


# ---- training


def test_a_model_on_disk_starts_as_the_one_in_memory(file, tiny):
    memory, disk = SCLD(planted_cells(), "cell_type", device="cpu", **tiny), SCLD(str(file), "cell_type", device="cpu", **tiny)
    assert (memory.genes, memory.labels, memory.label_counts) == (disk.genes, disk.labels, disk.label_counts)
    assert memory.fingerprint != disk.fingerprint == SCLD(file, "cell_type", device="cpu", **tiny).fingerprint
    for part in ("autoencoder", "denoiser", "scorer"):
        for a, b in zip(getattr(memory, part).state_dict().values(), getattr(disk, part).state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    latents, again = (encode_cells(model.autoencoder, model._reader, device=torch.device("cpu")) for model in (memory, disk))
    assert np.allclose(latents, again, atol=1e-4)


def test_a_backed_anndata_stays_on_disk_and_a_part_of_it_does_not(file, tiny):
    backed = ad.read_h5ad(file, backed="r")
    backed.obs["mine"] = pd.Categorical(np.where(np.arange(300) < 100, "x", "y"))
    model = SCLD(backed, "mine", device="cpu", **tiny)
    assert isinstance(model._reader, DiskReader) and model.label_counts == [100, 200]
    with pytest.raises(InputError, match="a part of a backed AnnData"):
        open_cells(backed[:50])
    assert not isinstance(SCLD(backed[:50], device="cpu", **tiny)._reader, DiskReader)


def test_other_cells_on_disk_are_encoded(file, tiny, tiny_model, tmp_path):
    mixed = planted_cells(80, seed=7)[:, ::-1].copy()
    mixed.write_h5ad(tmp_path / "mixed.h5ad")
    assert np.allclose(tiny_model.get_latent_representation(tmp_path / "mixed.h5ad"), tiny_model.get_latent_representation(mixed), atol=1e-6)
    mixed[:, 3:].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(InputError, match="3 of the model's 60 genes are missing"):
        tiny_model.get_latent_representation(tmp_path / "few.h5ad")


@pytest.mark.parametrize("head", ["mse", "zinb"])
def test_resume_on_disk_equals_an_uninterrupted_run(file, tiny, head, tmp_path, monkeypatch, small_blocks):
    """Broken off within an epoch of each stage; 300 cells are 4.7 batches of 64 and 10 buffers."""
    options = tiny | {"head": head}
    if head == "mse":
        monkeypatch.setattr(large.scratch_array, "__kwdefaults__", {"folder": None, "limit": 0})
    steps = {"max_steps": 20, "ae_steps": 25, "progress": False}
    whole = SCLD(file, "cell_type", device="cpu", **options).train(**steps)
    read, rows = BlockShuffle.read, training.batch_rows
    broken = {"autoencoder": 13, "denoiser": 12}

    def failing_read(self, step):
        if broken.get("autoencoder") == step:
            raise ConnectionError
        return read(self, step)

    def failing_rows(n, size, step, *, seed, stage):
        if broken.get(stage) == step:
            raise ConnectionError
        return rows(n, size, step, seed=seed, stage=stage)

    with patch.object(BlockShuffle, "read", failing_read), patch.object(training, "batch_rows", failing_rows):
        for stage in ("autoencoder", "denoiser"):
            with pytest.raises(ConnectionError):
                SCLD(file, "cell_type", device="cpu", **options).train(**steps, checkpoint_dir=tmp_path, checkpoint_every=10, resume=True)
            assert (tmp_path / f"{stage}.safetensors").exists()
            del broken[stage]
        resumed = SCLD(file, "cell_type", device="cpu", **options).train(**steps, checkpoint_dir=tmp_path, resume=True)
    for part in ("autoencoder", "denoiser", "scorer"):
        for key, value in getattr(whole, part).state_dict().items():
            assert torch.equal(value, getattr(resumed, part).state_dict()[key]), (part, key)
    assert whole.history["denoiser"]["losses"] == resumed.history["denoiser"]["losses"]
    assert np.isfinite(whole.history["autoencoder"]["losses"][-1]) and np.isfinite(whole.history["scorer"]["loss"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["autoencoder.safetensors", "denoiser.safetensors"]


def test_training_never_reads_more_than_a_slice_at_a_time(file, tiny, monkeypatch, small_blocks):
    """All reads of HDF5 are seen here, whoever makes them; a buffer of 32 cells is read in two or more."""
    longest, original = {}, h5py.Dataset.__getitem__

    def seen(self, key, *args, **kwargs):
        out = original(self, key, *args, **kwargs)
        longest[self.name] = max(longest.get(self.name, 0), np.size(out))
        return out

    monkeypatch.setattr(h5py.Dataset, "__getitem__", seen)
    monkeypatch.setattr(large, "SLICE", 500)
    SCLD(file, "cell_type", device="cpu", **tiny | {"head": "zinb"}).train(5, ae_steps=12, progress=False, scorer=False)
    nnz = planted_cells().X.nnz
    assert longest["/X/data"] <= 500 < nnz / 20 and longest["/X/indices"] <= 500
    assert longest["/X/indptr"] == 301


def test_a_model_on_disk_learns(file, tiny, small_blocks):
    model = SCLD(file, "cell_type", device="cpu", **tiny).train(150, ae_steps=300, progress=False)
    losses = model.history["autoencoder"]["losses"]
    assert losses[-1] < 0.8 * losses[0]
    drawn = model.sample(60, keep=1, progress=False)
    assert drawn.shape == (60, 60) and drawn.obs["cell_type"].value_counts().to_dict() == {"B": 36, "NK": 18, "T": 6}


# ---- the growing file


def some_cells(n: int, seed: int = 0) -> ad.AnnData:
    cells = planted_cells(n, 12, seed=seed)
    cells.X = cells.X.astype(np.int32)
    cells.obs["score"] = np.random.default_rng(seed).random(n)
    cells.obs["n"] = np.arange(n)
    cells.obs["ok"] = np.arange(n) % 2 == 0
    cells.obs["text"] = [f"t{i}" for i in range(n)]
    return cells


def test_written_in_chunks_is_written_whole(tmp_path):
    cells = some_cells(50)
    cells.obs.loc[cells.obs_names[:3], "cell_type"] = np.nan
    with CellWriter(tmp_path / "x.h5ad", chunk=16) as writer:
        for i in range(0, 50, 20):
            writer.append(cells[i : i + 20].copy())
        writer.uns = {"a": {"b": 1}}
        assert (writer.n_obs, writer.nnz) == (50, cells.X.nnz) and not (tmp_path / "x.h5ad").exists()
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    assert same(found.X, cells.X) and found.X.dtype == np.int32 and found.uns["a"]["b"] == 1
    assert found.X.indptr.dtype == found.X.indices.dtype == np.int32
    found.X.eliminate_zeros()                                  # in place, as rank_genes_groups does it
    pd.testing.assert_frame_equal(found.obs, cells.obs, check_dtype=False, check_categorical=False)
    assert list(found.obs["cell_type"].cat.categories) == ["B", "NK", "T"] and found.obs["cell_type"].isna().sum() == 3
    assert found.obs["n"].dtype == cells.obs["n"].dtype and found.obs["ok"].dtype == bool
    assert list(found.var_names) == list(cells.var_names)
    assert ad.read_h5ad(tmp_path / "x.h5ad", backed="r").X[10:12].sum() == cells.X[10:12].sum()
    assert same(DiskCounts(tmp_path / "x.h5ad")[:], cells.X.astype(np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]


@pytest.mark.parametrize("first, second", [([1, 2], [1.5, np.nan]), ([1, 2], [2**70, 1.0]), ([1.0, 2.0], ["a", "b"]), (["a", "b"], [1, 2]),
                                           ([True, False], [3, 4]), (np.array([1, 2], np.uint8), [-1, 300]),
                                           (pd.Categorical(["a", "b"]), ["a", "b"]), (["a", "b"], pd.Categorical([1, 2])), (["a", "b"], pd.Categorical(["a", None]))])
def test_values_that_would_change_among_those_of_the_first_chunk_are_refused(tmp_path, first, second):
    def cells(column):
        return ad.AnnData(sp.csr_matrix(np.ones((2, 3), np.float32)), obs=pd.DataFrame({"a": column}, index=["x", "y"]))

    with CellWriter(tmp_path / "cells.h5ad") as writer:
        writer.append(cells(first))
        with pytest.raises(InputError, match="obs\\['a'\\] was .* one type in all chunks"):
            writer.append(cells(second))
        writer.append(cells(first))                            # nothing of the refused ones was written
    assert ad.read_h5ad(tmp_path / "cells.h5ad").obs.a.tolist() == 2 * pd.Series(first).tolist()


def test_counts_do_not_take_fractions_and_fractions_take_counts(tmp_path):
    def cells(kind):
        return ad.AnnData(sp.csr_matrix(np.full((2, 3), 2.5).astype(kind)), obs=pd.DataFrame({"a": ["u", "v"]}, index=["x", "y"]))

    with CellWriter(tmp_path / "counts.h5ad") as writer:
        writer.append(cells(np.int32))
        with pytest.raises(InputError, match="X was int32 in the cells before and is float32 now"):
            writer.append(cells(np.float32))
    with CellWriter(tmp_path / "fractions.h5ad") as writer:
        for kind in (np.float32, np.float64, np.int32):
            cells_now = cells(kind)
            cells_now.obs["a"] = cells_now.obs["a"].astype("category" if kind is np.int32 else object)
            writer.append(cells_now)
    back = ad.read_h5ad(tmp_path / "fractions.h5ad")
    assert back.X.toarray()[:, 0].tolist() == [2.5, 2.5, 2.5, 2.5, 2.0, 2.0] and back.obs.a.tolist() == ["u", "v"] * 3


def test_categories_of_chunks_that_do_not_agree_are_their_sorted_union(tmp_path):
    with CellWriter(tmp_path / "x.h5ad", compress=False) as writer:
        for names in (["b", "d"], ["d", "a"], ["c"]):
            chunk = some_cells(len(names))
            chunk.obs["cell_type"] = pd.Categorical(names)
            writer.append(chunk)
    found = ad.read_h5ad(tmp_path / "x.h5ad").obs["cell_type"]
    assert list(found.cat.categories) == list("abcd") and found.tolist() == ["b", "d", "d", "a", "c"]


def test_a_file_is_complete_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "x.h5ad"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), CellWriter(path) as writer:
        writer.append(some_cells(5))
        1 / 0  # noqa: B018
    with pytest.raises(InputError, match="no cells for x.h5ad"), CellWriter(path):
        pass
    with pytest.raises(InputError, match="must have the genes and columns"), CellWriter(path) as writer:
        writer.append(some_cells(5))
        writer.append(some_cells(5)[:, :3].copy())
    monkeypatch.setattr(growing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="No space left on device"), CellWriter(path) as writer:
        writer.append(some_cells(5))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]


REFUSING = """
import os, resource, signal, sys, warnings
sys.path.insert(0, {tests!r})
from test_large import CellWriter, some_cells
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cells, path = some_cells(3000), {path!r}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with CellWriter(path, chunk=512) as writer:
    writer.append(cells)
whole = os.path.getsize(path)
for limit in (*range(0, whole, whole // 40), whole - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with CellWriter(path, chunk=512) as writer:
            for first in range(0, 3000, 300):
                writer.append(cells[first:first + 300].copy())
            writer.uns = {{"scld": {{"seed": 1}}}}
        print("written")
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert os.listdir(os.path.dirname(path)) == ["x.h5ad"] and os.path.getsize(path) == whole
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_refuses_is_an_error_and_no_crash(tmp_path):
    """A limit on the size of a file, reached anywhere: HDF5 may crash when one of its writes fails."""
    code = REFUSING.format(tests=str(Path(__file__).parent), path=str(tmp_path / "x.h5ad"))
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert set(done.stdout.splitlines()) == {f"[Errno 27] File too large: '{tmp_path / 'x.h5ad'}'"} and len(done.stdout.splitlines()) >= 41
    assert "HDF5-DIAG" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_file_that_hdf5_reads_again_though_it_was_refused(tmp_path):
    """What the disk does not take is there for HDF5, which would else stumble over zeros."""
    disk = growing._Unfailing(tmp_path / "x", tmp_path / "x")
    disk.write(b"abcdef")
    disk._keep(OSError(28, "No space left on device"))
    disk.seek(4), disk.write(b"EFGH"), disk.seek(6), disk.write(b"gh"), disk.seek(12), disk.write(b"z")
    disk.seek(2)
    read = bytearray(12)
    assert disk.readinto(read) == 12 and bytes(read) == b"cdEFgh\0\0\0\0z\0" and (tmp_path / "x").read_bytes() == b"abcdef"
    with pytest.raises(OSError, match="No space left"), disk:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_chunk_is_written(tmp_path, number):
    """HDF5 calls back into Python, and must not meet the error that a signal raises."""
    def stop(*_):
        raise KeyboardInterrupt("heard")

    def write(self, data):
        signal.raise_signal(number)
        written.append(original(self, data))
        return written[-1]

    written, original, before = [], growing._Unfailing.write, signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt, match="heard"), CellWriter(tmp_path / "x.h5ad", chunk=16) as writer, \
                patch.object(growing._Unfailing, "write", write):
            writer.append(some_cells(50))
        assert len(written) > 3 and not list(tmp_path.iterdir()) and signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


# ---- cells without end


def test_one_chunk_is_sample(tiny_model, tmp_path):
    whole = tiny_model.sample(40, seed=4, sampling_steps=4, progress=False)
    (chunk,) = tiny_model.sample_chunks(40, seed=4, sampling_steps=4, progress=False)
    facts = tiny_model.sample_to(tmp_path / "x.h5ad", 40, seed=4, sampling_steps=4, progress=False)
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    for other in (chunk, found):
        assert same(other.X, whole.X) and other.X.dtype == whole.X.dtype and list(other.var_names) == list(whole.var_names)
        pd.testing.assert_frame_equal(other.obs, whole.obs, check_index_type=False)
    assert facts == whole.uns["scld"] and dict(found.uns["scld"].items()) == facts


@pytest.mark.parametrize("scope", ["label", "all"])
def test_chunks_have_the_labels_of_the_whole(tiny_model, scope):
    n, size, keep = 100, 33, 0.8
    with patch.object(tiny_model, "config", type(tiny_model.config)(**{**tiny_model.config.__dict__, "scope": scope})):
        chunks = list(tiny_model.sample_chunks(n, chunk_size=size, seed=2, keep=keep, sampling_steps=2, progress=False))
    assert [c.n_obs for c in chunks] == [33, 33, 33, 1]
    assert [name for c in chunks for name in c.obs_names] == [f"scld_{i}" for i in range(n)]
    if scope == "label":
        total = sum(c.obs["cell_type"].value_counts().reindex(tiny_model.labels).to_numpy() for c in chunks)
        assert total.tolist() == proportional(n, tiny_model.label_counts).tolist()
        for chunk in chunks:                                  # the Scorer's share holds for each label of each chunk
            m = chunk.obs["cell_type"].value_counts()
            assert chunk.uns["scld"]["generated"] == sum(n_to_generate(int(k), keep) for k in m if k)
    else:
        assert [c.uns["scld"]["generated"] for c in chunks] == [n_to_generate(c.n_obs, keep) for c in chunks]


def test_chunk_is_sample_with_a_seed_of_its_own(tiny_model):
    options = {"sampling_steps": 3, "progress": False, "omega": 0.5}
    chunks = list(tiny_model.sample_chunks(50, "NK", chunk_size=20, seed=9, **options))
    for i, chunk in enumerate(chunks):
        own = tiny_model.sample(chunk.n_obs, "NK", seed=counter_seed(9, "chunk", i) if i else 9, **options)
        assert same(chunk.X, own.X) and np.array_equal(chunk.obs["score"], own.obs["score"]) and chunk.obs["cell_type"].eq("NK").all()
    assert not same(chunks[0].X, chunks[1].X)
    holistic = list(tiny_model.sample_chunks(12, chunk_size=5, seed=9, sampling_steps=2, progress=False, omega=-1))
    assert all(c.obs["cell_type"].isna().all() for c in holistic)


def test_a_file_of_chunks(tiny_model, tmp_path):
    options = {"chunk_size": 30, "sampling_steps": 3, "progress": False}
    sizes, append = [], CellWriter.append

    def seen(self, cells):
        sizes.append(cells.n_obs)
        append(self, cells)

    with patch.object(CellWriter, "append", seen):
        facts = tiny_model.sample_to(tmp_path / "a.h5ad", 100, seed=5, **options)
    assert sizes == [30, 30, 30, 10] and facts["chunks"] == 4 and facts["chunk_size"] == 30 and facts["seed"] == 5
    tiny_model.sample_to(tmp_path / "b.h5ad", 100, seed=5, **options)
    tiny_model.sample_to(tmp_path / "c.h5ad", 100, seed=6, **options)
    a, b, c = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "abc")
    assert same(a.X, b.X) and a.obs.equals(b.obs) and not same(a.X, c.X)
    chunks = list(tiny_model.sample_chunks(100, seed=5, **options))
    assert same(a.X, sp.vstack([chunk.X for chunk in chunks]))
    assert a.obs["cell_type"].tolist() == [label for chunk in chunks for label in chunk.obs["cell_type"]]
    assert list(a.obs["cell_type"].cat.categories) == tiny_model.labels and a.uns["scld"]["generated"] == facts["generated"]
    assert np.array_equal(a.obs["score"], np.concatenate([chunk.obs["score"] for chunk in chunks]))


def test_sampling_to_a_file_that_fails_leaves_nothing(tiny_model, tmp_path):
    def full(self, cells):
        raise OSError(28, "No space left on device")

    with patch.object(CellWriter, "append", full), pytest.raises(OSError, match="No space left"):
        tiny_model.sample_to(tmp_path / "x.h5ad", 9, chunk_size=4, sampling_steps=2, progress=False)
    with pytest.raises(InputError, match="unknown label 'Z'"):
        tiny_model.sample_to(tmp_path / "x.h5ad", 9, "Z", progress=False)
    with pytest.raises(InputError, match="chunk_size must be a whole number"):
        tiny_model.sample_to(tmp_path / "x.h5ad", 9, chunk_size=0, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- the command line

SET = "--set T=20 --set beta_T=0.6 --set latent=16 --set hidden=32 --set widths=64,32 --set e_width=16 --set batch_size=64 --head mse"


def call(line: str) -> int:
    return main(shlex.split(line))


def test_round_trip_of_the_command_line(file, tmp_path, capsys):
    line = f"train {file} -o {tmp_path}/m --labels cell_type --steps 30 --ae-steps 40 --device cpu {SET} --backed"
    assert call(line) == 0
    out = capsys.readouterr().out
    memory = load(file, labels="cell_type")
    train, test = default_split(memory)
    assert f"training on {train.n_obs} cells x 60 genes, 3 labels in 'cell_type', {test.n_obs} test cells kept apart" in out
    kept, sampled = (ad.read_h5ad(tmp_path / "m" / f"{name}.h5ad") for name in ("test", "train"))
    assert list(kept.obs_names) == list(test.obs_names) and same(kept.X, test.layers["counts"])
    assert kept.obs["cell_type"].tolist() == test.obs["cell_type"].tolist() and kept.uns["scld_data"]["labels_key"] == "cell_type"
    assert sampled.n_obs == test.n_obs and set(sampled.obs_names) <= set(train.obs_names)   # for the controls
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(
        ["config.json", "genes.txt", "labels.json", "test.h5ad", "train.h5ad", "weights.safetensors"]
    )
    assert call(line + " --resume") == 0 and "trained already" in capsys.readouterr().out
    sample = f"sample {tmp_path}/m -n 1_50 --sampling-steps 3 --chunk-size 40 --device cpu"
    assert call(f"{sample} -o {tmp_path}/a.h5ad") == 0 and "wrote 150 cells x 60 genes" in capsys.readouterr().out
    assert call(f"{sample} -o {tmp_path}/b.h5ad") == 0
    a, b = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(tmp_path / "b.h5ad")
    assert a.shape == (150, 60) and same(a.X, b.X) and a.uns["scld"]["chunks"] == 4


def test_no_split_on_disk(file, tmp_path):
    assert call(f"train {file} -o {tmp_path}/m --labels cell_type --steps 2 --ae-steps 2 --device cpu {SET} --backed --no-split") == 0
    assert not list((tmp_path / "m").glob("*.h5ad"))
    assert sum(json.loads((tmp_path / "m/labels.json").read_text())["counts"]) == load(file, labels="cell_type").n_obs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train pbmc68k_reduced -o m --backed", "--backed is for an .h5ad file, 'pbmc68k_reduced' is a known data set"),
        ("train nothing.h5ad -o m --backed", "no such file: nothing.h5ad"),
        ("train {file} -o m --backed", "no column 'louvain' in obs of cells.h5ad, and clusters cannot be computed from disk"),
        ("train {file} -o m --backed --labels x", "no column 'x' in obs; it has: cell_type"),
        ("train {file} -o m --backed --labels cell_type --layer raw", "no layer 'raw'; layers there: none"),
    ],
)
def test_errors_of_the_command_line(file, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    assert call(line.format(file=file)) == 2
    err = capsys.readouterr().err
    assert err.startswith("scld: error: ") and message in err and err.count("\n") == 1


def test_a_full_disk_is_said_before_training(file, tmp_path, monkeypatch, capsys):
    from scld_nb import checks

    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert call(f"train {file} -o {tmp_path}/m --labels cell_type --steps 2 --device cpu {SET} --backed") == 2
    assert "MiB free, training needs about" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_names_that_may_be_missing_are_read_as_well(tmp_path):
    cells = planted_cells(60, seed=3)
    cells.obs.index = cells.obs.index.astype("string")
    before = ad.settings.allow_write_nullable_strings
    try:
        ad.settings.allow_write_nullable_strings = True
        cells.write_h5ad(tmp_path / "cells.h5ad")
    finally:
        ad.settings.allow_write_nullable_strings = before
    found = open_cells(tmp_path / "cells.h5ad")
    assert found.n_obs == 60 and found.names(np.array([3, 7])) == [cells.obs_names[3], cells.obs_names[7]]


def test_a_label_column_may_be_called_place(tmp_path):
    cells = planted_cells(60, seed=3)
    cells.obs["place"] = cells.obs["cell_type"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    train, test = split_on_disk(load_on_disk(tmp_path / "cells.h5ad", labels="place"))
    assert set(train.obs("place")["place"]) == {"B", "NK", "T"} and train.n_obs + test.n_obs == 60


def test_the_empty_cell_that_is_named_may_be_in_any_slice(tmp_path, monkeypatch):
    cells = planted_cells(40, 8)
    cells.X = sp.vstack([cells.X[:25], sp.csr_matrix((1, 8)), cells.X[26:]], format="csr")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(large, "SLICE", 50)
    with pytest.raises(InputError, match="has 1 cells without a single count, e.g. 'cell0_25'"):
        open_cells(tmp_path / "cells.h5ad").reader()


def test_digest_sees_which_genes_and_which_cells_have_the_counts(tmp_path):
    same_values = ([[1, 1, 0], [0, 0, 1]], [[1, 0, 1], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]])
    paths = [put_matrix(tmp_path / f"{i}.h5ad", sp.csr_matrix(np.array(x, dtype=np.float32))) for i, x in enumerate(same_values)]
    assert len({DiskReader(DiskCounts(path)).digest for path in paths}) == 3


def test_plain_counts_stay_plain_in_memory_and_in_sums(tmp_path):
    x, groups = sparse_counts(20, 6, 0.5, 0), np.arange(20) % 3
    counts = DiskReader(DiskCounts(put_matrix(tmp_path / "x.h5ad", x)), groups=groups, n_groups=3).as_counts()
    assert np.array_equal(counts.group_sums(groups, 3), [x.toarray()[groups == k].sum(0) for k in range(3)])
    assert same(counts.in_memory(np.array([3, 7])).read_sparse(slice(None)), x[[3, 7]])


def test_entries_are_those_of_the_chosen_cells(tmp_path):
    x = sparse_counts(30, 6, 0.5, 0)
    some = DiskCounts(put_matrix(tmp_path / "x.h5ad", x)).take(rows=np.arange(3, 30, 4))
    assert some.nnz == x[3::4].nnz and some.take(rows=np.array([1, 2])).nnz == x[[7, 11]].nnz


def test_the_layer_counts_goes_before_x_unless_x_is_asked_for(tmp_path):
    cells = planted_cells(40, 30)
    cells.layers["counts"], cells.X = cells.X.copy(), cells.X * 2
    cells.write_h5ad(path := tmp_path / "cells.h5ad")
    assert same(DiskCounts(path)[:], cells.layers["counts"]) and same(DiskCounts(path, layer="X")[:], cells.X)
    for layer in (None, "X"):
        assert same(load_on_disk(path, layer=layer, labels="cell_type").counts[:], load(path, layer=layer, labels="cell_type").layers["counts"])


def test_new_columns_of_a_backed_anndata_follow_the_chosen_cells(file):
    backed = ad.read_h5ad(file, backed="r")
    backed.obs["mine"] = [f"m{i}" for i in range(300)]
    some = open_cells(backed).take(np.array([4, 9, 200]))
    assert some.obs("mine")["mine"].tolist() == ["m4", "m9", "m200"]
    last = some.to_memory(np.array([2]), columns=["mine"])
    assert last.obs["mine"].tolist() == ["m200"] and list(last.obs_names) == ["cell0_200"]


def test_filters_on_disk_keep_what_just_reaches_them_and_say_what_goes(tmp_path):
    x = np.ones((6, 12), np.float32)
    x[2:, 10:] = x[3, 0] = 0
    x[3, 10] = 1                                               # g10 is in three cells, one of which has ten genes, and g11 in two
    counts = sp.csr_matrix(x)
    counts.data[-1] = 0                                        # of the last cell nine genes are left
    cells = ad.AnnData(counts, obs=pd.DataFrame({"kind": list("aabbab")}, index=[f"c{i}" for i in range(6)]), var=pd.DataFrame(index=[f"g{j}" for j in range(12)]))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for read in (load, load_on_disk):
        with pytest.warns(UserWarning, match="1 of 6 cells are left out, they have fewer than 10 genes; of genes seen in fewer than 3 cells 1 of 12"):
            found = read(tmp_path / "cells.h5ad", labels="kind")
        assert (found.n_obs, found.n_vars) == (5, 11) and "g10" in found.var_names


def test_a_limited_number_of_test_cells_is_drawn_with_the_seed(file):
    cells = load_on_disk(file, labels="cell_type")
    a, b, c = (split_on_disk(cells, seed=seed, most=20)[1] for seed in (0, 1, 1))
    assert a.rows.tolist() != b.rows.tolist() == c.rows.tolist() and b.uns["scld_data"]["split"]["seed"] == 1


@pytest.mark.parametrize(("n", "genes", "message"), [(299, 60, "has 299 cells, obs has 300"), (300, 59, "has 59 genes, var has 60")])
def test_names_that_do_not_fit_the_matrix(file, tmp_path, n, genes, message):
    shutil.copy(file, tmp_path / "cells.h5ad")
    put_matrix(tmp_path / "x.h5ad", sparse_counts(n, genes, 0.1, 0))
    with h5py.File(tmp_path / "cells.h5ad", "r+") as cells, h5py.File(tmp_path / "x.h5ad") as other:
        del cells["X"]
        other.copy("X", cells)
    with pytest.raises(InputError, match=f"{message}; write the file again"):
        open_cells(tmp_path / "cells.h5ad")


# ------------------------------------------------------------------ what callers give

def test_cells_and_genes_are_taken_by_mask_or_in_order(tmp_path):
    cells = planted_cells()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    there, mask = open_cells(tmp_path / "cells.h5ad"), (cells.obs["cell_type"] == "T").to_numpy()
    some = there.take(mask, np.arange(60) % 2 == 0)
    assert some.n_obs == mask.sum() and set(some.obs("cell_type")["cell_type"]) == {"T"} and list(some.var_names) == list(cells.var_names[::2])
    assert (some.counts[:] != cells.X[mask][:, ::2]).nnz == 0 and list(there.to_memory(mask).obs_names) == list(cells.obs_names[mask])
    for options, message in (({"rows": [5, 2]}, "cells to take must be in ascending order; sort them"), ({"rows": [-1]}, "indices from 0 to 299, got -1"),
                             ({"rows": [3, 300]}, "got 300"), ({"rows": mask[:9]}, "a mask of cells to take must have 300 values, got 9"),
                             ({"genes": [1, 1]}, "genes to take must be named once each"), ({"genes": [60]}, "genes to take must be indices from 0 to 59, got 60")):
        with pytest.raises(InputError, match=message):
            there.take(**{k: np.array(v) for k, v in options.items()})
    with pytest.raises(InputError, match=r"read them by load_on_disk\(path, labels="):
        split_on_disk(there)


def test_a_backed_anndata_has_the_names_it_has_now(tmp_path):
    planted_cells().write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    backed.obs_names = [f"new{i}" for i in range(300)]
    cells = open_cells(backed)
    assert list(cells.to_memory(np.array([3, 8])).obs_names) == ["new3", "new8"] and cells.take(np.array([5, 7, 9])).names(np.array([1])) == ["new7"]


def test_missing_texts_and_nullable_numbers_can_be_written(tmp_path):
    cells = planted_cells(4, 5)
    cells.obs["text"], cells.obs["number"] = ["a", None, np.nan, "b"], pd.array([1, None, 2, 3], dtype="Int64")
    cells.obs["yes"] = pd.array([True, False, None, True], dtype="boolean")
    with CellWriter(tmp_path / "x.h5ad") as file:
        file.append(cells)
        file.append(cells)
    obs = ad.read_h5ad(tmp_path / "x.h5ad").obs
    assert list(obs["text"]) == ["a", "", "", "b"] * 2
    np.testing.assert_array_equal(obs["number"], [1, np.nan, 2, 3] * 2)
    np.testing.assert_array_equal(obs["yes"], [1, 0, np.nan, 1] * 2)


# ---- what genes are called


def test_other_names_of_genes_are_read_and_go_with_the_cells(cells, tiny, tmp_path):
    named = cells.copy()
    named.var["gene_ids"] = [f"ENSG{i:05d}" for i in range(cells.n_vars)]
    named.var["feature_types"] = pd.Categorical(["Gene Expression"] * cells.n_vars)
    named.var["means"] = 0.5
    named.write_h5ad(tmp_path / "cells.h5ad")
    some = np.arange(cells.n_vars) % 3 == 1
    for there in (open_cells(tmp_path / "cells.h5ad"), open_cells(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"))):
        assert list(there.var) == ["gene_ids", "feature_types"]
        part = there.take(genes=some).to_memory(np.arange(3))
        assert part.var["gene_ids"].tolist() == named.var["gene_ids"][some].tolist() and part.var_names.equals(named.var_names[some])
    loaded = load_on_disk(tmp_path / "cells.h5ad", labels="cell_type")
    assert loaded.var["gene_ids"].tolist() == named.var.loc[loaded.var_names, "gene_ids"].tolist()
    assert SCLD(tmp_path / "cells.h5ad", "cell_type", device="cpu", **tiny).var["gene_ids"].tolist() == named.var["gene_ids"].tolist()


def test_names_of_genes_that_cannot_be_read_do_not_stop_a_training(cells, tmp_path):
    named = cells.copy()
    named.var["gene_ids"], named.var["symbol"] = [f"ENSG{i:05d}" for i in range(cells.n_vars)], [f"s{i}" for i in range(cells.n_vars)]
    named.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as f:
        f["var/gene_ids"].attrs["encoding-type"] = "of-the-future"
    with pytest.warns(UserWarning, match="column 'gene_ids' of var cannot be read .* left out"):
        there = open_cells(tmp_path / "cells.h5ad")
    assert list(there.var) == ["symbol"] and there.n_obs == cells.n_obs

"""The data room: fetching, reading, checking, clustering, preprocessing, splitting and reading minibatches.

Downloads run against a server on this machine that serves generated files in the true 10x formats (tenx_server.py).
"""

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from conftest import planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import adjusted_rand_score
from tenx_server import Server, facts, names, planted, standins, surviving_shape, write_h5, write_mex

from scld_nb import data, datasets
from scld_nb.data import (
    DATASETS,
    TARGET_SUM,
    TRANSFORMS,
    CellReader,
    DatasetInfo,
    DownloadError,
    InputError,
    apply_transform,
    cluster,
    counts_matrix,
    data_dir,
    dataset_info,
    default_split,
    fetch,
    file_sha256,
    invert_transform,
    library_normalize,
    load,
    preprocess,
    read_dataset,
    recover_counts,
    register,
    split,
    table2,
)
from scld_nb.large import load_on_disk


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    """Every test has its own cache folder, no mirror, no overrides and no progress bars."""
    monkeypatch.setenv("SCLD_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("IN_TEST", "1")
    for name in ("SCLD_MIRROR", "SCLD_DATASETS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    with standins(tmp_path / "site") as site:
        monkeypatch.setenv("SCLD_DATASETS", site.env["SCLD_DATASETS"])
        yield site


@pytest.fixture(scope="module")
def embedded():
    return load("pbmc68k_reduced")


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    return message


def cached_files():
    return sorted(p.name for p in data_dir().iterdir()) if data_dir().exists() else []


def as_adata(counts, **obs):
    counts = sp.csr_matrix(counts, dtype=np.float32)
    frame = pd.DataFrame(obs, index=[f"cell{i}" for i in range(counts.shape[0])])
    return ad.AnnData(counts, obs=frame, var=pd.DataFrame(index=[f"gene{j}" for j in range(counts.shape[1])]))


# ---------------------------------------------------------------- what is known


def test_the_three_known_sets():
    assert list(DATASETS) == ["pbmc68k_reduced", "pbmc68k", "brain_small"]
    assert dataset_info("pbmc68k").shape == (68_579, 17_789) and dataset_info("pbmc68k").n_test == 7_000
    brain = dataset_info("brain_small")
    assert brain.shape == (20_000, 17_970) and brain.n_test == 2_000
    assert brain.known_hash == "md5:7696db0199a30a36f857e86a1ad1da8d"  # no sha256 is public
    assert dataset_info("pbmc68k").known_hash.startswith("sha256:3f35f37f")
    assert DatasetInfo("x").known_hash is None
    assert all(info.origin == "published" for info in DATASETS.values())


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError) as caught:
        load("brain")
    assert one_line(caught) == ("unknown dataset 'brain'; known: pbmc68k_reduced, pbmc68k, brain_small; "
                                "or give the path of an .h5ad file")


def test_register(monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", dict(DATASETS))
    register(DatasetInfo("mine", url="http://127.0.0.1/x.h5", filename="x.h5"))
    assert dataset_info("mine").filename == "x.h5"


def test_overrides_are_marked(monkeypatch, tmp_path):
    file = tmp_path / "sets.json"
    file.write_text(json.dumps({"brain_small": {"n_test": 5, "shape": [3, 4], "raw_shape": None}, "new": {"tissue": "Skin"}}))
    monkeypatch.setenv("SCLD_DATASETS", str(file))
    info = dataset_info("brain_small")
    assert (info.n_test, info.shape, info.raw_shape, info.origin) == (5, (3, 4), None, "stand-in")
    assert info.md5 == DATASETS["brain_small"].md5 and DATASETS["brain_small"].n_test == 2_000
    assert dataset_info("new").tissue == "Skin"
    assert dataset_info("pbmc68k").origin == "published"
    with pytest.raises(InputError, match="known: .*brain_small, new;"):
        dataset_info("other")
    with pytest.raises(InputError, match="'new' needs 'url' and 'filename'"):
        fetch("new")


@pytest.mark.parametrize("content", ["{", '{"a": {"colour": 1}}', "[1]", '{"a": 3}', '{"a": {"shape": 3}}'])
def test_bad_overrides(monkeypatch, tmp_path, content):
    file = tmp_path / "sets.json"
    file.write_text(content)
    monkeypatch.setenv("SCLD_DATASETS", str(file))
    with pytest.raises(InputError) as caught:
        dataset_info("pbmc68k")
    assert "SCLD_DATASETS=" in one_line(caught)


def test_missing_overrides_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SCLD_DATASETS", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="SCLD_DATASETS="):
        load("pbmc68k_reduced")


def test_data_dir(monkeypatch, tmp_path):
    assert data_dir() == tmp_path / "cache"
    monkeypatch.delenv("SCLD_DATA_DIR")
    assert data_dir().name == "scld_nb"


# ---------------------------------------------------------------- fetching


@pytest.mark.parametrize("name", ["pbmc68k", "brain_small"])
def test_fetch_once_and_verify_each_time(site, name):
    path = fetch(name)
    assert path == data_dir() / site.facts[name]["filename"] and file_sha256(path) == site.facts[name]["sha256"]
    assert fetch(name) == path
    (_, headers), = site.server.requests  # the second call asked nobody
    assert headers["User-Agent"].startswith("scld_nb")  # 10x may refuse Python's default agent
    assert cached_files() == [path.name]


def test_md5_alone_is_verified(site):
    info = replace(dataset_info("brain_small"), sha256=None)
    site.server.behaviour[info.filename] = "wrong"
    with pytest.raises(DownloadError) as caught:
        fetch(info)
    assert f"md5:{info.md5}" in one_line(caught)
    site.server.behaviour.clear()
    assert fetch(info).is_file()


@pytest.mark.parametrize(("how", "why"), [
    ("truncated", "cut off"), ("cut", "another checksum"), ("wrong", "another checksum"),
    (404, "the server answered 404 Not Found"), (403, "answered 403"), (500, "answered 500")])
def test_failed_download_leaves_nothing_and_a_retry_completes(site, how, why):
    info = dataset_info("brain_small")
    site.server.behaviour[info.filename] = how
    with pytest.raises(DownloadError) as caught:
        load("brain_small")
    message = one_line(caught)
    for part in (why, info.url, repr(info.filename), info.known_hash, str(data_dir()), "'brain_small'"):
        assert part in message
    assert cached_files() == []
    site.server.behaviour.clear()
    assert file_sha256(fetch("brain_small")) == info.sha256
    assert cached_files() == [info.filename]


def test_offline(site):
    info = dataset_info("pbmc68k")
    site.server.close()
    with pytest.raises(DownloadError) as caught:
        fetch("pbmc68k")
    assert "no connection to 127.0.0.1" in one_line(caught) and info.known_hash in str(caught.value)
    assert cached_files() == []


def test_a_file_placed_by_hand_needs_no_server(site):
    info = dataset_info("pbmc68k")
    content = (site.server.folder / info.filename).read_bytes()
    site.server.close()
    data_dir().mkdir()
    (data_dir() / info.filename).write_bytes(content)
    assert fetch("pbmc68k").read_bytes() == content


def test_damaged_file_is_noticed_on_the_next_load(site):
    path = fetch("brain_small")
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    assert fetch("brain_small").read_bytes() == good
    path.write_bytes(good[:-10])
    site.server.close()
    with pytest.raises(DownloadError) as caught:
        load("brain_small")
    assert "is there with a wrong checksum" in one_line(caught)


def test_killed_download_leaves_no_file_under_the_final_name(site, tmp_path):
    info = dataset_info("brain_small")
    site.server.behaviour[info.filename] = "stall"
    code = "from scld_nb.data import fetch; fetch('brain_small')"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert site.server.half_sent.wait(120)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert info.filename not in cached_files()
    site.server.behaviour.clear()
    assert file_sha256(fetch("brain_small")) == info.sha256


def test_mirror_keeps_the_path(site, monkeypatch):
    info = replace(dataset_info("pbmc68k"), url="https://unreachable.invalid/samples/a/standin_matrices.tar.gz")
    fetch(info, base_url=site.server.url + "/mirror/")
    assert site.server.requests[-1][0] == "/mirror/samples/a/standin_matrices.tar.gz"
    (data_dir() / info.filename).unlink()
    monkeypatch.setenv("SCLD_MIRROR", site.server.url)
    assert fetch(info).is_file() and site.server.requests[-1][0] == "/samples/a/standin_matrices.tar.gz"


@pytest.mark.parametrize(("asked", "environment", "shown"), [
    (None, {"IN_TEST": "1"}, False), (None, {"TQDM_DISABLE": "1"}, False), (False, {}, False), (True, {"IN_TEST": "1"}, True),
    (None, {}, True)])
def test_progress_bar(site, monkeypatch, capsys, asked, environment, shown):
    for name in ("IN_TEST", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fetch("brain_small", progressbar=asked)
    out = capsys.readouterr()
    assert out.out == "" and ("100%" in out.err) == shown and (shown or out.err == "")


def test_folder_that_cannot_be_made(site, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCLD_DATA_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(DownloadError) as caught:
        fetch("pbmc68k")
    one_line(caught)


def test_why_says_timeouts_plainly():
    import requests

    assert data._why(requests.ReadTimeout("x"), "http://a/b") == "the server did not answer in time"
    assert data._why(OSError("disk\nfull"), "http://a/b") == "disk full"
    assert data._why(requests.HTTPError("refused"), "http://a/b") == "refused"  # one without the server's answer


# ---------------------------------------------------------------- the two formats


def test_mex_equals_scanpys_reader(tmp_path):
    counts, _ = planted(60, 50, 3)
    path = write_mex(tmp_path / "m.tar.gz", counts)
    ours = read_dataset(DatasetInfo("m", kind="10x_mex", genome="hg19"), path=path)
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    theirs = sc.read_10x_mtx(tmp_path / "out" / "filtered_matrices_mex" / "hg19", var_names="gene_symbols")
    assert (ours.X != theirs.X).nnz == 0 and (ours.X != counts).nnz == 0
    assert ours.X.dtype == np.float32 and sp.isspmatrix_csr(ours.X)
    pd.testing.assert_frame_equal(ours.var, theirs.var)
    assert list(ours.obs_names) == list(theirs.obs_names) == names(*counts.shape)[0]
    assert list(ours.var_names[-2:]) == ["GENE0-1", "GENE0-2"]  # repeated symbols made unique


def test_h5_gives_the_counts_written(tmp_path):
    counts, _ = planted(60, 50, 3)
    path = write_h5(tmp_path / "n.h5", counts)
    ours = read_dataset(DatasetInfo("n", genome="mm10"), path=path)
    assert (ours.X != counts).nnz == 0 and ours.shape == counts.shape and ours.var_names.is_unique
    assert list(ours.obs_names) == names(*counts.shape)[0]


def test_archive_members_with_paths_that_climb_are_not_followed(tmp_path):
    counts, _ = planted(60, 50, 3)
    link = tarfile.TarInfo("filtered_matrices_mex/hg19/genes.tsv")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad = b"not a matrix"
    box = tmp_path / "box"
    box.mkdir()
    path = write_mex(box / "m.tar.gz", counts, extra=[
        ("../../escaped.txt", bad), (f"{tmp_path}/absolute.txt", bad), ("../hg19/matrix.mtx", bad),
        ("filtered_matrices_mex/mm10/matrix.mtx", bad), (link, b"")])
    ours = read_dataset(DatasetInfo("m", kind="10x_mex", genome="hg19"), path=path)
    assert (ours.X != counts).nnz == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["box", "m.tar.gz"]


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("make", [
    lambda d, c: write_mex(d / "f", c, leave_out=["genes.tsv"]), lambda d, c: write_mex(d / "f", c, genome="mm10"),
    lambda d, c: _cut(write_mex(d / "f", c)), lambda d, c: write_h5(d / "f", c)])
def test_unreadable_mex(tmp_path, make):
    path = make(tmp_path, planted(60, 50, 3)[0])
    with pytest.raises(InputError) as caught:
        read_dataset(DatasetInfo("m", kind="10x_mex", genome="hg19"), path=path)
    assert "cannot read 'f' as 10x_mex" in one_line(caught)


@pytest.mark.parametrize("make", [
    lambda d, c: write_h5(d / "f", c, leave_out=["indptr"]), lambda d, c: write_h5(d / "f", c, genome="hg19"),
    lambda d, c: _cut(write_h5(d / "f", c)), lambda d, c: write_mex(d / "f", c), lambda d, c: d / "none"])
def test_unreadable_h5(tmp_path, make):
    path = make(tmp_path, planted(60, 50, 3)[0])
    with pytest.raises(InputError) as caught:
        read_dataset(DatasetInfo("n", genome="mm10"), path=path)
    assert "as 10x_h5" in one_line(caught)


def test_out_of_memory_is_not_called_a_bad_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(sc, "read_10x_h5", full)
    monkeypatch.setattr(ad, "read_h5ad", full)
    with pytest.raises(MemoryError):
        read_dataset(DatasetInfo("n", genome="mm10"), path=write_h5(tmp_path / "n.h5", planted(30, 30, 2)[0]))
    (tmp_path / "a.h5ad").write_bytes(b"")
    with pytest.raises(MemoryError):
        load(tmp_path / "a.h5ad")


def test_wrong_shape_and_the_name_clash(tmp_path):
    small = write_h5(tmp_path / "small.h5", sp.csr_matrix((20, 12), dtype=np.int32))
    with pytest.raises(InputError) as caught:
        read_dataset(replace(DATASETS["brain_small"]), path=small)
    assert "20 cells x 12 genes" in one_line(caught) and "20000 x 27998" in str(caught.value)
    scvi = write_h5(tmp_path / "scvi.h5", sp.csr_matrix((9_128, 12), dtype=np.int32))
    with pytest.raises(InputError, match="neuron_9k, scVI's BRAIN-SMALL, not 10x neuron20k"):
        read_dataset("brain_small", path=scvi)


def test_unknown_kind(tmp_path):
    with pytest.raises(InputError, match="known: 10x_mex, 10x_h5, bundled"):
        read_dataset(DatasetInfo("n", kind="csv"), path=tmp_path)


def test_facts_that_a_kind_cannot_do_without(tmp_path):
    with pytest.raises(InputError) as caught:
        read_dataset(DatasetInfo("m", kind="10x_mex"), path=write_mex(tmp_path / "f", planted(30, 30, 2)[0]))
    assert "its 'genome' is not known" in one_line(caught)
    with pytest.raises(InputError) as caught:
        fetch(DatasetInfo("b", kind="bundled"))
    assert "dataset 'b' needs 'filename'" in one_line(caught)


# ---------------------------------------------------------------- the embedded set


def test_recovered_counts_are_the_documented_ones():
    raw = read_dataset("pbmc68k_reduced")
    counts = raw.X
    assert counts.shape == (700, 765) and counts.dtype == np.float32
    assert (counts.data == np.rint(counts.data)).all() and counts.data.min() == 1 and counts.data.max() == 259
    totals = np.asarray(counts.sum(axis=1)).ravel()
    assert (totals.min(), np.median(totals), totals.max()) == (342, 653, 1654)
    assert round(1 - counts.nnz / 700 / 765, 3) == 0.674
    assert list(raw.obs["louvain"].value_counts()) == [130, 123, 117, 70, 66, 54, 42, 35, 31, 19, 13]


def test_recovered_counts_give_back_the_stored_values():
    stored = sc.datasets.pbmc68k_reduced()
    counts = recover_counts(stored)
    again = np.log1p(counts.toarray() / stored.obs["n_counts"].to_numpy()[:, None] * 1e4)
    assert np.abs(again - stored.raw.X.toarray()).max() < 1e-3  # the file is rounded to three decimals


def test_another_file_is_not_recovered():
    stored = sc.datasets.pbmc68k_reduced()
    stored.obs["n_counts"] = stored.obs["n_counts"] * 1.37
    with pytest.raises(InputError, match="expected scanpy.datasets.pbmc68k_reduced"):
        recover_counts(stored)


def test_load_embedded(embedded, tmp_path):
    assert embedded.shape == (700, 765)
    counts, x = embedded.layers["counts"], embedded.X
    assert sp.isspmatrix_csr(counts) and sp.isspmatrix_csr(x) and x.dtype == counts.dtype == np.float32
    np.testing.assert_allclose(np.asarray(x.sum(axis=1)).ravel(), TARGET_SUM, rtol=1e-5)
    facts = embedded.uns["scld_data"]
    assert facts["sha256"] == DATASETS["pbmc68k_reduced"].sha256
    assert (facts["name"], facts["labels_key"], facts["labels"], facts["origin"]) == (
        "pbmc68k_reduced", "louvain", "from the file", "published")
    embedded.write_h5ad(tmp_path / "e.h5ad")  # provenance survives the file
    back = ad.read_h5ad(tmp_path / "e.h5ad").uns["scld_data"]
    assert back["versions"]["scanpy"] == sc.__version__ and float(back["target_sum"]) == TARGET_SUM
    assert cached_files() == []  # nothing was downloaded or kept


def test_load_with_other_labels():
    cells = load("pbmc68k_reduced", labels="bulk_labels")
    assert cells.obs["bulk_labels"].nunique() == 10 and cells.uns["scld_data"]["labels_key"] == "bulk_labels"
    with pytest.raises(InputError, match="no column 'type' in obs; columns there: bulk_labels, louvain"):
        load("pbmc68k_reduced", labels="type")


# ---------------------------------------------------------------- checks on counts


def test_counts_come_from_the_right_slot():
    adata = as_adata([[1, 0, 2], [0, 3, 0]])
    assert counts_matrix(adata).toarray().tolist() == [[1, 0, 2], [0, 3, 0]]
    adata.layers["counts"] = adata.X * 2
    assert counts_matrix(adata).max() == 6
    adata.layers["umi"] = (adata.X * 3).toarray()  # dense is accepted
    out = counts_matrix(adata, layer="umi")
    assert out.max() == 9 and sp.isspmatrix_csr(out) and out.dtype == np.float32


def test_repeated_entries_are_summed_without_touching_the_input():
    x = sp.csr_matrix((np.array([1.0, 2.0, 4.0], dtype=np.float32), np.array([0, 0, 1]), np.array([0, 2, 3])), shape=(2, 2))
    adata = ad.AnnData(x)
    assert counts_matrix(adata).toarray().tolist() == [[3, 0], [0, 4]]
    assert adata.X.nnz == 3


def test_counts_are_never_made_dense():
    n = 300_000  # dense this would be 360 GB
    x = sp.csr_matrix((np.ones(n, dtype=np.float32), (np.arange(n), np.arange(n))), shape=(n, n))
    assert counts_matrix(ad.AnnData(x)).nnz == n
    assert library_normalize(x).nnz == n
    assert CellReader(x).mean().max() == pytest.approx(np.log1p(TARGET_SUM) / n)


def test_backed_file(tmp_path):
    as_adata([[1, 0, 2], [0, 3, 0]]).write_h5ad(tmp_path / "b.h5ad")
    assert counts_matrix(ad.read_h5ad(tmp_path / "b.h5ad", backed="r")).sum() == 6


@pytest.mark.parametrize(("values", "expected"), [
    ([[1, -2.0]], "X holds negative values (least -2): it looks scaled"),
    ([[1, np.nan]], "X holds NaN or infinite values"),
    ([[1, np.inf]], "X holds NaN or infinite values"),
    ([[1, 0.5]], "X holds non-integer values (e.g. 0.5, greatest 1): it looks log-transformed"),
    ([[100, 0.5]], "X holds non-integer values (e.g. 0.5, greatest 100): it looks normalised"),
    ([[1, 1], [0, 0]], "X has 1 cells without a single count, e.g. 'cell1'"),
])
def test_values_that_are_not_counts(values, expected):
    with pytest.raises(InputError) as caught:
        counts_matrix(as_adata(values))
    assert one_line(caught).startswith(expected)


def test_log_like_layer_is_named():
    adata = as_adata([[1, 2]])
    adata.layers["logged"] = np.log1p(adata.X)
    with pytest.raises(InputError, match=r"layers\['logged'\] holds non-integer .*layer= \(--layer\)"):
        counts_matrix(adata, layer="logged")


def test_slots_that_are_not_there():
    adata = as_adata([[1, 2]])
    with pytest.raises(InputError, match="no layer 'umi'; layers there: none; give 'X' for X itself"):
        counts_matrix(adata, layer="umi")
    with pytest.raises(InputError, match=r"X is empty \(0 cells x 3 genes\)"):
        counts_matrix(as_adata(np.zeros((0, 3))))
    with pytest.raises(InputError, match="X is empty"):
        counts_matrix(ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])))
    with pytest.raises(InputError, match="give numbers"):
        counts_matrix(ad.AnnData(np.array([["a", "b"]], dtype=object)))


def test_repeated_genes():
    adata = as_adata([[1, 2, 3]])
    adata.var_names = ["A", "B", "A"]
    with pytest.raises(InputError, match=r"var_names repeat 1 times, e.g. 'A'; call adata.var_names_make_unique\(\)"):
        counts_matrix(adata)


# ---------------------------------------------------------------- normalisation, transforms, minibatches

matrices = hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
                      elements=st.one_of(st.just(0), st.integers(0, 5_000)))


@given(matrices, st.sampled_from([1.0, 1e4, TARGET_SUM]))
@settings(max_examples=40, deadline=None)
def test_normalised_sums(values, target):
    before = sp.csr_matrix(values)
    out = library_normalize(before, target)
    sums = np.asarray(out.sum(axis=1, dtype=np.float64)).ravel()
    np.testing.assert_allclose(sums, np.where(values.sum(axis=1) > 0, target, 0), rtol=1e-5)
    assert (before.toarray() == values).all() and ((out.toarray() > 0) == (values > 0)).all()


def test_normalise_equals_scanpy():
    counts, _ = planted(80, 60, 3)
    theirs = as_adata(counts)
    sc.pp.normalize_total(theirs, target_sum=TARGET_SUM)
    np.testing.assert_allclose(library_normalize(counts).toarray(), theirs.X.toarray(), rtol=2e-6)


@given(matrices, st.sampled_from(TRANSFORMS), st.booleans())
@settings(max_examples=40, deadline=None)
def test_transform_and_inverse(values, transform, dense):
    x = values.astype(np.float32) if dense else sp.csr_matrix(values, dtype=np.float32)
    before = x.copy()
    there = apply_transform(x, transform)
    back = invert_transform(there, transform)
    assert sp.issparse(there) != dense
    as_array = (lambda m: m) if dense else (lambda m: m.toarray())
    np.testing.assert_allclose(as_array(back), values, rtol=1e-5, atol=1e-5)
    assert (as_array(x) == as_array(before)).all()
    assert ((as_array(there) == 0) == (values == 0)).all()


@pytest.mark.parametrize("call", [lambda: apply_transform(np.ones(2), "log"), lambda: invert_transform(np.ones(2), "log"),
                                  lambda: CellReader(sp.csr_matrix((1, 1)), transform="log")])
def test_unknown_transform(call):
    with pytest.raises(InputError, match="unknown transform 'log'; known: log1p, none"):
        call()


@given(matrices, st.sampled_from(TRANSFORMS), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_reader_equals_dense_arithmetic(values, transform, size, drawn):
    n = len(values)
    totals = values.sum(axis=1, keepdims=True)
    dense = np.where(totals > 0, values / np.maximum(totals, 1) * TARGET_SUM, 0.0)
    dense = np.log1p(dense) if transform == "log1p" else dense
    counts = sp.csr_matrix(values, dtype=np.float32)
    reader = CellReader(counts, transform=transform)
    rows = np.array(drawn.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)))
    batch = reader.read(rows)
    assert batch.dtype == np.float32 and batch.shape == (len(rows), values.shape[1])
    np.testing.assert_allclose(batch, dense[rows], rtol=2e-6)
    np.testing.assert_allclose(np.concatenate(list(reader.blocks(size))), dense, rtol=2e-6)
    np.testing.assert_allclose(reader.mean(rows, size=size), dense[rows].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(reader.mean(), dense.mean(axis=0), rtol=1e-5)
    assert (counts.toarray() == values).all()
    assert reader.library_size.dtype == np.float64 and (reader.library_size == values.sum(axis=1)).all()


def test_reader_takes_indices_masks_and_slices(embedded):
    reader = CellReader(embedded.layers["counts"], transform="none")
    assert len(reader) == reader.n_obs == 700 and reader.n_vars == 765
    dense = embedded.X.toarray()
    mask = np.zeros(700, dtype=bool)
    mask[[3, 5]] = True
    for rows in ([3, 5], mask, slice(3, 6, 2)):
        np.testing.assert_allclose(reader.read(rows), dense[[3, 5]], rtol=2e-6)
        np.testing.assert_allclose(reader.mean(rows), dense[[3, 5]].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(reader.read([-1]), dense[[-1]], rtol=2e-6)
    assert [len(block) for block in reader.blocks(300)] == [300, 300, 100]
    with pytest.raises(InputError, match="no cells"):
        reader.mean([])
    with pytest.raises(IndexError):
        reader.read([700])


# ---------------------------------------------------------------- preprocessing


def test_preprocess_equals_scanpys_functions():
    counts, _ = planted(90, 70, 3, n_poor=6)
    raw = as_adata(counts, batch=np.arange(96) % 2)
    raw.var["mark"] = np.arange(70)
    theirs = raw.copy()
    sc.pp.filter_cells(theirs, min_genes=10)
    sc.pp.filter_genes(theirs, min_cells=3)
    ours = preprocess(raw)
    assert ours.shape == theirs.shape == surviving_shape(counts) and ours.shape[0] == 90 and ours.shape[1] < 66
    assert list(ours.obs_names) == list(theirs.obs_names) and list(ours.var_names) == list(theirs.var_names)
    assert (ours.layers["counts"] != theirs.X).nnz == 0
    sc.pp.normalize_total(theirs, target_sum=20_000)
    np.testing.assert_allclose(ours.X.toarray(), theirs.X.toarray(), rtol=2e-6)
    assert (ours.obs["batch"] == theirs.obs["batch"]).all() and (ours.var["mark"] == theirs.var["mark"]).all()
    facts = ours.uns["scld_data"]
    assert (facts["raw_cells"], facts["raw_genes"], facts["min_genes"], facts["min_cells"]) == (96, 70, 10, 3)
    assert raw.shape == (96, 70) and "scld_data" not in raw.uns  # the input is as it was


def test_preprocess_counts_an_explicit_zero_as_absent():
    raw = as_adata(np.ones((4, 12)))
    raw.X.data[raw.X.indices == 0] = 0
    assert preprocess(raw, min_genes=1).n_vars == 11


def test_the_filters_keep_what_just_reaches_them():
    assert preprocess(as_adata(np.ones((3, 10)))).shape == (3, 10)
    short = np.ones((4, 10))
    short[3, 0] = 0  # nine genes
    assert preprocess(as_adata(short)).shape == (3, 10)


def test_nothing_left():
    with pytest.raises(InputError, match="nothing is left of 2 x 2; give cells with more genes"):
        preprocess(as_adata([[1, 2], [3, 4]]))
    with pytest.raises(InputError, match="without a single count"):
        preprocess(as_adata([[1, 2], [0, 0]]), min_genes=0, min_cells=1)


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize("flavor", ["vtraag", "igraph"])
def test_planted_clusters_are_found_and_named_by_size(flavor):
    if flavor == "vtraag":
        pytest.importorskip("louvain")
    counts, labels = planted(240, 400, 6)
    adata = as_adata(counts)
    state = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = cluster(adata, flavor=flavor)
        again = cluster(adata, flavor=flavor)
    assert random.getstate() == state  # igraph draws from its own generator, not from the process's
    assert adjusted_rand_score(out.obs["louvain"], labels) == 1
    sizes = out.obs["louvain"].value_counts(sort=False)
    assert list(sizes.index) == [str(k) for k in range(6)] and (np.diff(sizes) <= 0).all()
    assert (out.obs["louvain"] == again.obs["louvain"]).all()
    assert "louvain" not in adata.obs and adata.uns == {} and (out.X != adata.X).nnz == 0
    done = out.uns["scld_data"]["clustering"]
    assert (done["flavor"], done["resolution"], done["n_clusters"]) == (flavor, 0.15, 6)


def test_ids_by_size():
    renamed = data._by_size([7, 3, 3, 9, 9, 9, 1])
    assert list(renamed) == ["3", "1", "1", "0", "0", "0", "2"]  # of 1 and 7, both single, the smaller id comes first


def test_many_genes_go_through_the_recipe_of_zheng17():
    """More than 1,000 genes: the partition equals the one of scanpy's functions called by hand."""
    pytest.importorskip("louvain")
    counts, _ = planted(200, 1_300, 5)
    work = as_adata(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.recipe_zheng17(work)
        assert work.n_vars == 1_000
        sc.tl.pca(work, n_comps=50)
        sc.pp.neighbors(work, n_pcs=50)
        sc.tl.louvain(work, resolution=0.4)
    ours = cluster(as_adata(counts), resolution=0.4)
    assert adjusted_rand_score(ours.obs["louvain"], work.obs["louvain"]) == 1


@pytest.mark.parametrize("n_genes", [400, 1_012])
def test_all_genes_are_used_where_1000_cannot_be_chosen(n_genes):
    """Few genes, or just over 1,000 of which some have no finite dispersion: scanpy's recipe alone would stop."""
    counts, labels = planted(120, n_genes, 4)
    dense = counts.toarray()
    dense[:, :20] = 0
    dense[0, :20] = 1
    with pytest.raises(IndexError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.recipe_zheng17(as_adata(dense))
    out = cluster(as_adata(dense), flavor="igraph")
    assert adjusted_rand_score(out.obs["louvain"], labels) == 1


def test_the_resolution_is_searched_for_the_expected_number():
    counts, labels = planted(240, 400, 6)
    fine = cluster(as_adata(counts), flavor="igraph", resolution=3.0)
    assert fine.obs["louvain"].nunique() > 6
    found = cluster(as_adata(counts), flavor="igraph", resolution=3.0, n_clusters=6)
    done = found.uns["scld_data"]["clustering"]
    assert done["n_clusters"] == done["n_clusters_expected"] == 6
    assert done["resolution_asked"] == 3.0 and 0.05 <= done["resolution"] <= 0.5
    assert adjusted_rand_score(found.obs["louvain"], labels) == 1
    embedded = read_dataset("pbmc68k_reduced")
    for resolution, n_clusters, sign in ((0.15, 5, -1), (0.05, 6, 1)):
        done = cluster(embedded, flavor="igraph", resolution=resolution, n_clusters=n_clusters).uns["scld_data"]["clustering"]
        assert done["n_clusters"] == n_clusters and np.sign(done["resolution"] - resolution) == sign


def test_an_impossible_number_is_said():
    counts, _ = planted(60, 100, 2)
    with pytest.warns(UserWarning, match="no resolution from 0.05 to 0.5 gives 55 clusters; kept the"):
        out = cluster(as_adata(counts), n_clusters=55, flavor="igraph")
    done = out.uns["scld_data"]["clustering"]
    assert done["resolution"] == 0.15 and done["n_clusters_expected"] == 55 != done["n_clusters"]


def test_without_the_louvain_package_igraph_is_used(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "louvain" else find(name, *rest))
    counts, labels = planted(120, 200, 4)
    with pytest.warns(UserWarning, match="'louvain' is not installed: Louvain of igraph is used") as caught:
        out = cluster(as_adata(counts))
    assert len(caught) == 1
    assert out.uns["scld_data"]["clustering"]["flavor"] == "igraph"
    assert adjusted_rand_score(out.obs["louvain"], labels) == 1


def test_versions_name_what_is_missing(monkeypatch):
    ask = data.version

    def without_louvain(package):
        if package == "louvain":
            raise data.PackageNotFoundError
        return ask(package)

    monkeypatch.setattr(data, "version", without_louvain)
    versions = data._versions()
    assert versions["louvain"] == "not installed" and versions["scanpy"] == sc.__version__


def test_clustering_leaves_the_number_of_threads_alone():
    """numba sets it for every library of the process, and with it the last digits of whatever is trained afterwards."""
    code = ("import torch; from conftest import planted_cells; from scld_nb.data import cluster; torch.set_num_threads(1); "
            "before = torch.get_num_threads(); cluster(planted_cells(400, seed=2)); print(before, torch.get_num_threads())")
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"}
    env |= {"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "1 1\n", done.stderr


def test_cluster_errors():
    with pytest.raises(InputError, match="unknown flavor 'leiden'; known: vtraag, igraph"):
        cluster(as_adata([[1]]), flavor="leiden")
    with pytest.raises(InputError, match="2 cells x 3 genes are too few to cluster; name a column with labels="):
        cluster(as_adata([[1, 2, 3], [2, 3, 4]]))
    with pytest.raises(InputError, match="log-transformed"):
        cluster(as_adata(np.full((5, 5), 0.5)))


def test_real_louvain_on_the_embedded_set(embedded):
    pytest.importorskip("louvain")
    out = cluster(embedded, resolution=1.0)
    assert adjusted_rand_score(out.obs["louvain"], embedded.obs["louvain"]) > 0.5
    other = cluster(embedded, resolution=1.0, flavor="igraph")
    assert adjusted_rand_score(out.obs["louvain"], other.obs["louvain"]) > 0.6


# ---------------------------------------------------------------- load


def test_stand_in_for_a_paper_set_from_download_to_table(site):
    cells = load("brain_small")
    facts = cells.uns["scld_data"]
    assert cells.shape == tuple(site.facts["brain_small"]["shape"]) and cells.obs["louvain"].nunique() == 8
    assert adjusted_rand_score(cells.obs["louvain"], site.labels["brain_small"]) == 1
    assert (facts["origin"], facts["sha256"]) == ("stand-in", site.facts["brain_small"]["sha256"])
    assert (facts["labels"], facts["n_test"], facts["clustering"]["n_clusters_expected"]) == ("clustered", 48, 8)
    table = table2(cells, load("pbmc68k"), load("pbmc68k_reduced"))
    assert list(table["dataset"]) == ["brain_small", "pbmc68k", "pbmc68k_reduced"]
    assert list(table["cells (paper)"]) == [20_000, 68_579, "-"] and list(table["clusters"]) == [8, 10, 11]
    assert list(table["match"]) == ["no (stand-in)", "no (stand-in)", "-"]
    train, test = default_split(cells)
    assert 48 - 8 < test.n_obs <= 48 and train.n_obs + test.n_obs == 240


def test_the_clustered_set_is_kept(site, monkeypatch):
    first = load("pbmc68k")
    kept = [name for name in cached_files() if name.endswith(".h5ad")]
    assert len(kept) == 1 and kept[0].startswith("pbmc68k-") and len(cached_files()) == 2

    def not_again(*args, **kwargs):
        raise AssertionError("clustered again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "cluster", not_again)
        second = load("pbmc68k")
        assert (second.obs["louvain"] == first.obs["louvain"]).all() and (second.X != first.X).nnz == 0
        assert (second.layers["counts"] != first.layers["counts"]).nnz == 0 and sp.issparse(second.X)
        assert dict(second.uns["scld_data"]["clustering"]) == first.uns["scld_data"]["clustering"]
        with pytest.raises(AssertionError, match="again"):
            load("pbmc68k", cache=False)
        patch.setattr(data, "_versions", lambda: {"scanpy": "0"})
        with pytest.raises(AssertionError, match="again"):  # another version of scanpy: other clusters are possible
            load("pbmc68k")
    (data_dir() / kept[0]).write_bytes(b"damaged")
    assert (load("pbmc68k").obs["louvain"] == first.obs["louvain"]).all()
    assert ad.read_h5ad(data_dir() / kept[0]).shape == first.shape
    assert not [name for name in cached_files() if name.endswith(".part")]


def test_a_folder_that_cannot_be_written_costs_only_a_warning(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="is not kept for next time"):
        cells = load("brain_small", cache=tmp_path / "file")
    assert cells.n_obs == 240
    elsewhere = tmp_path / "elsewhere"
    load("brain_small", cache=elsewhere)
    assert [p.suffix for p in elsewhere.iterdir()] == [".h5ad"]


def test_dataset_info_can_be_loaded(site):
    info = replace(dataset_info("brain_small"), name="mine", n_clusters=None, n_test=None)
    cells = load(info, cache=False)
    assert cells.uns["scld_data"]["name"] == "mine" and table2(cells)["match"].item().startswith("-")


@pytest.fixture
def own_file(tmp_path):
    counts, labels = planted(90, 60, 3, n_poor=2)
    adata = as_adata(counts, kind=pd.Series(labels, dtype="Int64").astype(str).to_numpy(), number=labels * 10 + 12)
    adata.layers["logged"] = np.log1p(adata.X)
    adata.layers["umi"] = adata.X.copy()
    path = tmp_path / "own.h5ad"
    adata.write_h5ad(path)
    return path


def test_own_file_with_labels(own_file):
    cells = load(own_file, labels="number")
    assert list(cells.obs["number"].cat.categories) == ["12", "22", "32"]  # "2", the poor cells' label, is filtered away
    facts = cells.uns["scld_data"]
    assert (facts["name"], facts["origin"], facts["labels_key"]) == ("own", "user file", "number")
    assert facts["sha256"] == file_sha256(own_file) and cells.n_obs == 90
    assert set(cells.layers) == {"counts"}
    assert load(str(own_file), labels="kind", layer="umi").n_obs == 90


def test_own_file_is_clustered_when_it_has_no_labels(own_file):
    cells = load(own_file)
    assert cells.uns["scld_data"]["labels"] == "clustered" and cells.uns["scld_data"]["clustering"]["n_clusters_expected"] == 0
    sizes = cells.obs["louvain"].value_counts(sort=False)
    assert (np.diff(sizes) <= 0).all() and (sizes > 0).all()
    assert cached_files() == []


def test_own_file_with_a_louvain_column_keeps_it(tmp_path):
    counts, labels = planted(60, 60, 3)
    order = pd.Categorical.from_codes(labels, ["T cell", "B cell", "NK"])
    as_adata(counts, louvain=order).write_h5ad(tmp_path / "a.h5ad")
    cells = load(tmp_path / "a.h5ad")
    assert list(cells.obs["louvain"].cat.categories) == ["T cell", "B cell", "NK"]
    assert list(cells.obs["louvain"].astype(str)) == list(np.array(["T cell", "B cell", "NK"])[labels])
    assert cells.uns["scld_data"]["labels"] == "from the file"


def test_own_file_errors(own_file, tmp_path):
    cases = {
        "no column 'cell_type' in obs; columns there: kind, number": {"labels": "cell_type"},
        "no column 'louvain' in obs; columns there: kind, number; clusters are computed where no labels are named": {"labels": "louvain"},
        "no layer 'raw'; layers there: logged, umi": {"layer": "raw"},
        "layers['logged'] holds non-integer": {"layer": "logged"},
    }
    for expected, options in cases.items():
        with pytest.raises(InputError) as caught:
            load(own_file, **options)
        assert one_line(caught).startswith(expected)
    with pytest.raises(InputError, match="layer='umi' is for .h5ad files"):
        load("pbmc68k_reduced", layer="umi")


def test_labels_that_are_missing_or_measured(tmp_path):
    counts, labels = planted(60, 60, 3)
    some = np.array(["a", "b", None], dtype=object)[labels]
    as_adata(counts, some=pd.Categorical(some), depth=labels + 0.5).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=f"obs\\['some'\\] has {(labels == 2).sum()} cells without a label"):
        load(tmp_path / "a.h5ad", labels="some")
    with pytest.raises(InputError, match="holds fractions .*: a measurement, not labels"):
        load(tmp_path / "a.h5ad", labels="depth")


def test_files_that_are_not_h5ad(own_file, tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path / "none.h5ad")
    assert one_line(caught).startswith("no such file: ")
    for name, content in {"cut.h5ad": own_file.read_bytes()[:3000], "text.h5ad": b"hello", "table": b"a,b\n1,2\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            load(tmp_path / name)
        assert f"{name} as .h5ad (not AnnData, or cut off)" in one_line(caught)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError):
        load(tmp_path / "other.h5ad")
    with pytest.raises(InputError, match="unknown dataset"):
        load(str(tmp_path))  # a folder


# ---------------------------------------------------------------- split


@given(st.lists(st.integers(0, 4), min_size=8, max_size=80), st.floats(0.15, 0.6), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_split_is_a_stratified_partition(groups, test_size, valid_size, seed):
    groups = np.array(groups)
    adata = as_adata(np.ones((len(groups), 2)), kind=groups.astype(str))
    sizes = np.bincount(groups)
    if not (np.floor(test_size * sizes + 1e-9) >= 1).any():
        with pytest.raises(InputError, match="raise test_size"):
            split(adata, test_size=test_size, valid_size=valid_size, stratify="kind", seed=seed)
        return
    train, test = split(adata, test_size=test_size, valid_size=valid_size, stratify="kind", seed=seed)
    again, _ = split(adata, test_size=test_size, valid_size=valid_size, stratify="kind", seed=seed)
    assert sorted([*train.obs_names, *test.obs_names]) == sorted(adata.obs_names)
    assert (train.obs["split"] == again.obs["split"]).all() and list(train.obs_names) == list(again.obs_names)
    assert set(test.obs["split"]) == {"test"} and set(train.obs["split"]) <= {"train", "valid"}
    for k in np.unique(groups):
        inside = {part: int(((a.obs["kind"] == str(k)) & (a.obs["split"] == part)).sum())
                  for part, a in (("train", train), ("valid", train), ("test", test))}
        assert inside["test"] == int(test_size * sizes[k] + 1e-9) and inside["valid"] == int(valid_size * sizes[k] + 1e-9)
        assert inside["train"] >= 1  # every label can be learned, a single cell stays in training
    assert train.uns["scld_data"]["split"]["n_test"] == test.n_obs
    assert list(train.obs_names) == [name for name in adata.obs_names if name in set(train.obs_names)]


def test_split_depends_on_the_seed_and_copies(embedded):
    (train, test), (_, other) = split(embedded, seed=0), split(embedded, seed=1)
    assert set(test.obs_names) != set(other.obs_names) and not test.is_view
    assert list(test.obs["louvain"].value_counts(sort=False)) == [26, 24, 23, 14, 13, 10, 8, 7, 6, 3, 2]
    test.X.data[:] = 0
    assert embedded.X.sum() > 0 and "split" not in embedded.obs and "split" not in embedded.uns["scld_data"]
    assert train.uns["scld_data"]["split"] == {"seed": 0, "stratify": "louvain", "n_train": 564, "n_valid": 0, "n_test": 136, "part": "train"}
    assert test.uns["scld_data"]["split"]["part"] == "test"


def test_split_without_labels():
    adata = as_adata(np.ones((10, 2)))
    _, test = split(adata, test_size=0.3)
    assert test.n_obs == 3 and test.uns["scld_data"]["split"]["stratify"] == ""


def test_paper_sizes_lose_a_few_to_rounding():
    """scGAN's int(ratio * n) per cluster: asking 7,000 of 68,579 in ten clusters gives a little less."""
    sizes = np.array([21_333, 14_211, 9_877, 7_331, 5_201, 4_133, 2_999, 1_987, 1_011, 496])
    assert sizes.sum() == 68_579
    adata = as_adata(sp.csr_matrix((68_579, 1)), louvain=np.repeat(np.arange(10), sizes).astype(str))
    adata.uns["scld_data"] = {"n_test": 7_000, "labels_key": "louvain"}
    _, test = default_split(adata)
    expected = [int(7_000 / 68_579 * n) for n in sizes]
    assert list(test.obs["louvain"].value_counts(sort=False)) == expected and 6_990 <= test.n_obs < 7_000


@pytest.mark.parametrize("options", [{"test_size": 0}, {"test_size": 1}, {"test_size": 1.5}, {"test_size": -0.1}, {"n_test": 0},
                                     {"n_test": 700}, {"test_size": 0.6, "valid_size": 0.4}, {"valid_size": -0.1}])
def test_splits_that_leave_nothing(embedded, options):
    with pytest.raises(InputError) as caught:
        split(embedded, **options)
    assert "leaves no test or no training cells" in one_line(caught)


def test_split_errors(embedded):
    with pytest.raises(InputError, match="no column 'type' in obs"):
        split(embedded, stratify="type")
    with pytest.raises(InputError, match="no label has enough cells"):
        split(embedded, test_size=0.001)


# ---------------------------------------------------------------- table 2


def test_table2_agrees_with_the_paper_only_when_all_three_numbers_do():
    empty = ad.AnnData(sp.csr_matrix((20_000, 17_970), dtype=np.float32))
    empty.obs["louvain"] = pd.Categorical((np.arange(20_000) % 8).astype(str))
    empty.uns["scld_data"] = {"name": "brain_small", "labels_key": "louvain", "tissue": "Brain", "origin": "published"}
    row = table2(empty).iloc[0]
    assert row["match"] == "yes" and row["tissue"] == "Brain" and row["genes (paper)"] == 17_970
    empty.obs["louvain"] = pd.Categorical((np.arange(20_000) % 7).astype(str))
    assert table2(empty).iloc[0]["match"] == "no"


# ---------------------------------------------------------------- the helper itself


def test_the_server_misbehaves_as_told(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    import requests

    with Server(tmp_path) as server:
        assert requests.get(server.url + "/any/f", timeout=10).content == bytes(range(100))
        server.behaviour["f"] = "cut"
        assert len(requests.get(server.url + "/f", timeout=10).content) == 50
        server.behaviour["f"] = "truncated"
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(server.url + "/f", timeout=10)
        assert requests.get(server.url + "/missing", timeout=10).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/f", timeout=10)


def test_facts_of_a_generated_file(tmp_path):
    counts, _ = planted(50, 40, 2, n_poor=3)
    path = write_h5(tmp_path / "n.h5", counts)
    told = facts(path, "http://127.0.0.1:1", counts, n_test=4)
    assert told["raw_shape"] == [53, 40] and told["shape"][0] == 50 and told["sha256"] == file_sha256(path)
    assert DatasetInfo("n", **told).n_test == 4 and io.BytesIO(path.read_bytes()).read(4) == b"\x89HDF"
    assert Path(told["url"]).name == "n.h5"


def test_the_two_matrices_of_loaded_cells_share_no_memory(tmp_path):
    cells = planted_cells(120, seed=3)
    cells.X.data[::7] = 0                                               # stored zeros, as after rounding
    cells.write_h5ad(tmp_path / "cells.h5ad")
    loaded = load(tmp_path / "cells.h5ad", labels="cell_type")
    before = loaded.layers["counts"].toarray()
    sc.pp.calculate_qc_metrics(loaded, inplace=True, percent_top=None)  # removes stored zeros of X in place
    assert (loaded.layers["counts"].toarray() == before).all()
    assert not np.shares_memory(loaded.X.indices, loaded.layers["counts"].indices)


def test_labels_with_raised_digits_can_be_split():
    cells = planted_cells(60, seed=3)
    cells.obs["dose"] = np.where(np.arange(60) % 2, "10²", "10")
    train, test = split(cells, stratify="dose")
    assert set(test.obs["dose"]) == {"10", "10²"} and train.n_obs == 48
    cells.obs["dose"] = np.where(np.arange(60) % 2, "²", "1")
    assert split(cells, stratify="dose")[1].n_obs == 12


@pytest.fixture
def seurat(tmp_path):
    """Counts in raw with all genes, X logged with half of them."""
    counts = planted_cells(80, 30)
    adata = counts[:, 5:20].copy()
    adata.raw = counts
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    return counts, adata


def test_counts_in_raw_are_named_and_can_be_taken(seurat, tmp_path):
    counts, adata = seurat
    with pytest.raises(InputError, match="looks log-transformed.*; adata.raw holds whole numbers, layer='raw' takes them$"):
        data.counts_matrix(adata)
    assert (data.counts_matrix(adata, layer="raw") != counts.X[:, 5:20]).nnz == 0
    assert (data.counts_matrix(adata[10:30, ::-1], layer="raw") != counts.X[10:30, 19:4:-1]).nnz == 0
    adata.write_h5ad(tmp_path / "s.h5ad")
    taken = data.load(tmp_path / "s.h5ad", layer="raw", labels="cell_type")
    kept = counts[:, taken.var_names]
    assert taken.n_vars > 15 and (taken.layers["counts"] != kept.X).nnz == 0 and (taken.obs["cell_type"] == counts.obs["cell_type"]).all()
    adata.raw = adata
    with pytest.raises(InputError, match="not counts; put raw counts there, or name their layer with layer= .--layer.$"):
        data.counts_matrix(adata)
    other = counts[:, :3].copy()
    adata = counts.copy()
    adata.raw = other
    with pytest.raises(InputError, match="adata.raw has 3 genes, which are not all of the 30"):
        data.counts_matrix(adata, layer="raw")


def test_zarr_and_measurements_are_named(tmp_path):
    with pytest.raises(InputError, match="zarr is not read here; anndata.read_zarr"):
        data.load(tmp_path / "x.zarr")
    cells = planted_cells(40, 30)
    cells.obs["n"] = np.arange(40)
    cells.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(InputError, match="has 40 labels for 40 cells: a measurement or names of cells"):
        data.load(tmp_path / "x.h5ad", labels="n")


def drawn_like(cells, scale="counts"):
    out = ad.AnnData(cells.X.astype(np.int32), obs=pd.DataFrame({"cell_type": cells.obs["cell_type"].astype(str).astype("category").to_numpy()},
                     index=[f"scld_{i}" for i in range(cells.n_obs)]), var=pd.DataFrame(index=cells.var_names))
    out.uns["scld"] = {"scale": scale, "labels_key": "cell_type"}
    return out


def test_joined_cells_are_counts_with_names_of_their_own(tmp_path):
    real = planted_cells(60, 30)
    real.obs["cell_type"] = real.obs["cell_type"].cat.rename_categories({"B": 1, "NK": 2, "T": 3})
    real.obs["doublet"], real.obs["batch"], real.var["symbol"] = [True, False] * 30, pd.Categorical(["x", "y"] * 30), [f"s{i}" for i in range(30)]
    real.layers["counts"] = real.X.copy()
    sc.pp.normalize_total(real)
    sc.pp.log1p(real)
    own = real[:, ::-1][:, 2:]                                  # the model knows fewer genes, in another order
    fake = drawn_like(ad.AnnData(own.layers["counts"], obs=own.obs, var=own.var))
    more = fake[:10].copy()
    more.layers["counts"] = more.X.copy()                       # went through scanpy since
    sc.pp.normalize_total(more)
    both = data.join(real, [fake, more])
    assert both.shape == (130, 28) and list(both.var_names) == list(real.var_names[:28]) and list(both.var["symbol"]) == [f"s{i}" for i in range(28)]
    assert both.obs["source"].value_counts().to_dict() == {"synthetic": 70, "real": 60} and both.obs_names.is_unique
    assert (both.X[:60] != real.layers["counts"][:, :28]).nnz == 0 and (both.X[60:120] != both.X[:60]).nnz == 0 and (both.X[120:] != both.X[:10]).nnz == 0
    assert both.X.dtype == np.int32 and (both.layers["counts"] != both.X).nnz == 0 and both.layers["counts"].data is not both.X.data
    assert set(both.obs["cell_type"].cat.categories) == {"1", "2", "3"} and both.obs["cell_type"].notna().all()
    both.write_h5ad(tmp_path / "both.h5ad")
    back = ad.read_h5ad(tmp_path / "both.h5ad")
    assert back.obs["doublet"][:60].tolist() == [True, False] * 30 and back.obs["doublet"][60:].isna().all()
    assert list(real.obs["cell_type"].cat.categories) == [1, 2, 3]                                                       # as it was


def test_what_cannot_be_joined():
    real = planted_cells(60, 30)
    fake = drawn_like(real)
    for synth, options, message in ((fake, {"key": "cell_type"}, "has a column 'cell_type' already"), ([], {}, "must be an AnnData of drawn cells"),
                                    (drawn_like(real, "log1p20k"), {}, "hold expected expression, not counts"),
                                    ([fake, fake[:, 1:]], {}, "1 genes, e.g. 'gene0', are not in all cells")):
        with pytest.raises(InputError, match=message):
            data.join(real, synth, **options)
    with pytest.raises(InputError, match="2 genes, e.g. 'gene0', are not in all cells"):
        data.join(real[:, 2:], fake)


def test_what_is_asked_of_the_clustering_reaches_its_steps(monkeypatch):
    asked, tried = {}, []
    monkeypatch.setattr(sc.tl, "pca", lambda work, **options: asked.update(pca=options))
    monkeypatch.setattr(sc.pp, "neighbors", lambda work, **options: asked.update(neighbors=options))
    monkeypatch.setattr(data, "_communities", lambda work, *options: tried.append(options) or data._by_size(np.zeros(60, dtype=int)))
    with pytest.warns(UserWarning, match="no resolution from 0.05 to 0.5 gives 3 clusters"):
        cluster(as_adata(planted(60, 100, 2)[0]), flavor="igraph", seed=7, n_pcs=5, resolution=0.3, n_clusters=3)
    assert asked == {"pca": {"n_comps": 5, "random_state": 7}, "neighbors": {"n_neighbors": 15, "n_pcs": 5, "random_state": 7}}
    assert tried[0] == (0.3, 7, "igraph") and {options[1:] for options in tried} == {(7, "igraph")}


@pytest.fixture
def two_circles():
    """Eight cells, all of them neighbours, and those of either half a hundred times as close."""
    weights = np.full((8, 8), 0.01)
    weights[:4, :4] = weights[4:, 4:] = 1
    np.fill_diagonal(weights, 0)
    cells = as_adata(np.ones((8, 2)))
    cells.obsp["connectivities"] = sp.csr_matrix(weights)
    return cells


def test_close_neighbours_count_for_more(two_circles):
    assert list(data._communities(two_circles, 1.0, 0, "igraph")) == ["0"] * 4 + ["1"] * 4


def test_either_louvain_has_its_seed(two_circles, monkeypatch):
    seeds = []

    def theirs(work, *, random_state, **options):
        seeds.append(random_state)
        work.obs["louvain"] = ["0"] * work.n_obs

    monkeypatch.setattr(sc.tl, "louvain", theirs)
    monkeypatch.setattr(data.random, "Random", lambda seed: seeds.append(seed) or random)
    for flavor in ("vtraag", "igraph"):
        data._communities(two_circles, 1.0, 7, flavor)
    assert seeds == [7, 7]


def test_few_genes_go_through_the_same_steps_as_many():
    counts, _ = planted(60, 100, 3)
    theirs = as_adata(counts)
    sc.pp.filter_genes(theirs, min_counts=1)
    sc.pp.normalize_total(theirs)
    sc.pp.log1p(theirs)
    sc.pp.scale(theirs)
    np.testing.assert_allclose(data._variable_genes(as_adata(counts)).X, theirs.X, rtol=1e-5, atol=1e-6)


def test_clusters_are_named_by_the_cells_that_pass_the_filters(monkeypatch, tmp_path):
    x = np.ones((50, 20))
    x[:20, 5:] = 0                                             # twenty of the first thirty cells have too few genes

    def found(raw, *, key_added, **options):
        raw.obs[key_added] = data._by_size([0] * 30 + [1] * 20)
        return raw

    monkeypatch.setattr(data, "cluster", found)
    as_adata(x).write_h5ad(tmp_path / "x.h5ad")
    with pytest.warns(UserWarning, match="20 of 50 cells are left out"):
        cells = load(tmp_path / "x.h5ad")
    assert cells.obs["louvain"].tolist() == ["1"] * 10 + ["0"] * 20


def test_what_is_kept_belongs_to_one_file_and_its_facts(tmp_path):
    source, built, info = tmp_path / "source", [], DatasetInfo("x", n_clusters=3)

    def build():
        built.append(1)
        return as_adata([[1, 2]])

    def times(info):
        data._cached(tmp_path / "kept", info, source, build)
        return len(built)

    source.write_text("a")
    assert [times(info), times(info), times(replace(info, n_clusters=4)), times(info)] == [1, 1, 2, 2]
    source.write_text("b")
    assert times(info) == 3


def test_a_set_is_not_taken_from_the_kept_ones_if_labels_are_named(site, monkeypatch):
    monkeypatch.setattr(data, "_cached", lambda *given: pytest.fail("a kept set was taken"))
    with pytest.raises(InputError, match="no column 'kind' in obs"):
        load("brain_small", labels="kind")


def test_a_checksum_may_have_capitals(site):
    info = dataset_info("brain_small")
    assert fetch(replace(info, sha256=info.sha256.upper())).is_file()


def test_a_damaged_matrix_in_memory_is_refused_before_it_reaches_compiled_code():
    adata = as_adata([[1, 0, 2], [0, 3, 0]])
    adata.X.indices[1] = 7
    with pytest.raises(InputError, match="X is damaged, it does not fit together as a sparse matrix"):
        counts_matrix(adata)


@pytest.mark.parametrize(("values", "names"), [
    ([10.0, 9.0, 1.0], ["1.0", "9.0", "10.0"]), ([-2, 10, -1], ["-2", "-1", "10"]), (["10", "9", "b", "1"], ["1", "9", "10", "b"]),
])
def test_labels_that_are_numbers_are_sorted_as_numbers(values, names):
    found = data._label_column(pd.DataFrame({"type": values}), "type")
    assert list(found.categories) == names and list(found) == list(map(str, values))


def test_genes_of_raw_may_be_all_there_in_another_order():
    counts = planted_cells(40, 12)
    adata = counts[:, ::-1].copy()
    adata.raw = counts
    assert (counts_matrix(adata, layer="raw") != adata.X).nnz == 0


def test_a_stored_zero_is_no_expressed_gene_of_a_cell():
    raw = as_adata(np.ones((4, 10)))
    raw.X.data[3] = 0                                          # nine genes are left
    assert list(preprocess(raw).obs_names) == ["cell1", "cell2", "cell3"]


def test_layer_and_total_of_preprocess():
    raw = as_adata(np.full((4, 10), 0.5))
    raw.layers["umi"] = sp.csr_matrix(np.full((4, 10), 2.0))
    out = preprocess(raw, layer="umi", target_sum=100)
    assert (out.layers["counts"].data == 2).all() and out.uns["scld_data"]["target_sum"] == 100
    np.testing.assert_allclose(out.X.sum(axis=1), 100, rtol=1e-6)
    np.testing.assert_allclose(CellReader(out.layers["counts"], target_sum=50, transform="none").read(slice(None)).sum(axis=1), 50, rtol=1e-6)


@pytest.mark.parametrize("n_test", [29, 57, 58])
def test_a_number_of_test_cells_is_that_number(n_test):
    """29 / 100 * 100 is less than 29 in floating point."""
    assert split(as_adata(np.ones((100, 1))), n_test=n_test)[1].n_obs == n_test


def test_joined_counts_come_from_the_layer_that_is_named():
    real = planted_cells(60, 30)
    fake = drawn_like(real)
    real.layers["umi"] = real.X.copy()
    real.X = real.X.log1p()
    both = data.join(real, fake, layer="umi")
    assert (both.X[:60] != real.layers["umi"]).nnz == 0 and (both.X[60:] != fake.X).nnz == 0
    del real.layers["umi"]
    with pytest.raises(InputError, match="1 genes, e.g. 'gene0', are not in all cells"):
        data.join(fake, [fake[:, 1:], fake])


# ---------------------------------------------------------------- what people bring

def test_cells_in_memory_are_loaded_as_those_of_a_file(own_file):
    raw = ad.read_h5ad(own_file)
    before = raw.copy()
    with pytest.warns(UserWarning, match="are left out"):
        a, b = load(raw, labels="kind"), load(own_file, labels="kind")
    assert (a.X != b.X).nnz == 0 and a.obs["kind"].equals(b.obs["kind"]) and list(a.var_names) == list(b.var_names)
    assert raw.obs.equals(before.obs) and raw.shape == before.shape and "scld_data" not in raw.uns
    other = raw.copy()
    other.X[0, 0] += 1
    with pytest.warns(UserWarning, match="are left out"):
        assert len({part.uns["scld_data"]["sha256"] for part in (a, load(raw, labels="kind"), load(other, labels="kind"))}) == 2
    assert a.uns["scld_data"]["file"] == "" and split(a, seed=0)[1].n_obs > 0


@pytest.mark.parametrize("name, way", [
    ("x.zarr", "read_zarr"), ("x.h5", "read_10x_h5"), ("x.loom", "read_loom"), ("x.csv", "read_csv"), ("x.mtx", "read_mtx"), ("x.h5ad.gz", "unpack"), ("x.rds", "anndataR")])
def test_files_of_other_kinds_are_recognised(tmp_path, name, way):
    (tmp_path / name).write_bytes(b"x")
    for opened in (lambda path: load(path), lambda path: load(str(path)), load_on_disk):
        with pytest.raises(InputError, match=way) as caught:
            opened(tmp_path / name)
        assert name in one_line(caught)


def test_anndata_under_a_shorter_name_is_read(own_file, tmp_path):
    path = tmp_path / "cells.h5"
    path.write_bytes(own_file.read_bytes())
    with pytest.warns(UserWarning, match="are left out"):
        assert load(path, labels="kind").n_obs == load_on_disk(path, labels="kind").n_obs == 90


def test_a_folder_of_cell_ranger_is_recognised(tmp_path):
    (tmp_path / "matrix.mtx.gz").write_bytes(b"")
    with pytest.raises(InputError, match="read_10x_mtx"):
        load(tmp_path)
    assert data.not_h5ad(tmp_path / "none.loom") == "" == data.not_h5ad("cells.h5ad")


@pytest.mark.parametrize("call", [lambda a: load(3), lambda a: load(a, labels=["kind", "number"]), lambda a: load(a, layer=["X"]), lambda a: split(a, stratify=["kind"])])
def test_one_thing_at_a_time(own_file, call):
    with pytest.raises(InputError) as caught:
        call(ad.read_h5ad(own_file))
    assert "got " in one_line(caught)


def test_doubts_name_what_is_not_a_gene_and_sizes_that_do_not_vary():
    rng = np.random.default_rng(0)
    by_cell, by_gene = rng.integers(500, 3000, 100).astype(float), np.array([10.0, 30.0, 60.0])
    assert data.doubts(by_cell, by_gene) == [] == data.doubts(by_cell, by_gene, ["Gene Expression"] * 3)
    kinds = data.doubts(by_cell, by_gene, ["Gene Expression", "Gene Expression", "Antibody Capture"])
    assert len(kinds) == 1 and "1 of 'Antibody Capture' with 60% of the counts, 2 of 'Gene Expression' with 40%" in kinds[0]
    assert "CPM" in data.doubts(rng.normal(1e6, 200, 100), by_gene)[0] and not data.doubts(np.full(19, 1e6), by_gene)


def test_doubts_are_said_whichever_way_cells_come(tmp_path):
    rng = np.random.default_rng(0)
    cells = as_adata(rng.poisson(2.0, (60, 40)), kind=np.repeat(["a", "b"], 30))
    cells.var["feature_types"] = ["Gene Expression"] * 39 + ["Antibody Capture"]
    cells.write_h5ad(tmp_path / "x.h5ad")
    for loaded in (lambda: load(cells, labels="kind"), lambda: load(tmp_path / "x.h5ad", labels="kind"), lambda: load_on_disk(tmp_path / "x.h5ad", labels="kind")):
        with pytest.warns(UserWarning, match="1 of 'Antibody Capture'"):
            loaded()


def test_clusters_that_nobody_asked_for_are_announced(own_file):
    with pytest.warns(UserWarning, match=r"no labels were named, so \d+ Louvain clusters are computed; columns of obs .*: kind, number"):
        load(own_file)


def test_a_column_split_of_the_users_is_not_replaced_in_silence():
    cells = as_adata(np.ones((20, 3)), split=["fit", "holdout"] * 10)
    with pytest.warns(UserWarning, match=r"obs\['split'\] is replaced"):
        train, _ = split(cells)
    assert set(cells.obs["split"]) == {"fit", "holdout"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(train)                                           # a part divided again


def test_joined_columns_of_two_meanings_stay_apart():
    real = as_adata(np.ones((4, 3)), condition=["ctrl", "stim"] * 2, cell_type=["a"] * 4)
    draw = as_adata(np.ones((3, 3)), condition=["a"] * 3, cell_type=["a"] * 3, score=[0.1, 0.2, 0.3])
    draw.uns["scld"] = {"scale": "counts", "labels_key": "cell_type", "model": "m", "seed": 0, "label": "a"}
    both = data.join(real, draw)
    assert set(both.obs["condition"].dropna()) == {"ctrl", "stim"} and both.obs["condition"].isna().sum() == 3
    assert both.obs["scld_condition"].dropna().tolist() == ["a"] * 3 and both.obs["score"].notna().sum() == 3
    with pytest.raises(InputError, match="cells that a model drew"):
        data.join(draw, real)
    with pytest.warns(UserWarning, match="1 of 2 draws share model, seed and label"):
        data.join(real, [draw, draw])

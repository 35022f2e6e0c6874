"""Generated count matrices in the two formats of 10x Genomics, and a local server that can misbehave.

Nothing here is real data: `planted` draws cells from a few made-up programmes. What is real is the form of the files,
the two that the paper's data sets come in:

- `write_mex`: tar.gz with `filtered_matrices_mex/GENOME/{matrix.mtx,genes.tsv,barcodes.tsv}` (genes x cells);
- `write_h5`: Cell Ranger 1 HDF5, a group GENOME with barcodes, data, gene_names, genes, indices, indptr, shape.

`standins(folder)` serves one of each under the names `pbmc68k` and `brain_small`:

    with standins(tmp_path) as site:
        run([...], env=os.environ | site.env)
"""

import hashlib
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp


def planted(n_cells=240, n_genes=400, n_clusters=8, *, n_poor=0, seed=0):
    """Counts (cells x genes, CSR int32) with planted clusters of falling size, and the planted labels.

    The last five genes are silent, the five before are seen in one or two cells, and `n_poor` further cells
    (label -1, at the end) express only four genes: the filters of the package have something to remove.
    """
    rng = np.random.default_rng(seed)
    share = np.linspace(2, 1, n_clusters)
    labels = rng.permutation(np.repeat(np.arange(n_clusters), np.diff(np.round(np.r_[0, np.cumsum(share / share.sum())] * n_cells).astype(int))))
    base = rng.gamma(0.6, size=n_genes - 10) + 0.02
    programmes = np.tile(base, (n_clusters, 1))
    for k, own in enumerate(np.array_split(rng.permutation(n_genes - 10)[: (n_genes - 10) // 2], n_clusters)):
        programmes[k, own] = 8 * (base[own] + 0.5)
    programmes /= programmes.sum(axis=1, keepdims=True)
    depth = rng.lognormal(np.log(600), 0.3, size=n_cells)
    counts = np.zeros((n_cells + n_poor, n_genes), dtype=np.int32)
    counts[:n_cells, : n_genes - 10] = rng.poisson(programmes[labels] * depth[:, None])
    for j in range(5):
        counts[rng.choice(n_cells, 1 + j % 2, replace=False), n_genes - 10 + j] = 1
    counts[n_cells:, :4] = 1
    return sp.csr_matrix(counts), np.r_[labels, np.full(n_poor, -1)]


def names(n_cells, n_genes, *, repeated=2):
    """(barcodes, gene ids, gene names); the last `repeated` genes carry the name of the first, as happens in 10x files."""
    barcodes = ["".join("ACGT"[(i >> 2 * j) & 3] for j in range(14)) + "-1" for i in range(n_cells)]
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    symbols = [f"GENE{i}" for i in range(n_genes - repeated)] + ["GENE0"] * repeated
    return barcodes, ids, symbols


def surviving_shape(counts, min_genes=10, min_cells=3):
    """(cells, genes) after the filters, computed densely and independently of the package."""
    dense = counts.toarray() > 0
    cells = dense[dense.sum(axis=1) >= min_genes]
    return len(cells), int((cells.sum(axis=0) >= min_cells).sum())


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_mex(path, counts, *, genome="hg19", leave_out=(), extra=()):
    """Write a Cell Ranger 1 MEX archive; `extra` holds (TarInfo or name, bytes) members that come first."""
    barcodes, ids, symbols = names(*counts.shape)
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, sp.coo_matrix(counts.T.astype(np.int64)), field="integer")
    folder = f"filtered_matrices_mex/{genome}"
    files = {
        "matrix.mtx": matrix.getvalue(),
        "genes.tsv": "".join(f"{i}\t{s}\n" for i, s in zip(ids, symbols, strict=True)).encode(),
        "barcodes.tsv": "".join(f"{b}\n" for b in barcodes).encode(),
    }
    with tarfile.open(path, "w:gz") as tar:
        for member, content in extra:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                _add(tar, member, content)
        for name, content in files.items():
            if name not in leave_out:
                _add(tar, f"{folder}/{name}", content)
    return Path(path)


def write_h5(path, counts, *, genome="mm10", leave_out=()):
    """Write a Cell Ranger 1 HDF5 file: the matrix genes x cells, compressed by column."""
    barcodes, ids, symbols = names(*counts.shape)
    by_cell = sp.csr_matrix(counts)  # CSR of cells x genes is CSC of genes x cells
    fields = {
        "barcodes": np.array(barcodes, dtype="S"), "genes": np.array(ids, dtype="S"), "gene_names": np.array(symbols, dtype="S"),
        "data": by_cell.data.astype(np.int32), "indices": by_cell.indices.astype(np.int64),
        "indptr": by_cell.indptr.astype(np.int64), "shape": np.array(counts.shape[::-1], dtype=np.int32),
    }
    with h5py.File(path, "w") as file:
        group = file.create_group(genome)
        for name, value in fields.items():
            if name not in leave_out:
                group.create_dataset(name, data=value)
    return Path(path)


class Server:
    """HTTP server on 127.0.0.1 for the files in a folder, by their base name whatever the path before it.

    `behaviour` of a name (default "good"): "truncated" promises the whole length and sends half; "cut" promises nothing
    and sends half; "wrong" changes one byte; "stall" sends half and waits until the server is closed; an integer is
    answered as that HTTP status. `requests` lists (path, headers).
    """

    def __init__(self, folder):
        self.folder, self.behaviour, self.requests = Path(folder), {}, []
        self.half_sent, self._closing = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                name = Path(urlsplit(self.path).path).name
                how = outer.behaviour.get(name, "good")
                if not (outer.folder / name).is_file():
                    how = 404
                if isinstance(how, int):
                    self.send_error(how)
                    return
                body = (outer.folder / name).read_bytes()
                if how == "wrong":
                    body = body[:-1] + bytes([body[-1] ^ 1])
                self.send_response(200)
                if how != "cut":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if how in ("good", "wrong") else body[: len(body) // 2])
                self.wfile.flush()
                if how == "stall":
                    outer.half_sent.set()
                    outer._closing.wait(60)

            def log_message(self, *args):
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Stop answering; a later request is refused. Calling again does nothing."""
        if not self._closing.is_set():
            self._closing.set()
            self._httpd.shutdown()
            self._httpd.server_close()
            self._thread.join()


def facts(path, url, counts, **more):
    """The fields of a `DatasetInfo` for a generated file, as they stand in the JSON of `SCLD_DATASETS`."""
    content = Path(path).read_bytes()
    return {"url": f"{url}/samples/{Path(path).name}", "filename": Path(path).name, "md5": hashlib.md5(content).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(), "raw_shape": list(counts.shape),
            "shape": list(surviving_shape(counts))} | more


@dataclass
class Site:
    """What `standins` yields: the server, the facts by name, the planted counts and labels, and an environment."""

    server: Server
    facts: dict
    env: dict
    counts: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)


@contextmanager
def standins(folder, *, n_cells=240, n_genes=400, seed=0):
    """Serve stand-ins for `pbmc68k` (10 clusters, MEX) and `brain_small` (8 clusters, HDF5) out of `folder`.

    `site.env` holds SCLD_DATASETS and SCLD_DATA_DIR for a process that shall take the stand-ins for the real sets.
    """
    folder = Path(folder)
    served, cache = folder / "served", folder / "cache"
    served.mkdir(parents=True, exist_ok=True)
    with Server(served) as server:
        site = Site(server, {}, {"SCLD_DATASETS": str(folder / "datasets.json"), "SCLD_DATA_DIR": str(cache)})
        for name, n_clusters, write, file, kind in (
            ("pbmc68k", 10, write_mex, "standin_matrices.tar.gz", {"kind": "10x_mex", "genome": "hg19"}),
            ("brain_small", 8, write_h5, "standin_neuron.h5", {"kind": "10x_h5", "genome": "mm10"}),
        ):
            counts, labels = planted(n_cells, n_genes, n_clusters, seed=seed)
            path = write(served / file, counts)
            site.counts[name], site.labels[name] = counts, labels
            site.facts[name] = facts(path, server.url, counts, n_clusters=n_clusters, n_test=n_cells // 5, **kind)
        Path(site.env["SCLD_DATASETS"]).write_text(json.dumps(site.facts))
        yield site

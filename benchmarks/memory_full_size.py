"""Peak memory of the whole protocol at the size of the paper's larger set: 68,579 cells x 17,789 genes, no download.

A sparse gamma-Poisson matrix with planted cell types is written as a 10x archive, a block of cells at a time. Everything
after that is the package's own way: read, cluster, filter and normalise, split, one epoch of Round/Map and of the
denoiser, the Scorer, as many new cells as there are test cells, all metrics, and the cheapest baseline. One line per
stage, then the verdict; exit status 1 if the limit was exceeded.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import io
import resource
import sys
import tarfile
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.io
import scipy.sparse as sp

from scld_nb.baselines.random import RandomBaseline
from scld_nb.data import DATASETS, DatasetInfo, InputError, cluster, default_split, file_sha256, preprocess, read_dataset
from scld_nb.evaluation import evaluate, expression
from scld_nb.experiments import provenance, write_json
from scld_nb.metrics import rf_aucs
from scld_nb.model import SCLD

GIB = 2**30
PAPER = DATASETS["pbmc68k"]  # raw_shape, shape, n_test, n_clusters
LABELS = "louvain"
PROTOCOL_TREES = 1000
EMPTY_CELLS = 5  # some dozens would be a cluster of their own


# ---------------------------------------------------------------- memory

def status_bytes(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def reset_peak() -> bool:
    """Start the kernel's high-water mark of this process anew, where it allows that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """High-water mark of resident memory: since the last reset if there can be one, else since the start."""
    since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return status_bytes("VmHWM") or since_start


class Meter:
    """Wall time and peak resident memory of stages that follow one another; prints a line after each."""

    def __init__(self):
        self.stages: list[dict] = []
        self.peak, self.resets = 0, reset_peak()

    @contextmanager
    def stage(self, name: str):
        """Measure the body; what it puts into the dict it is given is printed and kept."""
        notes: dict = {}
        self.resets = reset_peak() and self.resets
        began = time.perf_counter()
        try:
            yield notes
        except MemoryError:
            notes["failed"] = "out of memory"
            raise
        except Exception as error:
            notes["failed"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            own = peak_bytes()
            self.peak = max(self.peak, own)
            left = status_bytes("VmRSS")
            self.stages.append({
                "stage": name, "seconds": round(time.perf_counter() - began, 2), "stage_peak_gib": round(own / GIB, 3) if self.resets else None,
                "resident_after_gib": None if left is None else round(left / GIB, 3), "peak_so_far_gib": round(self.peak / GIB, 3), "notes": notes,
            })
            self._print(self.stages[-1])

    def heading(self) -> None:
        print(f"{'stage':<34} {'wall s':>8} {'peak GiB':>9} {'after GiB':>9} {'so far GiB':>10}  what", flush=True)

    def _print(self, row: dict) -> None:
        own, after = (" " * 5 + "n/a" if row[k] is None else f"{row[k]:.2f}" for k in ("stage_peak_gib", "resident_after_gib"))
        notes = "; ".join(f"{k} {v}" for k, v in row["notes"].items())
        print(f"{row['stage']:<34} {row['seconds']:>8.1f} {own:>9} {after:>9} {row['peak_so_far_gib']:>10.2f}  {notes}", flush=True)


# ---------------------------------------------------------------- the generated cells

def library_for(profile: np.ndarray, density: float, size: float) -> float:
    """Counts per cell at which a share `density` of the genes is seen: a gamma-Poisson gene is 0 with (1 + L p / r)^-r."""
    low, high = 1.0, 1e9
    for _ in range(80):
        middle = (low * high) ** 0.5
        seen = (1 - (1 + middle * profile / size) ** -size).mean()
        low, high = (middle, high) if seen < density else (low, middle)
    return low


def blocks_of_cells(cells: int, genes: int, density: float, types: int, seed: int, block: int = 512):
    """Counts of `cells` cells as COO blocks (row offset, rows, columns, values); at most one dense block is alive.

    Every gene has a count in at least three cells and every cell in at least ten genes, so that no filter takes any.
    """
    size = 2.0
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, 2.2, genes)
    markers = [rng.choice(genes, max(3, genes // 30), replace=False) for _ in range(types)]
    profiles = np.tile(base, (types, 1))
    for k, own in enumerate(markers):
        profiles[k, own] = profiles[k, own] * 6 + np.median(base) * 8
    profiles /= profiles.sum(1, keepdims=True)
    library = library_for(profiles[0], density, size)
    weights = np.linspace(2.0, 1.0, types)
    anchors = np.arange(3 * genes) % cells
    for start in range(0, cells, block):
        n = min(block, cells - start)
        kind = rng.choice(types, n, p=weights / weights.sum())
        rate = profiles[kind].astype(np.float32) * (library * rng.lognormal(0.0, 0.3, (n, 1))).astype(np.float32)
        rate *= rng.standard_gamma(size, rate.shape, dtype=np.float32) / np.float32(size)
        x = rng.poisson(rate).astype(np.int32)
        here = np.flatnonzero((anchors >= start) & (anchors < start + n))
        np.maximum.at(x, (anchors[here] - start, here // 3), 1)
        poor = np.flatnonzero((x > 0).sum(1) < 10)
        x[poor[:, None], np.arange(10)] += 1
        rows, columns = np.nonzero(x)
        yield start, rows, columns, x[rows, columns]


def write_archive(folder: Path, cells: int, genes: int, density: float, types: int, n_test: int, seed: int) -> tuple[DatasetInfo, Path, int]:
    """A 10x archive whose filters leave `cells` x `genes`: a few nearly empty cells and many unseen genes are added.

    Unfiltered and filtered genes stand in the ratio of the paper's set.
    """
    rng = np.random.default_rng([seed, 1])
    raw_cells, raw_genes = cells + EMPTY_CELLS, round(genes * PAPER.raw_shape[1] / PAPER.shape[1])
    gene_at = np.sort(rng.choice(raw_genes, genes, replace=False))
    empty = np.sort(rng.choice(raw_cells, raw_cells - cells, replace=False))
    cell_at = np.setdiff1d(np.arange(raw_cells), empty)
    unseen = np.setdiff1d(np.arange(raw_genes), gene_at)[::2]

    def parts():
        for start, rows, columns, values in blocks_of_cells(cells, genes, density, types, seed):
            yield gene_at[columns], cell_at[start + rows], values
        yield rng.choice(gene_at, 5 * len(empty)), np.repeat(empty, 5), np.ones(5 * len(empty), np.int32)  # cells of at most 5 genes
        yield unseen, rng.choice(cell_at, len(unseen)), np.ones(len(unseen), np.int32)  # genes seen in one cell

    def header(stored: int) -> bytes:
        sizes = f"{raw_genes} {raw_cells} {stored}\n".encode()
        return b"%%MatrixMarket matrix coordinate integer general\n%".ljust(160 - len(sizes), b" ")[:-1] + b"\n" + sizes

    stored, matrix = 0, folder / "matrix.mtx"
    with open(matrix, "wb") as file:
        file.write(header(0))
        for g, c, values in parts():
            buffer = io.BytesIO()
            scipy.io.mmwrite(buffer, sp.coo_matrix((values, (g, c)), shape=(raw_genes, raw_cells)), field="integer", symmetry="general")
            text = buffer.getvalue()
            at = text.index(f"{raw_genes} {raw_cells} {len(values)}\n".encode())
            file.write(text[text.index(b"\n", at) + 1:])
            stored += len(values)
        file.seek(0)
        file.write(header(stored))
    path = folder / "generated_gene_bc_matrices.tar.gz"
    names = {"genes.tsv": "".join(f"ENSG{i:011d}\tG{i}\n" for i in range(raw_genes)),
             "barcodes.tsv": "".join(f"CELL{i:08d}-1\n" for i in range(raw_cells))}
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(matrix, "filtered_matrices_mex/hg19/matrix.mtx")
        for name, text in names.items():
            entry = tarfile.TarInfo(f"filtered_matrices_mex/hg19/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    matrix.unlink()
    info = DatasetInfo("generated", kind="10x_mex", genome="hg19", filename=path.name, sha256=file_sha256(path), raw_shape=(raw_cells, raw_genes),
                       shape=(cells, genes), n_clusters=types, n_test=n_test, origin="stand-in", licence="generated", labels_key=LABELS)
    return info, path, stored


# ---------------------------------------------------------------- the stages

def shape(x) -> str:
    return f"{x.shape[0]:,} x {x.shape[1]:,}"


def run(args: argparse.Namespace, meter: Meter, folder: Path) -> None:
    """All stages in the order of an experiment. What `data.load` and `Study` keep alive is kept alive here."""
    n_test = args.test_cells or max(10, round(PAPER.n_test * args.cells / PAPER.shape[0]))
    with meter.stage("generate the archive") as notes:
        info, path, stored = write_archive(folder, args.cells, args.genes, args.density, args.types, n_test, args.seed)
        notes |= {"values": f"{stored:,}", "file MiB": round(path.stat().st_size / 2**20, 1)}
    with meter.stage("read it (data.read_dataset)") as notes:
        raw = read_dataset(info, path=path)
        notes["raw"] = shape(raw)
    with meter.stage("Louvain (data.cluster)") as notes:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            clustered = cluster(raw, n_clusters=info.n_clusters, key_added=LABELS, seed=args.seed)
        done = clustered.uns["scld_data"]["clustering"]
        notes |= {"clusters": done["n_clusters"], "planted": args.types, "resolution": done["resolution"]}
        if any("cluster ids cannot be compared" in str(w.message) for w in said):
            notes["note"] = "all 46 resolutions were tried"
    with meter.stage("filter, normalise (preprocess)") as notes:
        cells = preprocess(clustered)
        density = cells.layers["counts"].nnz / (cells.n_obs * cells.n_vars)
        notes |= {"left": shape(cells), "non-zero %": round(100 * density, 2)}
        if cells.shape != (args.cells, args.genes):
            raise InputError(f"the filters left {shape(cells)}, {args.cells:,} x {args.genes:,} were planned; raise --density")
        cells.obs[LABELS] = cells.obs[LABELS].cat.remove_unused_categories()
        cells.uns["scld_data"] |= {"labels_key": LABELS, "name": info.name, "n_test": info.n_test}
    del raw, clustered  # data.load returns here
    with meter.stage("split (default_split)") as notes:
        train, test = default_split(cells, seed=args.seed)
        notes |= {"train": f"{train.n_obs:,}", "test": f"{test.n_obs:,}"}
    with meter.stage("build SCLD, default widths") as notes:
        model = SCLD(train, LABELS, device=args.device, seed=args.seed)
        notes["parameters"] = f"{sum(p.numel() for m in (model.autoencoder, model.denoiser, model.scorer) for p in m.parameters()):,}"
    steps = args.epochs * max(1, train.n_obs // model.config.batch_size)
    checkpoints = folder / "checkpoints"
    with meter.stage("train Round/Map and denoiser") as notes:
        model.train(steps, ae_steps=steps, scorer=False, checkpoint_dir=checkpoints, progress=False)
        notes |= {"epochs": args.epochs, "steps each": steps} | {f"{k} s": round(v["seconds"], 1) for k, v in model.history.items()}
    with meter.stage("train the Scorer (and resume)") as notes:
        model.train(steps, ae_steps=steps, checkpoint_dir=checkpoints, resume=True, sampling_steps=args.sampling_steps, progress=False)
        notes |= {"fakes": model.history["scorer"]["n_fake"], "epochs": model.history["scorer"]["epochs"]}
    with meter.stage("save the model") as notes:
        notes["MiB"] = round(sum(f.stat().st_size for f in model.save(folder / "model").iterdir()) / 2**20)
    with meter.stage("sample") as notes:
        synth = model.sample(test.n_obs, sampling_steps=args.sampling_steps, seed=args.seed, progress=False)
        filled = synth.X.nnz / (synth.n_obs * synth.n_vars)
        notes |= {"generated": f"{synth.uns['scld']['generated']:,}", "kept": f"{synth.n_obs:,}", "steps": args.sampling_steps,
                  "non-zero %": round(100 * filled, 1)}
    judge = {"train": train, "seed": args.seed, "n_trees": args.trees, "n_jobs": args.jobs, "progress": False}
    with meter.stage("metrics of SCLD (evaluate)") as notes:
        # purity of the labels too; forests by label add no memory to the pooled ones, so that no label is large enough
        report = evaluate(test, synth, labels_key=LABELS, min_cluster=test.n_obs + 1, **judge)
        notes |= {"n": report.settings["n"], "trees": args.trees} | {f"{m} {s}": round(report.value(m, s), 3) for s in ("counts20k", "log1p")
                                                                     for m in ("rf_auc", "mmd_biased")}
    del synth
    if args.trees < PROTOCOL_TREES:
        forest_size(args, meter, train, test.n_obs)
    with meter.stage("baseline Random, fit and sample") as notes:
        shuffled: ad.AnnData = RandomBaseline(seed=args.seed).fit(train, LABELS).sample(test.n_obs)
        notes["cells"] = f"{shuffled.n_obs:,}"
    with meter.stage("metrics of Random (evaluate)") as notes:
        report = evaluate(test, shuffled, controls=report.controls, **judge)
        notes |= {f"{m} {s}": round(report.value(m, s), 3) for s in ("counts20k", "log1p") for m in ("rf_auc", "mmd_biased")}


def forest_size(args: argparse.Namespace, meter: Meter, train: ad.AnnData, n: int) -> None:
    """The same forests with few trees and with all: their difference is what the metrics lack at `--trees`.

    Training cells against training cells, which no tree can tell apart, give the largest trees. A forest of the protocol is
    fitted to 4/5 of 2 n cells; with two folds, as many are fitted when there are 1.6 n a side.
    """
    m = min(8 * n // 5, train.n_obs // 2)
    rows = np.random.default_rng([args.seed, 2]).permutation(train.n_obs)[:2 * m]
    pair = [expression(train[np.sort(part)], "counts20k") for part in (rows[:m], rows[m:])]
    for trees in (args.trees, PROTOCOL_TREES):
        with meter.stage(f"a forest of {trees:,} trees") as notes:
            rf_aucs(*pair, max_depths=(None,), folds=2, n_trees=trees, seed=args.seed, n_jobs=args.jobs)
            notes["fitted to"] = f"{m:,} cells"


def with_all_trees(stages: list[dict], trees: int) -> float | None:
    """Peak of the metrics if every forest had 1,000 trees: the measured peak, and what more trees added to a forest."""
    peaks = {s["stage"]: s["stage_peak_gib"] for s in stages}
    few, every = (peaks.get(f"a forest of {k:,} trees") for k in (trees, PROTOCOL_TREES))
    metrics = peaks.get("metrics of SCLD (evaluate)")
    return None if None in (few, every, metrics) else round(metrics + max(0.0, every - few), 3)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"cells": (PAPER.shape[0], "cells after the filters"), "genes": (PAPER.shape[1], "genes after the filters"),
             "types": (PAPER.n_clusters, "planted cell types"), "epochs": (1, "epochs of each training stage"),
             "sampling-steps": (20, "denoising steps; memory does not depend on them"),
             "trees": (PROTOCOL_TREES, "trees per forest of the metrics; with fewer, a forest of 1000 is measured apart")}
    for name, (default, what) in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--test-cells", type=int, default=None, help=f"test cells (default: {PAPER.n_test} at full size, else in proportion)")
    parser.add_argument("--density", type=float, default=0.0304, help="share of non-zero values (default 0.0304: 540 genes a cell)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=-1, help="cores for the forests (default -1, all)")
    parser.add_argument("--device", default="cpu", help="where the networks are (default cpu, so that their memory is counted)")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="limit of resident memory (default 16)")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write all figures to this file")
    args = parser.parse_args(argv)
    for name in whole:
        if getattr(args, name.replace("-", "_")) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.seed < 0:
        parser.error("--seed must be 0 or greater")
    if not 0 < args.density < 0.9:
        parser.error(f"--density must lie between 0 and 0.9, got {args.density}")
    if args.density * args.genes < 20 or args.cells < 100:
        parser.error("at least 100 cells are needed, and 20 genes seen per cell: raise --cells, --genes or --density")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run all stages; 0 if the peak stayed within the limit, else 1."""
    args = arguments(argv)
    meter, failed = Meter(), None
    with tempfile.TemporaryDirectory(prefix="scld-memory-") as folder:
        meter.heading()
        try:
            run(args, meter, Path(folder))
        except (MemoryError, InputError) as error:
            failed = " ".join(f"{type(error).__name__}: {error}".split())
    extrapolated = with_all_trees(meter.stages, args.trees)
    peak = max(meter.peak / GIB, extrapolated or 0.0)
    ok = failed is None and peak <= args.limit_gib
    if args.json is not None:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, {
            "format": 1, "benchmark": "memory_full_size", "settings": settings, "stages": meter.stages, "peak_gib": round(peak, 3),
            "measured_peak_gib": round(meter.peak / GIB, 3), "metrics_with_1000_trees_gib": extrapolated, "limit_gib": args.limit_gib, "ok": ok,
            "failed": failed, "peaks_per_stage": meter.resets, "cores": os.cpu_count(),
            "provenance": provenance(args.device, root=Path(__file__).parent) | {"peak_memory_gib": round(meter.peak / GIB, 3)},
        })
    if failed:
        print(f"stopped: {failed}", file=sys.stderr)
    verdict = "ok" if ok else "failed" if failed and not failed.startswith("MemoryError") else "EXCEEDED"
    if extrapolated:
        print(f"metrics with {PROTOCOL_TREES:,} trees instead of {args.trees:,}, extrapolated: {extrapolated:.2f} GiB")
    print(f"peak {peak:.2f} GiB (limit {args.limit_gib:g} GiB): {verdict}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())

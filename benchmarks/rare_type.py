"""A rare cell type, ten times over: does a classifier find held-out real cells of it more often?

    python benchmarks/rare_type.py cells.h5ad --labels cell_type

Every label with at most 2 % of all cells is tried. Each seed draws a fresh stratified split (70 % / 30 %) and trains one SCLD, and one scVI
where scvi-tools is installed, on the training part only. Ten times as many synthetic cells as the label has training cells join the training
set of a classifier of all labels, judged on the test part. Beside it stand the same classifier on real cells only, on rare cells drawn ten
times over with replacement, and with balanced class weights. A file per seed goes to results/<set>/rare_type/, and is reused.
"""

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_fscore_support

from scld_nb import data
from scld_nb.baselines.scvi import ScVI
from scld_nb.cli import parse_setting
from scld_nb.experiments import project_root, provenance, write_json
from scld_nb.model import SCLD, make_config
from scld_nb.suite import variable_genes

TIMES, LARGEST, TEST_SIZE, MIN_TRAIN, MIN_TEST, N_GENES, N_MARKERS, N_TREES, GUIDED = 10, 0.02, 0.3, 10, 3, 2000, 20, 300, 1.0
SOURCES = {"scld": "SCLD", "scld_scorer": "SCLD behind the Scorer, keep 0.8",
           "scld_guided": "SCLD, omega 1, behind the Scorer", "scvi": "scVI, label's aggregated posterior"}
TITLES = {"real": "real cells only", "oversampled": "+ 10x oversampled", "balanced": "balanced weights"} | {k: f"+ 10x {v}" for k, v in SOURCES.items()}


def rare_labels(train_labels, test_labels) -> list[str]:
    """Labels of at most 2 % of all cells, with 10 training and 3 test cells or more; the rarest first."""
    sizes = [dict(zip(*np.unique(np.asarray(y, str), return_counts=True), strict=True)) for y in (train_labels, test_labels)]
    largest = LARGEST * (len(train_labels) + len(test_labels))
    found = {k: n + sizes[1][k] for k, n in sizes[0].items() if n >= MIN_TRAIN and sizes[1].get(k, 0) >= MIN_TEST}
    return [str(k) for k in sorted(found, key=lambda k: (found[k], k)) if found[k] <= largest]


def log_normalised(counts) -> sp.csr_matrix:
    """log(1 + counts per 10,000), (n_cells, n_genes)."""
    return data.library_normalize(counts, 1e4).log1p()


def oversample(x, y: np.ndarray, label: str, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """The cells and ten times as many cells of ``label`` as there are, drawn from them with replacement."""
    rare = np.flatnonzero(y == label)
    return append(x, y, x[np.random.default_rng(seed).choice(rare, TIMES * len(rare))], label)


def append(x, y: np.ndarray, extra, label: str) -> tuple[sp.csr_matrix, np.ndarray]:
    """Cells and labels, with cells of one label added at the end."""
    return sp.vstack([x, extra], format="csr"), np.concatenate([y, np.full(extra.shape[0], label, dtype=y.dtype)])


def classify(x, y, x_test, y_test, label: str, seed: int, *, weights: str | None = None) -> dict[str, dict[str, float]]:
    """F1, precision and recall of ``label`` on test cells, and the mean F1 of all labels, by both classifiers."""
    models = {"logistic": LogisticRegression(max_iter=1000, class_weight=weights),
              "forest": RandomForestClassifier(N_TREES, class_weight=weights, random_state=seed)}
    x, x_test, found = x.toarray(), x_test.toarray(), {}
    names, codes = np.unique(y, return_inverse=True)     # balanced forests of scikit-learn 1.9 refuse labels that read like numbers
    for name, model in models.items():
        guess = names[model.fit(x, codes).predict(x_test)]
        precision, recall, f1, _ = precision_recall_fscore_support(y_test, guess, labels=[label], average=None, zero_division=0)
        found[name] = {"f1": float(f1[0]), "precision": float(precision[0]), "recall": float(recall[0]),
                       "macro_f1": float(f1_score(y_test, guess, average="macro", zero_division=0))}
    return found


def top_markers(rare, rest, n: int = N_MARKERS) -> np.ndarray:
    """Columns of the genes that lie highest in ``rare`` against ``rest`` (both log-normalised) by scanpy's Wilcoxon test."""
    group = np.repeat(["rare", "rest"], [rare.shape[0], rest.shape[0]])
    cells = ad.AnnData(sp.vstack([rare, rest], format="csr"), obs={"group": group}, uns={"log1p": {"base": None}})
    sc.tl.rank_genes_groups(cells, "group", groups=["rare"], method="wilcoxon", n_genes=n)
    return cells.uns["rank_genes_groups"]["names"]["rare"].astype(int)


def fold_changes(rare, rest) -> np.ndarray:
    """log2 fold changes of mean counts per 10,000, one added to both means, (n_genes,)."""
    inside, outside = (np.asarray(x.expm1().mean(axis=0), dtype=np.float64).ravel() for x in (rare, rest))
    return np.log2((1 + inside) / (1 + outside))


def compare_markers(train, y, test, y_test, label: str, drawn: dict) -> dict[str, dict[str, float]]:
    """Markers of ``label`` in real test cells beside those in real training cells ("real", the control) and in synthetic cells.

    Synthetic cells stand against the real training cells of all other labels, and as many are looked at as there are training cells.
    """
    real, rest, held_out, held_rest = train[y == label], train[y != label], test[y_test == label], test[y_test != label]
    markers, truth, best = top_markers(real, rest), fold_changes(held_out, held_rest), top_markers(held_out, held_rest)
    found = {}
    for name, cells in {"real": real, **{k: x[: real.shape[0]] for k, x in drawn.items()}}.items():
        change = fold_changes(cells, rest)
        found[name] = {"pearson": float(np.corrcoef(change[markers], truth[markers])[0, 1]),
                       "pearson_all_genes": float(np.corrcoef(change, truth)[0, 1]),
                       "overlap": int(len(np.intersect1d(top_markers(cells, rest), best)))}
    return found


def run(cells: ad.AnnData, key: str, seed: int, *, steps: int | None = None, ae_steps: int | None = None, sampling_steps: int | None = None,
        scvi_steps: int | None = None, omega: float = 0.0, settings: dict | None = None) -> dict:
    """One seed: split, train, and all rare labels; see the top of the file."""
    began = time.perf_counter()
    train, test = data.split(cells, test_size=TEST_SIZE, stratify=key, seed=seed)
    y, y_test = (part.obs[key].astype(str).to_numpy(dtype=object) for part in (train, test))
    if not (labels := rare_labels(y, y_test)):
        raise data.InputError(f"no label of {key!r} has at most {LARGEST:.0%} of the {cells.n_obs} cells, {MIN_TRAIN} training and {MIN_TEST} "
                              "test cells; give other labels with --labels, or a larger set")
    model = SCLD(train, key, seed=seed, **(settings or {})).train(steps, ae_steps=ae_steps, sampling_steps=sampling_steps, progress=False)
    scvi, skipped = ScVI(seed=seed, steps=scvi_steps, progress=False), {}
    try:
        scvi.fit(train, key)
    except data.InputError as error:                     # not installed, or a label of one cell
        skipped["scvi"] = str(error)
    x, x_test = (log_normalised(data.counts_matrix(part)) for part in (train, test))
    genes = variable_genes(x, N_GENES)
    x, x_test, found = x[:, genes], x_test[:, genes], {}
    for label in labels:
        n = TIMES * int((y == label).sum())
        drawn = {name: model.sample(n, label, omega=weight, keep=keep, seed=seed, sampling_steps=sampling_steps, progress=False).X
                 for name, keep, weight in (("scld", 1.0, omega), ("scld_scorer", 0.8, omega), ("scld_guided", 0.8, GUIDED))}
        drawn |= {} if skipped else {"scvi": scvi.sample(n, label).X}
        drawn = {name: log_normalised(counts)[:, genes] for name, counts in drawn.items()}
        sets = {"real": (x, y), "oversampled": oversample(x, y, label, seed), "balanced": (x, y)}
        sets |= {name: append(x, y, extra, label) for name, extra in drawn.items()}
        found[label] = {"n_train": n // TIMES, "n_test": int((y_test == label).sum()), "n_added": n,
                        "scores": {name: classify(*both, x_test, y_test, label, seed, weights="balanced" if name == "balanced" else None)
                                   for name, both in sets.items()},
                        "markers": compare_markers(x, y, x_test, y_test, label, drawn)}
    return {"format": 1, "experiment": "rare_type", "seed": seed, "labels_key": key, "n_train": train.n_obs, "n_test": test.n_obs,
            "n_genes": train.n_vars, "n_features": len(genes), "sources": SOURCES, "labels": found, "skipped": skipped,
            "steps": {k: v["steps"] for k, v in (model.history | {"scvi": scvi.history}).items() if "steps" in v},
            "seconds": round(time.perf_counter() - began, 1), "provenance": provenance(model.device, root=Path(__file__).parent)}


def usable(file: Path, asked: dict) -> bool:
    """Whether the file holds this run; one without scVI is no longer enough where scvi-tools is installed."""
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found.get("asked") == asked and not ("needs scvi-tools" in found["skipped"].get("scvi", "") and importlib.util.find_spec("scvi"))


def table(runs: list[dict]) -> str:
    """Mean and sd over seeds for every rare label: scores on test cells, then markers."""
    def spread(values: list[float]) -> str:
        return f"{np.mean(values):6.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:5.3f}"
    lines = []
    for label in sorted({label for run in runs for label in run["labels"]}):
        own = [run["labels"][label] for run in runs if label in run["labels"]]
        lines += ["", f"{label}: {own[0]['n_train']} training cells, {own[0]['n_added']} added, {own[0]['n_test']} test cells, {len(own)} seeds",
                  f"{'':43s}" + "".join(f"{f'{judge} {what}':>20s}" for judge in ("logistic", "forest") for what in ("F1", "precision", "recall"))]
        for name in TITLES:
            if scores := [o["scores"][name] for o in own if name in o["scores"]]:
                values = [[s[judge][what] for s in scores] for judge in ("logistic", "forest") for what in ("f1", "precision", "recall")]
                lines.append(f"{TITLES[name]:43s}" + "".join(f"{spread(v):>20s}" for v in values))
        lines.append(f"{'markers, against real test cells':43s}" + "".join(f"{what:>20s}" for what in ("r of 20 markers", "r of all genes", "of top 20")))
        for name in ("real", *SOURCES):
            if found := [o["markers"][name] for o in own if name in o["markers"]]:
                lines.append(f"{SOURCES.get(name, 'real training cells'):43s}"
                             + "".join(f"{spread([f[what] for f in found]):>20s}" for what in ("pearson", "pearson_all_genes", "overlap")))
    return "\n".join(lines + sorted({f"{k} left out: {v}" for run in runs for k, v in run["skipped"].items()}))


def main(argv: list[str] | None = None) -> int:
    """All seeds and the table; status 2 and one line if the input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts, or a known data set")
    parser.add_argument("--labels", metavar="KEY", help="column of obs (default: the set's own, or Louvain clusters)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    for name, default in (("steps", None), ("ae-steps", None), ("sampling-steps", None), ("scvi-steps", None), ("omega", 0.0)):
        parser.add_argument(f"--{name}", type=float if name == "omega" else int, default=default)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of SCLD; for trials")
    parser.add_argument("--output", type=Path, help="folder of the files (default results/<set>/rare_type)")
    given, runs = parser.parse_args(argv), []
    try:
        cells = data.load(given.cells, labels=given.labels)
        facts = cells.uns["scld_data"]
        options = {k: getattr(given, k) for k in ("steps", "ae_steps", "sampling_steps", "scvi_steps", "omega")} | {"settings": dict(map(parse_setting, given.set))}
        asked = json.loads(json.dumps(options | {"labels_key": str(facts["labels_key"]), "data_sha256": str(facts["sha256"]),
                                                 "config": asdict(make_config(**options["settings"]))}))
        for seed in given.seeds:
            file = (given.output or project_root() / "results" / str(facts["name"]) / "rare_type") / f"seed{seed}.json"
            if not usable(file, asked):
                write_json(file, run(cells, str(facts["labels_key"]), seed, **options) | {"asked": asked})
            runs.append(json.loads(file.read_text("utf-8")))
            print(f"seed {seed}: {runs[-1]['seconds']:.0f} s", flush=True)
    except data.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

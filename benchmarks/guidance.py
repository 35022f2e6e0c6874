"""What omega buys and costs: purity against coverage, and whether the global condition gives the mixture of all cells.

    python benchmarks/guidance.py cells.h5ad --labels cell_type --seeds 0 1 2

Trains one model per seed on the training part, fits a classifier of labels on real training cells, and asks for the largest labels at
every omega, without the Scorer. Controls: real training cells of the label for coverage, test cells, which the classifier has not seen,
for purity. Then cells are drawn with the global condition (omega = -1), and their labels counted. Written with provenance to
results/<set>/guidance/; seeds finished with the same options, cells and model are reused.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from scld_nb import data
from scld_nb.cli import parse_setting
from scld_nb.data import InputError
from scld_nb.evaluation import expression
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.guidance import check_omega
from scld_nb.metrics import label_classifier, purity
from scld_nb.model import SCLD, make_config
from scld_nb.suite import joint_components, precision_recall

OMEGAS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 3.0)  # check_omega ends at 3
LEAST, MOST, MANY = 30, 200, 6  # test cells a label must have, cells compared at most, labels at most
MEASURES = ("purity", "coverage", "density", "precision", "recall")


def chosen(labels: np.ndarray) -> dict[str, int]:
    """The largest labels and how many test cells of each are compared."""
    counts = Counter(map(str, labels)).most_common()
    if counts[0][1] < LEAST:
        raise InputError(f"no label has {LEAST} test cells (the largest has {counts[0][1]}): give coarser labels or more cells")
    return {label: min(n, MOST) for label, n in counts[:MANY] if n >= LEAST}


def judged(classifier, real, fake, label: str) -> dict[str, float]:
    """Purity of the drawn cells of a label, and how they lie among as many real ones (50 joint components, 5 neighbours)."""
    return {"purity": purity(classifier, fake, label)} | precision_recall(*joint_components(real, fake))


def mean_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Unweighted mean over labels."""
    return {m: float(np.mean([f[m] for f in found.values()])) for m in MEASURES}


def chance(percent: np.ndarray, n: int, seed: int = 0) -> float:
    """Largest difference, in points, that n cells drawn from exactly these proportions stay below in 95 of 100 cases."""
    drawn = np.random.default_rng(seed).multinomial(n, percent / percent.sum(), 2000) / n * 100
    return float(np.quantile(np.abs(drawn - percent).max(axis=1), 0.95))


def mixture(classifier, groups: dict, train: np.ndarray, n: int) -> dict:
    """Shares of labels that the classifier sees in groups of cells ("test" among them), against training's and against "test"."""
    labels = sorted(set(map(str, train)))
    seen = {"train": train} | {name: classifier.predict(cells) for name, cells in groups.items()}
    of = {name: np.array([100 * np.mean(found == label) for label in labels]) for name, found in seen.items()}
    gaps = {f"{name} - {base}": of[name] - of[base] for name in groups for base in ("train", "test") if name != base}
    return {"n": n, "labels": labels, "percent": {k: v.tolist() for k, v in of.items()}, "points": {k: v.tolist() for k, v in gaps.items()},
            "max_points": {k: float(np.abs(v).max()) for k, v in gaps.items()}, "chance_points": chance(of["train"], n)}


def trained(train, key: str, seed: int, given) -> SCLD:
    """A model of the training cells: a new one, or the saved one if these are its cells."""
    if given.model is None:
        model = SCLD(train, key, seed=seed, **dict(map(parse_setting, given.set)))
        return model.train(given.steps, ae_steps=given.ae_steps, scorer=False, progress=False)
    model = SCLD.load(given.model)
    if SCLD(train, key, seed=model.seed, device="cpu", **asdict(model.config)).fingerprint != model.fingerprint:
        raise InputError(f"the model in {given.model} was not trained on the training part of {given.cells}: train it on "
                         f"default_split(load(file, labels={key!r}))[0], or leave --model out")
    return model


def run(cells, key: str, seed: int, given) -> dict:
    """One seed: the curve, its controls, and the global mixture."""
    train, test = data.default_split(cells)
    was, is_now = (part.obs[key].astype(str).to_numpy() for part in (train, test))
    sizes, train_log, test_log = chosen(is_now), expression(train), expression(test)
    began, model = time.perf_counter(), trained(train, key, seed, given)
    classifier, rng = label_classifier(train_log, was, seed=seed), np.random.default_rng(seed)

    def draw(n: int, omega: float, number: int, label: str | None = None):
        out = model.sample(n, label, omega=omega, keep=1.0, seed=1000 * seed + number, sampling_steps=given.sampling_steps, progress=False)
        return expression(out, genes=test.var_names)

    def some(cells, of: np.ndarray, label: str, n: int):
        return cells[np.sort(rng.choice(np.flatnonzero(of == label), n, replace=False))]

    held = {label: some(test_log, is_now, label, n) for label, n in sizes.items()}
    control = {label: judged(classifier, held[label], some(train_log, was, label, n), label) for label, n in sizes.items()}
    for label, one in control.items():
        one |= {"purity_fitted": one["purity"], "purity": purity(classifier, held[label], label)}
    curve = []
    for omega in given.omegas:
        found = {label: judged(classifier, held[label], draw(n, omega, 1 + i, label), label) for i, (label, n) in enumerate(sizes.items())}
        curve.append({"omega": omega, **mean_of(found), "labels": found})
        print(f"seed {seed} omega {omega:+.2f}: purity {curve[-1]['purity']:.3f} coverage {curve[-1]['coverage']:.3f}", flush=True)
    n_global = max(given.global_cells, test.n_obs)
    groups = {"test": test_log, "global": draw(n_global, -1.0, 100), "proportional": draw(n_global, 0.0, 101)}
    return {"format": 1, "experiment": "guidance", "seed": seed, "n_train": train.n_obs, "n_test": test.n_obs, "n_genes": test.n_vars, "labels_key": key,
            "cells_per_label": sizes, "classifier_accuracy_on_test": purity(classifier, test_log, is_now), "curve": curve,
            "control": {**mean_of(control), "labels": control}, "global": mixture(classifier, groups, was, n_global),
            "training": {k: {"steps": v["steps"], "seconds": round(v["seconds"], 1)} for k, v in model.history.items() if "seconds" in v},
            "model": model.fingerprint, "seconds": round(time.perf_counter() - began, 1), "provenance": provenance(model.device)}


def tables(runs: list[dict]) -> str:
    """Means over seeds: the curve beside its controls, and the mixture."""
    first, every = runs[0], [r["global"] for r in runs]
    lines = [f"{len(runs)} seeds, {first['n_train']} training cells x {first['n_genes']} genes; compared: {first['cells_per_label']}",
             f"classifier on test cells: {np.mean([r['classifier_accuracy_on_test'] for r in runs]):.3f} right", "omega    " + "  ".join(MEASURES)]
    rows = [(f"{p['omega']:+.2f}", [r["curve"][i] for r in runs]) for i, p in enumerate(first["curve"])]
    for name, found in [*rows, ("real", [r["control"] for r in runs])]:
        lines.append(f"{name:7s}" + "".join(f"{np.mean([f[m] for f in found]):{len(m) + 2}.3f}" for m in MEASURES))
    lines.append("label, % of cells: training; the classifier sees in test cells, drawn globally (omega -1), drawn in proportion (omega 0)")
    for i, label in enumerate(every[0]["labels"]):
        lines.append(f"{label[:28]:28s}" + "".join(f"{np.mean([g['percent'][k][i] for g in every]):9.2f}" for k in ("train", "test", "global", "proportional")))
    worst = {k: [g["max_points"][k] for g in every] for k in every[0]["max_points"]}
    lines += [f"{k}: largest difference {np.mean(v):.2f} points (worst seed {max(v):.2f})" for k, v in worst.items()]
    met = "met" if max(worst["global - train"]) <= 2 else "NOT met"
    lines.append(f"bar, global within 2 points of training: {met}; chance alone at n = {every[0]['n']}: {every[0]['chance_points']:.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--omegas", type=float, nargs="+", default=list(OMEGAS))
    for name, default, what in (("--global-cells", 5000, "cells of the global control, at least as many as test cells (default 5000)"),
                                ("--steps", None, "of the denoiser"), ("--ae-steps", None, "of the autoencoder"), ("--sampling-steps", None, "default: the model's own")):
        parser.add_argument(name, type=int, default=default, help=what)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model")
    parser.add_argument("--model", type=Path, help="folder of a model saved by SCLD.save; seeds are then those of drawing only")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        given.omegas = sorted(set(map(check_omega, given.omegas)))
        cells = data.load(given.cells, labels=given.labels)
        key = str(cells.uns["scld_data"]["labels_key"])
        asked = {k: getattr(given, k) for k in ("omegas", "global_cells", "steps", "ae_steps", "sampling_steps")}
        asked |= {"labels": key, "data_sha256": str(cells.uns["scld_data"]["sha256"])}
        if given.model is None:
            asked["config"] = asdict(make_config(**dict(map(parse_setting, given.set))))
        elif (weights := given.model / "weights.safetensors").is_file():
            asked["model_sha256"] = data.file_sha256(weights)
        folder = (given.root or project_root()) / "results" / str(cells.uns["scld_data"]["name"]) / "guidance"
        print(tables([reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given)) for seed in given.seeds]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

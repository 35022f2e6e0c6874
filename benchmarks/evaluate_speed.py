"""Seconds and memory of a whole evaluation with the suite, on generated counts.

    python benchmarks/evaluate_speed.py                 # 10,000 against 10,000 cells x 2,000 genes
    python benchmarks/evaluate_speed.py --cells 1000    # smaller

Real, synthetic and training cells are gamma-Poisson counts of eight planted types from one distribution, so the results
should equal their controls.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

LIMIT_SECONDS = 300


def make_cells(n: int, genes: int, seed: int, synthetic: bool = False) -> ad.AnnData:
    """Counts of eight types with continuous variation inside each; profiles are the same for every seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    profiles = fixed.gamma(0.5, 1.0, (8, genes)) + 0.02
    programs = fixed.normal(0, 0.3, (10, genes))
    types, blocks = rng.integers(8, size=n), []
    for start in range(0, n, 1000):
        own = types[start : start + 1000]
        rate = profiles[own] * np.exp(rng.normal(0, 0.3, (len(own), 10)) @ programs) * rng.lognormal(-0.5, 0.4, (len(own), 1))
        blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(2.0, rate / 2.0)).astype(np.float32)))
    obs = pd.DataFrame({"type": pd.Categorical.from_codes(types, [f"type{i}" for i in range(8)])}, index=[f"c{seed}-{i}" for i in range(n)])
    uns = {"scld": {"scale": "counts", "method": "generated"}} if synthetic else {}
    return ad.AnnData(sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]), uns=uns)


def main() -> int:
    """Make the cells, evaluate them, print one line per stage; status 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=10_000, help="cells a side")
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--jobs", type=int, default=2, help="processor cores")
    parser.add_argument("--trees", type=int, help="trees of each forest on principal components; default: what evaluate takes for so many cells")
    parser.add_argument("--no-labels", action="store_true")
    parser.add_argument("--html", type=Path, help="write the report page here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    from scld_nb import evaluation

    real, synth, train = (make_cells(options.cells, options.genes, s, synthetic=s == 2) for s in (1, 2, 3))
    before, begun, stages = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter(), {}
    last = ["start", begun]

    class Clock:
        """Takes the place of the progress bar: seconds by step."""

        def __init__(self, **_):
            pass

        __enter__ = lambda self: self  # noqa: E731

        def __exit__(self, *_):
            self.set_postfix_str("end")

        def update(self):
            pass

        def set_postfix_str(self, text):
            now = time.perf_counter()
            print(f"{now - last[1]:8.1f} s  {last[0]}", flush=True)
            stages[last[0]] = stages.get(last[0], 0) + now - last[1]
            last[:] = [text, now]

    evaluation.tqdm = Clock
    report = evaluation.evaluate(
        real, synth, train=train, labels_key=None if options.no_labels else "type", suite=True, n_trees=options.trees, n_jobs=options.jobs,
        progress=False,
    )
    seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = os.times()
    for r in report.records:
        if r["cluster"] == "all":
            control = "" if r["control"] is None else f"{r['control']:9.3f}"
            print(f"{r['space']:10} {r['metric']:22} n={r['n']:<6} {r['value']:9.3f} control {control}")
    result = {
        "cells": options.cells, "genes": options.genes, "jobs": options.jobs, "seconds": round(seconds, 1), "cpu_seconds": round(used.user + used.system, 1),
        "peak_gib": round(peak, 2), "peak_gib_before": round(before, 2), "load": os.getloadavg(), "records": len(report.records),
    }
    print(json.dumps(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result | {"stages": stages}, indent=1) + "\n")
    if options.html:
        from scld_nb.report import write_html

        write_html(report, options.html)
    print(f"{seconds:.0f} s ({'within' if seconds <= LIMIT_SECONDS else 'above'} {LIMIT_SECONDS} s), peak {peak:.2f} GiB")
    return int(seconds > LIMIT_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())

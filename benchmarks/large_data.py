"""Cells that do not fit into memory: train from disk, draw into a file, and what a cell costs as the set grows. No download.

    python benchmarks/large_data.py                        # 1,000,000 cells x 20,000 genes, a file of about 7 GB
    python benchmarks/large_data.py --cells 100000
    python benchmarks/large_data.py --parts train sample --name many_draws --cells 20000 --genes 200 --nnz 50 --draw 10000000 --sampling-steps 5

A sparse file of planted cell types is generated once. Every measurement then runs in a process of its own, which reports its
peak of resident memory:

train     one epoch of Round/Map and one of the denoiser from disk, the Scorer, and the model is saved
reading   minibatches per second from disk and from memory, and training steps with either, on the first --fit-cells cells
scale     seconds per cell of every stage at growing numbers of cells, with a picture
sample    a tenth of --draw cells and all of them, into a file
judge     the whole evaluation of two draws of --judge-cells from a tenth of the file and from all of it

--parts names those to do, in this order. Results, with provenance, are in results/large_data/ (--name); a file there is reused if
it was asked for in the same words. Exit status 1 if a peak is above --limit-gib or reading from disk leaves less than 60 % of the training speed.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scld_nb.data import CellReader, InputError
from scld_nb.evaluation import evaluate
from scld_nb.experiments import project_root, provenance, reuse_json, write_json
from scld_nb.large import CellWriter, open_cells
from scld_nb.model import SCLD
from scld_nb.training import minibatches

GIB = 2**30
LABELS = "cell_type"
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BAR = 0.6
PARTS = ("train", "reading", "scale", "sample", "judge")


def peak_gib() -> float:
    """Peak of resident memory of this process: the kernel's high-water mark, which a program started by another does not inherit."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(peak / GIB, 3)


# ---------------------------------------------------------------- the generated cells

def molecules_for(shares: np.ndarray, wanted: float) -> int:
    """Molecules per cell that hit `wanted` different genes on average."""
    low, high = 1.0, 1e7
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (1 - (1 - shares) ** middle).sum() < wanted else (low, middle)
    return round(high)


def generate(path: Path, cells: int, genes: int, nnz: int, types: int = 8, seed: int = 0, block: int = 4096) -> dict:
    """Write a file of multinomial counts of planted types, a block of cells at a time; about `nnz` genes are seen in a cell."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, 1.5, genes)
    shares = base * np.where(rng.random((types, genes)) < 0.2, rng.lognormal(0.0, 1.5, (types, genes)), 1.0)
    shares /= shares.sum(1, keepdims=True)
    molecules = molecules_for(shares[0], nnz)
    pools = np.stack([rng.choice(genes, 2**20, p=p) for p in shares]).astype(np.int64)    # a draw is a place in a pool
    weights = np.linspace(2.0, 1.0, types) / np.linspace(2.0, 1.0, types).sum()
    names = pd.Index([f"gene{g}" for g in range(genes)])
    with CellWriter(path, compress=False, chunk=2**18) as writer:
        for start in range(0, cells, block):
            n = min(block, cells - start)
            kind = rng.choice(types, n, p=weights)
            library = np.maximum(20, np.rint(molecules * rng.lognormal(-0.02, 0.2, n))).astype(int)
            rows = np.repeat(np.arange(n), library)
            columns = pools[kind[rows], rng.integers(0, 2**20, len(rows))]
            x = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(n, genes))
            obs = pd.DataFrame({LABELS: pd.Categorical.from_codes(kind, [f"type{k}" for k in range(types)])})
            writer.append(ad.AnnData(x, obs=obs.set_axis([f"c{start + i}" for i in range(n)], axis=0), var=pd.DataFrame(index=names)))
        found = {"cells": writer.n_obs, "genes": genes, "entries": writer.nnz, "density": round(writer.nnz / writer.n_obs / genes, 4)}
    return found | {"gib": round(path.stat().st_size / GIB, 2)}


# ---------------------------------------------------------------- what is measured, each in a process of its own

def settings(given) -> dict:
    return {"device": given.device, "seed": 0, "batch_size": given.batch_size}


def stages(model: SCLD, opened: float, whole: float, cells: int) -> dict:
    """Seconds of each stage of a training without Scorer, and cells per second."""
    own = {name: model.history[name]["seconds"] for name in ("autoencoder", "denoiser")}
    own = {"open": opened, "autoencoder": own["autoencoder"], "latents": whole - sum(own.values()), "denoiser": own["denoiser"]}
    seen = {"open": cells, "latents": cells} | {k: model.history[k]["steps"] * model.config.batch_size for k in ("autoencoder", "denoiser")}
    return {name: {"seconds": round(s, 3), "cells": seen[name], "us_per_cell": round(1e6 * s / seen[name], 3)} for name, s in own.items()}


def measure_train(given) -> dict:
    began = time.perf_counter()
    model = SCLD(given.file, LABELS, **settings(given))
    opened, n = time.perf_counter() - began, sum(model.label_counts)
    steps = max(1, n // given.batch_size)
    began = time.perf_counter()
    model.train(steps, ae_steps=steps, scorer=False, checkpoint_dir=given.work / "checkpoints", progress=False)
    found = {"stages": stages(model, opened, time.perf_counter() - began, n), "peak_without_scorer_gib": peak_gib()}
    began = time.perf_counter()
    model._train_scorer(model._reader, given.sampling_steps, False)
    found["stages"]["scorer"] = {"seconds": round(time.perf_counter() - began, 3)}
    model.save(given.work / "model")
    shutil.rmtree(given.work / "checkpoints", ignore_errors=True)
    return found | {"cells": n, "steps": steps}


def batches_per_second(reader, given, times: int = 3) -> float:
    """Median rate of minibatches; every round is another part of an epoch."""
    rates, steps = [], max(1, min(given.most_steps, reader.n_obs // given.batch_size))
    with minibatches(reader, given.batch_size, seed=0, stage="reading") as batch_of:
        batch_of(0)
        for i in range(times):
            began = time.perf_counter()
            for step in range(i * steps, (i + 1) * steps):
                batch_of(step)
            rates.append(steps / (time.perf_counter() - began))
    return float(np.median(rates))


def measure_reading(given) -> dict:
    cells = open_cells(given.file)
    n = min(given.fit_cells, cells.n_obs)
    part = cells.take(np.arange(n))
    in_memory = part.to_memory(columns=[LABELS])
    disk, memory = part.reader().as_counts(), CellReader(in_memory.X, target_sum=None, transform="none")
    found = {"cells": n, "batch_size": given.batch_size}
    rates = {"disk": [], "memory": []}
    for _ in range(2):                                         # in turns, so that a busy machine disturbs both
        for name, reader in (("disk", disk), ("memory", memory)):
            rates[name].append(batches_per_second(reader, given))
    found["reading_cells_per_s"] = {k: round(max(v) * given.batch_size) for k, v in rates.items()}
    steps = max(1, min(given.most_steps, n // given.batch_size))
    seconds = {"disk": [], "memory": []}
    for _ in range(2):
        for name, source in (("disk", part), ("memory", in_memory)):
            model = SCLD(source, LABELS, **settings(given)).train(1, ae_steps=steps, scorer=False, progress=False)
            seconds[name].append(model.history["autoencoder"]["seconds"])
    found["training_cells_per_s"] = {k: round(steps * given.batch_size / min(v)) for k, v in seconds.items()}
    for what in ("reading", "training"):
        speed = found[f"{what}_cells_per_s"]
        found[f"{what}_ratio"] = round(speed["disk"] / speed["memory"], 3)
    return found


def measure_size(given) -> dict:
    cells = open_cells(given.file)
    n = min(given.size, cells.n_obs)
    began = time.perf_counter()
    model = SCLD(cells.take(np.arange(n)), LABELS, **settings(given))
    opened, steps = time.perf_counter() - began, max(1, min(given.most_steps, n // given.batch_size))
    began = time.perf_counter()
    model.train(steps, ae_steps=steps, scorer=False, progress=False)
    return {"cells": n, "steps": steps, "stages": stages(model, opened, time.perf_counter() - began, n)}


def measure_sample(given) -> dict:
    model, out = SCLD.load(given.work / "model", device=given.device), given.work / "drawn.h5ad"
    began = time.perf_counter()
    facts = model.sample_to(out, given.size, sampler=given.sampler, sampling_steps=given.sampling_steps, progress=False)
    seconds, peak = time.perf_counter() - began, peak_gib()                # opening the file reads 8 bytes of every cell
    cells = open_cells(out)
    found = {"peak_memory_gib": peak, "cells": cells.n_obs, "generated": facts["generated"], "seconds": round(seconds, 2),
             "cells_per_s": round(cells.n_obs / seconds, 1), "entries": cells.counts.nnz, "gib": round(out.stat().st_size / GIB, 3), "sampling_steps": given.sampling_steps}
    cells.counts._file.close()
    out.unlink()
    return found


def measure_judge(given) -> dict:
    """Two random draws of one file: every area under a curve should lie at 0.5, and memory must not know how long the file is."""
    cells = open_cells(given.file)
    part = cells.take(np.arange(given.size))
    report = evaluate(part, part, labels_key=LABELS, suite=True, n_max=given.judge_cells, n_trees=100, negative=False, n_jobs=1, progress=False)
    return {"cells": given.size, "n": report.settings["n"], "n_judge": report.settings["n_judge"],
            "rf_auc": report.value("rf_auc"), "combined": report.value("combined", "counts")}


MEASURE = {"train": measure_train, "reading": measure_reading, "size": measure_size, "sample": measure_sample, "judge": measure_judge}


def measured(stage: str, given, **changed) -> dict:
    """A measurement in a new process (with --here in this one), with its peak of resident memory."""
    words = {"file": given.file, "work": given.work, "device": given.device, "batch-size": given.batch_size, "fit-cells": given.fit_cells,
             "most-steps": given.most_steps, "sampling-steps": given.sampling_steps, "sampler": given.sampler, "judge-cells": given.judge_cells} | changed
    line = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    if given.here:
        record = run_stage(stage, parser().parse_args(line))
    else:
        done = subprocess.run([sys.executable, __file__, "--stage", stage, *line], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise InputError(f"the measurement {stage!r} ended with status {done.returncode}, see above")
        record = json.loads(done.stdout.splitlines()[-1])
    print(f"{stage:8s} {' '.join(f'{k} {v}' for k, v in changed.items()):16s} peak {record['peak_memory_gib']:.2f} GiB, {record['seconds_in_all']:.1f} s", flush=True)
    return record


def run_stage(stage: str, given) -> dict:
    began = time.perf_counter()
    record = MEASURE[stage](given)
    return {"peak_memory_gib": peak_gib()} | record | {"seconds_in_all": round(time.perf_counter() - began, 1)}


# ---------------------------------------------------------------- the report

def picture(scale: dict, path: Path) -> None:
    """Microseconds per cell of every stage against the number of cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), dpi=100)
    for name in ("open", "autoencoder", "latents", "denoiser"):
        axis.plot([r["cells"] for r in scale["sizes"]], [r["stages"][name]["us_per_cell"] for r in scale["sizes"]], "o-", ms=4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="cells in the file", ylabel="µs per cell")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def spread(scale: dict) -> dict[str, float]:
    """Dearest over cheapest cell of each stage, over sizes."""
    cost = {name: [r["stages"][name]["us_per_cell"] for r in scale["sizes"]] for name in ("open", "autoencoder", "latents", "denoiser")}
    return {name: round(max(v) / max(min(v), 1e-9), 2) for name, v in cost.items()}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cells", type=int, default=1_000_000)
    p.add_argument("--genes", type=int, default=20_000)
    p.add_argument("--nnz", type=int, default=900, help="genes seen per cell; 8 bytes each in the file")
    p.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of cells of the picture")
    p.add_argument("--fit-cells", type=int, default=100_000, help="cells that are held in memory for the comparison")
    p.add_argument("--most-steps", type=int, default=400, help="steps of a timed training (train: one epoch)")
    p.add_argument("--draw", type=int, default=100_000, help="cells to draw")
    p.add_argument("--judge-cells", type=int, default=10_000, help="cells a side of the evaluation")
    p.add_argument("--sampler", default="ddim")
    p.add_argument("--sampling-steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--device", default="auto")
    p.add_argument("--limit-gib", type=float, default=4.0)
    p.add_argument("--work", type=Path, default=Path("runs/large_data"), help="folder for the file and the model")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measurements to do")
    p.add_argument("--name", default="large_data", help="folder within results/")
    p.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    p.add_argument("--here", action="store_true", help="measure in this process: quick, but peaks are not each measurement's own")
    p.add_argument("--keep", action="store_true", help="keep the generated file")
    for name in ("--stage", "--file", "--size"):
        p.add_argument(name, type=int if name == "--size" else str, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    given = parser().parse_args(argv)
    try:
        if given.stage:
            print(json.dumps(run_stage(given.stage, given)))
            return 0
        return whole(given)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def whole(given) -> int:
    folder = (given.root or project_root()) / "results" / given.name
    given.work.mkdir(parents=True, exist_ok=True)
    given.file = str(given.work / f"{given.cells}x{given.genes}x{given.nnz}.h5ad")
    needed = 12 * given.cells * given.nnz
    if not Path(given.file).exists() and (free := shutil.disk_usage(given.work).free) < needed:
        raise InputError(f"{given.work} has {free / GIB:.1f} GiB free, the file and the results need about {needed / GIB:.1f}; use fewer --cells")
    about = {k: getattr(given, k) for k in ("cells", "genes", "nnz", "batch_size", "device")}

    def record(name: str, asked: dict, make) -> dict:
        def with_provenance() -> dict:
            if not Path(given.file).exists():
                began = time.perf_counter()
                made = generate(Path(given.file), given.cells, given.genes, given.nnz)
                write_json(Path(given.file).with_suffix(".json"), made | {"seconds": round(time.perf_counter() - began, 1)})
                print(f"generated {made}", flush=True)
            made = json.loads(Path(given.file).with_suffix(".json").read_text())
            return {"format": 1, "experiment": f"{given.name}/{name}", "file": made} | make() | {"provenance": provenance(given.device if given.device != "auto" else "cpu")}

        return reuse_json(folder / f"{name}.json", about | asked, with_provenance)

    model = {"sampling_steps": given.sampling_steps}
    sizes = sorted({min(n, given.cells) for n in given.sizes})
    draws = sorted({max(1, given.draw // 10), given.draw})
    judged = sorted({max(10, given.cells // 10), given.cells})

    def draw() -> dict:
        if not (given.work / "model" / "config.json").exists():
            measured("train", given)
        return {"draws": [measured("sample", given, size=n) for n in draws]}

    todo = {
        "train": (model, lambda: measured("train", given)),
        "reading": ({k: getattr(given, k) for k in ("fit_cells", "most_steps")}, lambda: measured("reading", given)),
        "scale": ({"sizes": sizes, "most_steps": given.most_steps}, lambda: {"sizes": [measured("size", given, size=n) for n in sizes]}),
        "sample": (model | {"draws": draws, "sampler": given.sampler}, draw),
        "judge": ({"parts": judged, "judge_cells": given.judge_cells}, lambda: {"parts": [measured("judge", given, size=n) for n in judged]}),
    }
    found = {name: record(name, *todo[name]) for name in PARTS if name in given.parts}
    missed = False
    for name, of in found.items():
        runs = of.get("draws" if name == "sample" else "parts", [of])
        missed |= name in ("train", "sample", "judge") and max(r["peak_memory_gib"] for r in runs) > given.limit_gib
        if name == "train":
            print(f"file: {of['file']['cells']:,} cells x {of['file']['genes']:,} genes, {of['file']['gib']} GiB")
            print(f"one epoch of each stage from disk: peak {of['peak_memory_gib']:.2f} GiB")
        elif name == "reading":
            missed |= of["training_ratio"] < BAR
            print(f"disk / memory: reading {of['reading_ratio']:.2f}, training {of['training_ratio']:.2f} (bar {BAR})")
        elif name == "scale":
            picture(of, folder / "scale.png")
            print(f"dearest / cheapest cell over {sizes[0]:,} to {sizes[-1]:,} cells: {spread(of)}")
        elif name == "sample":
            for r in runs:
                print(f"drawn into a file: {r['cells']:,} cells, {r['cells_per_s']:,.0f} per second, peak {r['peak_memory_gib']:.2f} GiB")
        else:
            for r in runs:
                print(f"evaluation of {r['n']:,} of {r['cells']:,} cells: {r['seconds_in_all']:,.0f} s, peak {r['peak_memory_gib']:.2f} GiB")
    if not given.keep:
        for path in (Path(given.file), Path(given.file).with_suffix(".json")):
            path.unlink(missing_ok=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

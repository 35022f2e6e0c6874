"""How fast are training and sampling, and how far from what the machine could do? Ratios from one run, floors beside the times.

    python benchmarks/speed.py                                   # training and sampling of made-up cells, 2,000 genes
    python benchmarks/speed.py --parts whole --cells 25000 --genes 17970 --draw 1000000      # the size of Brain Small; for a GPU
    python benchmarks/speed.py --parts scvi --file cells.h5ad --labels cell_type             # beside scVI (extra "scvi")

training: seconds per step of both stages, beside a bare loop of exactly the matrix products that the step does (recorded from a real
step, forwards and backwards, then replayed on preallocated memory). sampling: cells per second from noise to sparse counts with default
settings, with the Scorer, and with 1000-step DDPM, beside the bare products. whole: the default fit with Scorer, and --draw new cells in
chunks, in seconds. scvi: scVI with its default training against the shortest of our trainings whose cells a forest tells from validation
cells no more easily, and the time that each needs for as many new cells; what the forest says of both on test cells stands beside it.

What is compared is timed in turns, and medians are taken. One JSON with provenance goes to results/speed/. Meant for an idle machine.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode

from scld_nb import data
from scld_nb.counts import fit_count_statistics
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, write_json
from scld_nb.gpu import Recorded, sparse_rows
from scld_nb.metrics import rf_auc
from scld_nb.model import SCLD
from scld_nb.training import reduced_precision, resolve_device, train_autoencoder, train_denoiser

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
FIT_BAR_S, DRAW_BAR_S, CELLS_PER_S, SHARE_OF_BARE = 60.0, 120.0, 1000.0, 0.8


def made_up(n_cells: int, n_genes: int, seed: int = 0, n_types: int = 8, library: float = 3000.0, device: torch.device | str = "cpu") -> ad.AnnData:
    """Sparse counts of planted types, drawn row block by row block (on a GPU in seconds, and with other draws than on a CPU)."""
    rng, device = np.random.default_rng(seed), torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    shares = rng.gamma(0.3, 1.0, n_genes) * rng.gamma(2.0, 0.5, (n_types, n_genes))
    shares = torch.from_numpy(shares / shares.sum(axis=1, keepdims=True)).float().to(device)
    types, blocks = rng.integers(0, n_types, n_cells), []
    libraries = torch.from_numpy(rng.lognormal(np.log(library), 0.4, (n_cells, 1))).float().to(device)
    for start in range(0, n_cells, 2048):
        mean = shares[torch.from_numpy(types[start : start + 2048]).to(device)] * libraries[start : start + 2048]
        scatter = torch._standard_gamma(torch.full_like(mean, 4.0), generator=generator) / 4.0
        blocks.append(sparse_rows(torch.poisson(mean * scatter, generator=generator)))
    x = sparse.vstack(blocks, format="csr")
    x[np.diff(x.indptr) == 0, 0] = 1.0
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type {k}" for k in types])}, index=[f"cell{i}" for i in range(n_cells)])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)]))


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside, and how many operations were dispatched in all."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name = function.__name__.split(".")[0]
        if name in PRODUCTS:
            pair = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.found.append(tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in pair))
        return function(*args, **(kwargs or {}))

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return sum(2 * int(np.prod(a[0])) * b[0][-1] for a, b in self.found)

    def replay(self):
        """A function that does the same products, and nothing else, on memory of its own."""
        ready = []
        for pair in self.found:
            a, b = (torch.empty_strided(shape, stride, dtype=dtype, device=device).uniform_(-1, 1) for shape, stride, dtype, device in pair)
            multiply = torch.mm if a.ndim == 2 else torch.bmm
            ready.append((multiply, a, b, multiply(a, b)))

        def run() -> None:
            with torch.no_grad():
                for multiply, a, b, out in ready:
                    multiply(a, b, out=out)

        return at_once(run, self.found[0][0][3])


def at_once(work, device: torch.device):
    """A function that does the same; on a GPU as one recorded graph, since asking for each operation would take longer than doing it."""
    nothing = torch.zeros((), device=device)
    recorded = Recorded(lambda: (work(), nothing)[1], device)
    return lambda: recorded()


def seconds(work, device: torch.device, times: int = 1) -> float:
    """Wall time of one of ``times`` calls, the device's queue included."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def in_turns(works: dict, device: torch.device, turns: int) -> dict[str, float]:
    """Median seconds of each of several works, done one after the other in every turn; the first turn warms up."""
    found = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, (work, times) in works.items():
            took = seconds(work, device, times)
            if turn:
                found[name].append(took)
    return {name: statistics.median(took) for name, took in found.items()}


def update(network: torch.nn.Module, clip: float | None, ema: float | None):
    """A function that clips, updates and averages copies of a network's weights by fixed gradients, and does nothing else."""
    weights = [torch.nn.Parameter(p.detach().clone()) for p in network.parameters()]
    for p in weights:
        p.grad = torch.full_like(p, 1e-3)
    device = weights[0].device
    average, optimiser = [p.detach().clone() for p in weights], torch.optim.AdamW(weights, fused=device.type in ("cpu", "cuda"), capturable=device.type == "cuda")

    def run() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, clip)
        optimiser.step()
        if ema:
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1.0 - ema)

    return at_once(run, device)


def training(cells: ad.AnnData, device: torch.device, given: argparse.Namespace) -> list[dict]:
    """Seconds per step of both stages, of the bare products of a step, and of the bare update of the weights."""
    model, rows = SCLD(cells, "cell_type", device=device), []
    c = model.config
    reader = model._encoder_reader(model._reader)
    common = {"batch_size": c.batch_size, "seed": 0, "device": device, "lr": c.lr, "weight_decay": c.weight_decay, "clip": c.clip,
              "precision": c.precision, "lr_schedule": c.lr_schedule, "show": False}

    def autoencoder(steps: int) -> None:
        train_autoencoder(model.autoencoder, reader, steps=steps, ema=None, **common)

    autoencoder(2)
    latents, spread = fit_count_statistics(model.autoencoder, reader, device=device)
    labels = torch.from_numpy(model._codes)

    def denoiser(steps: int) -> None:
        train_denoiser(model.denoiser, model.schedule, latents, labels, spread=spread, p_uncond=c.p_uncond, steps=steps, ema=c.ema, **common)

    for name, fit, network, ema in (("autoencoder", autoencoder, model.autoencoder, None), ("denoiser", denoiser, model.denoiser, c.ema)):
        with Products() as seen:
            fit(1)
        with reduced_precision(device, c.precision):
            bare, weights = seen.replay(), sum(p.numel() for p in network.parameters())
            works = {"short": (lambda fit=fit: fit(given.steps), 1), "long": (lambda fit=fit: fit(2 * given.steps), 1),
                     "bare": (bare, given.steps), "update": (update(network, c.clip, ema), given.steps)}
            median = in_turns(works, device, given.turns)
        step, floor = median["long"] - median["short"], median["bare"] + median["update"]          # what begins and ends a training aside
        step = step / given.steps if step > 0 else median["long"] / (2 * given.steps)
        rows.append({"stage": name, "weights": weights, "step_ms": 1e3 * step, "bare_ms": 1e3 * median["bare"], "share_of_bare": median["bare"] / step,
                     "update_ms": 1e3 * median["update"], "share_of_floor": floor / step,
                     "gflop": seen.flop / 1e9, "operations": seen.operations, "optimiser_mb": 28 * weights / 1e6})
        print(f"{name:12s} {1e3 * step:8.2f} ms a step, bare products {1e3 * median['bare']:.2f} ms ({rows[-1]['share_of_bare']:.0%} of the step; "
              f"wanted: {SHARE_OF_BARE:.0%}), with the update of the weights {1e3 * floor:.2f} ms ({rows[-1]['share_of_floor']:.0%}); {seen.flop / 1e9:.2f} GFLOP, {seen.operations} operations, weights, gradients and moments "
              f"{28 * weights / 1e6:.0f} MB read and written", flush=True)
    return rows


def sampling(cells: ad.AnnData, device: torch.device, given: argparse.Namespace) -> list[dict]:
    """Cells per second from noise to sparse counts, and what the bare products would allow."""
    model = SCLD(cells, "cell_type", device=device).train(given.warm_steps, ae_steps=given.warm_steps, scorer=True, progress=False)
    n, few = given.cells_drawn, min(given.cells_drawn, 1024)

    def draw(n: int = n, **options) -> None:
        model.sample(n, **({"keep": 1.0, "progress": False} | options))

    with Products() as seen, reduced_precision(device, model.config.precision if device.type == "cpu" else "fp32"):
        draw(few, stream=False)
    replay = seen.replay()

    def bare() -> None:
        with reduced_precision(device, model.config.precision):      # as the draws have it
            replay()

    works = {"default": (draw, 1), "behind the Scorer": (lambda: draw(keep=0.8), 1), "guided, omega 1": (lambda: draw(omega=1.0), 1),
             "1000-step DDPM": (lambda: draw(few, sampler="ddpm", sampling_steps=model.config.T), 1), "bare products": (bare, 1)}
    sizes = dict.fromkeys(works, n) | {"1000-step DDPM": few, "bare products": few}
    median = in_turns(works, device, given.turns)
    rows = [{"way": name, "cells": sizes[name], "seconds": took, "cells_per_s": sizes[name] / took} for name, took in median.items()]
    for row in rows:
        faster = row["cells_per_s"] / rows[3]["cells_per_s"]
        print(f"{row['way']:18s} {row['cells_per_s']:10,.0f} cells/s, {faster:6.1f} times 1000-step DDPM"
              + (f" (wanted: {CELLS_PER_S:,.0f} cells/s on 2 cores)" if row["way"] == "default" else ""), flush=True)
    return rows


def whole(cells: ad.AnnData, device: torch.device, given: argparse.Namespace) -> list[dict]:
    """The default fit with the Scorer, and many new cells in chunks."""
    train, _ = data.split(cells, test_size=0.2, stratify="cell_type", seed=0)
    made = []
    build = seconds(lambda: made.append(SCLD(train, "cell_type", device=device, head=given.head)), device)
    model = made[0]
    fit = seconds(lambda: model.train(given.denoiser_steps, ae_steps=given.ae_steps, progress=False), device)
    own = {stage: model.history[stage]["seconds"] for stage in ("autoencoder", "denoiser")}
    steps = {stage: model.history[stage]["steps"] for stage in own}
    own["latents and Scorer"] = fit - sum(own.values())
    print(f"fit of {train.n_obs:,} x {train.n_vars:,}, head {given.head}: {fit:.1f} s (wanted: {FIT_BAR_S:.0f} s on one H200), before it {build:.1f} s to read the cells and build; "
          + ", ".join(f"{stage} {s:.1f} s" for stage, s in own.items()) + f"; steps {steps}", flush=True)                  # now: whoever runs out of time while drawing has this
    stored, drawn, began = 0, 0, time.perf_counter()

    def draw() -> None:
        nonlocal stored, drawn
        for chunk in model.sample_chunks(given.draw, keep=1.0, progress=False):
            stored, tenth = stored + chunk.X.nnz, 10 * drawn // given.draw
            drawn += chunk.n_obs
            if 10 * drawn // given.draw > tenth:
                print(f"  {drawn:,} cells after {time.perf_counter() - began:.0f} s", flush=True)

    took = seconds(draw, device)
    print(f"{given.draw:,} cells drawn and decoded: {took:.1f} s, {given.draw / took:,.0f} cells/s, {stored / given.draw:.0f} entries a cell "
          f"(wanted: {DRAW_BAR_S:.0f} s for 1,000,000)", flush=True)
    return [{"n_train": train.n_obs, "n_genes": train.n_vars, "entries_train": int(train.X.nnz), "head": given.head, "build_s": build, "fit_s": fit, "stages_s": own,
             "steps": steps, "drawn": given.draw, "draw_s": took, "entries": stored}]


def beside_scvi(device: torch.device, given: argparse.Namespace) -> list[dict]:
    """scVI's default training against the shortest of ours that is told from validation cells no more easily; judged on test cells."""
    from scld_nb.baselines import make_baseline

    if given.file is None:
        raise InputError("--parts scvi compares on real cells; give --file cells.h5ad (and --labels)")
    cells = data.load(given.file, labels=given.labels)
    key = str(cells.uns["scld_data"]["labels_key"])
    rest, test = data.default_split(cells)
    rows = []
    for seed in given.seeds:
        train, valid = data.split(rest, test_size=0.2, stratify=key, seed=seed)
        n = min(valid.n_obs, test.n_obs)

        def told(real, drawn, n=n, seed=seed) -> float:
            pair = (data.library_normalize(data.counts_matrix(side)[:n]).log1p() for side in (real, drawn))
            return rf_auc(*pair, n_trees=given.trees, seed=seed).auc

        def note(name: str, steps: int, fit, draw, seed=seed, n=n) -> dict:
            drawn: list = []
            fit_s = seconds(fit, device)
            draw_s = seconds(lambda: drawn.append(draw()), device)
            aucs = {"auc_valid": told(valid, drawn[0]), "auc_test": told(test, drawn[0])}
            rows.append({"method": name, "seed": seed, "steps": steps, "fit_s": fit_s, "draw_s": draw_s, "n": n} | aucs)
            print(f"{name:6s} seed {seed}, {steps:6d} steps: fit {fit_s:7.1f} s, {n:,} cells drawn in {draw_s:6.2f} s, "
                  f"AUC log {aucs['auc_valid']:.3f} (validation) {aucs['auc_test']:.3f} (test)", flush=True)
            return rows[-1]

        if not rows:                                            # imports and first calls are nobody's time
            make_baseline("scvi", steps=1, seed=seed, device=str(device)).fit(train, key)
            SCLD(train, key, device=device).train(1, ae_steps=1, scorer=False, progress=False)
        rival = make_baseline("scvi", steps=given.scvi_steps, seed=seed, device=str(device))
        steps = given.scvi_steps or rival.steps_published(train.n_obs)
        theirs = note("scVI", steps, lambda r=rival, t=train: r.fit(t, key), lambda r=rival, n=n, k=seed: r.sample(n, seed=k))
        for share in given.shares:
            model = SCLD(train, key, device=device, seed=seed)
            steps, ae_steps = (max(1, round(share * s)) for s in model.training_steps())
            ours = note("SCLD", steps, lambda m=model, s=steps, a=ae_steps: m.train(s, ae_steps=a, scorer=False, progress=False),
                        lambda m=model, n=n, k=seed: m.sample(n, seed=k, keep=1.0, progress=False))
            if ours["auc_valid"] <= theirs["auc_valid"]:
                break
        ours["chosen"] = theirs["chosen"] = True
    pairs = list(zip(*([r for r in rows if r.get("chosen") and r["method"] == m] for m in ("SCLD", "scVI"))))
    for what in ("fit_s", "draw_s"):
        ratios = [theirs[what] / ours[what] for ours, theirs in pairs]
        print(f"{what}: scVI / SCLD {np.mean(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})", flush=True)
    for name, side in (("SCLD", 0), ("scVI", 1)):
        print(f"AUC log on test cells, {name}: {np.mean([pair[side]['auc_test'] for pair in pairs]):.3f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["training", "sampling", "whole", "scvi"], default=["training", "sampling"])
    parser.add_argument("--cells", type=int, default=4000, help="made-up cells")
    parser.add_argument("--genes", type=int, default=2000, help="made-up genes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken, after one to warm up")
    parser.add_argument("--steps", type=int, default=50, help="training steps of a turn")
    parser.add_argument("--warm-steps", type=int, default=300, help="training before sampling is timed")
    parser.add_argument("--cells-drawn", type=int, default=4096, help="cells of a turn of sampling")
    parser.add_argument("--denoiser-steps", type=int, default=20_000, help="of --parts whole")
    parser.add_argument("--ae-steps", type=int, help="of --parts whole; default: the model's own")
    parser.add_argument("--head", default="zinb", help="of --parts whole")
    parser.add_argument("--draw", type=int, default=1_000_000, help="new cells of --parts whole")
    parser.add_argument("--file", help=".h5ad with counts, for --parts scvi")
    parser.add_argument("--labels", help="its column of labels")
    parser.add_argument("--scvi-steps", type=int, help="of scVI; default: its own")
    parser.add_argument("--trees", type=int, default=200, help="of the forest of --parts scvi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --parts scvi")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], help="of the default training, tried in this order")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        device = resolve_device(given.device)
        found = {}
        cells = made_up(given.cells, given.genes, device=device) if set(given.parts) - {"scvi"} else None
        for part in given.parts:
            print(f"--- {part}, on {device}, {torch.get_num_threads()} threads", flush=True)
            found[part] = beside_scvi(device, given) if part == "scvi" else {"training": training, "sampling": sampling, "whole": whole}[part](cells, device, given)
            gc.collect()
        folder = (given.root or project_root()) / "results" / "speed"
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items() if k not in ("root", "file")}
        write_json(folder / f"{'-'.join(given.parts)}-{device.type}.json",
                   {"format": 1, "experiment": "speed", "asked": asked, "found": found, "provenance": provenance(device)})
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

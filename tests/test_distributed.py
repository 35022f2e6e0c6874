"""Several real processes on the CPU: the same weights and cells as one, and no way to hang.

Most teams here are forked from the test process, which has everything imported, and get the environment that a launcher would
give them; two tests go through `accelerate launch` and `notebook_launcher` themselves.
"""

import faulthandler
import functools
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import accelerate  # noqa: F401  (so that forked processes have it)
import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, planted_cells
from safetensors.torch import load_file
from torch import nn

from scld_nb import cli, distributed, training
from scld_nb.counts import CountAutoencoder, count_start, fit_count_statistics
from scld_nb.data import CellReader, InputError
from scld_nb.distributed import MainFailed, Team, TeamError, placed, this_team, wait_limit
from scld_nb.guidance import Denoiser
from scld_nb.model import SCLD
from scld_nb.schedules import linear_schedule
from scld_nb.training import batch_rows, fit, resolve_device, train_autoencoder, train_denoiser

CPU = torch.device("cpu")
SMALL = TINY | {"widths": (16, 8), "hidden": 16, "latent": 6, "batch_size": 50, "scorer_cells": 64}
ROUNDING = 1e-12                                                   # of sums in double precision, after some dozens of steps
ENDS = float(os.environ.get("SCLD_TEST_ENDS_S", "100"))           # seconds after which a test says that something hangs


@dataclass
class Outcome:
    """What became of one process: exit status (negative: a signal), what its function returned, what it printed."""

    status: int
    value: object
    said: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _one(work, args, folder: Path, rank: int, environment: dict) -> None:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    faulthandler.dump_traceback_later(0.9 * ENDS, file=sys.stderr)    # what hangs says where
    status = 0
    try:
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(*args)))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")
        status = 1
    sys.stdout.flush()
    os._exit(status)


class Running:
    """A team of forked processes."""

    def __init__(self, folder: Path, n: int, work, *args, **environment):
        self.folder = folder / f"team{len(list(folder.glob('team*')))}"
        self.folder.mkdir()
        base = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "SCLD_TIMEOUT_S": str(0.6 * ENDS)}
        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=_one, args=(work, args, self.folder, r, base | environment), daemon=True) for r in range(n)]
        for p in self.processes:
            p.start()

    def wait(self, *, only: int | None = None) -> list[Outcome]:
        """Outcomes of all (or of one); what does not end in time is killed and fails the test."""
        watched = self.processes if only is None else [self.processes[only]]
        until = time.monotonic() + ENDS
        for p in watched:
            p.join(max(0.0, until - time.monotonic()))
        hanging = [i for i, p in enumerate(watched) if p.is_alive()]
        for p in self.processes:
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
                p.join()
        assert not hanging, "\n".join(f"process {i} hangs: {(self.folder / f'{i}.log').read_text()}" for i in hanging)
        found = []
        for r, p in enumerate(self.processes):
            value = self.folder / f"{r}.pickle"
            found.append(Outcome(p.exitcode, pickle.loads(value.read_bytes()) if value.exists() else None, (self.folder / f"{r}.log").read_text()))
        return found


@pytest.fixture
def team(tmp_path):
    """Run a function in n processes; `team(n, work, *args).wait()`."""
    return lambda n, work, *args, **environment: Running(tmp_path, n, work, *args, **environment)


def values(outcomes) -> list:
    for o in outcomes:
        assert o.status == 0, o.said
    return [o.value for o in outcomes]


def gap(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one if one[k].numel() and torch.isfinite(one[k]).all())


def relative(one: dict, other: dict) -> float:
    """Length of the difference of all weights over the length of the weights."""
    assert one.keys() == other.keys()
    pairs = [(one[k].double(), other[k].double()) for k in one if one[k].numel() and torch.isfinite(one[k]).all()]
    return (sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5


@contextmanager
def double_precision():
    """Whatever asks for single precision within gets double, in which rounding is too small to hide another sum, row or draw."""
    names = [(torch, "float32"), (torch.Tensor, "float"), (torch, "from_numpy"), (torch, "as_tensor")]
    kept = [getattr(place, name) for place, name in names]
    single, _, from_numpy, as_tensor = kept

    def wide(tensor):
        return tensor.double() if tensor.dtype == single else tensor

    others = [torch.float64, torch.Tensor.double, lambda a: wide(from_numpy(a)), lambda *a, **k: wide(as_tensor(*a, **k))]
    try:
        torch.set_default_dtype(torch.float64)
        for (place, name), other in zip(names, others):
            setattr(place, name, other)
        yield
    finally:
        for (place, name), own in zip(names, kept):
            setattr(place, name, own)
        torch.set_default_dtype(torch.float32)


def doubled(work):
    """`work`, done in double precision."""
    @functools.wraps(work)
    def wrapper(*args, **options):
        with double_precision():
            return work(*args, **options)

    return wrapper


def state(module: nn.Module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


# alone


def test_a_process_alone_neither_joins_nor_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)             # an import would now fail
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = nn.Linear(2, 1)
    fit(model, lambda step: model(torch.randn(8, 2)).square().mean(), steps=3, seed=0, stage="x", device=CPU, batch=8, show=False)
    assert placed() == (0, 1) and this_team().size == 1 and this_team().is_main
    assert resolve_device("cpu") == CPU and not torch.distributed.is_initialized()
    for size in ("", "0", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert placed() == (0, 1)


def test_an_environment_that_leads_nowhere_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE=2 announces several processes, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"):
        resolve_device("auto")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="'two'"):
        placed()
    for bad in ("-1", "0", "soon", "nan"):
        monkeypatch.setenv("SCLD_TIMEOUT_S", bad)
        with pytest.raises(InputError, match="SCLD_TIMEOUT_S"):
            wait_limit()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "SCLD_TIMEOUT_S": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match="pip install accelerate"):
        this_team()
    monkeypatch.setitem(sys.modules, "accelerate", types.SimpleNamespace(PartialState=lambda **_: None))
    with pytest.raises(InputError, match="set up in this one to work alone"):
        this_team()


def test_whoever_waits_for_nobody_says_so(team):
    """The second of two processes never starts."""
    [first] = team(1, lambda: this_team(), WORLD_SIZE="2", SCLD_TIMEOUT_S="2").wait()
    assert first.status == 1 and "TeamError: process 0 of 2 did not meet the others within 2 s" in first.said


# what a team says to each other


def _talk():
    t = this_team("cpu")
    grads = []
    for size in (7, 8):
        torch.manual_seed(0)
        x, w, unused = torch.randn(size, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        part = t.part(size)
        loss = (x[part.first:part.last] @ w).square().mean()
        loss.backward()
        mean = t.sum_gradients([w, unused], loss, part.weight)
        whole = (x @ w).square().mean()
        grads.append((w.grad - torch.autograd.grad(whole, w)[0]).abs().max().item() + (mean - whole).abs().item())
        assert unused.grad is None
    places = t.part(8).offset_of(10**t.rank)
    pieces = [list(t.in_order((f"{i} of {t.rank}" for i in t.deal(n)), n)) for n in (0, 1, t.size, 2 * t.size + 1)]
    wishes = t.ask(lambda: [t.rank == 1, t.rank, -1])()
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, float(t.rank))
    t.adopt(layer)
    got = t.on_main(lambda: {"rank": t.rank})
    failures = []
    for meet in (lambda: t.on_main(lambda: 1 / 0), lambda: _first(t, fail=True)):
        try:
            meet()
        except (ZeroDivisionError, MainFailed) as error:
            failures.append(f"{type(error).__name__}: {error}")
    order = _first(t)
    try:
        t.part(t.size - 1)
    except InputError as error:
        failures.append(str(error))
    try:
        resolve_device("cuda:1")
    except InputError as error:
        failures.append(str(error))
    return {"gradient": max(grads), "places": places, "pieces": pieces, "wishes": wishes, "weight": float(layer.weight.abs().max()), "got": got,
            "failures": failures, "order": order, "device": str(resolve_device("auto")), "same": this_team() is t}


def _first(t: Team, fail: bool = False):
    with t.main_first():
        return 1 / 0 if fail else time.monotonic()


@pytest.mark.parametrize("n", [2, 3])
def test_what_is_said_in_a_team(team, n):
    told = values(team(n, _talk).wait())
    assert all(t["gradient"] < 1e-5 and t["wishes"] == [1, n - 1, -1] and t["weight"] == 0 for t in told)
    assert [t["places"] for t in told] == [(sum(10**r for r in range(k)), sum(10**r for r in range(n))) for k in range(n)]
    assert told[0]["pieces"] == [[f"{i} of {i % n}" for i in range(m)] for m in (0, 1, n, 2 * n + 1)]
    assert all(t["pieces"] == [[]] * 4 for t in told[1:])
    assert all(t["got"] == {"rank": 0} and t["device"] == "cpu" and t["same"] for t in told)
    assert told[0]["failures"][:2] == ["ZeroDivisionError: division by zero"] * 2
    assert all(told[1]["failures"][i] == f"MainFailed: process 1 of {n} ends because the main process failed: ZeroDivisionError: division by zero" for i in (0, 1))
    assert f"a minibatch of {n - 1} cells cannot be shared by {n} processes" in told[1]["failures"][2]
    assert "cannot serve several processes" in told[1]["failures"][3] and told[0]["order"] < told[1]["order"]


# the same weights


@pytest.fixture(scope="module")
def cells30():
    return planted_cells(160, 30)


def parts_of(cells):
    """Count autoencoder, its reader, and the pieces of a denoiser, all small and from one seed."""
    reader = CellReader(cells.X, target_sum=None, transform="none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = CountAutoencoder(30, 5, hidden=16, width=12, rank=2, dropout=0.1, n_cells=reader.n_obs, start=count_start(cells.X))
        means = torch.rand(4, 30)
        schedule = linear_schedule(20, beta_T=0.6)
        denoiser = Denoiser(means, 6, widths=(16, 8), e_width=8, prediction="v", alpha_bar=schedule.alpha_bar, dropout=0.1, compact=True)
    return reader, autoencoder, denoiser, schedule, torch.from_numpy(cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64))


def _both(cells, drop="random", steps=40, **options):
    reader, autoencoder, denoiser, schedule, codes = parts_of(cells)
    common = {"batch_size": 50, "seed": 3, "device": CPU, "show": False, "lr_schedule": "cosine"} | options
    ae = train_autoencoder(autoencoder, reader, steps=steps, ema=None, **common)
    learnt = state(autoencoder)
    mean, spread = fit_count_statistics(autoencoder, reader, device=CPU)
    dm = train_denoiser(denoiser, schedule, mean, codes, spread=spread, steps=steps, drop=drop, min_snr=5.0, ema=0.9, **common)
    return learnt, state(denoiser), ae.losses, dm.losses, (placed(), denoiser.training)


@pytest.mark.parametrize("both, bound", [(_both, 1e-6), (doubled(_both), ROUNDING)], ids=["single", "double"])
@pytest.mark.parametrize("n, drop", [(2, "random"), (3, "first_k")])
def test_two_and_three_processes_end_at_the_weights_of_one(team, cells30, n, drop, both, bound):
    """Input dropout by entries, dropout in both networks, posterior noise, spread of latents, slices of 16, 17 and 17 rows."""
    alone = both(cells30, drop)
    told = values(team(n, both, cells30, drop).wait())
    start = parts_of(cells30)
    assert gap(state(start[1]), alone[0]) > 1e-2 and gap(state(start[2]), alone[1]) > 1e-2      # it was trained
    for t in told:
        assert gap(alone[0], t[0]) < bound and gap(alone[1], t[1]) < bound
        assert t[2] == pytest.approx(alone[2], abs=1e-5) and t[3] == pytest.approx(alone[3], abs=1e-5)
    assert all(gap(told[0][i], t[i]) == 0 for t in told[1:] for i in (0, 1)) and [t[4][0] for t in told] == [(r, n) for r in range(n)]


def test_own_draws_in_every_process_would_not_do(team, cells30, monkeypatch):
    """The check above can fail: without the common draws the weights part."""
    monkeypatch.setattr(training, "draw_rows", lambda n, draw: draw(n))
    alone = _both(cells30)
    told = values(team(2, _both, cells30).wait())
    assert gap(alone[1], told[0][1]) > 1e-3


def _rows_read(cells):
    reader, autoencoder, *_ = parts_of(cells)
    seen, read = [], reader.read
    reader.read = lambda rows: (seen.append(np.asarray(rows).tolist()), read(rows))[1]
    train_autoencoder(autoencoder, reader, steps=4, batch_size=50, seed=3, device=CPU, show=False)
    return seen


def test_each_process_reads_its_own_rows_only(team, cells30):
    told = values(team(2, _rows_read, cells30).wait())
    for step in range(4):
        rows = batch_rows(cells30.n_obs, 50, step, seed=3, stage="autoencoder").tolist()
        assert told[0][step] == rows[:25] and told[1][step] == rows[25:]


def _without_share(seed_of=lambda r: 0):
    """A loss that knows nothing of teams: every process does the whole minibatch."""
    torch.manual_seed(seed_of(placed()[0]))
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    fit(model, lambda step: (model(torch.randn(16, 3)) - 1).square().mean(), steps=20, seed=1, stage="x", device=CPU, show=False)
    return state(model)


def test_a_loss_that_is_not_shared_is_right_as_well_and_all_begin_alike(team):
    alone = _without_share()
    told = values(team(2, _without_share, lambda r: r).wait())       # other initial weights on process 1
    assert gap(alone, told[0]) < 1e-6 and gap(told[0], told[1]) == 0


def _model(cells, folder=None, resume=False, **options):
    model = SCLD(cells, "cell_type", device="cpu", seed=2, **SMALL | options)
    model.train(40, ae_steps=40, progress=False, checkpoint_dir=folder, checkpoint_every=15, resume=resume)
    if folder is not None:
        model.save(folder / "model")
    return {name: state(getattr(model, name)) for name in ("autoencoder", "denoiser", "scorer")}, model.history


@pytest.mark.parametrize("head", ["zinb", "mse"])
def test_a_whole_model_in_double_precision(team, cells30, head):
    """Both stages in a row: the denoiser learns from the latents of an autoencoder that two processes have trained."""
    alone, _ = doubled(_model)(cells30, head=head)
    for states, _ in values(team(2, lambda: doubled(_model)(cells30, head=head)).wait()):
        assert gap(alone["autoencoder"], states["autoencoder"]) < ROUNDING and gap(alone["denoiser"], states["denoiser"]) < ROUNDING


@pytest.mark.parametrize("head", ["zinb", "mse"])
def test_a_whole_model_in_two_processes(team, cells30, tmp_path, head):
    """As anyone trains. Behind a count head Adam makes a whole step of a gradient that is nothing but rounding, as the processor
    has it; in double precision, above, no such thing is left."""
    alone, history = _model(cells30, head=head)
    told = values(team(2, lambda: _model(cells30, tmp_path, head=head)).wait())
    for states, _ in told:
        assert gap(alone["autoencoder"], states["autoencoder"]) < 1e-6
        off, largest = relative(alone["denoiser"], states["denoiser"]), gap(alone["denoiser"], states["denoiser"])
        assert largest < 1e-6 if head == "mse" else off < 2e-6 and largest < 2e-5
    assert all(gap(told[0][0][k], told[1][0][k]) == 0 for k in alone)
    assert told[0][1]["scorer"] == told[1][1]["scorer"] and told[0][1]["scorer"]["n_real"] == history["scorer"]["n_real"]
    assert told[0][1]["denoiser"]["loss"] == pytest.approx(history["denoiser"]["loss"], abs=1e-5)
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "genes.txt", "labels.json", "weights.safetensors"]
    loaded = SCLD.load(tmp_path / "model", device="cpu")
    assert gap(state(loaded.denoiser), told[0][0]["denoiser"]) == 0


# threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_process_forked_from_one_with_many_threads_computes():
    """PyTorch's threads stay behind in the parent; a copy that waits for them is ended by an alarm."""
    asked = """
import os, signal, torch
import scld_nb.distributed
def large(): return float(torch.ones(2_000_000).add_(1).sum()) + float((torch.ones(600, 600) @ torch.ones(600, 600)).sum())
torch.set_num_threads(3)
large()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(torch.get_num_threads() if large() == 4e6 + 600**3 else 99)
print(os.waitpid(child, 0)[1], torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=ENDS, env=os.environ | {"OMP_NUM_THREADS": "3"})
    assert done.stdout.split() == [str(1 << 8), "3"], done.stdout + done.stderr


def test_to_join_adds_no_threads(team):
    """accelerate gives each process its share of the cores, if nobody has said how many threads there shall be."""
    def threads(before, cores):
        os.environ.pop("OMP_NUM_THREADS")
        torch.set_num_threads(before)
        psutil.cpu_count = lambda logical=True: cores
        this_team("cpu").ask(lambda: [0.0])()                            # nobody leaves before all are there
        return torch.get_num_threads()

    assert values(team(2, threads, 1, 8, LOCAL_WORLD_SIZE="2").wait()) == [1, 1]
    assert values(team(2, threads, 4, 4, LOCAL_WORLD_SIZE="2").wait()) == [2, 2]


# the same cells


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("ask", [{"n": 150, "batch_size": 32}, {"n": 20, "batch_size": 64, "keep": 1, "stream": False}])
def test_sampled_cells_are_those_of_one_process(team, tiny_model, n, ask):
    alone = tiny_model.sample(**ask, seed=4, progress=False)
    told = values(team(n, lambda: tiny_model.sample(**ask, seed=4, progress=False)).wait())
    assert told[1:] == [None] * (n - 1)
    cells = told[0]
    assert cells.n_obs == ask["n"] and (cells.X != alone.X).nnz == 0 and cells.obs_names.is_unique
    assert cells.obs.equals(alone.obs) and {k: str(v) for k, v in cells.uns["scld"].items()} == {k: str(v) for k, v in alone.uns["scld"].items()}
    assert len(np.unique(cells.X.toarray(), axis=0)) == cells.n_obs      # no batch was drawn twice


# being stopped


def _long(folder, steps=400, at=None, do=lambda: None, every=20, resume=False, **options):
    """A denoiser of its own on fixed latents; `do` happens at step `at` in process 1 (or the only one)."""
    denoiser = parts_of(planted_cells(80, 30))[2]
    schedule, z = linear_schedule(20, beta_T=0.6), torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    loss = training.diffusion_loss

    def watched(*args, **kwargs):
        watched.step += 1
        if watched.step == at and placed()[0] == placed()[1] - 1:
            do()
        return loss(*args, **kwargs)

    watched.step = -1
    training.diffusion_loss = watched
    try:
        done = train_denoiser(denoiser, schedule, z, torch.arange(80) % 3, steps=steps, batch_size=40, seed=1, device=CPU, show=False, ema=0.9,
                              checkpoint=folder / "c.safetensors", checkpoint_every=every, resume=resume, **options)
    finally:
        training.diffusion_loss = loss
    return state(denoiser), done.step, done.interrupted, done.losses


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_others_and_the_run_goes_on_later(team, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    undisturbed = _long(tmp_path / "undisturbed", steps=60)
    for n in (1, 2):                                                # resumed by one process, and by two
        folder = tmp_path / f"killed{n}"
        folder.mkdir()
        first, second = team(2, lambda folder=folder: _long(folder, steps=60, at=33, do=_die)).wait()
        assert second.status == -signal.SIGKILL and first.status == 1
        assert "TeamError: process 0 of 2 lost another one" in first.said and "the same command again goes on" in first.said
        assert [f.name for f in folder.iterdir()] == ["c.safetensors"] and _step_in(folder) == 20
        again = lambda folder=folder: _long(folder, steps=60, resume=True)
        resumed = values(team(2, again).wait()) if n == 2 else [again()]
        assert all(gap(undisturbed[0], r[0]) < 1e-6 and r[1] == 60 for r in resumed)


def _step_in(folder) -> int:
    from safetensors import safe_open

    with safe_open(folder / "c.safetensors", framework="pt") as f:
        return json.loads(f.metadata()["meta"])["step"]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(team, tmp_path, before, after):
    (tmp_path / "whole").mkdir()
    whole = _long(tmp_path / "whole", steps=60)
    for n, steps, resume in ((before, 30, False), (after, 60, True)):
        work = lambda steps=steps, resume=resume: _long(tmp_path, steps=steps, resume=resume)
        told = values(team(n, work).wait()) if n > 1 else [work()]
    assert all(gap(whole[0], t[0]) < 1e-6 and t[1] == 60 for t in told)


def test_a_process_that_hangs_is_not_waited_for_without_end(team, tmp_path):
    """Process 1 stops answering, as a machine without power would."""
    running = team(2, lambda: _long(tmp_path, at=10, do=lambda: os.kill(os.getpid(), signal.SIGSTOP)), SCLD_TIMEOUT_S="10")
    first = running.wait(only=0)[0]
    assert first.status == 1 and "waited 10 s for it in vain" in first.said


def _slowly(first: float, others: float = 0.0, last: float = 0.0, do=lambda: None):
    """Work of the main process, which then does something to itself; the others' turn; the main process alone again."""
    t = this_team("cpu")
    with t.main_first():
        time.sleep(first if t.is_main else others)
        if t.is_main:
            do()
    return t.on_main(lambda: (time.sleep(last), "done")[1])


def test_a_work_may_take_longer_than_the_limit_of_waiting(team):
    """Where the others wait for the main process, and where it waits for them."""
    assert values(team(3, _slowly, 0.0, 4.0, 4.0, SCLD_TIMEOUT_S="3").wait()) == ["done"] * 3


@pytest.mark.parametrize("number, why, within", [(signal.SIGKILL, "lost another one", 4.0), (signal.SIGSTOP, "waited 6 s for it in vain", 30.0)])
def test_a_main_process_that_goes_while_it_works_is_noticed(team, number, why, within):
    begun = time.monotonic()
    running = team(2, lambda: _slowly(1.0, do=lambda: os.kill(os.getpid(), number)), SCLD_TIMEOUT_S="6")
    other = running.wait(only=1)[1]
    assert other.status == 1 and why in other.said and time.monotonic() - begun < within + 10.0


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_to_one_stops_all_at_one_step(team, tmp_path, number, status):
    told = team(2, lambda: _long(tmp_path, steps=60, at=33, do=lambda: (os.kill(os.getpid(), number), os.kill(os.getpid(), number)))).wait()
    assert [t.status for t in told] == [status] * 2, told[0].said + told[1].said
    assert _step_in(tmp_path) in (34, 35, 36)
    if number == signal.SIGINT:                                     # the second one is the launcher's echo
        assert [t.value[1:3] for t in told] == [(_step_in(tmp_path), True)] * 2 and gap(told[0].value[0], told[1].value[0]) == 0
    (tmp_path / "whole").mkdir()
    assert gap(_long(tmp_path / "whole", steps=60)[0], _long(tmp_path, steps=60, resume=True)[0]) < 1e-6


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_in_the_last_step_is_not_lost(team, tmp_path, number, status):
    """By then the processes have asked each other whether to stop, for the last time but one."""
    told = team(2, lambda: _long(tmp_path, steps=30, at=29, do=lambda: os.kill(os.getpid(), number))).wait()
    assert [t.status for t in told] == [status] * 2 and _step_in(tmp_path) == 30, told[0].said + told[1].said
    assert number == signal.SIGTERM or [t.value[1:3] for t in told] == [(30, True)] * 2


def _hurried(folder):
    """Seconds pass five times as fast in process 1."""
    clock = iter(np.arange(100_000) * (1.0 + 4.0 * placed()[0]))
    training.time = types.SimpleNamespace(perf_counter=lambda: float(next(clock)), monotonic=time.monotonic)
    return _long(folder, budget_s=200.0, lr_schedule="cosine")


def test_a_budget_of_seconds_ends_all_at_one_step(team, tmp_path):
    told = values(team(2, _hurried, tmp_path).wait())
    assert told[0][1] == told[1][1] == _step_in(tmp_path) and 5 < told[0][1] < 50 and gap(told[0][0], told[1][0]) == 0


def test_a_loss_that_is_not_finite_is_everyones_error(team, tmp_path):
    def work():
        model = nn.Linear(2, 1)
        fit(model, lambda step: model(torch.randn(4, 2)).square().mean() * (float("nan") if placed()[0] and step == 5 else 1.0), steps=50, seed=0,
            stage="x", device=CPU, show=False)

    told = team(2, work).wait()
    assert all(t.status == 1 and "TrainingError: x: the loss is not finite" in t.said for t in told)


def test_processes_that_were_given_different_things_do_not_train(team):
    def work():
        model = nn.Linear(2, 1)
        fit(model, lambda step: model(torch.randn(4, 2)).square().mean(), steps=50, seed=0, stage="x", device=CPU, show=False, fingerprint=str(placed()[0]))

    told = team(2, work).wait()
    assert [t.status for t in told] == [1, 1] and "InputError: process 1 of 2 has other data" in told[1].said and "TeamError" in told[0].said


# launchers


def launch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port())]
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "scld_nb.cli", *words], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300, env=clean | {"OMP_NUM_THREADS": "1", "SCLD_TIMEOUT_S": "120", "PYTHONWARNINGS": "ignore"})


def test_accelerate_launch_trains_and_samples_as_the_plain_command(tmp_path, cells30, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells30.write_h5ad("cells.h5ad")
    settings = [w for k, v in SMALL.items() if k != "head" for w in ("--set", f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}")]
    words = ["cells.h5ad", "--labels", "cell_type", "--steps", "40", "--ae-steps", "40", "--device", "cpu", *settings]
    assert cli.main(["train", "-o", "one", *words]) == 0
    capsys.readouterr()
    done = launch(tmp_path, "train", "-o", "two", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared by 2 processes") == done.stdout.count("saved SCLD") == 1
    assert sorted(f.name for f in Path("two").iterdir()) == sorted(f.name for f in Path("one").iterdir())
    one, two = (load_file(f"{name}/weights.safetensors") for name in ("one", "two"))
    assert gap({k: v for k, v in one.items() if "scorer" not in k}, {k: v for k, v in two.items() if "scorer" not in k}) < 1e-6

    asked = ["one", "-n", "90", "--batch-size", "32", "--device", "cpu"]
    assert cli.main(["sample", *asked, "-o", "plain.h5ad"]) == 0
    done = launch(tmp_path, "sample", *asked, "-o", "shared.h5ad")
    assert done.returncode == 0 and done.stdout.count("wrote 90 cells") == 1, done.stderr
    import anndata

    plain, shared = (anndata.read_h5ad(f) for f in ("plain.h5ad", "shared.h5ad"))
    assert (plain.X != shared.X).nnz == 0 and plain.obs.equals(shared.obs) and plain.n_obs == 90
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_team_that_waits_for_a_folder_stays_together(team, tmp_path):
    """Longer than a process waits for another one; then one of them alone holds the lock."""
    def work():
        with cli.alone_with(this_team("cpu"), tmp_path / "m"):
            return time.monotonic()

    hold = "import sys, time; from scld_nb.files import alone_in\nwith alone_in(sys.argv[1]): print(flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "m")], stdout=subprocess.PIPE)   # a lock held here would be inherited
    try:
        owner.stdout.readline()
        running = team(2, work, SCLD_TIMEOUT_S="3")
        until = time.monotonic() + ENDS
        while "waiting for another process" not in (log.read_text() if (log := running.folder / "0.log").exists() else ""):
            assert time.monotonic() < until and running.processes[0].is_alive()
            time.sleep(0.05)
        time.sleep(4)
        free = time.monotonic()
    finally:
        owner.kill()
        owner.communicate()
    told = running.wait()
    assert all(t > free for t in values(told)) and "waiting" not in told[1].said


def test_a_folder_that_cannot_be_locked_ends_all(team, tmp_path):
    (tmp_path / "file").touch()

    def work():
        with cli.alone_with(this_team("cpu"), tmp_path / "file" / "m"):
            return None

    told = team(2, work).wait()
    assert [t.status for t in told] == [1, 1] and "NotADirectoryError" in told[0].said and "MainFailed" in told[1].said


def test_notebook_launcher_trains_what_a_plain_call_trains(tmp_path, cells30):
    from accelerate import notebook_launcher

    alone, _ = _model(cells30, head="mse")
    notebook_launcher(_model, (cells30, tmp_path, False), num_processes=2, use_port=str(free_port()))
    found = load_file(tmp_path / "model" / "weights.safetensors")
    assert gap({f"denoiser.{k}": v for k, v in alone["denoiser"].items()}, {k: v for k, v in found.items() if k.startswith("denoiser.")}) < 1e-6
    assert not torch.distributed.is_initialized()


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        cli.say("hello")
        assert capsys.readouterr().out == said
    assert cli.main(["train", "x", "-o", "y", "--set", "nonsense"]) == 2
    assert "scld: error in process 1: --set nonsense" in capsys.readouterr().err
    assert cli.main(["evaluate", "no.h5ad", "nor.h5ad"]) == 0        # the main process does that alone
    monkeypatch.delenv("WORLD_SIZE")
    cli.say("again")
    assert capsys.readouterr().out == "again\n"


def test_a_launcher_that_starts_one_process_only_is_noted(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    cli.note_if_left_alone()
    assert not capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cli.note_if_left_alone()
    assert "--multi_gpu" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.note_if_left_alone()
    assert not capsys.readouterr().err


def test_main_failed_is_not_said_twice(monkeypatch, capsys):
    def fail(*_, **__):
        raise MainFailed("as the main process said")

    monkeypatch.setattr(cli, "check_output", fail)
    monkeypatch.setattr(SCLD, "load", lambda *a, **k: None)
    assert cli.main(["sample", "m", "-n", "3", "-o", "x.h5ad"]) == 1 and not capsys.readouterr().err
    assert issubclass(MainFailed, TeamError) and distributed.Team().is_main

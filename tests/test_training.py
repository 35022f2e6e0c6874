"""The loop: counter-based randomness, checkpoints, interruption, and the two losses that use it."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scld_nb import running, training
from scld_nb.autoencoder import Autoencoder
from scld_nb.data import CellReader, InputError
from scld_nb.guidance import Denoiser
from scld_nb.schedules import linear_schedule
from scld_nb.training import (
    TrainingError,
    batch_rows,
    counter_seed,
    diffusion_loss,
    fit,
    load_checkpoint,
    progress_bar,
    reduced_precision,
    resolve_device,
    save_checkpoint,
    stop_on_ctrl_c,
    stop_on_sigterm,
    train_autoencoder,
    train_denoiser,
)

CPU = torch.device("cpu")


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def loss_for(model: nn.Module):
    """Batch, noise and dropout all come from the generators that `fit` sets."""

    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(16, 3)
        return (model(x) - x[:, :1].sin() - 0.1 * torch.randn(16, 1)).square().mean()

    return loss_of


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def run(model=None, *, steps=40, before_step=None, **options):
    model = small() if model is None else model
    loss_of = loss_for(model)

    def watched(step):
        if before_step:
            before_step(step)
        return loss_of(step)

    options = {"seed": 0, "stage": "toy", "device": CPU, "show": False} | options
    return model, fit(model, watched, steps=steps, **options)


def interrupt_at(stop: int):
    def before_step(step):
        if step == stop:
            raise KeyboardInterrupt
    return before_step


def meta_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as f:
        return json.loads(f.metadata()["meta"])


# devices, precision, bars

def test_resolve_device(monkeypatch):
    assert resolve_device("cpu") == CPU and resolve_device(torch.device("meta")).type == "meta"
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "cpu"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert resolve_device().type == expected
        if cuda:
            assert resolve_device("cuda:0") == torch.device("cuda:0")
            with pytest.raises(InputError, match="device 'cuda:3' is not available here; use 'auto' or 'cpu'"):
                resolve_device("cuda:3")
        if mps:
            assert resolve_device("mps").type == "mps"                 # Apple's GPU when it is asked for
    for name in ("cuda", "mps", "cuda:1"):
        with pytest.raises(InputError, match=f"device '{name}' is not available here"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "CUDA"])
def test_unknown_devices_list_the_known_ones(name):
    with pytest.raises(InputError, match=f"unknown device '{name}'; known: auto, cpu, cuda, mps"):
        resolve_device(name)


def test_bf16_on_cpu_restores_the_global_setting_even_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), reduced_precision(CPU, "bf16"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    for precision in ("auto", "fp32"):
        with reduced_precision(CPU, precision):
            assert torch.get_float32_matmul_precision() == before
    with pytest.raises(InputError, match="unknown precision 'fp16'; known: auto, fp32, tf32, bf16"), reduced_precision(CPU, "fp16"):
        pass


@pytest.mark.parametrize(("precision", "products", "autocast"), [("fp32", "highest", False), ("auto", "high", False), ("tf32", "high", False), ("bf16", "highest", True)])
def test_what_a_precision_means_on_cuda(precision, products, autocast):
    """TF32 by default; bf16 by autocast, without the cache that would keep the weights of the first step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # torch says so where there is no cuda
        with reduced_precision(torch.device("cuda"), precision):
            assert torch.get_float32_matmul_precision() == products
            assert (torch.get_autocast_dtype("cuda") == torch.bfloat16) is autocast
            assert torch.is_autocast_cache_enabled() is not autocast
    assert torch.get_float32_matmul_precision() == "highest" and torch.is_autocast_cache_enabled()


def test_precision_set_by_backend_is_borne_and_put_back():
    """PyTorch's newer way of setting it, which its older way of asking refuses to read."""
    products = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if products is None:
        pytest.skip("this PyTorch knows the older way alone")
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with reduced_precision(torch.device("cuda"), "auto"), reduced_precision(CPU, "fp32"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.backends.mkldnn.matmul.fp32_precision == products
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_fp32_is_fp32_whatever_the_process_is_set_to(device):
    torch.set_float32_matmul_precision("medium")
    try:
        with reduced_precision(device, "fp32"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_fit_restores_the_precision(monkeypatch):
    before = torch.get_float32_matmul_precision()
    seen = []
    run(steps=2, precision="bf16", before_step=lambda _: seen.append(torch.get_float32_matmul_precision()))
    with pytest.raises(RuntimeError, match="boom"):
        run(steps=2, precision="bf16", before_step=lambda _: (_ for _ in ()).throw(RuntimeError("boom")))
    assert seen == ["medium"] * 2 and torch.get_float32_matmul_precision() == before


class Terminal:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_bars_show_only_where_somebody_looks(monkeypatch):
    for name in ("IN_TEST", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for tty in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal(tty))
        assert isinstance(progress_bar(3, "demo"), running._Lines) is not tty and not progress_bar(3, "demo").disable
        assert progress_bar(3, "demo", show=False).disable
        assert not progress_bar(3, "demo", show=True).disable
    with progress_bar(3, "demo") as bar:
        bar.update(3)
    assert "demo" in sys.stderr.text
    for name in ("IN_TEST", "TQDM_DISABLE"):
        with monkeypatch.context() as silenced:
            silenced.setenv(name, "1")
            assert progress_bar(3, "demo").disable and not progress_bar(3, "demo", show=True).disable


# counters

@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), stage=st.sampled_from(["autoencoder", "denoiser"]))
def test_counter_seed_is_a_function_of_each_argument(seed, step, stage):
    value = counter_seed(seed, stage, step)
    assert value == counter_seed(seed, stage, step) and 0 <= value < 2**63 and type(value) is int
    others = {counter_seed(seed + 1, stage, step), counter_seed(seed, stage, step + 1), counter_seed(seed, stage + "2", step),
              counter_seed(seed, stage, step, 1)}
    assert value not in others and len(others) == 4


def test_counter_seed_has_not_changed():
    """A change here would break the resume of every run that was saved before it."""
    assert counter_seed(0, "denoiser", 7) == 1748471395430879553
    words = [5, 0, *b"sampling", 3, 1]
    expected = np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1)
    assert counter_seed(5, "sampling", 3 + 2**32) == int(expected)


def test_negative_seed_is_an_input_error():
    with pytest.raises(InputError, match="a seed must be 0 or greater, got -1"):
        counter_seed(-1, "denoiser", 0)


@settings(deadline=None)
@given(n=st.integers(1, 300), size=st.integers(1, 150), epoch=st.integers(0, 50), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation_prefix(n, size, epoch, seed):
    per_epoch = max(1, n // size)
    batches = [batch_rows(n, size, epoch * per_epoch + i, seed=seed, stage="s") for i in range(per_epoch)]
    rows = np.concatenate(batches)
    assert len(np.unique(rows)) == len(rows) == min(n, per_epoch * size)
    assert rows.min() >= 0 and rows.max() < n
    assert all((np.diff(b) > 0).all() and len(b) == min(n, size) for b in batches)
    order = np.random.default_rng(counter_seed(seed, "s", epoch)).permutation(n)
    assert set(rows) == set(order[:len(rows)])


def test_batches_differ_between_epochs_stages_and_seeds_and_visit_everyone():
    def rows(step, **k):
        return tuple(batch_rows(100, 10, step, **({"seed": 0, "stage": "a"} | k)))

    assert len({rows(0), rows(10), rows(20), rows(0, seed=1), rows(0, stage="b")}) == 5
    assert rows(37) == rows(37)
    assert set().union(*(rows(step) for step in range(10))) == set(range(100))


# the loop against other implementations

def test_fit_is_the_bare_loop_bit_for_bit():
    model, result = run(steps=30, ema=0.9, clip=0.05)
    bare = small().train()
    loss_of, average = loss_for(bare), [p.detach().clone() for p in bare.parameters()]
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    losses = []
    for step in range(30):
        torch.manual_seed(counter_seed(0, "toy", step))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.05)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average, bare.parameters()):
                a.lerp_(p, 1 - min(0.9, (1 + step) / (10 + step)))
        losses.append(loss.item())
    assert torch.equal(flat(model), torch.cat([a.ravel() for a in average]))
    assert result.losses == [pytest.approx(np.mean(losses), rel=1e-6)] and result.step == 30 and not result.interrupted


@pytest.mark.parametrize("clip, ema", [(None, None), (0.5, None), (None, 0.8), (0.5, 0.8)])
def test_adamw_clipping_and_averaging_against_numpy(clip, ema):
    """One weight vector, a quadratic loss with a known gradient, everything else by hand in float64."""
    target = np.array([3.0, -2.0, 0.5])
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
    fit(model, lambda step: (step + 1) * (model.weight[0] - torch.from_numpy(target).float()).square().sum(),
        steps=12, seed=0, stage="q", device=CPU, lr=0.1, weight_decay=0.05, ema=ema, clip=clip, show=False)
    w, m, v, average = np.ones(3), np.zeros(3), np.zeros(3), np.ones(3)
    for i in range(1, 13):
        g = 2 * i * (w - target)
        if clip:
            g *= min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        if ema:
            rho = min(ema, i / (9 + i))                  # the average starts short
            average = rho * average + (1 - rho) * w
    np.testing.assert_allclose(model.weight.detach().numpy()[0], average if ema else w, rtol=1e-5)


def test_a_short_run_forgets_its_initial_weights():
    """A constant decay of 0.999 would keep 86 % of the start after 150 steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 50.0)
    fit(model, lambda step: (model.weight - 1.0).square().sum(), steps=150, seed=0, stage="s", device=CPU, lr=5.0,
        weight_decay=0.0, clip=None, ema=0.999, show=False)
    assert abs(model.weight.item() - 1.0) < 15


def test_losses_are_means_of_a_hundred_steps_and_the_model_ends_in_evaluation_mode():
    model = nn.Linear(1, 1)
    result = fit(model, lambda step: step + 0.0 * model.weight.sum(), steps=250, seed=0, stage="s", device=CPU, show=False)
    assert result.losses == pytest.approx([49.5, 149.5, 224.5]) and not model.training and result.seconds > 0


def test_frozen_parameters_stay():
    model = small()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    run(model, steps=3)
    assert torch.equal(before, model[0].weight)


def test_the_callers_generators_are_untouched():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run(steps=5)
    run(steps=5, before_step=interrupt_at(3))
    with pytest.raises(RuntimeError):
        run(steps=5, before_step=lambda _: (_ for _ in ()).throw(RuntimeError))
    after = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_randomness_is_a_function_of_seed_stage_and_step_only():
    torch.manual_seed(1)
    first = flat(run(steps=5)[0])
    torch.manual_seed(2)
    assert torch.equal(first, flat(run(steps=5)[0]))
    assert not torch.equal(first, flat(run(steps=5, seed=1)[0]))
    assert not torch.equal(first, flat(run(steps=5, stage="other")[0]))


# interruption and resume

@pytest.mark.parametrize("options", [{}, {"ema": None}, {"clip": None}, {"ema": None, "clip": None, "weight_decay": 0.1},
                                     {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("stop", [0, 1, 17, 39])
def test_resume_equals_uninterrupted(tmp_path, stop, options):
    straight, whole = run(**options)
    path = tmp_path / "c.safetensors"
    _, first = run(before_step=interrupt_at(stop), checkpoint=path, **options)
    assert first.interrupted and first.step == stop
    assert path.exists() == (stop > 0) and (stop == 0 or meta_of(path)["step"] == stop)
    resumed, second = run(small(seed=9) if stop else None, checkpoint=path, resume=True, **options)
    assert torch.equal(flat(resumed), flat(straight))
    assert second.losses == whole.losses and second.step == 40 and not second.interrupted


@settings(max_examples=6, deadline=None)
@given(stops=st.lists(st.integers(0, 119), max_size=3), every=st.integers(5, 130))
def test_resume_equals_uninterrupted_after_any_interruptions(tmp_path_factory, stops, every):
    fresh = nn.Linear(2, 1)

    def go(before_step=None, **options):
        model = copy.deepcopy(fresh)

        def loss_of(step):
            if before_step:
                before_step(step)
            return model(torch.randn(4, 2)).square().mean()

        result = fit(model, loss_of, steps=120, seed=3, stage="h", device=CPU, show=False, **options)
        return flat(model), result.losses

    straight = go()
    path = tmp_path_factory.mktemp("h") / "c"
    for stop in stops:
        go(interrupt_at(stop), checkpoint=path, checkpoint_every=every, resume=True)
    weights, losses = go(checkpoint=path, checkpoint_every=every, resume=True)
    assert torch.equal(weights, straight[0]) and losses == straight[1]


def test_a_finished_run_can_be_prolonged_and_is_not_repeated(tmp_path):
    path = tmp_path / "c"
    straight, _ = run(steps=60)
    run(steps=25, checkpoint=path)
    steps_seen = []
    again, result = run(small(3), steps=25, checkpoint=path, resume=True, before_step=steps_seen.append)
    assert steps_seen == [] and result.step == 25 and torch.equal(flat(again), flat(run(steps=25)[0]))
    longer, _ = run(small(4), steps=60, checkpoint=path, resume=True, before_step=steps_seen.append)
    assert steps_seen[0] == 25 and torch.equal(flat(longer), flat(straight))


def test_without_resume_an_old_checkpoint_is_not_read(tmp_path):
    path = tmp_path / "c"
    run(steps=20, checkpoint=path)
    steps_seen = []
    model, _ = run(steps=30, checkpoint=path, before_step=steps_seen.append)
    assert steps_seen == list(range(30)) and torch.equal(flat(model), flat(run(steps=30)[0]))


def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, model, ema, optimizer, meta: saved.append(meta["step"]))
    run(steps=25, checkpoint=tmp_path / "c", checkpoint_every=10)
    assert saved == [10, 20, 25]
    saved.clear()
    run(steps=20, checkpoint=tmp_path / "c", checkpoint_every=10)
    assert saved == [10, 20]


def test_first_ctrl_c_finishes_the_step_and_saves(tmp_path):
    path, handler = tmp_path / "c", signal.getsignal(signal.SIGINT)
    _, result = run(before_step=lambda step: step == 12 and signal.raise_signal(signal.SIGINT), checkpoint=path)
    assert result.interrupted and result.step == 13 == meta_of(path)["step"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(flat(run(checkpoint=path, resume=True)[0]), flat(run()[0]))


def test_second_ctrl_c_leaves_at_once_and_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "c"

    def twice(step):
        if step == 12:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(before_step=twice, checkpoint=path, checkpoint_every=5)
    assert meta_of(path)["step"] == 10 and [f.name for f in tmp_path.iterdir()] == ["c"]
    assert torch.equal(flat(run(checkpoint=path, resume=True)[0]), flat(run()[0]))


def test_sigterm_saves_and_ends_with_143(tmp_path):
    path, handler = tmp_path / "c", signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(before_step=lambda step: step == 12 and signal.raise_signal(signal.SIGTERM), checkpoint=path)
    assert caught.value.code == 143 and meta_of(path)["step"] == 13
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.equal(flat(run(checkpoint=path, resume=True)[0]), flat(run()[0]))


def test_other_threads_and_ignored_signals_are_left_alone(tmp_path):
    done = {}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def work():
        done["model"] = run(before_step=lambda _: done.setdefault("handlers", (
            signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))))[0]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done["handlers"] == handlers and torch.equal(flat(done["model"]), flat(run()[0]))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_ctrl_c(threading.Event()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_flags_are_set_and_handlers_restored_after_an_error():
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    term, ctrl_c = threading.Event(), threading.Event()
    with pytest.raises(ZeroDivisionError), stop_on_sigterm(term), stop_on_ctrl_c(ctrl_c):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
    assert term.is_set() and ctrl_c.is_set()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


SCRIPT = """
import os, signal, sys
import torch
from safetensors.torch import save_file
sys.path.insert(0, os.path.dirname({here!r}))
import test_training as t
from scld_nb import running, training
torch.set_num_threads(1)
kind, path = sys.argv[1], t.Path(sys.argv[2])

def at_23(step):
    if step == 23:
        os.kill(os.getpid(), getattr(signal, kind))

def dies_while_writing(tensors, file, metadata):
    save_file(tensors, file, metadata=metadata)
    if t.json.loads(metadata["meta"])["step"] == 20:
        with open(file, "r+b") as f:
            f.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)

if kind == "half":
    training.save_file = dies_while_writing
t.run(before_step=None if kind == "half" else at_23, checkpoint=path, checkpoint_every=10)
"""


@pytest.mark.parametrize("kind, code, step", [("SIGKILL", -9, 20), ("half", -9, 10), ("SIGTERM", 143, 24)])
def test_a_process_ended_from_outside_can_be_resumed_exactly(tmp_path, kind, code, step):
    """SIGKILL at a step that is no checkpoint, SIGKILL in the middle of a write, SIGTERM."""
    path = tmp_path / "c.safetensors"
    script = tmp_path / "child.py"
    script.write_text(SCRIPT.format(here=__file__))
    child = subprocess.run([sys.executable, str(script), kind, str(path)], capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert child.returncode == code, child.stderr
    assert meta_of(path)["step"] == step
    resumed, result = run(small(seed=9), checkpoint=path, resume=True)
    straight, whole = run()
    assert torch.equal(flat(resumed), flat(straight)) and result.losses == whole.losses


# checkpoints that must not be trusted

def test_non_finite_loss_names_the_last_good_step_and_keeps_it(tmp_path):
    path, model = tmp_path / "c", small()

    def breaks(step):
        return loss_for(model)(step) * (float("inf") if step == 33 else 1.0)

    with pytest.raises(TrainingError, match="toy: the loss is not finite near step 40; the last good state is step 30 in .*c"):
        fit(model, breaks, steps=100, seed=0, stage="toy", device=CPU, checkpoint=path, checkpoint_every=10, show=False)
    assert meta_of(path)["step"] == 30
    assert torch.equal(flat(run(small(9), steps=60, checkpoint=path, resume=True)[0]), flat(run(steps=60)[0]))


@pytest.mark.parametrize("with_file", [False, True])
def test_non_finite_loss_claims_no_state_that_was_never_saved(tmp_path, with_file):
    model = small()
    with pytest.raises(TrainingError) as caught:
        fit(model, lambda step: model[0].weight.sum() * float("nan"), steps=10, seed=0, stage="toy", device=CPU, show=False,
            checkpoint=tmp_path / "c" if with_file else None)
    assert str(caught.value) == "toy: the loss is not finite near step 10; try a smaller learning rate"
    assert not (tmp_path / "c").exists()


def test_interrupted_after_a_bad_loss_saves_nothing(tmp_path):
    model = small()

    def breaks(step):
        if step == 5:
            raise KeyboardInterrupt
        return model[0].weight.sum() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(TrainingError):
        fit(model, breaks, steps=10, seed=0, stage="toy", device=CPU, show=False, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("at, kept", [(33, 30), (39, 30), (2, 0)])
def test_a_slope_that_is_not_finite_spoils_no_checkpoint(tmp_path, at, kept, clip):
    """The loss stays finite, in the bad step and in those after it."""
    path, model = tmp_path / "c", small()
    model.register_parameter("idle", nn.Parameter(torch.zeros(2)))

    def breaks(step):
        bad = (model.idle - model.idle.detach()).square().sum().sqrt()      # 0, with a slope of 0 / 0
        return loss_for(model)(step) + (bad if step == at else 0.0)

    with pytest.raises(TrainingError) as caught:
        fit(model, breaks, steps=40, seed=0, stage="toy", device=CPU, checkpoint=path, checkpoint_every=10, clip=clip, show=False)
    state = f"; the last good state is step {kept} in {path}" if kept else ""
    assert str(caught.value).startswith("toy: the ") and f" not finite near step {-(-(at + 1) // 10) * 10}{state}; try a smaller" in str(caught.value)
    assert meta_of(path)["step"] == kept if kept else not path.exists()


def test_a_slope_that_is_not_finite_in_the_very_last_step_is_an_error():
    """Nothing is computed with its weights before the end."""
    model = nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="toy: the weights are not finite near step 3; try a smaller learning rate"):
        fit(model, lambda step: (model.weight - model.weight.detach()).square().sum().sqrt() if step == 2 else model.weight.sum(),
            steps=3, seed=0, stage="toy", device=CPU, show=False)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04pickle?" * 20,
                                   lambda b: b[:8] + b"}" + b[9:]], ids=["cut", "empty", "other format", "bad header"])
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, spoil):
    path = tmp_path / "c"
    run(steps=5, checkpoint=path)
    path.write_bytes(spoil(path.read_bytes()))
    model = small(3)
    before = flat(model)
    with pytest.raises(InputError, match="cannot read checkpoint .*delete it to start this stage again") as caught:
        run(model, checkpoint=path, resume=True)
    assert "\n" not in str(caught.value) and torch.equal(before, flat(model))


@pytest.mark.parametrize("change, named", [
    ({"seed": 1}, "seed=0, this run has 1"), ({"stage": "b"}, "stage='toy', this run has 'b'"),
    ({"fingerprint": "x"}, "fingerprint='', this run has 'x'"), ({"ema": None}, "setting of ema")])
def test_checkpoints_of_another_run_are_refused(tmp_path, change, named):
    path, model = tmp_path / "c", small(3)
    run(steps=5, checkpoint=path)
    content, before = path.read_bytes(), flat(model)
    with pytest.raises(InputError, match=named) as caught:
        run(model, checkpoint=path, resume=True, **change)
    assert "\n" not in str(caught.value) and "train into another folder" in str(caught.value)
    assert torch.equal(before, flat(model)) and path.read_bytes() == content


def test_checkpoints_of_another_network_or_program_are_refused(tmp_path):
    path = tmp_path / "c"
    run(steps=5, checkpoint=path)
    other = nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Dropout(0.2), nn.Linear(9, 1))
    with pytest.raises(InputError, match="holds another network"):
        run(other, checkpoint=path, resume=True)
    for metadata in (None, {"meta": "{}"}, {"meta": "[1]"}, {"meta": "no json"}):
        save_file({"a": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(InputError, match="was made with format=None|cannot read checkpoint"):
            run(checkpoint=path, resume=True)


def test_a_failed_write_leaves_the_old_file_and_no_rubble(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "c"
    model, optimizer = small(), torch.optim.AdamW(small().parameters())
    save_checkpoint(path, model, [], optimizer, {"step": 1})
    content = path.read_bytes()

    def full_disk(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(training, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, model, [], optimizer, {"step": 2})
    assert path.read_bytes() == content and [f.name for f in path.parent.iterdir()] == ["c"]
    with pytest.raises(OSError, match="no space left"):                      # and the loop lets it through
        run(steps=30, checkpoint=path, checkpoint_every=10)
    assert path.read_bytes() == content


def test_checkpoint_roundtrip_restores_everything(tmp_path):
    path, model = tmp_path / "c", small()
    average = [p.detach() * 0.5 for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_for(model)(0).backward()
    optimizer.step()
    save_checkpoint(path, model, average, optimizer, {"step": 1, "losses": [0.1 + 0.2]})
    other = small(7)
    other_average, other_optimizer = [torch.zeros_like(p) for p in average], torch.optim.AdamW(other.parameters(), lr=0.01)
    meta = load_checkpoint(path, other, other_average, other_optimizer, {"step": 1})
    assert meta == {"step": 1, "losses": [0.1 + 0.2]}
    assert torch.equal(flat(other), flat(model)) and all(torch.equal(a, b) for a, b in zip(average, other_average))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, other_optimizer.state_dict()["state"][i][k]) for k, v in state.items())


@pytest.mark.parametrize("number", [27, 28, 122])
def test_a_checkpoint_that_the_disk_refuses_is_named(tmp_path, monkeypatch, number):
    """The library says the number only in words; what it says of other faults stays."""
    def refuse(tensors, path, metadata):
        raise SafetensorError(text)

    monkeypatch.setattr(training, "save_file", refuse)
    text = f"Error while serializing: I/O error: not so (os error {number})"
    with pytest.raises(OSError) as told:
        run(steps=3, checkpoint=tmp_path / "c.safetensors")
    assert told.value.errno == number and told.value.filename == str(tmp_path / "c.safetensors")
    text = "something else"
    with pytest.raises(SafetensorError, match="something else"):
        run(steps=3, checkpoint=tmp_path / "c.safetensors")


def test_no_pickle_in_a_checkpoint(tmp_path):
    run(steps=3, checkpoint=tmp_path / "c")
    raw = (tmp_path / "c").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    last = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    assert 8 + length + last == len(raw)                                      # JSON and numbers, nothing else


# the two losses

@pytest.fixture(scope="module")
def reader() -> CellReader:
    rng = np.random.default_rng(0)
    profile = rng.gamma(1.0, 2.0, (2, 40))
    counts = rng.poisson(profile[np.arange(60) % 2]).astype(np.float32)
    counts[:, 0] += 1
    return CellReader(sp.csr_matrix(counts))


def test_train_autoencoder_learns_and_reads_only_its_batches(reader):
    class Spy:
        n_obs, seen = reader.n_obs, []

        def read(self, rows):
            self.seen.append(np.asarray(rows))
            return reader.read(rows)

    def make():
        torch.manual_seed(0)
        return Autoencoder(40, 4, hidden=16, gene_means=torch.from_numpy(reader.mean()))

    autoencoder, x = make(), torch.from_numpy(reader.read(slice(None)))
    before = autoencoder.loss(x).item()
    result = train_autoencoder(autoencoder, Spy(), steps=150, batch_size=16, seed=2, device=CPU, ema=0.9, show=False)
    assert autoencoder.loss(x).item() < 0.7 * before and len(result.losses) == 2
    assert all(np.array_equal(rows, batch_rows(60, 16, i, seed=2, stage="autoencoder")) for i, rows in enumerate(Spy.seen))
    twin = make()
    train_autoencoder(twin, reader, steps=150, batch_size=16, seed=2, device=CPU, ema=0.9, show=False)
    assert torch.equal(flat(autoencoder), flat(twin))


class Recorder:
    """A stand-in denoiser that knows the clean latents and answers with the exact noise."""

    n_clusters = 3

    def __init__(self, z0, schedule, wrong=0.0):
        self.z0, self.schedule, self.wrong = z0, schedule, wrong

    def __call__(self, z, t, k):
        self.t, self.k = t, k
        level = torch.searchsorted(self.schedule.timesteps, t)
        a = self.schedule.alpha_bar[level].to(z.dtype)[:, None]
        return (z - a.sqrt() * self.z0) / (1 - a).sqrt() + self.wrong


@pytest.mark.parametrize("steps", [None, 50])
def test_the_loss_is_the_mean_squared_error_of_the_noise(steps):
    schedule = linear_schedule(1000).respace(steps)
    z0 = torch.randn(4000, 2, dtype=torch.float64)
    labels = torch.zeros(4000, dtype=torch.long)
    exact = Recorder(z0, schedule)
    assert diffusion_loss(exact, schedule, z0, labels) < 1e-4
    assert set(exact.t.tolist()) <= set(schedule.timesteps[1:].tolist()) and exact.t.min() > 0
    assert len(exact.t.unique()) > (900 if steps is None else 49)
    wrong = diffusion_loss(Recorder(z0, schedule, wrong=0.5), schedule, z0, labels).item()
    assert wrong == pytest.approx(0.25, abs=2e-3)


def test_who_gets_the_global_condition():
    schedule = linear_schedule(10)
    z0, labels = torch.zeros(200, 2), torch.arange(200) % 3
    denoiser = Recorder(z0, schedule)

    def conditions(**options):
        torch.manual_seed(0)
        diffusion_loss(denoiser, schedule, z0, labels, **options)
        return denoiser.k

    first = conditions(drop="first_k", p_uncond=0.1)
    assert (first[:20] == 3).all() and torch.equal(first[20:], labels[20:])
    scattered = conditions(drop="random", p_uncond=0.3)
    assert 30 < (scattered == 3).sum() < 90 and (scattered[-60:] == 3).any()
    assert torch.equal(scattered[scattered != 3], labels[scattered != 3])
    for drop in ("random", "first_k"):
        assert (conditions(drop=drop, p_uncond=1.0) == 3).all()
        assert torch.equal(conditions(drop=drop, p_uncond=0.0), labels)


def tiny_denoiser() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(torch.rand(4, 12), 8, widths=(16,), e_width=16)


@pytest.fixture(scope="module")
def latents():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    z = torch.randn(3, 8, generator=g)[labels] + 0.2 * torch.randn(90, 8, generator=g)
    return (z - z.mean(0)) / z.std(0), labels


def trained(latents, labels=None, *, steps=60, **options):
    denoiser = tiny_denoiser()
    options = {"batch_size": 32, "seed": 1, "device": CPU, "show": False, "ema": 0.9} | options
    result = train_denoiser(denoiser, linear_schedule(), latents[0], latents[1] if labels is None else labels, steps=steps, **options)
    return denoiser, result


def test_train_denoiser_learns(latents):
    _, result = trained(latents, steps=300, lr=5e-3)
    assert result.losses[0] < 1.05 and result.losses[-1] < 0.7 * result.losses[0]


def test_without_pre_guidance_labels_have_no_influence(latents):
    shuffled = latents[1].flip(0)
    alone = [flat(trained(latents, labels, p_uncond=1.0, steps=20)[0]) for labels in (latents[1], shuffled)]
    guided = [flat(trained(latents, labels, steps=20)[0]) for labels in (latents[1], shuffled)]
    assert torch.equal(*alone) and not torch.equal(*guided)


def test_first_k_falls_on_a_shuffled_batch(latents, monkeypatch):
    seen = {}

    def note(denoiser, schedule, z0, labels, **_):
        seen.setdefault(drop, []).append(z0[:, 0])
        return z0.sum() * 0.0 + denoiser.embed().sum() * 0.0

    monkeypatch.setattr(training, "diffusion_loss", note)
    numbered = (torch.arange(90.0)[:, None].expand(-1, 8), latents[1])
    for drop in ("random", "first_k"):
        trained(numbered, drop=drop, steps=12)
    for in_order, shuffled in zip(seen["random"], seen["first_k"]):
        assert torch.equal(in_order, shuffled.sort().values) and not torch.equal(in_order, shuffled)
    leaders = torch.cat([batch[:3] for batch in seen["first_k"]])
    assert len(leaders.unique()) > 20                                         # not always the same cells


@pytest.mark.parametrize("drop", ["random", "first_k"])
def test_the_denoiser_resumes_exactly(latents, tmp_path, monkeypatch, drop):
    straight, whole = trained(latents, drop=drop)
    original, calls = training.diffusion_loss, iter(range(10**6))

    def interrupted(*arguments, **options):
        if next(calls) == 37:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "diffusion_loss", interrupted)
        assert trained(latents, drop=drop, checkpoint=tmp_path / "d")[1].step == 37
    resumed, result = trained(latents, drop=drop, checkpoint=tmp_path / "d", resume=True)
    assert torch.equal(flat(resumed), flat(straight)) and result.losses == whole.losses


def test_a_budget_in_seconds_ends_training_and_is_over_after_a_resume(tmp_path, monkeypatch):
    """A clock that moves by one second per look: the loop ends when the seconds are used up, and stays ended."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(ticks)))

    def run(**options):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        return training.fit(model, lambda step: model.weight.square().sum(), steps=1000, seed=0, stage="demo", device=torch.device("cpu"),
                            checkpoint=tmp_path / "demo.safetensors", show=False, **options)

    first = run(budget_s=40)
    assert 0 < first.step < 45 and len(first.losses) == 1 and not first.interrupted and first.seconds >= 40
    again = run(budget_s=40, resume=True)
    assert again.step == first.step and again.losses == first.losses
    more = run(budget_s=90, resume=True)
    assert first.step < more.step < 95


# step sizes, other predictions, latents with a spread


def test_cosine_steps_rise_and_fall_to_nothing():
    sizes = [training._learning_rate(2.0, "cosine", s, 100) for s in range(100)]
    assert max(sizes) == pytest.approx(2.0) and np.argmax(sizes) in (9, 10)
    assert (np.diff(sizes[:10]) > 0).all() and (np.diff(sizes[10:]) < 0).all() and sizes[-1] < 0.002
    assert {training._learning_rate(2.0, "constant", s, 100) for s in range(100)} == {2.0}


def test_an_unknown_lr_schedule_is_refused(latents):
    with pytest.raises(InputError, match="unknown lr_schedule 'linear'; known: constant, cosine"):
        trained(latents, lr_schedule="linear")


def test_a_cosine_run_is_resumed_bit_for_bit(latents, tmp_path, monkeypatch):
    whole, _ = trained(latents, lr_schedule="cosine", steps=40)

    class Killed(Exception):
        pass

    save = training.save_checkpoint

    def save_and_die(*args):
        save(*args)
        raise Killed

    monkeypatch.setattr(training, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        trained(latents, lr_schedule="cosine", steps=40, checkpoint=tmp_path / "c", checkpoint_every=15)
    monkeypatch.setattr(training, "save_checkpoint", save)
    again, _ = trained(latents, lr_schedule="cosine", steps=40, checkpoint=tmp_path / "c", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_losses_of_all_predictions_agree_at_their_weights():
    """An error of the noise, told in the terms of v or z0, has the loss that the signal-to-noise ratio predicts."""
    schedule, z0, labels = linear_schedule(1000), torch.randn(64, 8), torch.zeros(64, dtype=torch.long)
    found = {}
    for prediction in ("eps", "v", "z0"):
        denoiser = Denoiser(torch.rand(2, 12), 8, widths=(8,), e_width=8, prediction=prediction, alpha_bar=schedule.alpha_bar)
        torch.manual_seed(3)                                         # the same steps and noise for all three
        found[prediction] = diffusion_loss(denoiser, schedule, z0, labels, p_uncond=0.0)
        torch.manual_seed(3)
        weighted = diffusion_loss(denoiser, schedule, z0, labels, p_uncond=0.0, min_snr=1e-3)
        assert 0 < float(weighted.detach()) < float(found[prediction].detach()) * 2
    # an untrained network says 0 everywhere: the losses are the mean squares of the targets
    assert float(found["eps"].detach()) == pytest.approx(1.0, abs=0.15)
    assert float(found["z0"].detach()) == pytest.approx(float(z0.square().mean()), rel=1e-5)
    assert float(found["v"].detach()) == pytest.approx(1.0, abs=0.2)


def test_latents_with_a_spread_are_drawn_anew_each_step(latents, monkeypatch):
    seen = []

    def note(denoiser, schedule, z0, labels, **_):
        seen.append(z0.clone())
        return denoiser.embed().sum() * 0.0

    monkeypatch.setattr(training, "diffusion_loss", note)
    z = torch.zeros_like(latents[0])
    trained((z, latents[1]), spread=torch.full_like(z, 0.5), steps=30)
    values = torch.cat(seen)
    assert abs(float(values.std()) - 0.5) < 0.05 and abs(float(values.mean())) < 0.05
    assert not torch.equal(seen[0], seen[1])


def test_precisions_of_several_threads_end_in_the_users():
    cpu, before = torch.device("cpu"), torch.get_float32_matmul_precision()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with training.reduced_precision(cpu, "bf16"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with training.reduced_precision(cpu, "bf16"):
        thread.start()
        inside.wait(10)
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "medium"             # the other one still computes
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == before


def test_a_log_file_gets_lines_and_no_bar(monkeypatch):
    for name in ("IN_TEST", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    with progress_bar(2_000, "denoiser") as bar:                # over before there was anything to tell
        bar.update(1_000)
    assert sys.stderr.text == ""
    monkeypatch.setattr(running, "LINE_EVERY_S", 0.0)
    with progress_bar(2_000, "denoiser") as bar:
        bar.update(1_500)
    first, last = sys.stderr.text.splitlines()
    assert first == "denoiser: 0 of 2,000 steps" and last.startswith("denoiser: 1,500 of 2,000 steps, about 00:00 left")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress_bar(3, "demo").disable

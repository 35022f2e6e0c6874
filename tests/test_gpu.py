"""Cells on a device, recorded steps and the sparse way back: against scipy, against plain calls, and on a GPU, a pretended one where there is none."""

import json

import numpy as np
import pretend_gpu
import pytest
import scipy.sparse as sp
import torch
from conftest import benchmark_script, planted_cells
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scld_nb import SCLD, data, gpu, training
from scld_nb import experiments as ex
from scld_nb.baselines import make_baseline
from scld_nb.counts import CountAutoencoder, CountMap, CountParameters, count_nll
from scld_nb.data import CellReader
from scld_nb.gpu import OnDevice, Recorded, blocks_on, on_device, rows_at_once, send, sparse_rows
from scld_nb.sampling import SAMPLERS
from scld_nb.schedules import linear_schedule
from scld_nb.training import diffusion_draws, fit, train_autoencoder

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
IS_REAL = torch.cuda.is_available()
needs_gpu, needs_apple = pytest.mark.gpu, pytest.mark.gpu(pretend_gpu.MPS)
DEVICES = [CPU, pytest.param(CUDA, marks=needs_gpu)]


@pytest.fixture(autouse=True)
def gpu_if_needed(request, monkeypatch):
    marker = request.node.get_closest_marker("gpu")
    there = {(): IS_REAL, (pretend_gpu.SECOND,): torch.cuda.device_count() > 1, (pretend_gpu.MPS,): torch.backends.mps.is_available()}
    if marker and not there[marker.args]:
        pretend_gpu.pretend(monkeypatch, *marker.args)


def counts(n: int = 300, genes: int = 40, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.4, 2.0, (n, genes))).astype(np.float32)
    x[:, 0] += 1
    return sp.csr_matrix(x)


# ------------------------------------------------------------------ cells on a device

@pytest.mark.parametrize("device", DEVICES)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1), st.data())
def test_minibatches_made_on_the_device_are_rows_of_the_matrix(device, n, genes, seed, more):
    """Empty rows, rows asked for twice and the last row among them."""
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix((rng.poisson(0.6, (n, genes)) * rng.normal(size=(n, genes))).astype(np.float32))
    rows = more.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    got = OnDevice(x, device).dense(torch.tensor(rows, device=device)).cpu().numpy()
    assert got.dtype == np.float32 and np.array_equal(got, x.toarray()[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_what_comes_back_is_the_sparse_form(device, dtype, n, genes, seed):
    dense = np.random.default_rng(seed).poisson(0.5, (n, genes)).astype(np.float32)
    back, wanted = sparse_rows(torch.from_numpy(dense).to(device), dtype), sp.csr_matrix(dense, dtype=dtype)
    assert back.dtype == dtype and back.has_canonical_format
    for part in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(back, part), getattr(wanted, part)), part


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_all_cells_in_order(device):
    reader = CellReader(counts())
    blocks = list(blocks_on(reader, device, 128))
    assert [len(b) for b in blocks] == [128, 128, 44] and all(b.device.type == device.type for b in blocks)
    assert np.allclose(torch.cat(blocks).cpu().numpy(), reader.read(slice(None)), rtol=1e-6)
    some = list(blocks_on(reader, device, 128, every=2))
    assert len(some) == 2 and all(torch.equal(a, b) for a, b in zip(some, blocks[::2]))


def test_blocks_of_many_genes_are_cut_on_a_cpu(monkeypatch):
    reader = CellReader(counts())
    whole = list(blocks_on(reader, CPU, 128, every=2))
    monkeypatch.setattr(gpu, "rows_at_once", lambda n_genes, device, *, most: min(most, 50))
    parts = list(blocks_on(reader, CPU, 128, every=2))
    assert [len(b) for b in parts] == [50, 50, 28, 44] and torch.equal(torch.cat(parts), torch.cat(whole))


@given(st.integers(1, 10**8), st.integers(1, 5000))
def test_a_block_has_rows_and_fits(genes, most):
    rows = rows_at_once(genes, CPU, most=most)
    assert 1 <= rows <= most and (rows == 1 or rows * genes <= 2**21) and (rows == most or (rows + 1) * genes > 2**21)
    there = rows_at_once(genes, CUDA, most=most)
    assert rows <= there <= most and (there == 1 or there * genes <= 2**25) and there == rows_at_once(genes, torch.device("mps"), most=most)
    assert genes > 2**15 or rows_at_once(genes, CUDA) == 1024


@needs_gpu
def test_some_of_the_cells_need_room_for_them_alone(monkeypatch):
    reader = CellReader(counts())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * reader.counts.nnz, 2**40))
    few = on_device(reader, CUDA, rows=np.array([7, 250]), share=0.5)
    assert on_device(reader, CUDA, share=0.5) is None and few is not None and few.n_obs == 2
    assert np.array_equal(few.dense(torch.tensor([1, 0], device=CUDA)).cpu().numpy(), reader.read(np.array([250, 7])))


def test_only_a_gpu_with_room_keeps_the_cells(monkeypatch, tmp_path):
    reader = CellReader(counts())
    assert on_device(reader, CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * reader.counts.nnz, 2**40))
    assert on_device(reader, CUDA, share=0.5) is None                              # more than half of what is free
    import anndata as ad

    ad.AnnData(counts(), obs={"k": ["a"] * 300}).write_h5ad(tmp_path / "cells.h5ad")
    on_disk = SCLD(tmp_path / "cells.h5ad", "k", device="cpu")._reader
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    assert on_device(on_disk, CUDA) is None                                        # they are on disk for a reason


# ------------------------------------------------------------------ likelihood of every entry

@pytest.mark.parametrize("head", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-cell", "trend"])
@pytest.mark.parametrize("outliers", [True, False])
def test_the_likelihood_of_every_entry_is_that_of_the_counted_ones(head, dispersion, outliers):
    """Values and gradients: counted entries in single precision, every entry in double."""
    torch.manual_seed(0)
    decoder = CountMap(30, 4, head=head, dispersion=dispersion, outliers=outliers)
    x, z = torch.from_numpy(counts(20, 30).toarray()), torch.randn(20, 4)
    found = []
    for dense, kind in ((False, torch.float32), (True, torch.float64)):
        decoder.zero_grad()
        decoder.to(kind)
        nll = count_nll(x.to(kind), decoder(z.to(kind), x.to(kind).sum(1, keepdim=True).log()), dense=dense)
        nll.sum().backward()
        found.append((nll.detach().double(), [p.grad.double() for p in decoder.parameters() if p.grad is not None]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_likelihood_of_every_entry_keeps_its_digits_in_float32():
    """Where r is large and the mean is small, log(r / (r + mu)) must not be a difference of logarithms."""
    x = torch.zeros(2, 20_000)
    x[:, ::50] = 3.0
    exact = CountParameters(torch.full_like(x, -6.0).double(), torch.full_like(x, 8.0).double(), torch.full_like(x, -9.0).double())
    single = CountParameters(*(None if p is None else p.float() for p in exact))
    gap = count_nll(x, single, dense=True).double() - count_nll(x.double(), exact, dense=True)
    assert gap.abs().max() < 1e-3 * 400                                            # per counted entry, as lgamma of 3,000 allows


# ------------------------------------------------------------------ recorded steps

def noisy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Dropout(0.3), nn.Linear(32, 6))


def fitted(device: torch.device, *, halves: bool, steps: int = 40, **options):
    """A small fit whose loss takes the step, or inputs that were prepared from it."""
    model = noisy().to(device)

    def inputs_of(step: int) -> list[torch.Tensor]:
        return [torch.randn(16, 6) + step % 3]

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x).square().mean()

    given = {"inputs_of": inputs_of} if halves else {}
    loss = loss_of if halves else lambda step: loss_of(inputs_of(step)[0].to(device))
    result = fit(model, loss, steps=steps, seed=3, stage="toy", device=device, show=False, precision="fp32", ema=0.9, lr_schedule="cosine", **given, **options)
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]), result


def test_on_a_cpu_two_halves_are_the_whole():
    assert all(torch.equal(a, b) for a, b in zip(fitted(CPU, halves=True)[:1], fitted(CPU, halves=False)[:1]))


def test_a_function_off_the_gpu_is_just_called():
    step = Recorded(lambda x, y: x.sum() + y, CPU)
    assert [float(step(torch.full((2,), float(i)), torch.tensor(1.0))) for i in range(6)] == [1, 3, 5, 7, 9, 11]
    assert step.calls == 6 and not step.recorded


def test_recording_can_be_switched_off(monkeypatch):
    assert Recorded(torch.sum, CUDA).usual == 3
    monkeypatch.setenv("SCLD_CUDA_GRAPHS", "0")
    assert Recorded(torch.sum, CUDA).usual is None


def test_a_recording_that_fails_is_told_with_the_mend(monkeypatch):
    class Fails:
        def __init__(self, graph, stream, capture_error_mode): ...
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")
        def __exit__(self, *_): ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", pretend_gpu.Stream)
    monkeypatch.setattr(torch.cuda, "device", pretend_gpu.current_device)
    monkeypatch.setattr(torch.cuda, "graph", Fails)
    with pytest.raises(RuntimeError, match="SCLD_CUDA_GRAPHS=0"):
        Recorded(torch.sum, CUDA)._record([])


def test_tensors_stay_where_they_are():
    assert all(t.device == CPU for t in send([torch.ones(2), torch.zeros(1)], CPU))


def test_draws_of_algorithm_1():
    torch.manual_seed(0)
    to_global, t, eps = diffusion_draws(5000, 3, 50, p_uncond=0.2)
    assert abs(float(to_global.float().mean()) - 0.2) < 0.02 and (t.min(), t.max()) == (1, 50) and abs(float(eps.std()) - 1) < 0.02
    assert diffusion_draws(10, 3, 50, p_uncond=0.3, drop="first_k")[0].tolist() == [True] * 3 + [False] * 7
    assert linear_schedule(10).to("cpu").alpha_bar.equal(linear_schedule(10).alpha_bar)


@needs_gpu
def test_replays_are_calls_with_new_inputs_and_seeds():
    """Dropout included: a replay draws with the seed that is set when it is asked for."""
    model = noisy().to(CUDA)
    plain, recorded = Recorded(lambda x: model(x).sum().detach(), CUDA, usual=None), Recorded(lambda x: model(x).sum().detach(), CUDA)
    found = {}
    for name, function in (("plain", plain), ("recorded", recorded)):
        found[name] = []
        for i in range(10):
            torch.manual_seed(100 + i // 2)
            found[name].append(float(function(torch.full((4, 6), float(i)))))
    assert recorded.recorded and not plain.recorded
    assert found["plain"] == pytest.approx(found["recorded"], rel=1e-5) and len(set(found["plain"])) == 10


@needs_gpu
def test_a_recorded_fit_is_the_plain_one():
    whole, halves = fitted(CUDA, halves=False, steps=250), fitted(CUDA, halves=True, steps=250)
    assert torch.allclose(whole[0], halves[0], atol=1e-5) and whole[1].losses == pytest.approx(halves[1].losses, rel=1e-4)


@pytest.mark.gpu(pretend_gpu.SECOND)
@pytest.mark.filterwarnings("error")
def test_a_recorded_fit_on_the_second_gpu():
    """Which is not the current device; a recording of the wrong one would be empty, or fail. Nobody else's GPU is touched."""
    here, there = fitted(CPU, halves=True), fitted(torch.device("cuda:1"), halves=True)
    assert IS_REAL or (torch.allclose(here[0], there[0], atol=1e-5) and torch.cuda.current_device() == 0)


@needs_gpu
def test_a_recorded_fit_resumes(tmp_path):
    """As if it had never stopped: weights, moments, the average and the rate of learning are where a recording reads them."""
    def interrupted(*args):
        if len(asked) == 25:
            raise KeyboardInterrupt
        asked.append(0)
        return rate(*args)

    straight, _ = fitted(CUDA, halves=True, steps=60)
    asked, rate = [], training._learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_learning_rate", interrupted)
        assert fitted(CUDA, halves=True, steps=60, checkpoint=tmp_path / "c")[1].interrupted
    resumed, result = fitted(CUDA, halves=True, steps=60, checkpoint=tmp_path / "c", resume=True)
    assert result.step == 60 and torch.allclose(resumed, straight, atol=1e-5)


@needs_gpu
def test_the_gpu_learns_what_the_cpu_learns():
    """Without dropout every draw is the CPU's, so that the weights agree as far as single precision and 30 steps let them."""
    reader, found = CellReader(counts(400), target_sum=None, transform="none"), {}
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        pair = CountAutoencoder(40, 5, n_cells=400, hidden=32, width=16, input_dropout=0.0).to(device)
        train_autoencoder(pair, reader, steps=30, batch_size=64, seed=1, device=device, show=False, precision="fp32", ema=None)
        found[device.type] = torch.cat([p.detach().flatten().cpu() for p in pair.parameters()])
    assert (found["cpu"] - found["cuda"]).abs().max() < 2e-3 and (found["cpu"] - found["cuda"]).abs().mean() < 1e-4


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"head": "mse", "widths": (64, 32)}, {"precision": "bf16"}, {"precision": "fp32"}, {"drop": "first_k", "min_snr": 5.0}])
def test_a_model_on_the_gpu(options, tmp_path):
    """Losses fall, the saved model draws the same latents' cells on the CPU in kind, and a second run is alike."""
    train, _ = data.default_split(data.load("pbmc68k_reduced"))
    steps, runs = (300, 2) if IS_REAL else (200, 1 if options else 2)      # a pretended GPU takes its time
    models = [SCLD(train, "louvain", device="cuda", **options).train(steps, ae_steps=steps, sampling_steps=20, progress=False) for _ in range(runs)]
    for stage in ("autoencoder", "denoiser"):
        losses = [m.history[stage]["losses"] for m in models]
        assert losses[0][-1] < losses[0][0] and losses[0] == pytest.approx(losses[-1], rel=2e-2)
    cells = models[0].sample(200, sampling_steps=20, progress=False)
    there = SCLD.load(models[0].save(tmp_path / "model"), device="cpu").sample(200, sampling_steps=20, progress=False)
    assert cells.X.dtype == there.X.dtype and cells.n_obs == 200
    assert np.corrcoef(np.asarray(cells.X.mean(0)).ravel(), np.asarray(there.X.mean(0)).ravel())[0, 1] > 0.97


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu), pytest.param("mps", marks=needs_apple)])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("head", ["zinb", "mse"])
def test_all_that_a_model_can_do(head, where, device, tmp_path, tiny):
    """Cells from memory or from disk; every sampler, a label, guidance, the Scorer; and what came out lies on the CPU."""
    cells = planted_cells()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = SCLD(cells if where == "memory" else tmp_path / "cells.h5ad", "cell_type", device=device, **(tiny | {"head": head}))
    model.train(30, ae_steps=30, progress=False)
    for sampler in SAMPLERS:
        drawn = model.sample(25, sampler=sampler, sampling_steps=5, progress=False)
        assert drawn.n_obs == 25 and np.isfinite(drawn.X.data).all(), sampler
    assert set(model.sample(20, label="NK", omega=1.0, keep=0.8, progress=False).obs["cell_type"]) == {"NK"}
    assert model.get_latent_representation(cells).shape[0] == model.reconstruct(cells).n_obs == cells.n_obs
    again = SCLD.load(model.save(tmp_path / "model"), device=device)
    for options in ({}, {"keep": 0.8}, {"label": "B", "omega": 2.0}):
        assert (model.sample(30, progress=False, **options).X != again.sample(30, progress=False, **options).X).nnz == 0


@needs_apple
@pytest.mark.parametrize("options", [{"head": "nb"}, {"head": "poisson"}, {"dispersion": "gene"}, {"min_snr": 5.0}, {"prediction": "eps"}])
def test_settings_on_an_apple(options):
    """Single precision alone, and no draws of counts there; nobody gets it without asking."""
    model = SCLD(planted_cells(), "cell_type", device="mps", **options).train(8, ae_steps=8, progress=False)
    assert model.sample(20, progress=False).n_obs == 20 and training.resolve_device("auto").type != "mps"


@pytest.mark.parametrize(("device", "queues"), [pytest.param("cuda", 1, marks=needs_gpu), pytest.param("mps", 0, marks=needs_apple)])
def test_an_apple_draws_in_one_thread(device, queues, monkeypatch, tiny):
    """Two threads of Python on its GPU end the process; elsewhere decoding overlaps with sampling."""
    from scld_nb import model as module

    model, seen = SCLD(planted_cells(), "cell_type", device=device, **tiny).train(4, ae_steps=4, scorer=False, progress=False), []
    monkeypatch.setattr(module, "bounded_queue", lambda steps, stop, real=module.bounded_queue: seen.append(1) or real(steps, stop=stop))
    assert model.sample(7, keep=1.0, progress=False).n_obs == 7 and len(seen) == queues


@pytest.mark.skipif(IS_REAL, reason="a recording that runs out of memory, pretended")
@needs_gpu
def test_a_full_memory_is_not_taken_for_a_driver_that_cannot_record():
    def work(x):
        if pretend_gpu.recording:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x + 1

    recorded = Recorded(work, CUDA, usual=1)
    recorded(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        recorded(torch.ones(2))


@pytest.mark.skipif(IS_REAL, reason="counted on a pretended GPU")
@needs_gpu
@pytest.mark.parametrize("head", ["zinb", "mse"])
def test_a_step_does_not_wait(head, tiny, monkeypatch):
    """In 200 more steps of a stage, nobody waits but for the two times that the losses are read."""
    def counting(*args, **kwargs):
        before = len(pretend_gpu.waits)
        result = fit(*args, **kwargs)
        found.append(len(pretend_gpu.waits) - before)
        return result

    found = []
    monkeypatch.setattr(training, "fit", counting)
    for steps in (100, 300):
        SCLD(planted_cells(), "cell_type", device="cuda", **(tiny | {"head": head})).train(steps, ae_steps=steps, progress=False)
    assert len(found) == 4 and found[2] - found[0] == found[3] - found[1] == 2 and min(found) >= 1, found


@pytest.mark.skipif(IS_REAL, reason="counted on a pretended GPU")
@needs_gpu
def test_a_step_asks_for_few_things(monkeypatch):
    """Each operation costs a few µs on a GPU, whatever its size (benchmarks/README.md has the sums); views cost nothing."""
    def graph(made, **options):
        graphs.append(made)
        return record(made, **options)

    graphs, record = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", graph)
    SCLD(planted_cells(), "cell_type", device="cuda").train(4, ae_steps=4, progress=False)
    assert [g.operations for g in graphs] == [pytest.approx(311, abs=30), pytest.approx(291, abs=30)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu), pytest.param("mps", marks=needs_apple)])
@pytest.mark.parametrize("name", ["scgan", "cscgan", "activa", "scigans"])
def test_competitors_on_the_gpu(name, device):
    baseline = make_baseline(name, steps=10, device=device, progress=False)
    assert baseline.fit(planted_cells(), "cell_type").sample(20).n_obs == 20 and baseline.device.type == device


@needs_gpu
def test_tables_and_figure_on_the_gpu(tmp_path):
    """What `papermill nbs/reproduce.ipynb` calls: models of every fusion, competitors, their Scorers; results say where they come from."""
    study = ex.Study(seeds=(0,), root=tmp_path, device="cuda", T=12, widths=(16, 8), hidden=16, latent=16, e_width=16, steps=5, n_trees=4, budget=2,
                     sampling_steps=3, progress=False)
    lines = ex.table3(study, methods=["positive", "scgan", "scgan+scorer", "reconstruction", "scld_both", "scld_counts_post"])
    assert lines["value"].notna().all() and lines["method"].nunique() == 6
    assert set(ex.table4(study)["method"]) >= {"add", "cat"} and len(ex.table5(study, methods=["scld_both"])) > 0
    record = json.loads((study.results / "table3" / "scld_both-seed0.json").read_text())
    assert record["provenance"]["device"] == torch.cuda.get_device_name(0) and record["provenance"]["peak_gpu_memory_gib"] is not None


@needs_gpu
def test_the_gpu_benchmark(tmp_path, capsys):
    few = ["--cells", "200", "--genes", "60", "--turns", "1", "--steps", "4", "--warm-steps", "5", "--cells-drawn", "40", "--denoiser-steps", "6", "--ae-steps", "6"]
    assert benchmark_script("speed").main(["--parts", "training", "whole", *few, "--draw", "90", "--device", "cuda", "--root", str(tmp_path)]) == 0
    assert "90 cells drawn" in capsys.readouterr().out and (tmp_path / "results/speed/training-whole-cuda.json").exists()


# ------------------------------------------------------------------ the pretended GPU refuses what a real one refuses

@needs_gpu
@pytest.mark.parametrize("mistake, message", [
    (lambda x: x + torch.ones(3), "same device"),
    (lambda x: nn.Linear(3, 2)(x), "same device"),
    (lambda x: torch.ones(3)[x.long()], "cpu"),
    (lambda x: x.numpy(), "numpy"),
    (lambda x: np.asarray(x), "numpy"),
    (lambda x: x.pin_memory(), "pin"),
    (lambda x: torch.rand(3, device="cuda", generator=torch.Generator()), "generator"),
])
def test_mistakes_are_found(mistake, message):
    with pytest.raises((RuntimeError, TypeError), match=message):
        mistake(torch.ones(3).to("cuda"))


@pytest.mark.skipif(IS_REAL, reason="recordings that fail can leave a real one in disorder")
@needs_gpu
@pytest.mark.parametrize("look", [lambda x: float(x.sum()), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(), lambda x: x.add_(torch.ones(3).to("cuda"))])
def test_looking_while_recording_is_found(look):
    with pytest.raises(RuntimeError, match="SCLD_CUDA_GRAPHS=0"):
        Recorded(lambda x: (look(x), x.sum())[1], CUDA, usual=0)(torch.ones(3))


@needs_gpu
def test_what_python_decides_is_frozen_in_a_recording():
    """So a test of recorded steps would notice a step that is not wholly on the device; recording itself computes nothing."""
    weight, rate, calls = torch.zeros(3, device="cuda"), [1.0], []

    def work(x):
        calls.append(0)
        weight.add_(x * rate[0])
        return weight.sum() + torch.zeros(3, device="cuda").add_(1.0).sum()

    step = Recorded(work, CUDA, usual=1)
    assert [float(step(torch.full((3,), 2.0))) for _ in range(3)] == [9.0, 15.0, 21.0] and len(calls) == 2
    rate[0] = 0.0
    assert float(step(torch.full((3,), 1.0))) == 24.0 and weight.tolist() == [7.0] * 3

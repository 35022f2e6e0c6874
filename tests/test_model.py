"""The object a user holds: settings, training, sampling, latents, files."""

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import scld_nb
from scld_nb import config as config_module
from scld_nb import model as model_module
from scld_nb.data import InputError, file_sha256
from scld_nb.model import (
    FORMAT,
    MSE,
    PAPER,
    SCLD,
    Config,
    make_config,
    proportional,
    read_labels,
)
from scld_nb.sampling import SAMPLERS
from scld_nb.scorer import n_to_generate
from scld_nb.training import TrainingError


def equal(a: ad.AnnData, b: ad.AnnData) -> bool:
    """Whether two sets of cells agree to the bit, with their labels and scores."""
    return a.shape == b.shape and (a.X != b.X).nnz == 0 and a.obs.equals(b.obs)


# ---- the package


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light_and_names_come_when_asked_for():
    code = """
import sys, scld_nb as scld
heavy = [m for m in ("torch", "scanpy", "anndata", "numpy", "typer") if m in sys.modules]
assert not heavy, heavy
assert {"SCLD", "evaluate", "data", "model"} <= set(dir(scld))
assert scld.SCLD.__module__ == "scld_nb.model" and scld.evaluate is sys.modules["scld_nb.evaluation"].evaluate
assert scld.data is sys.modules["scld_nb.data"] and callable(scld.data.load)
print(scld.__version__)
"""
    assert fresh(code) == scld_nb.__version__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scld_nb.nothing
    assert not hasattr(scld_nb, "_nothing")
    assert all(hasattr(scld_nb, name) for name in scld_nb.__all__)


def test_version_is_a_literal():
    assert f'\n__version__ = "{scld_nb.__version__}"\n' in Path(scld_nb.__file__).read_text()


# ---- settings


def test_presets():
    default, paper = make_config(head="mse"), make_config("paper")
    assert (default.transform, default.fusion, default.T, default.keep, default.ema) == (
        "log1p",
        "add",
        1000,
        0.8,
        0.999,
    )
    assert {k for k in default.__dict__ if getattr(default, k) != getattr(paper, k)} == set(PAPER) - set(MSE)
    assert make_config("paper", transform="log1p").transform == "log1p"
    assert make_config(widths=[8, 4]).widths == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "multiply"}, "unknown fusion 'multiply'; known: add, cat, attn, add_input"),
        ({"head": "normal"}, "unknown head 'normal'; known: zinb, nb, poisson, mse"),
        ({"dispersion": "cell"}, "unknown dispersion 'cell'; known: gene-cell, gene, trend"),
        ({"prediction": "x"}, "unknown prediction 'x'; known: eps, v, z0"),
        ({"out_act": "softplus"}, "out_act='softplus' belongs to head='mse'"),
        ({"fusion": "attn"}, "latent + 1 (for the library size) and e_width in multiples of 8, got 31 and 256"),
        ({"pre_guidance": "yes"}, "unknown pre_guidance 'yes'; known: True, False"),
        ({"transform": "sqrt"}, "unknown transform"),
        ({"widht": 3}, "unknown setting 'widht'; known: transform, head"),
        ({"T": 0}, "T must be a positive integer, got 0"),
        ({"latent": 1.5}, "latent must be a positive integer"),
        ({"batch_size": True}, "batch_size must be a positive integer"),
        ({"widths": ()}, "widths must be positive integers"),
        ({"widths": (8, 0)}, "widths must be positive integers"),
        ({"keep": 0}, "keep must lie in"),
        ({"keep": None}, "keep must lie in"),
        ({"lr": "fast"}, "lr must lie in"),
        ({"p_uncond": float("nan")}, "p_uncond must lie in"),
        ({"clip": 0}, "clip must lie in"),
        ({"ema": 1.5}, "ema must lie in"),
        ({"beta_1": 0.5, "beta_T": 0.1}, "beta_1 must not exceed beta_T"),
        ({"head": "mse", "fusion": "attn", "latent": 12}, "multiples of 8, got 12 and 256"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(InputError) as error:
        make_config(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_preset():
    with pytest.raises(InputError, match="unknown preset 'fast'; known: default, paper"):
        make_config("fast")


# ---- construction


def test_labels_keep_names_and_order(cells):
    odd = cells.copy()
    odd.obs["number"] = odd.obs["cell_type"].map({"B": 10, "NK": 9, "T": 2}).astype(int)
    odd.obs["cat"] = pd.Categorical(odd.obs["cell_type"], categories=["T", "unused", "NK", "B"])
    assert read_labels(odd, "number")[0] == ["2", "9", "10"]
    names, codes = read_labels(odd, "cat")
    assert names == ["T", "NK", "B"] and np.array_equal(np.array(names)[codes], odd.obs["cell_type"])
    assert read_labels(odd, None) == (["all"], pytest.approx(np.zeros(300)))


def test_construction_errors(cells, tiny):
    def bad(change=lambda a: None, key="cell_type", **options):
        adata = cells.copy()
        change(adata)
        with pytest.raises(InputError) as error:
            SCLD(adata, key, device="cpu", **tiny | options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert bad(key="celltype") == "no column 'celltype' in obs; it has: cell_type"
    assert "2 cells without a label" in bad(
        lambda a: a.obs.__setitem__("cell_type", a.obs["cell_type"].where(np.arange(300) > 1))
    )
    assert "several labels that read '1'" in bad(
        lambda a: a.obs.__setitem__("cell_type", pd.Categorical([1, "1"] * 150))
    )
    assert "looks log-transformed" in bad(lambda a: setattr(a, "X", a.X.log1p()))
    assert "no layer 'raw'" in bad(layer="raw")
    assert "seed must be a whole number of at least 0, got -1" in bad(seed=-1)
    assert "unknown setting" in bad(nonsense=1)
    assert "line break" in bad(lambda a: setattr(a, "var_names", ["a\nb", *a.var_names[1:]]))
    adata = cells.copy()
    adata.obs = adata.obs[[]]
    with pytest.raises(InputError, match="it has: none"):
        SCLD(adata, "cell_type", **tiny)
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        SCLD(cells, "cell_type", device="tpu", **tiny)


def test_a_schedule_that_does_not_end_in_noise_is_named(cells, tiny):
    with pytest.warns(
        UserWarning,
        match=r"T=20 with beta_T=0.02 leaves 90% of the signal at the last step.* use beta_T=0.6, or T=1000",
    ):
        SCLD(cells, "cell_type", device="cpu", **tiny | {"beta_T": 0.02})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCLD(cells, "cell_type", device="cpu", **tiny | {"T": 1000, "beta_T": 0.02})


def test_same_seed_same_first_weights_and_no_global_generator(cells, tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (SCLD(cells, "cell_type", device="cpu", seed=s, **tiny) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.denoiser.unet.time[0].weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert (
        a.fingerprint
        == b.fingerprint
        == c.fingerprint
        != SCLD(cells[1:], "cell_type", device="cpu", **tiny).fingerprint
    )


def test_counts_in_a_layer_and_input_unchanged(cells, tiny):
    scaled = ad.AnnData(cells.X.log1p(), obs=cells.obs.copy(), var=cells.var.copy(), layers={"umi": cells.X.copy()})
    before = scaled.X.copy()
    model = SCLD(scaled, "cell_type", layer="umi", device="cpu", **tiny)
    assert model.fingerprint == SCLD(cells, "cell_type", device="cpu", **tiny).fingerprint
    assert (scaled.X != before).nnz == 0 and list(scaled.obs) == ["cell_type"]
    assert sp.issparse(model._reader.counts)


# ---- training


def test_stages_are_noted(tiny_model):
    history = tiny_model.history
    assert list(history) == ["autoencoder", "denoiser", "scorer"]
    for stage in ("autoencoder", "denoiser"):
        assert history[stage]["steps"] == 300 and not history[stage]["interrupted"]
        assert len(history[stage]["losses"]) == 3 and history[stage]["losses"][2] < history[stage]["losses"][0]
    assert history["scorer"]["n_real"] == 300
    assert "3 labels from 'cell_type', cpu; autoencoder: 300 steps" in repr(tiny_model)


def test_latents_are_standardised(tiny_model, cells):
    z = tiny_model.get_latent_representation()
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-4)
    np.testing.assert_array_equal(z, tiny_model.get_latent_representation(cells))
    some = tiny_model.get_latent_representation(cells[5:9])
    np.testing.assert_allclose(some, z[5:9], atol=1e-5)


def test_standardize_none_leaves_the_scale(cells, tiny, tiny_model):
    model = SCLD(cells, "cell_type", device="cpu", standardize="none", **tiny)
    model.train(5, autoencoder=tiny_model, scorer=False, progress=False)
    stats = tiny_model.autoencoder
    raw = tiny_model.get_latent_representation() * stats.latent_std.numpy() + stats.latent_mean.numpy()
    np.testing.assert_allclose(model.get_latent_representation(), raw, atol=1e-4)
    assert (model.autoencoder.latent_std == 1).all()


def test_genes_are_matched_by_name(tiny_model, cells):
    mixed = cells[:20, np.random.default_rng(0).permutation(60)].copy()
    extra = ad.concat(
        [mixed, ad.AnnData(sp.csr_matrix(np.ones((20, 1))), obs=mixed.obs, var=pd.DataFrame(index=["more"]))], axis=1
    )
    np.testing.assert_allclose(
        tiny_model.get_latent_representation(extra), tiny_model.get_latent_representation(cells[:20]), atol=1e-5
    )
    with pytest.raises(InputError, match="2 of the model's 60 genes are missing in adata, e.g. gene0, gene1"):
        tiny_model.get_latent_representation(cells[:, 2:])
    twice = cells[:5].copy()
    twice.var_names = ["gene1", *twice.var_names[1:]]
    with pytest.raises(InputError, match="var_names_make_unique"):
        tiny_model.get_latent_representation(twice)


def test_reconstruct(tiny_model, cells):
    out = tiny_model.reconstruct(cells)
    assert out.shape == cells.shape and out.uns["scld"]["scale"] == "log1p20k" and out.X.min() >= 0
    real = tiny_model._reader.read(slice(None))
    assert ((out.X.toarray() - real) ** 2).mean() < ((real.mean(0) - real) ** 2).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"ae_steps": 0},
        {"checkpoint_every": 0},
        {"max_steps": "many"},
        {"max_steps": float("inf")},
        {"max_steps": True},
        {"sampling_steps": 0},
    ],
)
def test_step_numbers(cells, tiny, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be a whole number of at least 1"):
        SCLD(cells, "cell_type", device="cpu", **tiny).train(**options, progress=False)


def test_sampling_steps_are_checked_before_training(cells, tiny):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    with pytest.raises(InputError, match="sampling_steps must lie in 1..20, got 21"):
        model.train(5, sampling_steps=21, progress=False)
    assert model.history == {}


@pytest.mark.parametrize(("transform", "most"), [("log1p", np.log1p(20_000)), ("none", 20_000)])
def test_no_gene_exceeds_the_library(cells, tiny, transform, most):
    model = SCLD(cells, "cell_type", device="cpu", transform=transform, **tiny).train(2, scorer=False, progress=False)
    with torch.no_grad():
        model.autoencoder.map.linear2.bias += 1e6
    assert model.sample(5, keep=1, progress=False).X.max() == pytest.approx(most)
    assert model.reconstruct(cells[:5]).X.max() == pytest.approx(most)


def test_autoencoder_is_shared_exactly(cells, tiny, tiny_model):
    other = SCLD(cells, "cell_type", device="cpu", fusion="cat", seed=3, **tiny)
    other.train(3, autoencoder=tiny_model, scorer=False, progress=False)
    for a, b in zip(other.autoencoder.state_dict().values(), tiny_model.autoencoder.state_dict().values()):
        assert torch.equal(a, b)
    assert other.history["autoencoder"]["shared"] and "shared" not in tiny_model.history["autoencoder"]


def test_autoencoder_that_does_not_fit(cells, tiny, tiny_model):
    def share(adata=cells, other=tiny_model, **options):
        with pytest.raises(InputError) as error:
            SCLD(adata, "cell_type", device="cpu", **tiny | options).train(3, autoencoder=other, progress=False)
        return str(error.value)

    assert "other genes or another transform" in share(cells[:, :50].copy())
    assert "other genes or another transform" in share(transform="none")
    assert "has hidden=32, this model 64" in share(hidden=64)
    assert "is not trained" in share(other=SCLD(cells, "cell_type", device="cpu", **tiny))


def test_ctrl_c_keeps_what_is_trained(cells, tiny, monkeypatch, tmp_path):
    """The first Ctrl-C ends the autoencoder's stage, the second the denoiser's; what follows is trained as ever."""
    from scld_nb import training

    seen = []

    def interrupting(original, at):
        def loss(*args, **kwargs):
            seen.append(1)
            if len(seen) in at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return loss

    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    monkeypatch.setattr(model.autoencoder, "loss", interrupting(model.autoencoder.loss, {4}))
    monkeypatch.setattr(training, "diffusion_loss", interrupting(training.diffusion_loss, {11}))
    with pytest.warns(UserWarning, match="was interrupted at step") as notes:
        model.train(50, progress=False)
    assert [str(n.message).split(";")[0] for n in notes] == [
        "autoencoder was interrupted at step 3",
        "denoiser was interrupted at step 6",
    ]
    assert model.history["denoiser"] | {"seconds": 0} == {
        "steps": 6,
        "loss": None,
        "losses": [],
        "seconds": 0,
        "interrupted": True,
    }
    assert [str(n.message).split("; ")[2] for n in notes] == ["next: 50 steps of the denoiser (Ctrl-C again ends that too)", "next: the Scorer (Ctrl-C again ends that too)"]
    assert model.sample(5, progress=False).n_obs == 5 and "epochs" in model.history["scorer"]      # sampling works as if nothing had been
    model.history.pop("scorer")
    with pytest.raises(InputError, match="trained without a Scorer; pass keep=1"):
        model.sample(5)
    assert model.sample(5, keep=1, progress=False).n_obs == 5
    assert SCLD.load(model.save(tmp_path / "m"), device="cpu").history["denoiser"]["interrupted"]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_ctrl_c_can_end_the_training(cells, tiny, monkeypatch, tmp_path, stage):
    from scld_nb import running, training

    original = training.batch_rows

    def interrupted(n, size, step, *, seed, stage: str):
        if (stage, step) == (wanted, 5):
            raise KeyboardInterrupt
        return original(n, size, step, seed=seed, stage=stage)

    wanted = stage
    for module in (running, training):                             # where each stage looks it up
        monkeypatch.setattr(module, "batch_rows", interrupted)
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    with pytest.raises(KeyboardInterrupt, match=f"{stage} was interrupted at step 5"):
        model.train(20, checkpoint_dir=tmp_path, keep_partial=False, progress=False)
    assert stage not in model.history and (tmp_path / f"{stage}.safetensors").exists()


def test_resume_equals_an_uninterrupted_run(cells, tiny, tmp_path, monkeypatch):
    """Broken off in either stage, behind a checkpoint and some steps more; tests of the command line use SIGKILL."""
    from scld_nb import running, training

    def broken_off(stage, at):
        original = training.batch_rows

        def rows(n, size, step, *, seed, stage: str):
            if (stage, step) == (target, at):
                raise ConnectionError
            return original(n, size, step, seed=seed, stage=stage)

        target = stage
        for module in (running, training):
            monkeypatch.setattr(module, "batch_rows", rows)
        with pytest.raises(ConnectionError):
            SCLD(cells, "cell_type", device="cpu", **tiny).train(
                30, ae_steps=40, checkpoint_dir=tmp_path, checkpoint_every=10, resume=True, progress=False
            )
        monkeypatch.undo()

    whole = SCLD(cells, "cell_type", device="cpu", **tiny).train(30, ae_steps=40, progress=False)
    broken_off("autoencoder", 17)
    broken_off("denoiser", 3)
    broken_off("denoiser", 28)
    resumed = SCLD(cells, "cell_type", device="cpu", **tiny)
    resumed.train(30, ae_steps=40, checkpoint_dir=tmp_path, resume=True, progress=False)
    for name in ("autoencoder", "denoiser", "scorer"):
        for key, value in getattr(whole, name).state_dict().items():
            assert torch.equal(value, getattr(resumed, name).state_dict()[key]), (name, key)
    assert whole.history["denoiser"]["losses"] == resumed.history["denoiser"]["losses"]
    assert whole.history["scorer"] == resumed.history["scorer"]


def test_a_denoiser_is_not_continued_on_another_autoencoder(cells, tiny, tmp_path):
    options = {"checkpoint_dir": tmp_path, "scorer": False, "progress": False}
    SCLD(cells, "cell_type", device="cpu", **tiny).train(6, ae_steps=5, **options)
    with pytest.raises(InputError, match="belongs to an autoencoder of 5 steps, this run asks for 9; give ae_steps=5"):
        SCLD(cells, "cell_type", device="cpu", **tiny).train(9, resume=True, **options)
    longer = SCLD(cells, "cell_type", device="cpu", **tiny).train(9, ae_steps=5, resume=True, **options)
    whole = SCLD(cells, "cell_type", device="cpu", **tiny).train(9, ae_steps=5, scorer=False, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(longer.denoiser.parameters(), whole.denoiser.parameters()))
    (tmp_path / "autoencoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="autoencoder.safetensors"):
        SCLD(cells, "cell_type", device="cpu", **tiny).train(9, ae_steps=5, resume=True, **options)


def test_a_denoiser_is_not_continued_on_the_autoencoder_of_another_model(cells, tiny, tmp_path):
    donors = [SCLD(cells, "cell_type", seed=s, **tiny).train(5, scorer=False, progress=False) for s in (1, 2)]
    options = {"checkpoint_dir": tmp_path, "scorer": False, "progress": False}
    SCLD(cells, "cell_type", **tiny).train(20, autoencoder=donors[0], **options)
    again = SCLD(cells, "cell_type", **tiny).train(20, autoencoder=donors[0], resume=True, **options)
    assert again.history["denoiser"]["steps"] == 20
    for other in ({"autoencoder": donors[1]}, {"ae_steps": 5}):
        with pytest.raises(InputError, match=r"denoiser\.safetensors was made with autoencoder="):
            SCLD(cells, "cell_type", **tiny).train(20, resume=True, **options | other)


@pytest.mark.parametrize("head", ["zinb", "mse"])
def test_a_training_goes_on_where_sums_are_rounded_otherwise(cells, tiny, tmp_path, monkeypatch, head):
    """Latents and mended means have other last bits on another GPU; that is no other autoencoder."""
    from scld_nb import model as module

    options = {"ae_steps": 5, "checkpoint_dir": tmp_path, "scorer": False, "progress": False}
    SCLD(cells, "cell_type", **(tiny | {"head": head})).train(6, **options)
    what = "fit_count_statistics" if head == "zinb" else "fit_latent_statistics"

    real = getattr(module, what)

    def rounded(autoencoder, *args, **kwargs):
        found = real(autoencoder, *args, **kwargs)
        with torch.no_grad():
            (autoencoder.map.mean.bias if head == "zinb" else autoencoder.latent_mean).mul_(1 + 1e-6)
        return found

    monkeypatch.setattr(module, what, rounded)
    assert SCLD(cells, "cell_type", **(tiny | {"head": head})).train(9, resume=True, **options).history["denoiser"]["steps"] == 9


def test_a_second_training_that_ends_early_leaves_no_stage_of_the_first(cells, tiny, tmp_path, monkeypatch):
    model = SCLD(cells, "cell_type", **tiny).train(20, progress=False)
    model.train(10, scorer=False, progress=False)
    assert set(model.history) == {"autoencoder", "denoiser"} and model.sample(5, keep=1, progress=False).obs["score"].isna().all()
    monkeypatch.setattr("scld_nb.training.save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for stage, left in (("autoencoder", set()), ("denoiser", {"autoencoder"})):
        folder = tmp_path / stage
        given = {"autoencoder": model} if stage == "denoiser" else {}
        second = SCLD(cells, "cell_type", **tiny).train(10, progress=False) if stage == "autoencoder" else SCLD(cells, "cell_type", **tiny)
        state = torch.get_rng_state()
        with pytest.raises(OSError, match="No space left"):
            second.train(10, checkpoint_dir=folder, progress=False, **given)
        assert set(second.history) == left and torch.equal(torch.get_rng_state(), state)
        assert not any(part.training for part in (second.autoencoder, second.denoiser))
        with pytest.raises(InputError, match="not trained"):
            second.sample(3)


def test_what_is_done_to_the_cells_afterwards_changes_nothing(cells, tiny):
    mine = cells.copy()
    model = SCLD(mine, "cell_type", **tiny)
    before = model._reader.counts.toarray()
    mine.X.data[:] = np.log1p(mine.X.data)
    mine.X.eliminate_zeros()
    assert (model._reader.counts.toarray() == before).all()


def test_two_that_save_into_one_folder_do_not_pass_for_one(cells, tiny, tiny_model, tmp_path, monkeypatch):
    """The other one saves all of its model before this one's last file: checksums are of what was meant, not of what is there."""
    other = SCLD(cells, "cell_type", device="cpu", seed=77, **tiny)
    other.train(2, ae_steps=2, progress=False)
    original, calls = config_module._replace, []

    def replace(path, put):
        original(path, put)
        calls.append(path.name)
        if len(calls) == 3:
            other.save(tmp_path)

    monkeypatch.setattr(config_module, "_replace", replace)
    tiny_model.save(tmp_path)
    assert calls[-1] == "config.json" and len(calls) == 8
    with pytest.raises(InputError, match="weights.safetensors does not match"):
        SCLD.load(tmp_path, device="cpu")


def test_more_chunks_than_can_be_dealt_out_are_refused(tiny_model):
    for n in (10**9, {"B": 10**9, "T": 1}):
        with pytest.raises(InputError, match="chunks make fewer than 1,000,000,000 cells"):
            next(tiny_model.sample_chunks(n, sampling_steps=2, progress=False))
    most = tiny_model.sample_chunks(10**9 - 1, chunk_size=5, sampling_steps=2, progress=False)
    assert next(most).n_obs == 5


def test_files_of_somebody_else_are_not_replaced(tiny_model, tmp_path):
    (tmp_path / "genes.txt").write_text("my list")
    with pytest.raises(InputError, match="holds genes.txt but no model"):
        tiny_model.save(tmp_path)
    assert (tmp_path / "genes.txt").read_text() == "my list"
    for call in (lambda p: tiny_model.save(p), lambda p: tiny_model.sample_to(p.parent, 5)):
        with pytest.raises(InputError, match="is a f"):
            call(tmp_path / "genes.txt")


def test_latents_that_are_no_numbers_are_told(tiny_model, cells, tiny):
    with pytest.raises(InputError, match="leaves 0e.00 of the signal|leaves .*e-.* of the signal"):
        SCLD(cells, "cell_type", **tiny | {"T": 1000, "beta_T": 0.5})
    damaged = copy.deepcopy(tiny_model)
    with torch.no_grad():
        next(damaged.denoiser.unet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="no finite numbers"):
        damaged.sample(3, progress=False)


def test_a_checkpoint_of_another_run_is_refused(cells, tiny, tmp_path):
    SCLD(cells, "cell_type", device="cpu", **tiny).train(5, checkpoint_dir=tmp_path, scorer=False, progress=False)
    for other in ({"seed": 1}, {"dropout": 0.2}):
        with pytest.raises(InputError, match="was made with"):
            SCLD(cells, "cell_type", device="cpu", **tiny | other).train(
                5, checkpoint_dir=tmp_path, resume=True, progress=False
            )


# ---- sampling


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.lists(st.integers(1, 10_000), min_size=1, max_size=12))
def test_proportions_by_largest_remainder(n, counts):
    m, exact = proportional(n, counts), n * np.array(counts) / sum(counts)
    assert m.sum() == n and (np.abs(m - exact) < 1 + 1e-9).all() and (m >= 0).all()


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), keep=st.floats(0.3, 1.0), by_label=st.booleans(), omega=st.sampled_from([-1.0, 0.0, 0.7]))
def test_exactly_n_cells(tiny_model, n, keep, by_label, omega):
    got = tiny_model.sample(
        n, "NK" if by_label else None, omega=omega, keep=keep, sampler="ddim", sampling_steps=2, progress=False
    )
    assert got.n_obs == n


def test_labels_in_training_proportions(tiny_model):
    got = tiny_model.sample(50, progress=False)
    assert got.obs["cell_type"].value_counts().to_dict() == {"B": 30, "NK": 15, "T": 5}
    assert (
        list(got.obs["cell_type"].cat.categories) == ["B", "NK", "T"]
        and (got.obs["condition"] == got.obs["cell_type"]).all()
    )
    assert got.uns["scld"]["generated"] == sum(n_to_generate(m, 0.8) for m in (30, 15, 5))
    assert not (np.diff(got.obs["cell_type"].cat.codes) >= 0).all()  # mixed, not sorted
    assert got.obs["score"].between(0, 1).all()


def test_labels_that_are_not_drawn_are_no_categories(tiny_model, tmp_path):
    """scanpy.tl.rank_genes_groups and others go through all categories and fail at empty ones."""
    two = tiny_model.sample({"T": 12, "B": 12}, keep=1, progress=False)
    assert list(two.obs["cell_type"].cat.categories) == ["B", "T"]
    tiny_model.sample_to(tmp_path / "two.h5ad", {"T": 12, "B": 12}, keep=1, chunk_size=10, progress=False)
    for cells in (two, ad.read_h5ad(tmp_path / "two.h5ad")):
        assert list(cells.obs["cell_type"].cat.categories) == ["B", "T"]
        sc.pp.normalize_total(cells)
        sc.pp.log1p(cells)
        sc.tl.rank_genes_groups(cells, "cell_type")
        assert set(cells.uns["rank_genes_groups"]["names"].dtype.names) == {"B", "T"}
    for name, options in (("holistic", {"omega": -1}), ("one", {"label": "T"})):
        tiny_model.sample_to(tmp_path / f"{name}.h5ad", 5, keep=1, progress=False, **options)
        there = ad.read_h5ad(tmp_path / f"{name}.h5ad").obs["cell_type"]
        assert there.isna().all() if name == "holistic" else list(there.cat.categories) == ["T"]
    assert tiny_model.sample(5, "T", omega=-1, keep=1, progress=False).uns["scld"]["label"] == ""      # labels are ignored there


def test_missing_labels_as_text_are_named(cells, tiny, tiny_model):
    odd = cells.copy()
    odd.obs["cell_type"] = odd.obs["cell_type"].astype(str).replace({"T": "nan"})
    with pytest.warns(UserWarning, match="'nan' is learned as a label like any other"):
        SCLD(odd, "cell_type", device="cpu", **tiny).train(2, autoencoder=tiny_model, scorer=False, progress=False)


def test_what_is_no_count_of_a_gene_is_said_at_once(cells, tiny):
    odd = cells.copy()
    odd.var["feature_types"] = ["Antibody Capture"] + ["Gene Expression"] * (cells.n_vars - 1)
    with pytest.warns(UserWarning, match="1 of 'Antibody Capture'"):
        SCLD(odd, "cell_type", device="cpu", **tiny)
    odd.uns["scld_data"] = {}                                  # `load` said it already
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCLD(odd, "cell_type", device="cpu", **tiny)


def test_a_label_is_drawn_and_resembles_its_type(tiny_model):
    means = tiny_model.denoiser.embed.means.numpy()[:-1]
    for k, label in enumerate(tiny_model.labels):
        got = tiny_model.sample(40, label, keep=1, progress=False)
        assert (got.obs["cell_type"] == label).all()
        nearest = ((got.X.toarray()[:, None] - means) ** 2).sum(2).argmin(1)
        assert (nearest == k).mean() > 0.6, label  # chance: a third


def test_numbers_as_labels(cells, tiny, tiny_model):
    adata = cells.copy()
    adata.obs["id"] = adata.obs["cell_type"].cat.codes.astype(int)
    model = SCLD(adata, "id", device="cpu", **tiny).train(3, autoencoder=tiny_model, scorer=False, progress=False)
    assert (model.sample(4, 2, keep=1, progress=False).obs["id"] == "2").all()


def test_holistic_cells_have_no_label(tiny_model):
    got = tiny_model.sample(20, omega=-1, progress=False)
    assert (
        got.obs["cell_type"].isna().all()
        and (got.obs["condition"] == "global").all()
        and (got.obs["omega"] == -1).all()
    )
    labelled = tiny_model.sample(20, "T", omega=-1, progress=False)
    assert (got.X != labelled.X).nnz == 0  # the label has no effect


def test_same_seed_same_cells(tiny_model):
    a, b, c = (tiny_model.sample(30, seed=s, progress=False) for s in (0, 0, 1))
    assert equal(a, b) and not equal(a, c)


@pytest.mark.parametrize(
    "options", [{}, {"omega": 1.5, "batch_size": 7}, {"label": "B", "sampler": "dpm++", "sampling_steps": 5}]
)
def test_stream_changes_nothing(tiny_model, options):
    assert equal(
        tiny_model.sample(30, progress=False, **options), tiny_model.sample(30, progress=False, stream=False, **options)
    )


def test_cells_decoded_in_parts_are_those_decoded_at_once(tiny_model, cells, monkeypatch):
    whole, back = tiny_model.sample(30, keep=1, progress=False), tiny_model.reconstruct(cells)
    monkeypatch.setattr(model_module, "rows_at_once", lambda n_genes, device, *, most: 7)
    for a, b in ((whole, tiny_model.sample(30, keep=1, progress=False)), (back, tiny_model.reconstruct(cells))):
        assert a.shape == b.shape and list(a.obs) == list(b.obs)
        if "score" in a.obs:
            np.testing.assert_allclose(a.obs["score"], b.obs["score"], atol=1e-5)
        np.testing.assert_allclose(a.X.toarray(), b.X.toarray(), atol=1e-4)


def test_samplers_and_steps(tiny_model):
    drawn = {
        s: tiny_model.sample(20, sampler=s, sampling_steps=5, keep=1, progress=False) for s in SAMPLERS
    }
    assert drawn["ddim"].uns["scld"]["steps"] == 5 and drawn["ddim"].uns["scld"]["sampler"] == "ddim"
    assert all(np.isfinite(d.X.data).all() for d in drawn.values())
    assert not equal(drawn["ddpm"], drawn["ddim"]) and not equal(drawn["ddim"], drawn["dpm++"])


def test_keep_one_delivers_everything_made(tiny_model):
    got = tiny_model.sample(30, keep=1, progress=False)
    assert got.uns["scld"]["generated"] == 30 == got.n_obs


def test_the_scorer_keeps_the_best_of_each_label(tiny_model):
    kept = tiny_model.sample(40, progress=False)
    made = n_to_generate(24, 0.8), n_to_generate(12, 0.8), n_to_generate(4, 0.8)
    model = SCLD.__new__(SCLD)
    model.__dict__ |= tiny_model.__dict__
    k = np.random.default_rng(model_module.counter_seed(0, "order")).permutation(np.repeat([0, 1, 2], made))
    _, scores = model._generate(k, 0.0, seed=0)
    for label, code in zip("B NK T".split(), range(3)):
        best = np.sort(scores[k == code])[::-1]
        np.testing.assert_array_equal(
            np.sort(kept.obs["score"][kept.obs["cell_type"] == label])[::-1], best[: (24, 12, 4)[code]]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 2.5}, "n must be a whole number"),
        ({"n": "all"}, "n must be a whole number of at least 1, got 'all'"),
        ({"label": "Z"}, "unknown label 'Z'; known: B, NK, T"),
        ({"omega": -1.01}, "omega must lie in [-1, 3]"),
        ({"omega": 3.01}, "omega must lie in [-1, 3]"),
        ({"omega": float("nan")}, "omega must lie in [-1, 3]"),
        ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddpm, ddim, dpm++, sde-dpm++"),
        ({"sampling_steps": 0}, "sampling_steps must be a whole number of at least 1, got 0"),
        ({"sampling_steps": 21}, "sampling_steps must lie in 1..20, got 21"),
        ({"keep": 0}, "keep must lie in (0, 1], got 0"),
        ({"keep": 1.2}, "keep must lie in (0, 1]"),
        ({"keep": float("nan")}, "keep must lie in (0, 1]"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(tiny_model, monkeypatch, options, message):
    monkeypatch.setattr(SCLD, "_generate", lambda *a, **k: pytest.fail("sampling began"))
    with pytest.raises(InputError) as error:
        tiny_model.sample(**{"n": 5} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_untrained_models(cells, tiny, tmp_path):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    assert "untrained" in repr(model)
    with pytest.raises(InputError, match="not trained; call train"):
        model.sample(1)
    with pytest.raises(InputError, match="nothing to save"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("key", ["condition", "omega", "score"])
def test_label_columns_with_the_names_of_ours(cells, tiny, tiny_model, key):
    adata = cells.copy()
    adata.obs[key] = adata.obs["cell_type"]
    model = SCLD(adata, key, device="cpu", **tiny).train(3, autoencoder=tiny_model, scorer=False, progress=False)
    got = model.sample(10, "NK", keep=1, progress=False)
    assert (got.obs[key] == "NK").all() and list(got.obs[key].cat.categories) == ["NK"]


def test_without_labels(cells, tiny, tiny_model):
    with pytest.warns(UserWarning, match="all cells have one label") as warned:
        model = SCLD(cells, device="cpu", **tiny).train(3, autoencoder=tiny_model, scorer=False, progress=False)
    assert warned[0].filename == __file__                    # it points at who called train
    got = model.sample(6, keep=1, progress=False)
    assert model.labels == ["all"] and (got.obs["label"] == "all").all() and got.uns["scld"]["labels_key"] == "label"


def test_without_pre_guidance(cells, tiny, tiny_model):
    model = SCLD(cells, "cell_type", device="cpu", pre_guidance=False, **tiny).train(
        20, autoencoder=tiny_model, progress=False
    )
    got = model.sample(10, progress=False)
    assert got.obs["cell_type"].isna().all() and got.n_obs == 10
    assert equal(got, model.sample(10, progress=False)) and model.history["scorer"]["n_fake"] == 300


@pytest.mark.parametrize("fusion", ["cat", "attn", "add_input"])
def test_other_fusions_train_and_sample(cells, tiny, tiny_model, fusion):
    model = SCLD(cells, "cell_type", device="cpu", fusion=fusion, **tiny).train(
        3, autoencoder=tiny_model, scorer=False, progress=False
    )
    assert model.sample(4, "T", omega=1, keep=1, progress=False).n_obs == 4


def test_preset_paper(cells, tiny, tmp_path):
    options = {k: v for k, v in tiny.items() if k != "ema"}
    model = SCLD(cells, "cell_type", preset="paper", device="cpu", **options).train(30, progress=False)
    assert model.config.ema is None and model.config.scope == "all"
    got = model.sample(40, progress=False)
    assert got.n_obs == 40 and got.uns["scld"]["generated"] == 50 and got.uns["scld"]["scale"] == "counts20k"
    assert got.X.min() >= 0 and got.X.max() > 100  # un-logged
    assert equal(SCLD.load(model.save(tmp_path / "p"), device="cpu").sample(40, progress=False), got)


def test_a_failure_in_scoring_ends_sampling(tiny_model, monkeypatch):
    """The consumer fails at the first batch; the producer does not go through the other 99."""
    steps = []
    monkeypatch.setattr(tiny_model.scorer, "score", lambda x: (_ for _ in ()).throw(ArithmeticError("scoring failed")))
    original = model_module.guided_sampler

    def counting(*args, **kwargs):
        eps_of = original(*args, **kwargs)
        return lambda z, t: (steps.append(1), eps_of(z, t))[1]

    monkeypatch.setattr(model_module, "guided_sampler", counting)
    with pytest.raises(ArithmeticError, match="scoring failed"):
        tiny_model.sample(200, batch_size=2, keep=1, progress=False)
    assert 20 <= len(steps) < 100 * 20
    assert not [t for t in threading.enumerate() if t.name == "scld-sampling"]


def test_a_failure_in_sampling_surfaces(tiny_model, monkeypatch):
    monkeypatch.setattr(
        model_module, "sample_latents", lambda *a, **k: (_ for _ in ()).throw(MemoryError("device is full"))
    )
    with pytest.raises(MemoryError, match="device is full"):
        tiny_model.sample(5, progress=False)
    assert not [t for t in threading.enumerate() if t.name == "scld-sampling"]


def test_bars_are_shown_on_request(tiny_model, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    tiny_model.sample(5, progress=True)
    assert "sampling" in capsys.readouterr().err
    tiny_model.sample(5, progress=False)
    assert capsys.readouterr().err == ""


# ---- files


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    return tiny_model.save(tmp_path / "model")


def test_a_loaded_model_draws_the_same_cells(tiny_model, saved, cells):
    loaded = SCLD.load(saved, device="cpu")
    assert sorted(f.name for f in saved.iterdir()) == ["config.json", "genes.txt", "labels.json", "weights.safetensors"]
    for options in ({}, {"label": "T", "omega": 2.0}, {"omega": -1}):
        assert equal(loaded.sample(25, progress=False, **options), tiny_model.sample(25, progress=False, **options))
    np.testing.assert_array_equal(loaded.get_latent_representation(cells), tiny_model.get_latent_representation(cells))
    for name in ("config", "labels", "labels_key", "label_counts", "genes", "seed", "history", "fingerprint"):
        assert getattr(loaded, name) == getattr(tiny_model, name)
    assert equal(
        SCLD.load(loaded.save(saved.parent / "again"), device="cpu").sample(9, progress=False),
        tiny_model.sample(9, progress=False),
    )


def test_a_loaded_model_has_no_cells(saved):
    loaded = SCLD.load(saved, device="cpu")
    for call in (lambda: loaded.train(5), loaded.get_latent_representation, loaded.reconstruct):
        with pytest.raises(InputError, match="a loaded model holds no training cells"):
            call()


def test_names_survive(cells, tiny, tiny_model, tmp_path):
    odd = cells.copy()
    odd.var_names = ["β-actin", "a b", 'x"y', "ж\u2028n", *odd.var_names[4:]]
    odd.obs["Zelltyp"] = odd.obs["cell_type"].cat.rename_categories({"B": "B – naïv", "NK": "N/K", "T": "Ť"})
    model = SCLD(odd, "Zelltyp", device="cpu", **tiny).train(3, scorer=False, progress=False)
    loaded = SCLD.load(model.save(tmp_path / "m"), device="cpu")
    assert loaded.genes == model.genes == list(odd.var_names) and loaded.labels == ["B – naïv", "N/K", "Ť"]


def test_cells_can_be_written_and_read(tiny_model, tmp_path):
    for options in ({}, {"omega": -1}):
        got = tiny_model.sample(8, progress=False, **options)
        got.write_h5ad(tmp_path / "x.h5ad")
        assert equal(ad.read_h5ad(tmp_path / "x.h5ad"), got)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        SCLD.load(folder, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def reseal(folder: Path, **changes) -> None:
    """Write config.json anew, with the checksums of the files as they are now."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config["sha256"] = {name: file_sha256(folder / name) for name in config["sha256"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_no_model(tmp_path, saved):
    assert "config.json is missing; give the folder that 'scld train -o'" in refused(tmp_path / "nowhere")
    assert "config.json is missing" in refused(saved / "genes.txt")


@pytest.mark.parametrize("name", ["weights.safetensors", "genes.txt", "labels.json"])
def test_missing_and_damaged_files(saved, name):
    content = bytearray((saved / name).read_bytes())
    (saved / name).unlink()
    assert f"incomplete: {name} is missing" in refused(saved)
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    assert f"damaged or half-written: {name} does not match" in refused(saved)


def test_damaged_description(saved):
    config = json.loads((saved / "config.json").read_text())
    for text, what in (
        ("{", "is damaged"),
        ("\xff", "is damaged"),
        ("[]", "is not a model description"),
        ("{}", "is not a model description"),
        (json.dumps(config | {"sha256": None}), "is not a model description"),
        (json.dumps(config | {"sha256": {}}), "does not match"),
        (json.dumps({k: v for k, v in config.items() if k != "seed"}), "do not fit together"),
        (json.dumps(config | {"config": config["config"] | {"new": 1}}), "do not fit together"),
        (json.dumps(config | {"config": config["config"] | {"latent": 8}}), "do not fit together"),
        (json.dumps(config | {"config": config["config"] | {"head": "normal"}}), "unknown head 'normal'"),
        (
            json.dumps(config | {"format": FORMAT + 1}),
            f"has format {FORMAT + 1}, this version reads up to {FORMAT}; upgrade",
        ),
    ):
        (saved / "config.json").write_text(text, encoding="latin-1")
        assert what in refused(saved)


class Planted:
    """Unpickling this would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_the_folder_is_executed(saved, tmp_path, tiny_model):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Planted(marker))
    for name in ("model.pkl", "weights.pt", "pytorch_model.bin", "config.py", "__init__.py"):
        (saved / name).write_bytes(bomb)
    (saved / "config.py").write_text(f"open({str(marker)!r}, 'w')")
    assert equal(SCLD.load(saved, device="cpu").sample(5, progress=False), tiny_model.sample(5, progress=False))
    (saved / "weights.safetensors").write_bytes(bomb)
    assert "does not match" in refused(saved)
    reseal(saved)  # even where the checksum is right
    assert "do not fit together" in refused(saved)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the charge was live


def test_weights_of_another_model(saved):
    tensors = load_file(saved / "weights.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("scorer.")}, saved / "weights.safetensors")
    reseal(saved)
    assert "do not fit together" in refused(saved)


def test_an_interrupted_save_is_recognised(tiny_model, saved, cells, tiny, monkeypatch):
    """Overwriting a model is cut off behind the weights: old description, new weights."""
    other = SCLD(cells, "cell_type", device="cpu", seed=9, **tiny).train(
        3, autoencoder=tiny_model, scorer=False, progress=False
    )
    original = config_module._replace

    def cut_off(path, put):
        if path.name == "genes.txt":
            raise OSError(28, "No space left on device")
        original(path, put)

    monkeypatch.setattr(config_module, "_replace", cut_off)
    with pytest.raises(OSError, match="No space left"):
        other.save(saved)
    assert "half-written" in refused(saved)
    monkeypatch.undo()
    assert SCLD.load(other.save(saved), device="cpu").seed == 9


def test_no_temporary_files_remain(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        tiny_model.save(tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


def test_config_rebuilds(saved):
    config = json.loads((saved / "config.json").read_text())
    assert Config(**config["config"]) == SCLD.load(saved, device="cpu").config and config["format"] == FORMAT
    shutil.rmtree(saved)


def test_a_budget_in_seconds_gives_half_to_each_stage_and_resumes_as_finished(cells, tiny, tmp_path):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    model.train(10**6, budget_s=1.0, checkpoint_dir=tmp_path, scorer=False, progress=False)
    stages = model.history["autoencoder"], model.history["denoiser"]
    assert all(0 < s["steps"] < 10**6 and s["seconds"] >= 0.5 and s["budget_s"] == 0.5 and not s["interrupted"] for s in stages)
    again = SCLD(cells, "cell_type", device="cpu", **tiny)
    again.train(10**6, budget_s=1.0, checkpoint_dir=tmp_path, resume=True, scorer=False, progress=False)
    assert [again.history[s]["steps"] for s in ("autoencoder", "denoiser")] == [s["steps"] for s in stages]
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.state_dict().values(), again.denoiser.state_dict().values()))
    with pytest.raises(InputError, match="budget_s must be a positive number of seconds, got 0"):
        again.train(5, budget_s=0)


def test_whose_checkpoints_they_are(cells, tiny, tmp_path):
    def model(**changes):
        return SCLD(cells, "cell_type", device="cpu", **tiny | changes)

    steps = {"max_steps": 4, "ae_steps": 3}
    assert not model().has_checkpoints(tmp_path / "none", **steps)
    model().train(**steps, checkpoint_dir=tmp_path, scorer=False, progress=False)
    assert model().has_checkpoints(tmp_path, **steps) and not model().has_checkpoints(tmp_path)
    for other in ({"max_steps": 5, "ae_steps": 3}, {"max_steps": 4, "ae_steps": 4}, steps | {"budget_s": 1.0}):
        assert not model().has_checkpoints(tmp_path, **other)
    assert not model(seed=1).has_checkpoints(tmp_path, **steps) and not model(lr=1e-4).has_checkpoints(tmp_path, **steps)
    (tmp_path / "autoencoder.safetensors").unlink()
    assert model().has_checkpoints(tmp_path, **steps)          # as when Round and Map are another model's
    (tmp_path / "denoiser.safetensors").write_bytes(b"damaged")
    assert not model().has_checkpoints(tmp_path, **steps)


@pytest.mark.parametrize("wrong", [pd.DataFrame(np.ones((3, 2))), np.ones((3, 2)), None])
def test_what_is_no_cells_is_named(wrong, tiny):
    with pytest.raises(InputError, match=f"must be an AnnData or the path of an .h5ad file, got {type(wrong).__name__}"):
        SCLD(wrong, **tiny)


def test_numbers_that_json_does_not_know_are_refused_before_the_training():
    with pytest.raises(InputError, match=r"lr must lie in .* got np.float32"):
        make_config(lr=np.float32(1e-3))


def test_a_model_may_keep_its_own_autoencoder_and_a_refusal_leaves_it_trained(cells, tiny):
    model = SCLD(cells, "cell_type", **tiny).train(20, progress=False)
    before = [p.clone() for p in model.autoencoder.parameters()]
    model.train(10, autoencoder=model, scorer=False, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.autoencoder.parameters())) and set(model.history) == {"autoencoder", "denoiser"}
    with pytest.raises(InputError, match="is not trained"):
        model.train(10, autoencoder=SCLD(cells, "cell_type", **tiny), progress=False)
    assert set(model.history) == {"autoencoder", "denoiser"}


def test_a_second_training_from_disk_starts_where_the_first_did(cells, tiny, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = SCLD(tmp_path / "cells.h5ad", "cell_type", device="cpu", **tiny)
    draws = [model.train(10, ae_steps=8, progress=False).sample(30, progress=False) for _ in range(2)]
    assert (draws[0].X != draws[1].X).nnz == 0


def test_a_second_training_starts_where_the_first_did(cells, tiny):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    draws = [model.train(15, ae_steps=10, progress=False).sample(30, seed=1, progress=False) for _ in range(2)]
    assert (draws[0].X != draws[1].X).nnz == 0
    other = SCLD(cells, "cell_type", device="cpu", **tiny).train(15, progress=False, autoencoder=model)
    again = model.train(15, progress=False, autoencoder=model)
    assert all(torch.equal(a, b) for a, b in zip(other.denoiser.parameters(), again.denoiser.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(other.autoencoder.parameters(), again.autoencoder.parameters()))


def test_two_labels_share_no_noise_and_one_label_does_at_every_omega(tiny_model, monkeypatch):
    seen, original = [], SCLD._generate
    monkeypatch.setattr(SCLD, "_generate", lambda self, k, omega, **options: seen.append(options["seed"]) or original(self, k, omega, **options))
    for label, omega in (("T", 0.0), ("B", 0.0), ("T", 1.0), ("T", -1.0), (None, 0.0)):
        tiny_model.sample(3, label, omega=omega, seed=5, sampling_steps=2, progress=False)
    assert seen[0] == seen[2] and len(set(seen)) == 3 and seen[3] == seen[4] == 5


def test_numbers_per_label(tiny_model, cells, tiny, tmp_path):
    asked = {"B": 7, "T": 4, "NK": 0}
    made = tiny_model.sample(asked, seed=2, sampling_steps=3, progress=False)
    assert made.obs["cell_type"].value_counts().to_dict() == {"B": 7, "T": 4} and made.obs["cell_type"].iloc[:7].nunique() == 2      # shuffled
    series = tiny_model.sample(pd.Series(asked), seed=2, sampling_steps=3, progress=False)
    assert (made.X != series.X).nnz == 0
    parts = list(tiny_model.sample_chunks(asked, chunk_size=5, seed=2, sampling_steps=3, progress=False))
    assert [p.n_obs for p in parts] == [5, 5, 1]
    assert sum(p.obs["cell_type"].value_counts() for p in parts).to_dict() == asked
    assert tiny_model.sample_to(tmp_path / "x.h5ad", asked, chunk_size=5, seed=2, sampling_steps=3, progress=False)["chunks"] == 3
    for wrong, options, message in (({"Z": 3}, {}, "unknown label 'Z'; known: B"), ({"T": -1}, {}, "n of 'T' must be a whole number of at least 0"),
                                    ({"T": 0}, {}, "n must be a whole number of at least 1"), ({"T": 3}, {"label": "T"}, "need label=None"),
                                    ({"T": 3}, {"omega": -1}, "omega above -1"), (3, {"keep": "0.5"}, "keep must lie in")):
        with pytest.raises(InputError, match=message):
            tiny_model.sample(wrong, progress=False, **options)
    with pytest.raises(InputError, match="scope='label'"):
        SCLD(cells, "cell_type", device="cpu", **tiny, scope="all").train(2, ae_steps=2, progress=False).sample({"T": 3}, progress=False)
    with pytest.raises(InputError, match="must end in .h5ad"):
        tiny_model.sample_to(tmp_path / "x.csv", 3, progress=False)


def test_a_keep_that_is_no_share_is_refused_in_chunks_too(tiny_model):
    model = SCLD.__new__(SCLD)
    model.__dict__ |= tiny_model.__dict__ | {"config": dataclasses.replace(tiny_model.config, scope="all")}
    for keep in ("0.5", 0, float("nan")):
        for drawing in (tiny_model, model):
            with pytest.raises(InputError, match="keep must lie in"):
                next(drawing.sample_chunks(3, keep=keep, progress=False))


def test_reconstructions_keep_names_and_labels(tiny_model, cells):
    some = cells[5:40].copy()
    some.obs_names = [f"cell {i}" for i in range(35)]
    made = tiny_model.reconstruct(some)
    assert list(made.obs_names) == list(some.obs_names) and (made.obs["cell_type"] == some.obs["cell_type"]).all() and list(made.obs) == ["cell_type"]
    own = tiny_model.reconstruct()
    assert (own.obs["cell_type"].to_numpy() == cells.obs["cell_type"].to_numpy()).all()
    del some.obs["cell_type"]
    assert list(tiny_model.reconstruct(some).obs) == []


def test_a_measurement_is_no_label(cells, tiny):
    some = cells.copy()
    some.obs["score"], some.obs["id"] = np.linspace(0, 1, some.n_obs), np.arange(some.n_obs)
    for key, message in (("score", "holds fractions"), ("id", "has 300 labels for 300 cells"), (["score", "id"], "name of one column")):
        with pytest.raises(InputError, match=message):
            SCLD(some, key, device="cpu", **tiny)


# ---- what genes are called


@pytest.fixture(scope="module")
def annotated(cells):
    named = cells.copy()
    named.var["gene_ids"] = [f"ENSG{i:05d}" for i in range(cells.n_vars)]
    named.var["feature_name"] = pd.Categorical([None, *(f"symbol {i}" for i in range(1, cells.n_vars))])
    named.var["feature_types"] = "Gene Expression"
    named.var["highly_variable"], named.var["means"] = True, 1.0
    return named


def test_other_names_of_genes_go_with_draws_models_and_files(tiny, annotated, tmp_path):
    model = SCLD(annotated, labels_key="cell_type", device="cpu", **tiny).train(max_steps=2, scorer=False, progress=False)
    loaded = SCLD.load(model.save(tmp_path / "model"), device="cpu")
    model.sample_to(tmp_path / "drawn.h5ad", 5, chunk_size=2, keep=1, progress=False)
    for cells in (model.sample(5, keep=1, progress=False), loaded.sample(5, keep=1, progress=False), model.reconstruct(), ad.read_h5ad(tmp_path / "drawn.h5ad")):
        assert list(cells.var) == ["gene_ids", "feature_name", "feature_types"]
        assert (cells.var["gene_ids"] == annotated.var["gene_ids"]).all() and (cells.var["feature_types"] == "Gene Expression").all()
        assert cells.var["feature_name"].astype(object).fillna("-").tolist() == ["-", *annotated.var["feature_name"][1:]]
    cells = model.sample(5, keep=1, progress=False)
    cells.var["gene_ids"] = "changed"
    assert model.sample(5, keep=1, progress=False).var["gene_ids"].is_unique


def test_other_names_of_genes_change_neither_model_nor_cells(tiny, cells, annotated):
    plain, named = (SCLD(a, labels_key="cell_type", device="cpu", **tiny).train(max_steps=2, scorer=False, progress=False) for a in (cells, annotated))
    assert plain.fingerprint == named.fingerprint and plain.var.shape == (cells.n_vars, 0)
    assert (plain.sample(5, keep=1, progress=False).X != named.sample(5, keep=1, progress=False).X).nnz == 0


def test_names_of_an_older_model_do_not_stay_in_its_folder(tiny, cells, annotated, tmp_path):
    for named in (annotated, cells):
        SCLD(named, labels_key="cell_type", device="cpu", **tiny).train(max_steps=2, scorer=False, progress=False).save(tmp_path / "model")
        assert (tmp_path / "model" / "genes.json").exists() == (named is annotated)
        assert SCLD.load(tmp_path / "model", device="cpu").var.shape[1] == (3 if named is annotated else 0)


def test_damaged_names_of_genes_are_noticed(tiny, annotated, tmp_path):
    folder = SCLD(annotated, labels_key="cell_type", device="cpu", **tiny).train(max_steps=2, scorer=False, progress=False).save(tmp_path / "model")
    (folder / "genes.json").write_text("{}")
    with pytest.raises(InputError, match="genes.json does not match"):
        SCLD.load(folder)
    (folder / "genes.json").unlink()
    with pytest.raises(InputError, match="genes.json is missing"):
        SCLD.load(folder)


def test_draws_do_not_replace_the_cells_beside_a_model(tiny_model, saved, tmp_path):
    for name in ("train.h5ad", "TEST.h5ad"):
        with pytest.raises(InputError, match="is where scld train keeps cells of the model"):
            tiny_model.sample_to(saved / name, 3, progress=False)
    for path in (saved / "cells.h5ad", tmp_path / "train.h5ad"):           # another name, and a folder without a model
        tiny_model.sample_to(path, 3, progress=False)
        assert ad.read_h5ad(path).n_obs == 3


# ---- latents of one's own, and networks of one's own


def test_decode_is_the_way_back(cells, tiny, tiny_model):
    z = tiny_model.get_latent_representation(cells)
    back = tiny_model.decode(z)
    assert (back.X != tiny_model.reconstruct(cells).X).nnz == 0 and back.uns["scld"]["scale"] == "log1p20k"
    assert list(back.obs) == ["score"] and back.obs["score"].between(0, 1).all() and list(back.var_names) == tiny_model.genes
    counted = SCLD(cells, "cell_type", device="cpu", **tiny | {"head": "zinb"}).train(5, ae_steps=30, scorer=False, progress=False)
    z = counted.get_latent_representation(cells)
    first, again, other = (counted.decode(z, seed=seed) for seed in (0, 0, 1))
    assert (first.X != again.X).nnz == 0 < (first.X != other.X).nnz and first.X.dtype == np.int32 and first.obs["score"].isna().all()
    large = z.copy()
    large[:, -1] = 3.0                                                     # library sizes far above the usual
    assert counted.decode(large).X.sum() > 1.3 * first.X.sum()


@pytest.mark.parametrize("change, message", [
    (lambda z: z[:, :-1], "must be finite numbers of shape"), (lambda z: z[0], "must be finite numbers of shape"),
    (lambda z: np.where(z > 0, np.nan, z), "must be finite numbers"), (lambda z: z.astype(str), "must be finite numbers"),
    (lambda z: z[:0], "no latents were given")])
def test_latents_that_cannot_be_decoded(cells, tiny_model, change, message):
    with pytest.raises(InputError, match=message):
        tiny_model.decode(change(tiny_model.get_latent_representation(cells)))


def test_an_untrained_model_has_no_latents(cells, tiny):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    for call in (model.get_latent_representation, model.reconstruct, lambda: model.decode(np.zeros((1, 16)))):
        with pytest.raises(InputError, match="not trained yet"):
            call()


def test_what_load_could_not_rebuild_is_not_saved(cells, tiny, tmp_path):
    model = SCLD(cells, "cell_type", device="cpu", **tiny).train(2, scorer=False, progress=False)
    own = copy.deepcopy(model)
    own.denoiser.unet = torch.nn.Linear(3, 3)
    with pytest.raises(InputError, match="denoiser.unet.* is not what SCLD made of its settings"):
        own.save(tmp_path / "own")
    own = copy.deepcopy(model)
    own.schedule = model_module.linear_schedule(model.config.T, beta_1=1e-3, beta_T=0.5)
    with pytest.raises(InputError, match="noise schedule is not that of the settings"):
        own.save(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    SCLD.load(model.save(tmp_path / "model")).save(tmp_path / "again")


def test_resume_wants_a_folder_and_says_when_more_was_done(cells, tiny, tmp_path):
    model = SCLD(cells, "cell_type", device="cpu", **tiny)
    with pytest.raises(InputError, match="give their folder with checkpoint_dir="):
        model.train(4, resume=True)
    model.train(6, ae_steps=6, scorer=False, checkpoint_dir=tmp_path, progress=False)
    with pytest.warns(UserWarning, match="checkpoint of the denoiser has 6 steps already, more than the 4 asked for"):
        model.train(4, ae_steps=6, scorer=False, checkpoint_dir=tmp_path, resume=True, progress=False)
    assert model.history["denoiser"]["steps"] == 6

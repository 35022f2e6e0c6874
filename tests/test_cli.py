"""The command line: the whole path, every way to get it wrong, and trainings that are killed."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import planted_cells
from safetensors.torch import load_file

from scld_nb import checks, cli, data, evaluation, growing, running, training
from scld_nb import config as config_module
from scld_nb import files as scld_files
from scld_nb.cli import check_folder, drop_checkpoints, main, parse_setting, write_cells
from scld_nb.data import InputError
from scld_nb.files import HOST, alone_in
from scld_nb.large import load_on_disk
from scld_nb.model import SCLD

SETTINGS = (
    "--set T=20 --set beta_T=0.6 --set latent=16 --set hidden=32 --set widths=64,32 --set e_width=16 --set ema=0.95 "
    "--set lr=3e-3 --set batch_size=64"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with counts in cells.h5ad."""
    folder = tmp_path_factory.mktemp("cli")
    planted_cells(400, seed=2).write_h5ad(folder / "cells.h5ad")
    return folder


def call(line: str, *more: str) -> int:
    return main([*shlex.split(line), *more])


@pytest.fixture(scope="module")
def trained(files) -> Path:
    """A model trained through the command line, with its test and training cells."""
    folder = files / "model"
    assert call(f"train {files}/cells.h5ad -o {folder} --labels cell_type --steps 150 --device cpu {SETTINGS}") == 0
    return folder


@pytest.fixture
def refuse(capsys, tmp_path, monkeypatch):
    """Run a command that must end with status 2 and one line, and return that line."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, *more: str) -> str:
        capsys.readouterr()
        assert call(line, *more) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("scld: error: ") and err.endswith("\n") and err.count("\n") == 1, (out, err)
        assert "Traceback" not in err
        return err.removeprefix("scld: error: ").rstrip()

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def other_weights(a: Path, b: Path) -> dict[str, float | None]:
    """Names of the weights that are not equal to the last bit, and how far they are apart."""
    one, other = weights(a), weights(b)
    apart = {k: float((one[k].double() - other[k].double()).abs().max()) for k in one.keys() & other.keys() if not torch.equal(one[k], other[k])}
    return apart | dict.fromkeys(one.keys() ^ other.keys())


def same_weights(a: Path, b: Path) -> bool:
    return not other_weights(a, b)


# ---- the program


def test_help_needs_no_heavy_imports():
    code = """
import sys
from scld_nb.cli import main
status = main(["--help"])
assert status == 0, status
heavy = [m for m in ("torch", "scanpy", "anndata", "pandas") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(word in done.stdout for word in ("datasets", "train", "sample", "evaluate")) and done.stderr == ""


def test_console_script():
    (script,) = entry_points(group="console_scripts", name="scld")
    assert script.value == "scld_nb.cli:main" and script.load() is main


def test_version_and_help_of_commands(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"scld_nb {cli.__version__}\n"
    documented = {
        "datasets": "",
        "train": "DATA -o MODEL_DIR --labels --layer --head --steps --seed --device auto --resume --set",
        "sample": "MODEL_DIR -n -o OUT.h5ad --label --omega --sampler dpm++ --sampling-steps --keep 0.8 --seed",
        "evaluate": "REAL.h5ad SYNTH.h5ad --train --labels -o REPORT_DIR",
    }
    for command, words in documented.items():
        assert call(f"{command} --help") == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words.split()), command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Missing command; see 'scld --help'"),
        ("trian", "No such command 'trian'"),
        ("train", "see 'scld train --help'"),
        ("train pbmc68k_reduced", "see 'scld train --help'"),
        ("train pbmc68k_reduced -o m --stepz 3", "No such option: --stepz"),
        ("train pbmc68k_reduced -o m --steps many", "see 'scld train --help'"),
        ("train pbmc68k_reduced -o m --steps 0", "'--steps'"),
        ("train pbmc68k_reduced -o m --seed -1", "'--seed'"),
        ("sample m -o x.h5ad", "'-n'"),
        ("sample m -n 0 -o x.h5ad", "'-n'"),
        ("sample m -n 1000000000 -o x.h5ad", "'-n'"),
        ("sample m -n 5 -o x.h5ad --omega high", "'--omega'"),
        ("sample m -n 5 -o x.h5ad extra", "extra"),
        ("evaluate a.h5ad", "see 'scld evaluate --help'"),
    ],
)
def test_usage_errors(refuse, line, message):
    assert message in refuse(line)


# ---- datasets


def test_datasets(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SCLD_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("SCLD_DATASETS", raising=False)
    assert call("datasets") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:4]}
    assert list(rows) == ["pbmc68k_reduced", "pbmc68k", "brain_small"]
    assert all(v in rows["pbmc68k"] for v in ("68,579", "17,789", " 10 ", "cf.10xgenomics.com")) and rows[
        "pbmc68k"
    ].endswith(" no")
    assert "installed with scanpy" in rows["pbmc68k_reduced"] and rows["pbmc68k_reduced"].endswith("yes")
    (tmp_path / "1M_neurons_neuron20k.h5").write_bytes(b"0" * 2**20)
    (tmp_path / "sets.json").write_text(
        json.dumps({"mine": {"filename": "mine.h5", "url": "https://example.org/mine.h5"}})
    )
    monkeypatch.setenv("SCLD_DATASETS", str(tmp_path / "sets.json"))
    assert call("datasets") == 0
    out = capsys.readouterr().out
    assert "yes, 1 MiB" in out and "mine" in out and "example.org (stand-in)" in out


# ---- settings


def test_settings_as_words():
    assert parse_setting("lr=2e-4") == ("lr", 2e-4)
    assert parse_setting(" widths = 8,4 ") == ("widths", (8, 4))
    assert parse_setting("clip=None") == ("clip", None) and parse_setting("clip=2") == ("clip", 2.0)
    assert parse_setting("standardize=none") == ("standardize", "none")
    assert parse_setting("pre_guidance=False") == ("pre_guidance", False)
    values = {"int": "3", "float": "0.25", "str": "word", "bool": "true", "tuple": "3"}
    for field in config_module.fields(config_module.Config):  # every field can be said in words
        kind = str(getattr(field.type, "__name__", field.type)).split("[")[0].split(" ")[0]
        name, value = parse_setting(f"{field.name}={values[kind]}")
        assert name == field.name and value is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "give NAME=VALUE"),
        ("=3", "unknown setting ''"),
        ("rate=3", "unknown setting 'rate'; known: transform"),
        ("lr=fast", "lr must be a number"),
        ("T=2.5", "T must be a whole number"),
        ("lr=none", "lr must be a number"),
        ("ema=some", "ema must be a number or none"),
        ("widths=a,b", "whole numbers with commas"),
        ("pre_guidance=2", "true or false"),
    ],
)
def test_settings_that_are_not_understood(text, message):
    with pytest.raises(InputError) as error:
        parse_setting(text)
    assert message in str(error.value)


# ---- the whole path


def test_train_leaves_a_model_and_both_parts_of_the_split(trained, files):
    assert sorted(f.name for f in trained.iterdir()) == [
        "config.json",
        "genes.txt",
        "labels.json",
        "test.h5ad",
        "train.h5ad",
        "weights.safetensors",
    ]
    parts = {name: ad.read_h5ad(trained / f"{name}.h5ad") for name in ("train", "test")}
    train, test = data.default_split(data.load(files / "cells.h5ad", labels="cell_type"))
    for name, expected in (("train", train), ("test", test)):
        assert list(parts[name].obs_names) == list(expected.obs_names)
        assert (parts[name].X != expected.layers["counts"]).nnz == 0 and list(parts[name].obs) == ["cell_type"]
    model = SCLD.load(trained, device="cpu")
    assert model.fingerprint == SCLD(train, "cell_type", **dict(model.config.__dict__.items())).fingerprint
    assert sum(model.label_counts) == train.n_obs and {"autoencoder", "denoiser", "scorer"} == set(model.history)


def test_sample_then_evaluate(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(f"sample {trained} -n 70 -o new/folder/synth.h5ad --omega 0.5 --seed 3 --device cpu") == 0
    assert "wrote 70 cells x 60 genes to new/folder/synth.h5ad" in capsys.readouterr().out
    synth = ad.read_h5ad("new/folder/synth.h5ad")
    direct = SCLD.load(trained, device="cpu").sample(70, omega=0.5, seed=3, progress=False)
    assert (synth.X != direct.X).nnz == 0 and synth.obs.equals(direct.obs)
    options = f"--train {trained}/train.h5ad --labels cell_type -o report --n-trees 10 --n-judge 40"
    assert call(f"evaluate {trained}/test.h5ad new/folder/synth.h5ad {options}") == 0
    out = capsys.readouterr().out
    assert "n_real = n_fake = 70" in out and "rf_auc" in out and "mmd_biased" in out and "purity" in out
    assert "wrote report.html, report.json, report.csv, auc.png, tsne.png in report" in out
    assert "classifiers, MMD and exact transport see 40 cells a side" in out
    assert all(word in out for word in ("strict_boosting", "combined", "coverage", "wasserstein1", "ilisi", "tstr", "memorisation"))
    assert Path("report/report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    report = json.loads(Path("report/report.json").read_text())
    table = pd.read_csv("report/report.csv")
    auc = [r for r in report["records"] if (r["metric"], r["space"], r["cluster"]) == ("rf_auc", "log1p", "all")]
    assert len(auc) == 1 and auc[0]["control"] is not None and len(table) == len(report["records"])
    assert all((Path("report") / f).read_bytes()[:4] == b"\x89PNG" for f in ("auc.png", "tsne.png"))
    assert not [f for f in Path("new/folder").iterdir() if f.name != "synth.h5ad"]


def test_evaluate_without_folder_prints_only(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(f"evaluate {trained}/test.h5ad {trained}/train.h5ad --n-trees 5 --quick") == 0
    out, err = capsys.readouterr()
    assert "rf_auc" in out and "strict" not in out and "as no training cells were given" in out and "wrote" not in out and err == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluate_leaves_files_on_disk(trained, capsys, monkeypatch):
    line = f"evaluate {trained}/test.h5ad {trained}/train.h5ad --train {trained}/train.h5ad --n-trees 5 --quick"
    assert call(f"{line} --n-max 50") == 0 and "n_real = n_fake = 50" in (drawn := capsys.readouterr().out)
    monkeypatch.setattr(data, "_read_h5ad", lambda path: pytest.fail(f"{path} was read whole"))
    assert call(f"{line} --n-max 50 --backed") == 0 and "50 of 320 cells of synth were read" in (read := capsys.readouterr().out)
    areas = [[row for row in out.splitlines() if "rf_auc " in row and "counts20k" in row] for out in (drawn, read)]
    assert len(areas[0]) == 1 and [a[0].split()[4] for a in areas][0] == areas[1][0].split()[4]


def test_options_of_sample(trained, tmp_path):
    out = tmp_path / "x.h5ad"
    assert (
        call(f"sample {trained} -n 12 -o {out} --label NK --sampler ddim --sampling-steps 4 --keep 1 --batch-size 5")
        == 0
    )
    cells = ad.read_h5ad(out)
    assert (
        (cells.obs["cell_type"] == "NK").all()
        and cells.uns["scld"]["steps"] == 4
        and cells.uns["scld"]["generated"] == 12
    )
    assert call(f"sample {trained} -n 7 -o {out} --omega -1") == 0  # replaces the file
    cells = ad.read_h5ad(out)
    assert cells.n_obs == 7 and cells.obs["cell_type"].isna().all() and cells.uns["scld"]["keep"] == 0.8


def test_embedded_set_without_split(tmp_path, capsys):
    line = f"train pbmc68k_reduced -o {tmp_path}/m --no-split --steps 2 --ae-steps 3 --preset paper --fusion cat"
    assert call(f"{line} {SETTINGS}") == 0
    out, err = capsys.readouterr()
    assert "training on 700 cells" in out and "test cells" not in out and "evaluate" not in out and err == ""
    model = SCLD.load(tmp_path / "m", device="cpu")
    assert (model.config.transform, model.config.fusion, model.labels_key) == ("none", "cat", "louvain")
    assert (model.history["autoencoder"]["steps"], model.history["denoiser"]["steps"]) == (3, 2)
    assert not (tmp_path / "m/test.h5ad").exists()


def test_counts_in_a_layer(files, tmp_path):
    cells = ad.read_h5ad(files / "cells.h5ad")
    cells.layers["umi"] = cells.X.copy()
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "logged.h5ad")
    assert (
        call(f"train {tmp_path}/logged.h5ad -o {tmp_path}/m --labels cell_type --layer umi --steps 2 {SETTINGS}") == 0
    )


# ---- wrong input: training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train pbmc86k -o m", "unknown dataset 'pbmc86k'; known: pbmc68k_reduced, pbmc68k, brain_small"),
        ("train nowhere.h5ad -o m", "no such file: nowhere.h5ad"),
        ("train broken.h5ad -o m", "cannot read broken.h5ad as .h5ad"),
        ("train {cells} -o m --labels celltype", "no column 'celltype' in obs; columns there: cell_type"),
        ("train {cells} -o m --layer raw", "no layer 'raw'"),
        ("train pbmc68k_reduced -o m --layer raw", "is for .h5ad files"),
        ("train logged.h5ad -o m --labels cell_type", "looks log-transformed, not counts"),
        ("train {cells} -o m --head normal", "unknown head 'normal'; known: zinb, nb, poisson, mse"),
        ("train {cells} -o m --fusion multiply", "unknown fusion 'multiply'; known: add, cat, attn, add_input"),
        ("train {cells} -o m --preset fast", "unknown preset 'fast'; known: default, paper"),
        ("train {cells} -o m --device tpu", "unknown device 'tpu'"),
        ("train {cells} -o m --set rate=3", "unknown setting 'rate'; known:"),
        ("train {cells} -o m --set lr=fast", "lr must be a number"),
        ("train {cells} -o m --set keep=0", "keep must lie in"),
        ("train {cells} -o m --resume --overwrite", "exclude each other"),
        ("train {cells} -o broken.h5ad", "broken.h5ad is a file; give a folder"),
        ("train {cells} -o broken.h5ad/m", "cannot write to folder broken.h5ad/m"),
        ("train {few} -o m --labels cell_type", "no label has enough cells"),
    ],
)
def test_training_errors(refuse, files, line, message):
    Path("broken.h5ad").write_bytes(b"not hdf5")
    cells = ad.read_h5ad(files / "cells.h5ad")
    if "{few}" in line:
        some = cells[
            [int(np.flatnonzero(cells.obs["cell_type"] == t)[i]) for t in ("B", "NK", "T") for i in range(4)]
        ].copy()
        some.write_h5ad("few.h5ad")
    if "logged" in line:
        cells.X = cells.X.log1p()
        cells.write_h5ad("logged.h5ad")
    assert message in refuse(line.format(cells=files / "cells.h5ad", few="few.h5ad"))
    assert not Path("m/config.json").exists()


def test_settings_are_checked_before_the_cells_are_read(refuse, files, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("the cells were read"))
    refuse(f"train {files}/cells.h5ad -o m --head normal")
    refuse(f"train {files}/cells.h5ad -o {files}/cells.h5ad")
    refuse(f"train {files}/cells.h5ad -o m --device tpu")


def test_a_model_is_not_replaced_unasked(refuse, trained, files, tmp_path, capsys):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    line = f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}"
    capsys.readouterr()
    for more in ("", "--resume"):  # finished already
        assert call(f"{line} {more}") == 0
        assert "trained already; nothing to do" in capsys.readouterr().out
        assert "finished and was trained on other cells, settings, steps" in (text := refuse(f"{line} {more} --seed 1")) and "--overwrite" in text
        assert "finished and was trained on" in refuse(f"{line.replace('--steps 150', '--steps 151')} {more}")
    assert same_weights(copy, trained)
    assert call(line.replace("--steps 150", "--steps 3"), "--overwrite", "--seed", "1", "--no-split") == 0
    assert SCLD.load(copy, device="cpu").history["denoiser"]["steps"] == 3
    assert not (copy / "test.h5ad").exists()  # no test cells of another split left


def test_an_unfinished_training_goes_on_if_it_is_the_same(refuse, files, tmp_path, monkeypatch, capsys):
    """The same command goes on by itself; one with another number of steps, another seed or other settings has to say so."""
    line = f"train {files}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 6 --ae-steps 5 --checkpoint-every 2 --device cpu {SETTINGS}"
    calls, original = [], training.diffusion_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "diffusion_loss", interrupted)
    assert call(line) == 143
    for other in ("--steps 7", "--ae-steps 6", "--seed 1", "--set lr=1e-3"):
        text = refuse(f"{line} {other}")
        assert "there is an unfinished training in" in text and "--resume" in text and "--overwrite" in text
    assert len(calls) == 5
    (tmp_path / "m" / "config.json").write_text("{}")  # of an older model, which was being replaced
    capsys.readouterr()
    assert call(line) == 0 and len(calls) == 6
    assert f"going on with what was begun in {tmp_path}/m" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == ["config.json", "genes.txt", "labels.json", "test.h5ad", "train.h5ad", "weights.safetensors"]


def test_a_training_that_ended_while_clearing_up_is_finished(trained, files, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "checkpoints").mkdir()
    for name in ("denoiser.safetensors", ".tmpAbCdEf"):
        (copy / "checkpoints" / name).write_bytes(b"half")
    monkeypatch.setattr(SCLD, "train", lambda *a, **k: pytest.fail("training began"))
    capsys.readouterr()
    assert call(f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}") == 0
    assert "trained already" in capsys.readouterr().out and not (copy / "checkpoints").exists()


def test_a_training_waits_for_another_one_in_its_folder(trained, files, tmp_path, capsys, monkeypatch):
    """What is there is looked at when the other one is done."""
    monkeypatch.setattr(SCLD, "train", lambda *a, **k: pytest.fail("training began"))
    line, ends, said = f"train {files}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 150 --device cpu {SETTINGS}", [], ""
    thread = threading.Thread(target=lambda: ends.append(call(line)))
    with alone_in(tmp_path / "m"):
        thread.start()
        while "waiting for another process that works in m" not in said:
            said += capsys.readouterr().err
            assert thread.is_alive()
        shutil.copytree(trained, tmp_path / "m", dirs_exist_ok=True)
    thread.join(60)
    assert ends == [0] and "trained already; nothing to do" in capsys.readouterr().out


def test_lost_cells_of_a_finished_model_are_written_again(trained, files, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    monkeypatch.setattr(SCLD, "train", lambda *a, **k: pytest.fail("training began"))
    line = f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}"
    for lost, said in ((["test.h5ad"], "only test.h5ad had"), (["train.h5ad", "test.h5ad"], "only train.h5ad and test.h5ad had"), ([], "nothing to do")):
        for name in lost:
            (copy / name).unlink()
        capsys.readouterr()
        assert call(line) == 0 and f"trained already; {said}" in capsys.readouterr().out
        for name in ("train.h5ad", "test.h5ad"):
            one, other = (ad.read_h5ad(folder / name) for folder in (copy, trained))
            assert (one.X != other.X).nnz == 0 and one.obs.equals(other.obs)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("weights.safetensors", None, "weights.safetensors is missing"), ("weights.safetensors", b"half", "weights.safetensors does not match"),
    ("config.json", b"{", "config.json is damaged"), ("config.json", b"[]", "is not a model description")])
def test_half_a_model_is_told_from_another_one(refuse, trained, files, tmp_path, name, content, message):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    text = refuse(f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}")
    assert message in text and text.endswith("; give --overwrite to train it anew, or another folder") and "save" not in text.split("/")[-1]


def test_a_model_of_a_later_version_is_not_called_incomplete(refuse, trained, files, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"format": 99}))
    text = refuse(f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}")
    assert "upgrade scld_nb" in text and "--overwrite" not in text


def test_a_damaged_model_is_not_taken_for_a_finished_one(refuse, trained, files, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "genes.txt").write_text("other\n")
    assert "genes.txt does not match" in refuse(f"train {files}/cells.h5ad -o {copy} --labels cell_type --steps 150 --device cpu {SETTINGS}")


def test_an_unfinished_training_is_not_replaced_unasked(refuse, files, tmp_path, monkeypatch):
    begun = tmp_path / "begun" / "checkpoints"
    begun.mkdir(parents=True)
    (begun / "autoencoder.safetensors").write_bytes(b"damaged")
    line = f"train {files}/cells.h5ad -o {tmp_path}/begun --labels cell_type --steps 2 {SETTINGS}"
    text = refuse(line)
    assert "there is an unfinished training in" in text and "autoencoder.safetensors is damaged; delete" in text and "other cells" not in text
    assert (begun / "autoencoder.safetensors").exists()
    capture = main([*shlex.split(line), "--resume"])  # a damaged checkpoint
    assert capture == 2
    assert call(line, "--overwrite") == 0 and not begun.exists()


def test_too_little_space(refuse, files, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    monkeypatch.setattr(SCLD, "train", lambda *a, **k: pytest.fail("training began"))
    text = refuse(f"train {files}/cells.h5ad -o m --labels cell_type {SETTINGS}")
    assert "has 0 MiB free, training needs about" in text and not Path("m").exists()


def test_space_needed_is_enough(trained, files, tmp_path, monkeypatch):
    """Checkpoints and results of a training never take more than was asked for at its start."""
    asked, seen = [], []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, asked.append(path) or 10**12))
    original = os.replace

    def measured(source, target):
        seen.append(sum(f.stat().st_size for f in (tmp_path / "m").rglob("*") if f.is_file()))
        original(source, target)

    monkeypatch.setattr(os, "replace", measured)
    assert (
        call(f"train {files}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 4 --checkpoint-every 2 {SETTINGS}")
        == 0
    )
    model = SCLD.load(tmp_path / "m", device="cpu")
    parameters = sum(p.numel() for part in (model.autoencoder, model.denoiser, model.scorer) for p in part.parameters())
    cells = ad.read_h5ad(files / "cells.h5ad")
    overhead = 200_000  # headers and text, small beside real weights
    assert asked and max(seen) <= 10 * 4 * parameters + 8 * cells.X.nnz + overhead


# ---- wrong input: sampling


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-n 5 -o x.h5ad --label Z", "unknown label 'Z'; known: B, NK, T"),
        ("-n 5 -o x.h5ad --omega 3.5", "omega must lie in [-1, 3]"),
        ("-n 5 -o x.h5ad --omega -1.5", "omega must lie in [-1, 3]"),
        ("-n 5 -o x.h5ad --omega nan", "omega must lie in [-1, 3]"),
        ("-n 5 -o x.h5ad --sampler euler", "unknown sampler 'euler'; known: ddpm, ddim, dpm++, sde-dpm++"),
        ("-n 5 -o x.h5ad --sampling-steps 0", "sampling_steps must be a whole number of at least 1"),
        ("-n 5 -o x.h5ad --sampling-steps 21", "sampling_steps must lie in 1..20"),
        ("-n 5 -o x.h5ad --keep 0", "keep must lie in (0, 1], got 0"),
        ("-n 5 -o x.h5ad --keep 1.1", "keep must lie in (0, 1]"),
        ("-n 5 -o x.h5ad --device tpu", "unknown device 'tpu'"),
        ("-n 5 -o x.csv", "output x.csv must end in .h5ad; give for instance -o x.h5ad"),
        ("-n 5 -o folder.h5ad", "output folder.h5ad is a folder"),
        ("-n 5 -o file/x.h5ad", "cannot write to folder file"),
    ],
)
def test_sampling_errors(refuse, trained, monkeypatch, line, message):
    monkeypatch.setattr(SCLD, "_generate", lambda *a, **k: pytest.fail("sampling began"))
    Path("folder.h5ad").mkdir()
    Path("file").write_text("")
    assert message in refuse(f"sample {trained} {line}")
    assert not Path("x.h5ad").exists()


def test_models_that_cannot_be_read(refuse, trained, tmp_path):
    def spoiled(name: str, content: bytes | None) -> str:
        folder = Path(shutil.copytree(trained, tmp_path / f"spoiled-{name}", dirs_exist_ok=True))
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return refuse(f"sample {folder} -n 5 -o x.h5ad")

    assert "no model in nowhere: config.json is missing" in refuse("sample nowhere -n 5 -o x.h5ad")
    assert "incomplete: genes.txt is missing" in spoiled("genes.txt", None)
    assert "damaged or half-written: weights.safetensors" in spoiled("weights.safetensors", b"\0" * 100)
    assert "config.json is damaged" in spoiled("config.json", b"{")
    later = json.loads((trained / "config.json").read_text()) | {"format": 99}
    assert "has format 99, this version reads up to 1; upgrade scld_nb" in spoiled(
        "config.json", json.dumps(later).encode()
    )


def test_a_planted_pickle_is_ignored(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "gift"))
    bomb = f"cposix\nsystem\n(S'touch {tmp_path}/executed'\ntR.".encode()
    for name in ("weights.pt", "model.pkl", "weights.pkl"):
        (folder / name).write_bytes(bomb)
    assert call(f"sample {folder} -n 3 -o {tmp_path}/x.h5ad") == 0
    assert not (tmp_path / "executed").exists()


# ---- wrong input: evaluation


def test_evaluation_errors(refuse, trained, files):
    real, synth = trained / "test.h5ad", "synth.h5ad"
    SCLD.load(trained, device="cpu").sample(30, progress=False).write_h5ad(synth)
    fewer = ad.read_h5ad(synth)[:, 5:].copy()
    fewer.write_h5ad("fewer.h5ad")
    Path("broken.h5ad").write_bytes(b"not hdf5")
    Path("file").write_text("")
    assert "no such file: nowhere.h5ad" in refuse(f"evaluate nowhere.h5ad {synth}")
    assert "cannot read broken.h5ad" in refuse(f"evaluate {real} broken.h5ad")
    assert "no such file" in refuse(f"evaluate {real} {synth} --train nowhere.h5ad")
    assert "lacks 5 of 60 genes (gene0, gene1, gene2, ...)" in refuse(f"evaluate {real} fewer.h5ad")
    assert "no column 'louvain'" in refuse(f"evaluate {real} {synth} --labels louvain")
    assert "cannot write to folder file/report" in refuse(f"evaluate {real} {synth} -o file/report")
    ad.read_h5ad(synth)[:3].write_h5ad("three.h5ad")
    assert "at least" in refuse(f"evaluate {real} three.h5ad")


def test_the_report_folder_is_checked_before_the_work(refuse, trained, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("the evaluation began"))
    Path("file").write_text("")
    refuse(f"evaluate {trained}/test.h5ad {trained}/train.h5ad -o file")


# ---- exit status of what is not the user's fault, and of what comes from outside


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_anything_else_is_one_line_and_status_1(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SCLD_DEBUG", raising=False)
    monkeypatch.setattr(SCLD, "sample", raising(ZeroDivisionError("two\nlines")))
    line = f"sample {trained} -n 5 -o {tmp_path}/x.h5ad"
    assert call(line) == 1
    assert capsys.readouterr().err == "scld: error: ZeroDivisionError: two lines (set SCLD_DEBUG=1 to see where)\n"
    monkeypatch.setattr(SCLD, "sample", raising(MemoryError()))
    assert call(line) == 1
    assert capsys.readouterr().err == "scld: error: MemoryError (set SCLD_DEBUG=1 to see where)\n"
    monkeypatch.setattr(SCLD, "sample", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")))
    assert call(line) == 1
    said = capsys.readouterr().err
    assert said.startswith("scld: error: the GPU's memory is full (CUDA out of memory); ") and "--batch-size" in said and said.count("\n") == 1
    monkeypatch.setattr(SCLD, "sample", raising(MemoryError()))
    monkeypatch.setenv("SCLD_DEBUG", "1")
    with pytest.raises(MemoryError):
        call(line)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (RuntimeError("I/O error: File too large (os error 27)"), 2, "no file may become that large here (I/O error: File too large (os error 27)); raise"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), 2, "the quota of this disk is used up"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), 2, "the disk refuses (I/O error: Read-only"),
        (OSError(errno.EFBIG, "File too large", "/x"), 2, "File too large: '/x'); raise the limit (ulimit -f), or write to another disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), 2, "Disk quota exceeded: '/x'); make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "Permission denied: '/x'; give another path, or change its permissions",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 2, "No such file or directory"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
    ],
)
def test_file_system_errors(trained, tmp_path, capsys, monkeypatch, error, status, message):
    monkeypatch.setattr(cli, "write_cells", raising(error))
    assert call(f"sample {trained} -n 3 -o {tmp_path}/x.h5ad") == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_full_disk_leaves_the_old_file(cells, tmp_path, monkeypatch):
    out = tmp_path / "x.h5ad"
    write_cells(cells, out)
    before = out.read_bytes()

    def half(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_cells(cells[:5], out)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_written_cells_read_back(cells, tmp_path):
    cells = cells.copy()
    cells.uns["scld"] = {"label": "", "omega": 0.5, "n": 3}
    write_cells(cells, tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    assert (back.X != cells.X).nnz == 0 and back.obs.equals(cells.obs) and back.uns["scld"] == cells.uns["scld"]


def test_ctrl_c_while_sampling(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SCLD, "sample", raising(KeyboardInterrupt()))
    assert call(f"sample {trained} -n 5 -o {tmp_path}/x.h5ad") == 130
    assert capsys.readouterr().err == "scld: interrupted\n" and not (tmp_path / "x.h5ad").exists()


@pytest.mark.parametrize("more", ["", "--chunk-size 5"])
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_while_sampling_leaves_nothing(trained, tmp_path, capsys, monkeypatch, more, times):
    """Of several signals, as launchers send them, the first one counts."""
    before, found, replacing = signal.getsignal(signal.SIGTERM), [], scld_files.replacing

    @contextmanager
    def stopped(path):
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                found.append(temporary.exists())
                for _ in range(times - 1):
                    signal.raise_signal(signal.SIGTERM)
            yield temporary

    for place in (scld_files, growing):
        monkeypatch.setattr(place, "replacing", stopped)
    assert call(f"sample {trained} -n 12 -o {tmp_path}/x.h5ad {more}") == 143
    assert found == [True] and not list(tmp_path.iterdir()) and capsys.readouterr().err == "scld: stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["train.h5ad", "test.h5ad"])
def test_the_cells_of_a_model_are_not_replaced_by_drawn_ones(refuse, trained, tmp_path, monkeypatch, name):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    before = listing(copy)
    monkeypatch.setattr(SCLD, "_generate", lambda *a, **k: pytest.fail("sampling began"))
    (tmp_path / "link").symlink_to(copy)
    for folder in (copy, tmp_path / "link"):
        assert f"{name} is where scld train keeps cells of the model in" in refuse(f"sample {trained} -n 5 -o {folder}/{name}")
    monkeypatch.undo()
    assert listing(copy) == before and call(f"sample {trained} -n 5 -o {copy}/synth.h5ad") == call(f"sample {trained} -n 5 -o {tmp_path}/{name}") == 0


def test_a_reader_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(cli.typer, "echo", raising(BrokenPipeError()))
    before = sys.stdout
    try:
        assert call("datasets") == 1
    finally:
        sys.stdout = before
    assert capsys.readouterr().err == ""


def test_other_exits_pass_through(trained, monkeypatch, capsys):
    monkeypatch.setattr(SCLD, "load", raising(SystemExit("text")))
    assert call(f"sample {trained} -n 5 -o x.h5ad") == 1


def test_warnings_become_notes(files, tmp_path, capsys):
    line = f"train {files}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 2 {SETTINGS}".replace(
        "beta_T=0.6", "beta_T=0.02"
    )
    assert call(line) == 0
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if " steps, about " not in line]     # progress, where a machine is slow
    assert len(said) == 1 and said[0].startswith("scld: note: T=20 with beta_T=0.02 leaves 90% of the signal")


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.tempfile, "TemporaryFile", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match=r"cannot write to folder .* \(Permission denied\); choose another with -o"):
        check_folder(tmp_path)


def test_foreign_files_among_checkpoints_stay(tmp_path):
    """What another process is writing just now stays as well."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "checkpoints").mkdir()
    live = {f".denoiser.safetensors.{HOST}.{os.getpid()}.tmp", ".autoencoder.safetensors.elsewhere.7.tmp"}
    for name in {"autoencoder.safetensors", f".denoiser.safetensors.{HOST}.{process.pid}.tmp", "notes.txt"} | live:
        (tmp_path / "checkpoints" / name).write_text("")
    for number in (process.pid, os.getpid()):
        (tmp_path / f".genes.txt.{HOST}.{number}.tmp").write_text("")
    drop_checkpoints(tmp_path)
    assert {f.name for f in (tmp_path / "checkpoints").iterdir()} == {"notes.txt"} | live
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoints", f".genes.txt.{HOST}.{os.getpid()}.tmp"}


# ---- trainings that are stopped


TRAIN = "--labels cell_type --steps 30 --ae-steps 40 --checkpoint-every 10 --device cpu " + SETTINGS


@pytest.fixture(scope="module")
def uninterrupted(files) -> Path:
    folder = files / "uninterrupted"
    assert call(f"train {files}/cells.h5ad -o {folder} {TRAIN}") == 0
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(files, tmp_path, monkeypatch, capsys, uninterrupted, number, status):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    calls, original = [], training.diffusion_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:  # between two checkpoints
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "diffusion_loss", interrupted)
    line = f"train {files}/cells.h5ad -o {tmp_path}/m {TRAIN}"
    assert call(line) == status
    assert capsys.readouterr().err == "scld: stopped; the same command goes on from the last checkpoint\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(calls) == 14 and not (tmp_path / "m/config.json").exists()
    assert call(line, "--resume") == 0
    assert len(calls) == 30 and same_weights(tmp_path / "m", uninterrupted)  # nothing was done twice


def test_overwriting_goes_on_as_well(files, trained, tmp_path, monkeypatch, capsys, uninterrupted, refuse):
    """The command that was stopped, given again, --overwrite included."""
    copy, calls, original = Path(shutil.copytree(trained, tmp_path / "m")), [], training.diffusion_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "diffusion_loss", interrupted)
    line = f"train {files}/cells.h5ad -o {copy} --overwrite {TRAIN}"
    assert call(line) == 143
    text = capsys.readouterr().err
    assert "the same command goes on" in text and "--resume" not in text
    assert call(line) == 0 and "going on with what was begun" in capsys.readouterr().out
    assert len(calls) == 30 and same_weights(copy, uninterrupted)
    assert call(line) == 0 and len(calls) == 60                 # finished: that is replaced, as it was asked for


def test_overwriting_does_not_go_on_with_another_training(files, tmp_path, monkeypatch):
    calls, original = [], training.diffusion_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "diffusion_loss", interrupted)
    line = f"train {files}/cells.h5ad -o {tmp_path}/m --overwrite {TRAIN}"
    assert call(line) == 143
    assert call(line, "--seed", "1") == 0 and len(calls) == 35


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_the_loop(files, tmp_path, monkeypatch, capsys, number, status):
    monkeypatch.setattr(SCLD, "_train_scorer", lambda *a: signal.raise_signal(number))
    assert call(f"train {files}/cells.h5ad -o {tmp_path}/m {TRAIN}") == status
    assert "the same command goes on" in capsys.readouterr().err


def test_ctrl_c_in_the_first_stage_ends_the_command(files, tmp_path, monkeypatch, uninterrupted):
    calls, original = [], running.batch_rows

    def interrupted(*args, stage, **kwargs):
        calls.append(stage)
        if len(calls) == 25:
            signal.raise_signal(signal.SIGINT)
        return original(*args, stage=stage, **kwargs)

    monkeypatch.setattr(running, "batch_rows", interrupted)
    line = f"train {files}/cells.h5ad -o {tmp_path}/m {TRAIN}"
    assert call(line) == 130 and set(calls) == {"autoencoder"}
    monkeypatch.undo()
    assert call(line, "--resume") == 0 and same_weights(tmp_path / "m", uninterrupted)


def test_hint_in_another_thread():
    """Signals belong to the main thread; elsewhere only the status is made."""
    seen = []

    def work():
        try:
            with cli.say_how_to_resume():
                seen.append(signal.getsignal(signal.SIGTERM))
                raise KeyboardInterrupt
        except SystemExit as end:
            seen.append(end.code)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 130]


KILL = """
import os, signal, sys
import scld_nb.config as config, scld_nb.running as running, scld_nb.training as training
from scld_nb.cli import main
moment = sys.argv[1]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def at_step(stage, at):
    original = training.batch_rows
    def rows(n, size, step, *, seed, stage):
        if (stage, step) == (wanted, at):
            die()
        return original(n, size, step, seed=seed, stage=stage)
    wanted, running.batch_rows, training.batch_rows = stage, rows, rows
if moment.startswith("step"):
    _, stage, at = moment.split()
    at_step(stage, int(at))
elif moment == "half a checkpoint":
    os.replace = lambda *a: die()
elif moment == "half a model":
    original = config._replace
    config._replace = lambda path, put: die() if path.name == "labels.json" else original(path, put)
main(sys.argv[2:])
sys.exit("survived")
"""


def test_sigkill_at_any_moment_then_resume(files, tmp_path, uninterrupted):
    """Killed again and again, each time further on; the weights are those of a training nobody touched."""
    words = shlex.split(f"train {files}/cells.h5ad -o {tmp_path}/m {TRAIN} --resume")
    moments = ["half a checkpoint", "step autoencoder 27", "step denoiser 17", "half a model"]
    for moment in moments:
        done = subprocess.run([sys.executable, "-c", KILL, moment, *words], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert not (tmp_path / "m/config.json").exists()
        if moment == "half a checkpoint":  # nothing usable, and nothing that looks so
            assert not list((tmp_path / "m").rglob("*.safetensors")) and list((tmp_path / "m").rglob("*.tmp"))
    assert main(words) == 0
    assert other_weights(tmp_path / "m", uninterrupted) == {}
    one, other = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "m", uninterrupted))
    assert [one["history"][s]["losses"] for s in ("autoencoder", "denoiser")] == [
        other["history"][s]["losses"] for s in ("autoencoder", "denoiser")
    ]
    assert one["history"]["scorer"] == other["history"]["scorer"] and one["fingerprint"] == other["fingerprint"]
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == sorted(f.name for f in uninterrupted.iterdir())


# ---- the kernel


def test_an_installed_kernel_runs_this_python(tmp_path, capsys, monkeypatch):
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    assert main(["kernel", "install", "--prefix", str(tmp_path), "--name", "scld-test", "--gpu", ""]) == 0
    assert "papermill -k scld-test" in capsys.readouterr().out
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "share" / "jupyter" / "kernels")], ensure_native_kernel=False)
    assert list(specs.find_kernel_specs()) == ["scld-test"]
    manager = KernelManager(kernel_name="scld-test", kernel_spec_manager=specs)
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        said = []
        client.execute_interactive("import os, sys, scld_nb; print(sys.executable, repr(os.environ['CUDA_VISIBLE_DEVICES']))", timeout=120,
                                   output_hook=lambda m: said.append(m["content"].get("text", str(m["content"]))))
        assert f"{sys.executable} ''" in "".join(said)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("line, message", [
    ("kernel install --prefix k --name a/b", "--name 'a/b' may have letters"),
    ("kernel install --prefix k --gpu first", "--gpu 'first' must be numbers of GPUs"),
])
def test_kernels_that_are_refused(refuse, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    assert refuse(line).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_kernel_needs_ipykernel(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel.kernelspec", None)
    assert "pip install 'scld-nb[notebook]'" in refuse("kernel install --prefix k")


# ---- files of somebody else


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("options", ["", "--no-split", "--overwrite"])
@pytest.mark.parametrize(("name", "message"), [
    ("train.h5ad", "train.h5ad holds the cells to train on and would be replaced; choose another folder with -o"),
    ("mine.h5ad", "holds genes.txt but no model, and it would be replaced; choose another folder with -o")])
def test_files_that_are_no_models_are_not_touched(files, tmp_path, refuse, name, message, options):
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(files / "cells.h5ad", mine / name)
    for other in ("genes.txt", "labels.json", ".notes.tmp") if name == "mine.h5ad" else ("test.h5ad",):
        (mine / other).write_text("of somebody")
    before = listing(mine)
    assert message in refuse(f"train {mine / name} -o {mine} --labels cell_type --steps 2 --device cpu {options} {SETTINGS}")
    assert listing(mine) == before


def test_unrelated_temporary_files_stay(files, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / ".notes.tmp").write_text("of somebody")
    assert call(f"train {files}/cells.h5ad -o {folder} --labels cell_type --steps 2 --device cpu {SETTINGS}") == 0
    assert (folder / ".notes.tmp").read_text() == "of somebody" and SCLD.load(folder, device="cpu").genes


def test_training_cells_of_a_model_do_not_train_its_successor_in_place(trained, tmp_path, refuse):
    shutil.copytree(trained, tmp_path / "model")
    before = listing(tmp_path / "model")
    said = refuse(f"train model/train.h5ad -o model --overwrite --labels cell_type --steps 2 --device cpu {SETTINGS}")
    assert "holds the cells to train on" in said and listing(tmp_path / "model") == before


def test_a_link_into_nowhere_is_no_folder(files, tmp_path, refuse):
    (tmp_path / "drive").symlink_to(tmp_path / "not mounted")
    said = refuse(f"train {files}/cells.h5ad -o drive --labels cell_type --steps 2 --device cpu {SETTINGS}")
    assert "drive is a link to" in said and "which is not there" in said


def test_the_home_folder_may_be_written_short(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call(f"train {files}/cells.h5ad --output=~/model --labels cell_type --steps 2 --device cpu {SETTINGS}") == 0
    assert call("sample ~/model -n 30 --output=~/cells.h5ad") == 0
    assert call("evaluate ~/model/test.h5ad ~/cells.h5ad --quick --output=~/report".replace("~/model/test.h5ad ~/cells.h5ad", "model/test.h5ad cells.h5ad")) == 0
    assert (tmp_path / "report/report.html").exists() and not (tmp_path / "~").exists()
    model = SCLD.load("~/model", device="cpu")
    model.save("~/again")
    model.sample_to("~/more.h5ad", 5, progress=False)
    assert {"again", "more.h5ad"} <= {p.name for p in tmp_path.iterdir()} and not (tmp_path / "~").exists()


def test_notes_are_said_as_a_module_too(tmp_path):
    planted_cells(120, n_genes=14, seed=3).write_h5ad(tmp_path / "few.h5ad")
    done = subprocess.run([sys.executable, "-m", "scld_nb.cli", *shlex.split(
        f"train few.h5ad -o model --labels cell_type --steps 2 --device cpu {SETTINGS}")], cwd=tmp_path, capture_output=True, text=True)
    assert "scld: note: " in done.stderr and "are left out, they have fewer than 10 genes" in done.stderr, done.stderr


def test_labels_named_split_are_refused(tmp_path, refuse):
    cells = planted_cells(120, seed=3)
    cells.obs["split"] = cells.obs["cell_type"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for more in ("", "--backed"):
        said = refuse(f"train cells.h5ad -o model --labels split --steps 2 --device cpu {more} {SETTINGS}")
        assert said == "labels in obs['split'] would be replaced by the names of the parts; give that column another name"


def test_a_wrong_label_leaves_no_folder(trained, tmp_path, refuse):
    assert "unknown label 'Z'" in refuse(f"sample {trained} -n 30 --chunk-size 10 -o new/cells.h5ad --label Z")
    assert not (tmp_path / "new").exists()


def test_the_next_commands_can_be_pasted(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(f"train {files}/cells.h5ad --labels cell_type --steps 2 --device cpu {SETTINGS}"), "-o", "my model"]) == 0
    hint = capsys.readouterr().out.split("next: ")[1]
    assert shlex.split(hint.splitlines()[0])[:3] == ["scld", "sample", "my model"]


def test_counts_in_x_can_be_asked_for_by_name(tmp_path):
    cells = planted_cells(120, seed=3)
    cells.layers["counts"] = cells.X.log1p()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert (data.counts_matrix(cells, layer="X") != cells.X).nnz == 0
    loaded = data.load(tmp_path / "cells.h5ad", labels="cell_type", layer="X")
    assert loaded.layers["counts"].data.max() == cells.X.data.max()


@pytest.mark.parametrize("omega", ["-1", "0"])
def test_a_label_that_omega_ignores_is_noted(trained, tmp_path, capsys, omega):
    capsys.readouterr()
    assert call(f"sample {trained} -n 5 -o {tmp_path}/x.h5ad --label T --omega {omega} --sampling-steps 2 --keep 1") == 0
    assert ("note: omega -1 ignores labels, so these are cells in general and not 'T'" in capsys.readouterr().err) == (omega == "-1")


def test_counts_in_raw_can_be_asked_for(tmp_path, refuse):
    cells = planted_cells(120, seed=3)
    cells.raw = cells
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert "adata.raw holds whole numbers, layer='raw' takes them" in refuse(f"train cells.h5ad -o m --labels cell_type --device cpu {SETTINGS}")
    assert call(f"train {tmp_path}/cells.h5ad -o {tmp_path}/m --labels cell_type --layer raw --steps 2 --device cpu {SETTINGS}") == 0
    assert ad.read_h5ad(tmp_path / "m" / "train.h5ad").X.data.max() > 5


# ---- what is asked for arrives


@pytest.mark.parametrize("backed", ["", "--backed"])
def test_every_option_of_train_arrives(files, tmp_path, monkeypatch, backed):
    asked, written, begin = {}, [], SCLD.__init__
    monkeypatch.setattr(SCLD, "__init__", lambda self, *cells, **options: (asked.update(options), begin(self, *cells, **options))[1])
    monkeypatch.setattr(SCLD, "train", lambda self, steps, **options: asked.update(options, steps=steps))
    monkeypatch.setattr(SCLD, "save", lambda self, folder: folder)
    monkeypatch.setattr(checks, "write_backed", lambda cells, path, **options: written.append((path.name, options["most"], options["seed"])))
    line = f"train {files}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 7 --ae-steps 9 --checkpoint-every 3 --seed 5 --device cpu"
    assert call(f"{line} --head nb --dispersion gene --fusion cat --set lr=3e-4 {backed}") == 0
    assert asked == {"preset": "default", "device": "cpu", "seed": 5, "head": "nb", "dispersion": "gene", "fusion": "cat", "lr": 3e-4, "steps": 7, "ae_steps": 9,
                     "checkpoint_dir": tmp_path / "m/checkpoints", "checkpoint_every": 3, "resume": False, "keep_partial": False}
    assert written == ([("train.h5ad", 80, 5), ("test.h5ad", 80, 5)] if backed else [])


@pytest.mark.parametrize("n", [6, 7])
def test_every_option_of_sample_arrives(tmp_path, monkeypatch, n):
    asked, written = [], []

    class Model:
        labels, genes = ["B", "T"], ["a", "b"]

        def sample(self, *given, **options):
            asked.append((given, options))
            return SimpleNamespace(uns={"scld": {"generated": 9, "scale": "counts"}})

        def sample_to(self, path, *given, chunk_size, **options):
            written.append((path, chunk_size))
            return self.sample(*given, **options).uns["scld"]

    monkeypatch.setattr(SCLD, "load", lambda folder, **options: asked.append((folder, options)) or Model())
    monkeypatch.setattr(cli, "write_cells", lambda cells, path: written.append((path, 6)))
    line = f"sample m -n {n} -o {tmp_path}/x.h5ad --label T --omega 0.5 --sampler ddim --sampling-steps 4 --keep 0.7 --seed 3 --device cpu --batch-size 5 --chunk-size 6"
    assert call(line) == 0 and written == [(tmp_path / "x.h5ad", 6)]
    assert asked == [(Path("m"), {"device": "cpu"}),
                     ((n, "T"), {"omega": 0.5, "sampler": "ddim", "sampling_steps": 4, "keep": 0.7, "seed": 3, "batch_size": 5})]


@pytest.mark.parametrize("quick", ["", "--quick"])
def test_every_option_of_evaluate_arrives(monkeypatch, capsys, quick):
    asked = {}
    monkeypatch.setattr(evaluation, "evaluate", lambda *cells, **options: asked.update(options, cells=cells) or "the report")
    assert call(f"evaluate a.h5ad b.h5ad --train c.h5ad --labels kind --seed 3 --n-trees 11 --n-judge 12 --n-max 13 --backed {quick}") == 0
    assert asked.pop("progress") in (None, False) and capsys.readouterr().out == "the report\n"
    assert asked == {"cells": (Path("a.h5ad"), Path("b.h5ad")), "train": Path("c.h5ad"), "labels_key": "kind", "seed": 3, "n_trees": 11, "n_judge": 12, "n_max": 13,
                     "suite": not quick}


def test_cells_on_disk_are_copied_in_chunks_of_any_size(files, tmp_path):
    cells = load_on_disk(files / "cells.h5ad", labels="cell_type")
    cli.write_backed(cells, tmp_path / "all.h5ad", most=cells.n_obs, chunk=7)
    whole, found = data.load(files / "cells.h5ad", labels="cell_type"), ad.read_h5ad(tmp_path / "all.h5ad")
    assert list(found.obs_names) == list(whole.obs_names) and (found.X != whole.layers["counts"]).nnz == 0
    assert found.obs["cell_type"].tolist() == whole.obs["cell_type"].tolist()
    drawn = []
    for seed in (0, 1, 1):
        cli.write_backed(cells, tmp_path / "some.h5ad", most=50, seed=seed, chunk=7)
        drawn.append(ad.read_h5ad(tmp_path / "some.h5ad"))
        part = whole[drawn[-1].obs_names]
        assert drawn[-1].n_obs == 50 and (drawn[-1].X != part.layers["counts"]).nnz == 0 and drawn[-1].obs["cell_type"].tolist() == part.obs["cell_type"].tolist()
    assert list(drawn[0].obs_names) != list(drawn[1].obs_names) == list(drawn[2].obs_names)


def test_of_cells_on_disk_only_those_that_are_kept_need_space(files, tmp_path, monkeypatch):
    cells, nothing = load_on_disk(files / "cells.h5ad", labels="cell_type"), torch.nn.Module()
    model = SimpleNamespace(autoencoder=nothing, denoiser=nothing, scorer=nothing, config=SimpleNamespace(width=2))
    free = 4 * cells.counts.nnz
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    cli.check_space(tmp_path, model, cells, 40)                # a tenth of them
    with pytest.raises(InputError, match="MiB free, training needs about"):
        cli.check_space(tmp_path, model, cells, cells.n_obs)


def test_a_model_that_is_being_replaced_is_none_until_all_of_it_is_there(files, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    for name in cli.MODEL_FILES:
        (tmp_path / "m" / name).write_text("old")
    monkeypatch.setattr(SCLD, "train", lambda self, steps, **options: None)
    monkeypatch.setattr(checks, "write_cells", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert call(f"train {files}/cells.h5ad -o {tmp_path}/m --overwrite --labels cell_type --steps 2 --device cpu {SETTINGS}") == 2
    assert not {"config.json", "train.h5ad", "test.h5ad"} & {f.name for f in (tmp_path / "m").iterdir()}


@pytest.mark.parametrize("backed", ["", "--backed"])
def test_other_names_of_genes_reach_every_file(files, tmp_path, backed):
    cells = ad.read_h5ad(files / "cells.h5ad")
    cells.var["gene_ids"] = [f"ENSG{i:05d}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert call(f"train {tmp_path}/cells.h5ad -o {tmp_path}/m --labels cell_type --steps 4 --ae-steps 4 --device cpu {backed} {SETTINGS}") == 0
    assert call(f"sample {tmp_path}/m -n 5 -o {tmp_path}/drawn.h5ad --device cpu") == 0
    for name in ("m/train.h5ad", "m/test.h5ad", "drawn.h5ad"):
        there = ad.read_h5ad(tmp_path / name)
        assert there.n_vars > 20 and there.var["gene_ids"].tolist() == cells.var.loc[there.var_names, "gene_ids"].tolist()
    assert (tmp_path / "m" / "genes.json").exists()

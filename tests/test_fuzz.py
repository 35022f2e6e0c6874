"""Nonsense of all kinds: settings, models and files. Whatever it is, it works or is refused in one line; nothing else may be raised."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, planted_cells
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scld_nb import data
from scld_nb.cli import parse_setting
from scld_nb.data import InputError
from scld_nb.model import SCLD, Config, make_config

NAMES = list(Config.__dataclass_fields__)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), st.text(max_size=6), st.lists(st.integers(-3, 600), max_size=4),
                   st.tuples(st.integers(-1, 64), st.integers(-1, 64)), st.sampled_from(["zinb", "mse", "cosine", "log1p", "none", "auto", "gene"]))


def works_or_is_refused(work) -> bool:
    try:
        work()
    except InputError as error:
        assert "\n" not in str(error) and str(error).strip() and len(str(error)) < 600, str(error)
        return False
    return True


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "colour"]), VALUES, min_size=1, max_size=3))
def test_any_settings(options):
    if works_or_is_refused(lambda: make_config(**options)):
        config = make_config(**options)
        assert 0 < config.beta_1 <= config.beta_T < 1 and config.T >= 1 and config.batch_size >= 1 and 0 < config.keep <= 1 and min(config.widths) >= 1


@settings(max_examples=800, deadline=None)
@given(st.one_of(st.text(max_size=20), st.tuples(st.sampled_from(NAMES), st.text(max_size=8)).map("=".join)))
def test_any_words(text):
    def work() -> None:
        name, value = parse_setting(text)
        make_config(**{name: value})

    works_or_is_refused(work)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = SCLD(planted_cells(), "cell_type", device="cpu", **TINY | {"head": "zinb"}).train(3, ae_steps=3, scorer=False, progress=False)
    return model.save(tmp_path_factory.mktemp("fuzz") / "model")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.json", "labels.json", "genes.txt", "weights.safetensors"]), st.data())
def test_any_damage_to_a_model(saved, tmp_path, name, drawn):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    kind = drawn.draw(st.sampled_from(["cut", "byte", "value"]))
    if kind == "cut":
        content = content[: drawn.draw(st.integers(0, len(content) - 1))]
    elif kind == "byte":
        content[drawn.draw(st.integers(0, len(content) - 1))] = drawn.draw(st.integers(0, 255))
    elif name == "config.json":
        stored = json.loads(content)
        stored[drawn.draw(st.sampled_from(sorted(stored)))] = drawn.draw(st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=3), st.lists(st.none(), max_size=2)))
        content = json.dumps(stored).encode()
    (folder / name).write_bytes(bytes(content))
    works_or_is_refused(lambda: SCLD.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "cells.h5ad"
    planted_cells()[:40].copy().write_h5ad(path)
    places = []
    with h5py.File(path) as file:
        file.visit(places.append)
    return path.read_bytes(), places


ARRAYS = st.one_of(
    st.lists(st.integers(-5, 80), max_size=50).map(lambda v: np.array(v, dtype=np.int64)),
    st.lists(st.floats(width=32), max_size=50).map(lambda v: np.array(v, dtype=np.float32)),
    st.lists(st.text("abc", max_size=3), min_size=1, max_size=50).map(lambda v: np.array(v, dtype=h5py.string_dtype())),
)


def damage(path, drawn, places) -> None:
    """Something in the file is gone, of another kind or length, or has other attributes; HDF5 itself stays sound."""
    with h5py.File(path, "r+") as file:
        place = drawn.draw(st.sampled_from(places))
        what = drawn.draw(st.sampled_from(["gone", "array", "values", "attribute", "no attribute"]))
        if what == "gone":
            del file[place]
        elif what == "array":
            del file[place]
            file[place] = drawn.draw(ARRAYS)
        elif what == "values" and isinstance(file[place], h5py.Dataset) and file[place].dtype.kind in "iuf" and file[place].size:
            changed = file[place][()]
            at = drawn.draw(st.integers(0, changed.size - 1))
            changed.reshape(-1)[at] = drawn.draw(st.integers(-100, 100)) if changed.dtype.kind != "u" else drawn.draw(st.integers(0, 100))
            file[place][...] = changed
        elif what == "attribute":
            file[place].attrs[drawn.draw(st.sampled_from(["encoding-type", "encoding-version", "shape", "_index", "column-order"]))] = drawn.draw(
                st.one_of(st.text("abc", max_size=3), st.integers(-3, 90), st.lists(st.integers(0, 90), max_size=3)))
        elif what == "no attribute" and len(file[place].attrs):
            del file[place].attrs[drawn.draw(st.sampled_from(sorted(file[place].attrs)))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.data())
def test_any_damage_to_a_file_of_cells(cells, tmp_path, drawn):
    content, places = cells
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "cells.h5ad"      # a model keeps its file open
    path.write_bytes(content)
    damage(path, drawn, places)
    if drawn.draw(st.integers(0, 3)) == 0:
        path.write_bytes(path.read_bytes()[: drawn.draw(st.integers(1, len(content) - 1))])
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if works_or_is_refused(lambda: found.append(data.load(path, labels="cell_type"))):
            counts = found[0].layers["counts"]
            assert (counts.data == np.rint(counts.data)).all() and counts.data.min() >= 0
        works_or_is_refused(lambda: SCLD(path, "cell_type", device="cpu", widths=(8, 4), hidden=8, latent=4))

"""What an installation asks for, and that the files which describe the project agree with each other."""
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import scld_nb

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def wanted(settings, python):
    found = [Requirement(r) for r in settings["requirements"].split()]
    return {r.name for r in found if r.marker is None or r.marker.evaluate({"python_version": python})}


def test_louvain_is_asked_for_only_where_it_has_a_wheel(settings):
    assert "louvain" in wanted(settings, "3.11")
    for python in ("3.12", "3.13"):
        assert "louvain" not in wanted(settings, python) and "igraph" in wanted(settings, python)


def test_torch_is_not_pinned_to_one_build(settings):
    torch = next(r for r in map(Requirement, settings["requirements"].split()) if r.name == "torch")
    assert "2.13.0" in torch.specifier and "2.13.0+cu130" in torch.specifier and "2.5.0" in torch.specifier


def test_constraints_pin_every_requirement_and_name_no_host(settings):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    asked = [Requirement(r) for key in ("requirements", "notebook_requirements", "dev_requirements") for r in settings[key].split()]
    assert {r.name.lower().replace("_", "-") for r in asked} <= pinned
    assert "torch==2.13.0" in lines


def test_the_lock_holds_the_constraints_with_their_hashes_and_names_no_host(settings):
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.M)
    assert "".join(f"{name}=={version}{when}{hashes}\n" for name, version, when, hashes in blocks) == text  # and nothing else
    locked = {name: version for name, version, *_ in blocks}
    pinned = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    assert pinned.pop("torch") and "torch" not in locked and not [name for name in locked if name.startswith("nvidia")]  # its build is the user's choice
    assert {name: locked.get(name) for name in pinned} == pinned
    asked = [Requirement(r) for key in ("requirements", "notebook_requirements", "dev_requirements", "docs_requirements") for r in settings[key].split()]
    assert {r.name.lower() for r in asked} - {"torch"} <= set(locked)


def test_one_version_and_one_address(settings):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["version"] == scld_nb.__version__
    assert project["project"]["urls"]["Repository"] == settings["git_url"]
    assert project["project"]["name"] == settings["lib_name"]
    assert project["tool"]["nbdev"]["allowed_cell_metadata_keys"] == settings["allowed_cell_metadata_keys"].split()
    assert f"version: {scld_nb.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_importing_the_package_does_not_import_torch_and_the_names_are_there():
    code = ("import sys, scld_nb as scld; assert 'torch' not in sys.modules and 'scanpy' not in sys.modules; "
            "assert scld.data.InputError is scld.InputError and 'SCLD' in dir(scld); assert not hasattr(scld, 'nonsense')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exported_modules_import_neither_nbdev_nor_fastcore():
    for file in (ROOT / "scld_nb").rglob("*.py"):
        if file.name != "_modidx.py":
            assert not re.search(r"^\s*(from|import) (nbdev|fastcore)", file.read_text(), re.M), file


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Build the documentation site: `python docs/build.py [-o _site]`; needs `pip install -e '.[docs]'`.

The pages are what the repository holds anyway: README.md in front, the chapters with their committed outputs, the
docstrings, the help texts of `scld`, CHANGELOG and CONTRIBUTING. They are laid out in docs/_build/src, which Sphinx reads.
Ends with status 1 if Sphinx has a warning, a broken link for instance.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "docs"
BUILD = HERE / "_build"
TOOLS = ("sphinx", "myst_nb", "numpydoc", "furo", "sphinx-mathjax-offline")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "benchmarks/README.md")
LINK = re.compile(r"""\]\(<?([^)\s>]+)|\bsrc=["']([^"']+)""")
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)


def modules() -> list[str]:
    """All public modules of the package, by name."""
    package = importlib.import_module("scld_nb")
    found = [m.name for m in pkgutil.walk_packages(package.__path__, "scld_nb.")]
    return ["scld_nb", *(name for name in sorted(found) if not any(part.startswith("_") for part in name.split(".")))]


def chapters() -> list[Path]:
    """All notebooks that become pages: tutorials, the front door, and the chapters in their order."""
    tutorials = sorted((ROOT / "nbs/tutorials").glob("[!_.]*.ipynb"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rest = [p for p in (ROOT / "nbs").glob("[!_.]*.ipynb") if p.stem not in ("index", "reproduce")]

    def place(path: Path) -> tuple[str, int, str]:
        """By number; chapters of one number as README's table has them."""
        return path.name[:2], readme.find(f"| [{path.stem}](") % 2**31, path.name

    return [*tutorials, ROOT / "nbs/reproduce.ipynb", *sorted(rest, key=place)]


def menu_entry(name: str) -> str:
    """A chapter in the menu: its number, by which others refer to it, and its title."""
    number = re.match(r"\d+(?=_)", Path(name).name)
    if not number:
        return name
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    title = re.search(r"^# +(.+)$", "".join(cells[0]["source"]), re.M)
    return f"{number[0]} {title[1] if title else Path(name).stem} <{name.removesuffix('.ipynb')}>"


def module_of(notebook: dict) -> str | None:
    """The module that a chapter exports."""
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    found = re.search(r"^#\| *default_exp +(\S+)", code, re.M)
    return f"scld_nb.{found.group(1)}".removesuffix(".__init__") if found else None


def chapter_page(path: Path) -> tuple[str, str | None]:
    """A chapter without the cells and lines that only nbdev reads, and with a link to the reference of its module."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    module, cells = module_of(notebook), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            directives = [line.removeprefix("#|").split()[:1] for line in DIRECTIVE.findall(source)]
            if ["hide"] in directives or ["default_exp"] in directives:
                continue
            source = DIRECTIVE.sub("", source).strip("\n")
            if not source:
                continue
        cells.append(cell | {"source": source})
    where = f"This page is the notebook `{path.relative_to(ROOT).as_posix()}`"
    where += f"; what it exports is listed under {{py:mod}}`{module}`." if module else "."
    cells.insert(1, {"cell_type": "markdown", "id": "docs-where", "metadata": {}, "source": f"*{where}*"})
    return json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False), module


def shorten(value: object, width: int = 160) -> str:
    """A value on one line; memory addresses differ between builds and are left out."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= width else text[: width - 1] + "…"


def reference_page(name: str, chapter: str | None) -> str:
    """Every public name of a module, with autodoc's directive for its kind."""
    module = importlib.import_module(name)
    title = f"``{name}``"
    lines = [title, "=" * len(title), "", f".. py:module:: {name}", "", inspect.getdoc(module) or "", ""]
    if chapter:
        lines += [f"Explained in the chapter :doc:`/{chapter}`.", ""]
    kinds = {n: inspect.isclass(v) or inspect.isroutine(v) for n in module.__all__ for v in [getattr(module, n)]}
    for public in sorted(module.__all__, key=lambda n: not kinds[n]):
        thing = getattr(module, public)
        if name == "scld_nb":
            home = f"{thing.__module__}.{thing.__qualname__}"
            kind = "class" if inspect.isclass(thing) else "function"
            lines += [f".. py:{kind}:: {public}", "   :no-typesetting:", "", f"- ``scld_nb.{public}`` is :py:obj:`{home}`", ""]
        elif inspect.isclass(thing) and issubclass(thing, BaseException):
            lines += [f".. autoexception:: {public}", "   :show-inheritance:", ""]
        elif inspect.isclass(thing):
            lines += [f".. autoclass:: {public}", "   :members:"]
            ancestors = [c.__name__ for c in thing.__mro__[1:]]
            if any(b.__name__.startswith("_") for b in thing.__bases__):  # what a hidden parent does is the class's own
                lines.append("   :inherited-members: " + ", ".join(n for n in ancestors if not n.startswith("_")))
            if any(not b.__name__.startswith("_") and b is not object for b in thing.__bases__):
                lines.append("   :show-inheritance:")
            lines.append("")
        elif inspect.isroutine(thing):
            lines += [f".. autofunction:: {public}", ""]
        else:
            lines += [f".. py:data:: {public}", f"   :value: {shorten(thing)}", ""]
    return "\n".join(lines)


def command_page() -> str:
    """What `scld --help` and the help of each command print."""
    from typer.testing import CliRunner

    from scld_nb.cli import app

    os.environ |= {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1"}
    lines = ["# Command line", "", "What each command prints with `--help`; {doc}`/nbs/40_cli` shows them at work.", ""]
    def named(typer_app) -> list[str]:
        return [c.name or c.callback.__name__.replace("_", "-") for c in typer_app.registered_commands]

    inner = [[group.name, name] for group in app.registered_groups for name in named(group.typer_instance)]
    for command in [[], *([name] for name in named(app)), *inner]:
        done = CliRunner().invoke(app, [*command, "--help"], prog_name="scld")
        if done.exit_code:
            raise RuntimeError(f"scld {' '.join(command)} --help ended with status {done.exit_code}: {done.output}")
        lines += [f"## `{' '.join(['scld', *command])}`", "", "```text", done.output.strip("\n"), "```", ""]
    return "\n".join(lines)


def toctree(caption: str, pages: list[str], depth: int = 1) -> str:
    """A part of the menu."""
    return "\n".join(["```{toctree}", ":hidden:", f":maxdepth: {depth}", f":caption: {caption}", "", *pages, "```", ""]) if pages else ""


def lay_out() -> dict[str, str]:
    """The source of every page, by its path."""
    pages, chapter_of = {}, {}
    for path in chapters():
        name = path.relative_to(ROOT).as_posix()
        pages[name], module = chapter_page(path)
        if module:
            chapter_of[module] = name.removesuffix(".ipynb")
    known = modules()
    for name in known:
        pages[f"api/{name}.rst"] = reference_page(name, chapter_of.get(name))
    menu = "\n".join(f"   {name}" for name in known)
    pages["api/index.rst"] = (
        "Reference\n=========\n\nAll public names, generated from their docstrings. :ref:`genindex` lists them by letter.\n\n"
        f".. toctree::\n   :maxdepth: 2\n\n{menu}\n"
    )
    pages["api/command_line.md"] = command_page()
    for name in PAGES:
        pages[name] = (ROOT / name).read_text(encoding="utf-8")
    guides = sorted(p.relative_to(ROOT).as_posix() for p in HERE.glob("*.md"))
    for name in guides:
        pages[name] = (ROOT / name).read_text(encoding="utf-8")
    names = [p.relative_to(ROOT).as_posix() for p in chapters()]
    pages["index.md"] = "\n\n".join([
        (ROOT / "README.md").read_text(encoding="utf-8"),
        toctree("Tutorials", [n for n in names if n.startswith("nbs/tutorials/")]),
        toctree("Guides", guides),
        toctree("Chapters", [menu_entry(n) for n in names if not n.startswith("nbs/tutorials/")]),
        toctree("Reference", ["api/index", "api/command_line"]),
        toctree("Project", [n.removesuffix(".md") for n in PAGES]),
    ])  # fmt: skip
    return pages


def linked_files(pages: dict[str, str]) -> dict[str, Path]:
    """Pictures and other files of the repository that pages link to: they go along, at the same place."""
    found = {}
    for name, text in pages.items():
        if name.endswith(".ipynb"):
            text = "\n".join(c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for match in LINK.finditer(text):
            target = unquote((match.group(1) or match.group(2)).split("#")[0])
            if not target or re.match(r"[a-z]+:", target):
                continue
            path = (ROOT / Path(name).parent / target).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                relative = path.relative_to(ROOT).as_posix()
                if relative not in pages:
                    found[relative] = path
    return found


def stage(folder: Path) -> None:
    """Write the sources; pages that did not change keep their time, so that Sphinx reads only what is new."""
    pages = lay_out()
    pages["index.md"] = re.sub(r"\]\((?:nbs/index\.ipynb|README\.md)", "](index.md", pages["index.md"])
    files = linked_files(pages)
    for path in [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []:
        if path.relative_to(folder).as_posix() not in {*pages, *files}:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != source.read_bytes():
            shutil.copyfile(source, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "_site", help="folder of the site (default: _site)")
    parser.add_argument("--work", type=Path, default=BUILD, help="folder of intermediate files (default: docs/_build)")
    parser.add_argument("--quiet", action="store_true", help="print warnings only")
    options = parser.parse_args(arguments)
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; pip install -c constraints.txt -e '.[docs]'", file=sys.stderr)
        return 2
    from sphinx.cmd.build import main as sphinx

    sys.path.insert(0, str(ROOT))  # the reference is of the package beside this file
    source, doctrees = options.work / "src", options.work / "doctrees"
    stage(source)
    command = ["-b", "html", "-c", str(HERE), "-d", str(doctrees), "--fail-on-warning", *(["-q"] if options.quiet else [])]
    status = sphinx([*command, str(source), str(options.output)])
    if status == 0:
        print(f"open {options.output / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

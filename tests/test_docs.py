"""The documentation site: built once, every link followed, some pages opened in a browser; and the files about the project."""

import configparser
import functools
import html.parser
import http.server
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
import yaml

import scld_nb

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TOOLS = ("sphinx", "myst_nb", "numpydoc", "furo", "sphinx-mathjax-offline")
MISSING = [name for name in TOOLS if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"the extra docs is not installed: no {', '.join(MISSING)}")
LOADING = {"script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "embed": ("src",), "audio": ("src",),
           "video": ("src", "poster"), "object": ("data",), "track": ("src",), "input": ("src",), "image": ("href", "xlink:href"), "use": ("href", "xlink:href")}  # fmt: skip
# a link element of another kind (next, canonical, search) is not fetched by a browser
FETCHED = {"stylesheet", "icon", "shortcut", "preload", "prefetch", "modulepreload", "manifest", "preconnect", "dns-prefetch", "apple-touch-icon"}
REMOTE = re.compile(r"^\s*(?:[a-z]+:)?//", re.I)


class Page(html.parser.HTMLParser):
    """What a page loads, where it points, and which places it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.ids, self.text = [], [], set(), path.read_text(encoding="utf-8")
        self._styles = False
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.ids |= {attrs[k] for k in ("id", "name") if k in attrs and not (k == "name" and tag != "a")}
        if tag == "link" and FETCHED & set(attrs.get("rel", "").lower().split()):
            self.loads.append(attrs.get("href", ""))
        for key in LOADING.get(tag, ()):
            self.loads += [part.split()[0] for part in attrs.get(key, "").split(",") if part.split()] if key == "srcset" else [attrs[key]] if attrs.get(key) else []
        self.loads += css_loads(attrs.get("style", ""))
        if tag in ("a", "area") and "href" in attrs:
            self.links.append(attrs["href"])
        self._styles = tag == "style"

    def handle_data(self, data):
        if self._styles:
            self.loads += css_loads(data)

    def handle_endtag(self, tag):
        self._styles = False


def css_loads(text: str) -> list[str]:
    """Addresses a style sheet has its reader fetch."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return [m[1] or m[2] for m in re.finditer(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text)]


def broken(pages: dict[Path, Page]) -> list[str]:
    """Links and loaded files that lead nowhere, as "page: link"."""
    found = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.is_file() or (fragment and target in pages and fragment not in pages[target].ids):
                found.append(f"{path.name}: {link}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--quiet", "-o", str(folder / "site"), "--work", str(folder / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site", done.stdout + done.stderr


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in (p.resolve() for p in site[0].rglob("*.html"))}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_tools
def test_the_build_has_no_warning_and_leaves_the_repository_alone(site):
    assert not re.search(r"\b(WARNING|ERROR)\b", site[1])
    assert (site[0] / "index.html").is_file() and (site[0] / "searchindex.js").is_file()


@needs_tools
def test_every_chapter_has_a_page_with_its_outputs(site, build):
    folder = site[0].resolve()
    chapters = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/tutorials").glob("*.ipynb")]
    chapters = [p for p in chapters if p.name != "index.ipynb" and p.name[0] not in "_."]
    assert set(chapters) == set(build.chapters())
    front = (folder / "index.html").read_text(encoding="utf-8")
    for chapter in chapters:
        page = folder / chapter.relative_to(ROOT).with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
        title = re.search(r"^# +(.+)$", "".join(cells[0]["source"]), re.M)[1]
        assert html.unescape(re.sub(r"<[^>]+>", "", re.search(r"<h1>(.*?)<a class", text, re.S)[1])).replace("’", "'") == title
        shown = [c for c in cells if c["cell_type"] == "code" and "#| hide" not in "".join(c["source"])]
        pictures = sum("image/png" in o.get("data", {}) for c in shown for o in c["outputs"])
        pictures += sum("".join(c["source"]).count("![") for c in cells if c["cell_type"] == "markdown")
        assert len(re.findall(r'<img[^>]+src="\.\./(?:\.\./)?_images/', text)) == pictures, chapter.name
        assert text.count('class="cell_output ') == sum(bool(c["outputs"]) for c in shown), chapter.name
        assert not re.search(r"^#\|", text, re.M) and 'class="n">default_exp' not in text
        assert f'href="{page.relative_to(folder).as_posix()}"' in front, f"{chapter.name} is not in the menu"


@needs_tools
def test_every_public_name_has_its_place(site, pages, build):
    folder = site[0].resolve()
    names = build.modules()
    files = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for p in (ROOT / "scld_nb").rglob("*.py")}
    assert set(names) == {n for n in files if not n.rpartition(".")[2].startswith("_")}
    for name in names:
        ids = pages[folder / "api" / f"{name}.html"].ids
        public = importlib.import_module(name).__all__
        assert public and not {f"{name}.{n}" for n in public} - ids, name
    # methods that a class has from a hidden parent, parameters and links between modules
    model, config = (pages[folder / "api" / f"scld_nb.{name}.html"] for name in ("model", "config"))
    assert {f"scld_nb.model.SCLD.{n}" for n in ("train", "sample", "save", "load")} <= model.ids
    assert "<strong>labels_key</strong>" in model.text and "scld_nb.counts.html#scld_nb.counts.CountAutoencoder" in config.links
    assert "--omega" in (folder / "api" / "command_line.html").read_text(encoding="utf-8")


@needs_tools
def test_the_front_page_is_the_readme_with_its_pictures(site, pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = pages[site[0].resolve() / "index.html"]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme)
    assert pictures and sum(load.startswith("_images/") for load in front.loads) == len(pictures)
    for heading in re.findall(r"^## (.+)$", readme, re.M):
        assert heading in front.text


@needs_tools
def test_nothing_is_loaded_from_elsewhere(site, pages):
    remote = [f"{path.name}: {load}" for path, page in pages.items() for load in page.loads if REMOTE.match(load)]
    for sheet in site[0].rglob("*.css"):
        remote += [f"{sheet.name}: {load}" for load in css_loads(sheet.read_text(encoding="utf-8")) if REMOTE.match(load)]
    assert not remote
    assert any("tex-svg-full.js" in load for page in pages.values() for load in page.loads)


@needs_tools
def test_every_link_leads_somewhere(pages):
    assert len(pages) > 60 and not broken(pages)


def test_the_link_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "there.html").write_text('<h1 id="top">x</h1>', encoding="utf-8")
    (tmp_path / "a page.html").write_text(
        '<a href="there.html#top"><a href="https://example.org/x"><a href="#here"><a id="here" href="a%20page.html"><a href="there.html#no">'
        '<a href="gone.html"><img src="gone.png"><script src="//cdn.example.org/x.js"></script><style>@import "gone.css"; b{background:url(gone.gif)}</style>'
        '<link rel="stylesheet" href="https://fonts.example.org/x.css"><link rel="next" href="gone2.html">',
        encoding="utf-8",
    )
    found = {path: Page(path) for path in (p.resolve() for p in tmp_path.glob("*.html"))}
    assert broken(found) == [f"a page.html: {x}" for x in ("there.html#no", "gone.html", "gone.png", "gone.css", "gone.gif")]
    loads = found[(tmp_path / "a page.html").resolve()].loads
    assert [x for x in loads if REMOTE.match(x)] == ["//cdn.example.org/x.js", "https://fonts.example.org/x.css"]


def in_browser(address: str, profile: Path) -> tuple[str, list[str]]:
    """The document after a real browser has read it, and what it wrote to the console; it reaches files and this machine only."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium")


@needs_browser
def test_console_errors_are_seen(tmp_path):
    (tmp_path / "bad.html").write_text('<script>console.error("planted")</script><script>undefined_name()</script>', encoding="utf-8")
    document, console = in_browser((tmp_path / "bad.html").as_uri(), tmp_path / "profile")
    assert "undefined_name" in document and any("planted" in line for line in console) and any("undefined_name is not defined" in line for line in console)


@needs_tools
@needs_browser
@pytest.mark.parametrize("page, wanted", [
    ("index.html", ["Use it on your own cells", "table3"]),
    ("nbs/02_schedules.html", ["Noise schedules", "<mjx-container"]),
    ("api/scld_nb.model.html", ['id="scld_nb.model.SCLD"', "Raises"]),
    ("api/scld_nb.guidance.html", ["<mjx-container"]),
])  # fmt: skip
def test_in_a_real_browser(site, tmp_path, page, wanted):
    document, console = in_browser((site[0].resolve() / page).as_uri(), tmp_path)
    assert not console and all(text in document for text in wanted)
    formulas_are_set(document)


def formulas_are_set(document: str) -> None:
    """Every formula of a page became a picture of it, none is in error, and none was left as text."""
    assert document.count("<mjx-container") == len(re.findall(r'class="math notranslate', document))
    assert "<mjx-merror" not in document and not re.search(r'<g data-mml-node="merror"', document)
    text = re.sub(r"<(script|style|pre|code|mjx-container)\b.*?</\1>", "", document, flags=re.S)
    assert "\\(" not in text and "\\[" not in text and not re.search(r"\$[^$<]+\$", text)


@pytest.mark.slow
@needs_tools
@needs_browser
def test_all_formulas_in_a_real_browser(site, pages, tmp_path):
    for path, page in pages.items():
        if 'class="math notranslate' in page.text:
            document, console = in_browser(path.as_uri(), tmp_path)
            assert not console, path.name
            formulas_are_set(document)


@pytest.fixture(params=["from the disk", "from a server"])
def address(request, site):
    """Where the site is read: as files, or from a web server on this machine."""
    if request.param == "from the disk":
        yield site[0].resolve().as_uri()
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site[0])) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@needs_tools
@needs_browser
@pytest.mark.parametrize("query, first", [("bounded_queue", "api/scld_nb.scorer.html#scld_nb.scorer.bounded_queue"), ("Louvain clusters", None)])
def test_search_in_a_real_browser(site, address, tmp_path, query, first):
    document, console = in_browser(f"{address}/search.html?q={quote(query)}", tmp_path)
    assert not console
    results = document[document.index('id="search-results"') :]
    assert int(re.search(r"found (\d+) page", results)[1]) >= 1
    links = re.findall(r'<li[^>]*><a href="([^"]+)"', results)
    assert links and all((site[0] / urlsplit(link).path).is_file() for link in links)
    assert first is None or urlsplit(links[0])._replace(query="").geturl() == first
    assert ('class="context"' in results) == address.startswith("http:")  # excerpts need a server


def test_the_extra_is_named_pinned_and_apart_from_dev():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    asked = {re.split(r"[<>=!;]", r)[0].lower() for r in parser["DEFAULT"]["docs_requirements"].split()}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert asked <= pinned and not asked & {re.split(r"[<>=!;]", r)[0].lower() for r in parser["DEFAULT"]["dev_requirements"].split()}


def test_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "version", "license"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["version"] == scld_nb.__version__
    paper = citation["references"][0]
    assert {"type", "title", "authors"} <= set(paper) and "2312.14220" in paper["url"] and paper["year"] == 2023
    assert [a["family-names"] for a in paper["authors"]] == ["Wang", "Li", "Di", "Chen"]
    for person in [*citation["authors"], *paper["authors"]]:
        assert set(person) in ({"name"}, {"family-names", "given-names"}) and all(isinstance(v, str) and v for v in person.values())


def test_one_version_everywhere():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    version = parser["DEFAULT"]["version"]
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    numbered = [(name, day) for name, day in headings if name != "Unreleased"]
    assert numbered[0][0] == version == scld_nb.__version__
    assert all(day == "unreleased" or date.fromisoformat(day) for _, day in numbered)


def test_the_guide_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"docs", "readme", "test"} <= set(re.findall(r"make (\w+)", text))
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in re.findall(r"`?make (docs|readme|test)\b", text))
    named = [n for n in re.findall(r"`([\w./]+\.(?:md|py|ipynb|ini|txt|cff|toml))`", text) if "NN" not in n and "NAME" not in n]
    assert len(named) > 8 and all((ROOT / n).exists() for n in named), [n for n in named if not (ROOT / n).exists()]
    from scld_nb.baselines.base import Baseline, require_memory

    assert callable(require_memory) and all(hasattr(Baseline, n) for n in ("_learn", "_draw", "_training_steps", "_note_loss", "_seeded", "steps_published"))

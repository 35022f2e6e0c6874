"""The page: verdicts, pictures, nothing from outside, and a real browser that opens it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import planted_cells
from PIL import Image

from scld_nb import report as module
from scld_nb.data import InputError
from scld_nb.evaluation import COLUMNS, Report, evaluate
from scld_nb.report import correlation_figure, distance_figure, gene_figure, html_page, verdict, write_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def record(metric, value, control, cluster="all", space="log1p", **more):
    found = dict.fromkeys(COLUMNS) | {"dataset": "d", "method": "m", "seed": 0, "space": space, "metric": metric, "cluster": cluster}
    return found | {"n": 50, "value": value, "control": control} | more


@pytest.fixture(scope="module")
def found():
    real, fake, train = (planted_cells(n, 30, seed=s) for n, s in ((80, 1), (80, 2), (120, 3)))
    fake.uns["scld"] = {"scale": "counts", "method": "<b>planted & more</b>"}
    report = evaluate(real, fake, train=train, labels_key="cell_type", min_cluster=10, suite=True, n_trees=10, n_jobs=1, dataset="set", progress=False)
    report.tsne()
    return report


@pytest.fixture(scope="module")
def page(found):
    return html_page(found)


@pytest.mark.parametrize(
    "metric, value, control, null_sd, word",
    [
        ("rf_auc", 0.53, 0.50, None, "like real"),
        ("rf_auc", 0.53, 0.50, 0.01, "like real"),
        ("rf_auc", 0.60, 0.50, None, "close"),
        ("rf_auc", 0.40, 0.50, None, "close"),
        ("rf_auc", 0.60, 0.50, 0.04, "like real"),
        ("combined", 0.75, 0.50, 0.01, "off"),
        ("rf_auc", 0.48, 0.60, None, "like real"),
        ("rf_auc", 0.40, 0.60, None, "close"),
        ("rf_auc", 0.55, 0.46, None, "close"),
        ("rf_auc", 0.602, 0.469, 0.021, "close"),
        ("rf_auc", 0.48, 0.46, None, "like real"),
        ("rf_auc", 0.36, 0.46, None, "close"),
        ("coverage", 0.99, 0.95, None, "like real"),
        ("coverage", 0.86, 0.95, None, "close"),
        ("coverage", 0.60, 0.95, None, "off"),
        ("ks_zeros", 0.10, 0.02, None, "close"),
        ("ks_zeros", 0.01, 0.02, None, "like real"),
        ("mmd_biased", 0.054, 0.05, None, "like real"),
        ("mmd_biased", 0.07, 0.05, None, "close"),
        ("wasserstein1", 80.0, 50.0, None, "off"),
        ("density", 1.3, 1.0, None, "close"),
        ("density", 0.4, 1.0, None, "off"),
        ("memorisation", 0.40, 0.50, None, "like real"),
        ("memorisation", 0.58, 0.50, None, "close"),
        ("memorisation", 0.90, 0.50, None, "off"),
        ("distance_to_train", 8.0, 10.0, None, "close"),
        ("distance_to_train", 12.0, 10.0, None, "like real"),
        ("mmd_biased", 0.05, 0.0, None, ""),
        ("mmd_unbiased_squared", 0.1, 0.0, None, ""),
        ("lisi", 1.0, 2.0, None, ""),
        ("rf_auc", 0.6, None, None, ""),
        ("unheard_of", 0.6, 0.5, None, ""),
    ],
)
def test_verdicts(metric, value, control, null_sd, word):
    assert verdict({"metric": metric, "value": value, "control": control, "null_sd": null_sd}) == word


def test_every_measure_of_the_suite_has_a_name(found):
    assert {r["metric"] for r in found.records} <= set(module._KNOWN)
    assert {m.section for m in module._KNOWN.values()} == set(module._SECTIONS)


def test_page_refers_to_nothing_outside(page):
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|<script|<link|@import|url\(|<iframe|<object", words, re.I)
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)


def test_pictures_decode(page):
    for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        picture.load()
        assert picture.width > 600 and len(np.unique(np.asarray(picture))) > 20


def test_rows_are_there(found, page):
    pooled = [r for r in found.records if r["cluster"] == "all"]
    tables = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)
    assert sum(t.count("<tr>") for t in tables[:-1]) == len(pooled) and tables[-1].count("<tr>") == 3
    for r in pooled:
        assert f"<b>{module._number(r['value'], r['metric'])}</b>" in page
    assert "How to read this page" in page and "Privacy" in page and "proof of privacy" in page
    assert "&lt;b&gt;planted &amp; more&lt;/b&gt;" in page and "<b>planted" not in page  # names are text, not markup


def test_tally_counts_the_verdicts(found, page):
    words = [verdict(r) for r in found.records if r["cluster"] == "all"]
    for word in ("like real", "close", "off"):
        assert f'<b>{words.count(word)}</b><span class="soft">{word}</span>' in page


def test_page_of_a_report_without_suite_or_controls():
    page = html_page(Report([record("rf_auc", 0.9, None), record("unheard_of", 1.0, 2.0)], {}, ["a <note>"], {}))
    assert "<img" not in page and "Other measures" in page and "unheard_of" in page and "a &lt;note&gt;" in page
    assert "Copying was not tested: that takes the suite, training cells, and" in page and "Label by label" not in page and "real cells the same judge" not in page


def test_copying_is_not_called_harmless():
    page = html_page(Report([record("memorisation", 0.9, 0.5)], {}, [], {}), title="My <own>")
    assert "may lie close to training cells" in page and "<h1>My &lt;own&gt;</h1>" in page and "No sign of" not in page


def test_figures(found):
    left, right = gene_figure(found.details).axes
    assert left.get_xscale() == left.get_yscale() == "log" and right.get_ylabel() == "share of zeros"
    maps = correlation_figure(found.details).axes
    assert np.allclose(maps[0].images[0].get_array(), found.details["correlation"]["real"])
    assert maps[0].images[0].get_clim() == maps[1].images[0].get_clim()
    assert len(distance_figure(found.details).axes[0].patches) == 2
    for draw, what in ((gene_figure, "genes"), (correlation_figure, "correlation"), (distance_figure, "with train")):
        with pytest.raises(InputError, match=what):
            draw({})


def test_file_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = write_html(found, tmp_path / "new" / "page.html")
    before = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["page.html"] and oct(path.stat().st_mode)[-3:] == "644"
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_html(found, path, title="other")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="ends in .html"):
        write_html(found, tmp_path / "page.pdf")
    with pytest.raises(InputError, match="no results"):
        html_page(Report([], {}, [], {}))


def test_same_page_from_the_file(found, page, tmp_path):
    found.save(tmp_path)
    assert html_page(Report.load(tmp_path)) == page


def open_page(path, profile) -> str:
    """The document after a real browser has read it; every address but the file itself is unreachable."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_in_a_real_browser(found, page, tmp_path):
    path = write_html(found, tmp_path / "page.html")
    document = open_page(path, tmp_path / "one")
    assert document.count("<tr>") == page.count("<tr>") and "Can a judge tell them apart?" in document
    # the same page with a script that says what the browser made of it
    script = """<script>onload = () => { const seen = {
      images: [...document.images].map(i => i.complete && i.naturalWidth), rows: document.querySelectorAll("tbody tr").length,
      requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name),
      wide: document.documentElement.scrollWidth > innerWidth, dot: getComputedStyle(document.querySelector(".v.like")).borderRadius};
      document.body.textContent = JSON.stringify(seen) }</script>"""
    spy = tmp_path / "spy.html"
    spy.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</main>", "</main>" + script))
    seen = json.loads(re.search(r"<body>(.*)</body>", open_page(spy, tmp_path / "two"), re.S).group(1))
    assert len(seen["images"]) == 4 and all(width > 600 for width in seen["images"])
    assert seen["rows"] == len(re.findall("<tr>", page)) - page.count("<thead>") and seen["requests"] == []
    assert not seen["wide"] and seen["dot"] != "0px"


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_hardest_judge_is_named_with_its_control():
    judges = [record("rf_auc", 0.6, 0.5), record("combined", 0.8, 0.51, space="counts"), record("rf_auc_depth5", 0.9, 0.5), record("strict_forest", 0.7, 0.5)]
    sentence = "The judge that tells them apart best (judge of everything, counts) has an AUC of 0.800; for real cells against real cells the same judge has 0.510."
    assert sentence in html_page(Report(judges, {}, [], {}))


@pytest.mark.parametrize("metric, bad", [("memorisation", 0.9), ("membership_auc", 0.9), ("copied", 0.9), ("nndr", 0.1)])
def test_one_sign_of_copying_is_enough(metric, bad):
    good = {"memorisation": 0.5, "membership_auc": 0.5, "copied": 0.05, "nndr": 0.9}
    pages = [html_page(Report([record(m, v, good[m]) for m, v in (good | change).items()], {}, [], {})) for change in ({}, {metric: bad})]
    assert "No sign of" in pages[0] and "may lie close" in pages[1] and "No sign of" not in pages[1]


def test_a_row_has_value_real_and_shuffled_in_this_order_and_a_mark_where_the_control_is_off():
    page = text_of(html_page(Report([record("rf_auc", 0.61, 0.55, negative=0.99, sd=0.02, flag="control 0.550 outside")], {}, [], {"n": 1234})))
    assert "0.610 ± 0.020 0.550 † 0.990 log1p 50" in page and "1,234 cells a side" in page
    assert "†" not in text_of(html_page(Report([record("rf_auc", 0.61, 0.5)], {}, [], {}))).replace("A † marks", "")


def test_label_by_label_is_the_log_space_with_the_control_in_brackets():
    records = [record("rf_auc", 0.5, 0.5), record("rf_auc", 0.9, 0.91, cluster="<i>B", space="counts20k"), record("rf_auc", 0.71, 0.52, cluster="<i>B", negative=0.99)]
    page = html_page(Report(records, {}, [], {}))
    assert "<i>B" not in page and "&lt;i&gt;B" in page
    assert "0.710 (0.520)" in re.sub(r"\( ", "(", text_of(page).split("Label by label")[1]) and "0.900" not in page


def test_names_of_measures_are_text():
    assert "<i>mine" not in html_page(Report([record("<i>mine", 1.0, 2.0)], {}, [], {}))


def test_what_the_pictures_of_the_suite_show(found):
    genes = found.details["genes"]
    for axes, column in zip(gene_figure(found.details).axes, ("variance", "zeros")):
        for drawn, name in zip(axes.collections, ("real", "synthetic")):
            mean, values = np.array(genes[name]["mean"]), np.array(genes[name][column])
            some = (mean > 0) & (values > 0) if column == "variance" else mean > 0
            assert drawn.get_label() == name and np.allclose(drawn.get_offsets(), np.c_[mean, values][some])
    low, high = correlation_figure(found.details).axes[0].images[0].get_clim()
    assert low == -high and 0.2 <= high <= 1
    flat = {"correlation": {"genes": ["a", "b"], "real": np.eye(2), "synthetic": np.eye(2)}}
    assert correlation_figure(flat).axes[0].images[0].get_clim() == (-0.2, 0.2)
    near, far = distance_figure(found.details).axes[0].patches
    assert list(near.get_data().values) == found.details["distances"]["train"] and "training" in near.get_label()
    assert list(far.get_data().values) == found.details["distances"]["heldout"] and "held-out" in far.get_label()


def test_the_short_ending_is_accepted(tmp_path):
    assert write_html(Report([record("rf_auc", 0.6, 0.5)], {}, [], {}), tmp_path / "page.htm").exists()


def test_doubts_about_the_cells_come_first(found):
    told = Report(found.records, found.controls, found.notes, found.settings | {"doubts": ["the real <cells> are odd"]})
    page = html_page(told)
    assert "The real &lt;cells&gt; are odd." in page and page.index("Before you read on") < page.index("How to read this page")
    assert "Before you read on" not in html_page(found) and found.settings["doubts"] == []


def test_few_real_cells_of_a_label_get_no_verdict():
    records = [record("tstr", 0.1, 0.9, cluster="few"), record("tstr", 0.8, 0.8, cluster="many")]
    page = html_page(Report(records, {"how": ""}, [], {"dataset": "d", "method": "m", "n": 50, "seed": 0, "cells": {"few": 9, "many": 10}}))
    rows = page[page.index("Label by label"):].split("<tr>")
    few, many = (next(row for row in rows if row.startswith(f"<td>{name}")) for name in ("few", "many"))
    assert "9 real cells" in few and "off" not in few and "–" in few and "like real" in many


def test_forests_of_each_label_are_shown_in_the_space_there_is():
    records = [record("rf_auc", 0.55, 0.5, cluster="a", space="counts20k"), record("rf_auc", 0.55, 0.5, space="counts20k")]
    assert "Label by label" in html_page(Report(records, {"how": ""}, [], {"dataset": "d", "method": "m", "n": 50, "seed": 0}))

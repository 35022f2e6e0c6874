"""Settings of Sphinx. `docs/build.py` lays out the pages and starts it; nothing is loaded from the network at view time."""

import re
import typing
from importlib.metadata import files

from sphinx.util.nodes import make_refnode

import scld_nb

project = "scld_nb"
author = "The scld_nb developers"
copyright = "2026 onwards, the scld_nb contributors"
version = release = scld_nb.__version__
language = "en"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "myst_nb"]
root_doc = "index"

# One file with all of TeX and its glyphs as outlines, copied beside the pages: no font and no further script is fetched.
mathjax = next(f for f in files("sphinx-mathjax-offline") or [] if f.name == "tex-svg-full.js")
mathjax_path = mathjax.name

html_theme = "furo"
html_title = f"scld_nb {release}"
html_static_path = ["_static", str(mathjax.locate())]
html_css_files = ["custom.css"]
html_js_files = ["from_disk.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}

nb_execution_mode = "off"  # pages show the outputs that are committed
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["mystnb.unknown_mime_type"]

default_role = "py:obj"  # `name` in a docstring is a link where the name is documented, and code elsewhere
nitpicky = True  # a name of this package that leads nowhere is a warning; names of other packages are not linked
nitpick_ignore_regex = [(r"py:.*", r"(?!scld_nb\b).*")]
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_validation_checks = set()


def prose_returns(app, what, name, obj, options, lines) -> None:
    """Let a Returns section say in a sentence what comes back: numpydoc would take each of its lines for a type."""
    for i in range(1, len(lines)):
        if lines[i - 1].strip() in ("Returns", "Yields") and re.fullmatch(r"\s*-{3,}\s*", lines[i]):
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].strip()), len(lines))
            body = lines[i + 1 : end]
            if len(body) > 1 and not any(line.startswith(" ") for line in body):
                lines[i + 1 : end] = [" ".join(body)]
            return


def dollar_math(app, what, name, obj, options, lines) -> None:
    """Formulas stand between dollars in docstrings, as in the chapters."""

    def role(match: re.Match) -> str:
        if match["literal"]:
            return match[0]
        before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
        return ("\\ " if before.isalnum() else "") + f":math:`{match['tex']}`" + ("\\ " if after.isalnum() or after == "`" else "")

    text = re.sub(r"^( *)\$\$(.+?)\$\$ *$", r"\1.. math::\n\n\1    \2\n", "\n".join(lines), flags=re.M)
    lines[:] = re.sub(r"(?P<literal>(`+)(?:(?!\2).)*\2)|\$(?P<tex>[^$`]+)\$", role, text).split("\n")


def literal_bars(app, what, name, obj, options, lines) -> None:
    """|x| is an absolute value; reStructuredText would look for a substitution of that name."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"(`+)(?:(?!\1).)*\1|\|([^|`]+)\|", lambda m: m[0] if m[1] else rf"\|{m[2]}\|", line)


def public_bases(app, name, obj, options, bases) -> None:
    """Private parents have no page."""
    bases[:] = [b for b in bases if not getattr(b, "__name__", "").startswith("_")] or [object]


def plain_annotations(app, obj, bound_method) -> None:
    """Of `Annotated[type, how typer shall ask for it]` the reference shows the type."""
    hints = getattr(obj, "__annotations__", {})
    for key, hint in list(hints.items()):
        if typing.get_origin(hint) is typing.Annotated:
            hints[key] = typing.get_args(hint)[0]


def by_last_name(app, env, node, contnode):
    """`diffusion_loss` in the text of another module: a link, if one module only has that name and no parameter could be meant."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or node.get("reftype") != "obj" or not re.fullmatch(r"(?=.*[A-Z_])\w+", target):
        return None
    found = [(n, o) for n, o in env.domains["py"].objects.items() if n.endswith(f".{target}") and n.count(".") > 1 and not o.aliased]
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", dollar_math, priority=99)
    app.connect("autodoc-process-docstring", prose_returns, priority=100)
    app.connect("autodoc-process-docstring", literal_bars, priority=101)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("missing-reference", by_last_name)
    app.connect("autodoc-before-process-signature", plain_annotations)

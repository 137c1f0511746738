"""Charts: curves and counts -> inline SVG in the colours of the page.

    Curve, Curve   ->  matplotlib  ->  <svg class="chart" viewBox="0 0 440 250">... stroke: var(--c1) ...</svg>

matplotlib draws in a few stand-in colours, which become CSS variables, so that one drawing is light, dark and printed.
Texts stay texts in the font of the page. Nothing in a drawing depends on the time or on chance.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from lit_phi2.report.curves import Array, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 440, 250  # in units of the SVG
MAX_POINTS = 400  # of a curve; of more, the means of equal parts are drawn

# Stand-in colours, and the CSS variables that replace them.
_INK, _RULE, _FIRST, _SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--muted)", _RULE: "var(--rule)", _FIRST: "var(--c1)", _SECOND: "var(--c2)"}
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so places are the same everywhere
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "ytick.major.size": 0,
    "path.simplify": True,
}


def line_chart(name: str, description: str, train: Curve | None, val: Curve | None) -> Markup:
    """A value over optimizer steps: of every step in one colour, of the validations in the other.

    Args:
        name: of the drawing, once on the page.
        description: what it shows, for who cannot see it.
        train: of every step.
        val: of every validation; the first is that of the base.
    """

    def draw(axes: "Axes") -> None:
        if train is not None:
            thin = thinned(train)
            axes.plot(thin.steps, thin.values, color=_FIRST, lw=1.1, alpha=0.75)
        if val is not None:
            axes.plot(
                val.steps, val.values, color=_SECOND, lw=2, marker="o" if len(val) <= 40 else "", ms=4.5, clip_on=False
            )
            if len(val) > 1 and val.steps[0] == 0:
                axes.axhline(val.values[0], color=_SECOND, lw=1, ls=(0, (2, 3)))
        axes.set_xlabel("optimizer step")
        axes.locator_params(axis="x", integer=True, nbins=7)
        axes.locator_params(axis="y", nbins=5)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlim(left=0)

    return _chart(name, description, draw)


def thinned(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """A curve of at most so many points: means of equally many neighbours.

    >>> thin = thinned(Curve(np.arange(1, 5), np.array([1.0, 3.0, 5.0, 9.0])), limit=2)
    >>> thin.steps.tolist(), thin.values.tolist()
    ([1.5, 3.5], [2.0, 7.0])
    """
    if len(curve) <= limit:
        return curve
    ends = np.linspace(0, len(curve), limit + 1).astype(int)[:-1]
    sizes = np.diff([*ends, len(curve)])
    return Curve(np.add.reduceat(curve.steps, ends) / sizes, np.add.reduceat(curve.values, ends) / sizes)


def histogram(name: str, description: str, label: str, values: list[Array], bins: Array) -> Markup:
    """How often values occur: one series filled, a second beside it.

    Args:
        name: of the drawing, once on the page.
        description: what it shows, for who cannot see it.
        label: of the horizontal axis.
        values: of one or two series.
        bins: edges.
    """

    def draw(axes: "Axes") -> None:
        for series, color in zip(values, (_FIRST, _SECOND), strict=False):
            counts, _ = np.histogram(series, bins)
            axes.stairs(counts, bins, fill=True, color=color, alpha=0.28, lw=0)
            axes.stairs(counts, bins, color=color, lw=1.4)
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", integer=True, nbins=8)
        axes.locator_params(axis="y", integer=True, nbins=5)
        axes.set_xlim(bins[0], bins[-1])

    return _chart(name, description, draw)


def _chart(name: str, description: str, draw: Callable[..., None]) -> Markup:
    import matplotlib as mpl  # slow to import
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # the settings of the user would change the drawing
        mpl.rcParams.update({**_SETTINGS, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.105, 0.185, 0.875, 0.775))
        draw(axes)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(to_inline(buffer.getvalue(), name, description))


def to_inline(svg: bytes, name: str, description: str) -> str:
    """An SVG document as a part of a page.

    Args:
        svg: of matplotlib.
        name: begins every id, so that those of several drawings differ.
        description: for who cannot see it.
    """
    root = ElementTree.fromstring(svg)
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        tag = element.tag.rpartition("}")[2]
        if tag in ("metadata", "style"):  # the style is for every element, also those of the page
            parents[element].remove(element)
        if style := element.get("style"):
            element.set("style", _page_style(style))
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF).replace("#", f"#{name}-"))
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", _SVG)
    text = ElementTree.tostring(root, "unicode")
    used = set(re.findall(r'#([\w-]+)[")]', text))
    text = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", text)
    return re.sub(r"\n\s*", "\n", text).replace(f' xmlns="{_SVG}"', "")


def _page_style(style: str) -> str:
    for color, variable in _VARIABLES.items():
        style = style.replace(color, variable)
    return re.sub(r"font:\s*([\d.]+)px[^;]*", r"font-size: \1px", style)

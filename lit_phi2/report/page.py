"""Page: the folder of a run -> report.html, one page that needs nothing else.

    Content, template.html.jinja, style.css   ->   report.html

No script, no font and no request: a Content-Security-Policy in the page forbids them. The same files give the same
bytes. Every value passes through `to_html` on its way into the template, and is escaped.
"""

import functools
from pathlib import Path

import jinja2
from markupsafe import Markup

from lit_phi2 import __version__
from lit_phi2.report.audits import MEANINGS
from lit_phi2.report.content import Content, read_content
from lit_phi2.report.metric_table import GROUP_METRICS, SYSTEMS
from lit_phi2.report.summary import plural
from lit_phi2.report.text import to_attribute, to_html
from lit_phi2.utils.files import atomic_write

REPORT_FILE = "report.html"

_FOLDER = Path(__file__).parent


def write_report(folder: Path, file: Path) -> None:
    """Write the page about a run; a reader finds the old page or the new one, complete.

    Args:
        folder: of the run.
        file: to write.

    Raises:
        InputError: the folder has nothing of a run, or one of its files is damaged.
        OSError: the disk is full or cannot be written.
    """
    atomic_write(file, render(read_content(folder)))


def render(content: Content) -> str:
    """The page as HTML."""
    examples = {"placeholder": "[CLAIM_NUMBER_1]", "override": "\u202e"}  # Jinja passes no constant through to_html
    style = Markup((_FOLDER / "style.css").read_text("utf-8"))
    return _template().render(page=content, style=style, version=__version__, **examples)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=to_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"attribute": to_attribute, "number": _number}
    environment.globals |= {
        "systems": SYSTEMS,
        "meanings": MEANINGS,
        "group_metrics": GROUP_METRICS,
        "plural": plural,
    }
    return environment.get_template("template.html.jinja")


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}"

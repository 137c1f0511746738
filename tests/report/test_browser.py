"""report.html in a real browser, if one is installed: no error, no request, no wider than a phone."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.report.page import write_report
from report.test_page import HOSTILE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="not run: no Chromium here"),
]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Opens a page without a window; the DOM is on standard output, the console on standard error."""

    def run(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        assert BROWSER is not None
        settings = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        # The browser's own services find no host.
        quiet = ["--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command = [BROWSER, *settings, *quiet, "--enable-logging=stderr", "--v=0", "--dump-dom", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)

    return run


def test_a_browser_finds_no_error_and_no_request(
    new_run: Callable[..., Path], tmp_path: Path, browse: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """With hostile records; a page that does load something shows that it would be seen."""
    page, log = tmp_path / "report.html", tmp_path / "net.json"
    write_report(new_run(lambda place: f"{place} {HOSTILE}"), page)
    result = browse(page, f"--log-net-log={log}")
    assert result.returncode == 0
    assert "<footer>" in result.stdout, "to the end"
    assert "CONSOLE" not in result.stderr
    assert requests(log) == set()

    loading = tmp_path / "loading.html"
    image = '<img src="http://127.0.0.1:9/a.png"><script>document.title = 1</script></body>'
    loading.write_text(page.read_text("utf-8").replace("</body>", image), "utf-8")
    assert browse(loading).stderr.count("Content Security Policy") >= 2, "the policy of the page forbids both"
    loading.write_text(f"<body>{image}<script>console.error('seen')</script>")
    result = browse(loading, f"--log-net-log={log}")
    assert "CONSOLE" in result.stderr
    assert requests(log) == {"http://127.0.0.1:9/a.png"}


def requests(log: Path) -> set[str]:
    """Every URL that a page asked for; what the browser itself asks for has no origin."""
    text = log.read_text("utf-8")
    complete = text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}"  # a browser that ends at once
    found = [event.get("params", {}) for event in json.loads(complete)["events"]]
    return {each["url"] for each in found if each.get("initiator", "not an origin") != "not an origin"}


def test_the_page_is_no_wider_than_a_phone(
    new_run: Callable[..., Path], tmp_path: Path, browse: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Wide tables scroll in their own boxes, and a word without an end is broken."""
    page, frame = tmp_path / "report.html", tmp_path / "frame.html"
    write_report(new_run(lambda place: f"{place} {'W' * 200}"), page)
    content = html.escape(page.read_text("utf-8"))
    script = (
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "const boxes = [...page.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length;"
        "document.querySelector('p').textContent = `${page.clientWidth} ${page.scrollWidth} ${boxes}`;"
    )
    frame.write_text(
        f'<iframe srcdoc="{content}" style="width: 390px; height: 800px; border: 0"></iframe><p></p>'
        f"<script>document.querySelector('iframe').onload = () => {{ {script} }}</script>",
        "utf-8",
    )
    measured = re.search(r"<p>(\d+) (\d+) (\d+)</p>", browse(frame).stdout)
    assert measured is not None
    inner, content_width, scrolling = map(int, measured.groups())
    assert content_width == inner <= 390
    assert scrolling >= 2

"""Notebooks in JupyterLab and pages of the website, in a headless Chromium, on loopback only."""

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from small import served

from paperlib.experiments import FIGURES

psutil = pytest.importorskip("psutil", reason="no psutil: pip install 'paperlib[test]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install 'paperlib[browser]'"
)

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build/site"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
STARTED_SECONDS = 120
SHOWN_SECONDS = 60
NOTEBOOK_SECONDS = 420
IMAGES = ".jp-OutputArea-output img"
# Every cell in the page, nothing saved by itself, nothing asked of the network.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium"),
    pytest.mark.timeout(NOTEBOOK_SECONDS + 180),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SHOWN_SECONDS * 1000)
    yield context.new_page()
    context.close()


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started: kernels, and workers of kernels."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.terminate()
    for member in psutil.wait_procs(family, timeout=10)[1]:
        member.kill()
    process.wait(10)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks; gives the address of a notebook by its path."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name, settings in SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = os.urandom(16).hex()
    variables = {
        "PYTHONPATH": str(ROOT),
        "PAPERLIB_PROFILE": "auto",
        "PAPERLIB_RESULTS": str(ROOT / "results"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_TOKEN": token,
    }
    options = ("--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}")
    limits = (f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, *limits],
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + STARTED_SECONDS
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < until, "JupyterLab has not started"
            time.sleep(0.2)
        yield lambda path: f"http://127.0.0.1:{port}/lab/tree/notebooks/{path}?reset&token={token}"
    finally:
        end(process)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def run_all(page, address: str) -> None:
    """Open a notebook, run all its cells, and check that each has run and none has failed."""
    page.goto(address)
    page.get_by_text("| Idle").wait_for(timeout=STARTED_SECONDS * 1000)  # the kernel, connected
    cells = page.locator(".jp-NotebookPanel .jp-CodeCell")
    page.locator(".jp-NotebookPanel .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    until = time.monotonic() + NOTEBOOK_SECONDS
    failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    while True:
        prompts = cells.locator(".jp-InputPrompt").all_inner_texts()
        assert not failed.count(), failed.first.inner_text()[-2000:]
        if all(prompt.strip("[]: ").isdigit() for prompt in prompts):
            return
        assert time.monotonic() < until, f"cells still running: {prompts}"
        page.wait_for_timeout(500)


def shown(page, selector: str, before: Sequence[str] = ()) -> list[str]:
    """The addresses of the images, once all have pixels and they differ from those before."""
    images = page.locator(selector)
    loaded = "all => all.every(i => i.complete && i.naturalWidth > 0) ? all.map(i => i.src) : []"
    until = time.monotonic() + SHOWN_SECONDS
    while not (addresses := images.evaluate_all(loaded)) or addresses == before:
        assert time.monotonic() < until, f"no new images: {addresses}"
        page.wait_for_timeout(200)
    return addresses


@pytest.mark.parametrize(
    ("path", "pictures"), [("tour.ipynb", 2), ("tradeoff-2020/figure-2.ipynb", 1)]
)
def test_notebook_runs_in_jupyterlab(page, lab, path, pictures):
    run_all(page, lab(path))
    assert len(shown(page, IMAGES)) >= pictures


def test_every_choice_of_explore_changes_the_picture(page, lab):
    run_all(page, lab("explore.ipynb"))
    picture = shown(page, IMAGES)
    for name in ("x", "y", "run", "runs of"):
        choice = page.locator(f".jupyter-widgets:has(> label:text-is('{name}')) > select")
        chosen = choice.evaluate("select => select.selectedIndex")
        choice.select_option(index=0 if chosen else 1)
        picture = shown(page, IMAGES, picture)


def links(name: str) -> tuple[list[str], set[str]]:
    """Where a page of the site links to, and the places in it that can be linked to."""
    text = (SITE / name).read_text()
    hrefs = re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text)
    return [html.unescape(href) for href in hrefs], {"", *re.findall(r'\bid="([^"]+)"', text)}


@pytest.fixture(scope="module")
def site():
    """The address of the website, served on loopback."""
    if not (SITE / "index.html").exists():
        pytest.skip("no website: make site")
    with served(SITE) as address:
        yield f"{address}/"


def pages() -> list[str]:
    found = (path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    return sorted(name for name in found if not name.startswith("_static"))


def test_links_of_the_site_lead_somewhere(site):
    found = {name: links(name) for name in pages()}
    broken = []
    for name, (hrefs, _) in found.items():
        for href in hrefs:
            address, fragment = urldefrag(urljoin(site + name, href))
            if address.startswith(site):
                target = unquote(urlsplit(address).path).lstrip("/")
                _, places = found.get(target, ([], {""}))
                if not (SITE / target).is_file() or unquote(fragment) not in places:
                    broken.append((name, href))
    assert len(found) > 20
    assert not broken


def test_the_page_of_every_figure_offers_pdf_and_csv(site):
    for name in {figure.notebook for figure in FIGURES.values()}:
        hrefs, _ = links(f"notebooks/{name}.html")
        assert {".pdf", ".csv"} <= {Path(href).suffix for href in hrefs}, name


def background(page) -> float:
    """Brightness of the page's background, 0 to 255."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, color[color.index("(") + 1 : -1].split(",")[:3])) / 3


def test_pages_of_the_site(browser, site):
    wrong = []

    def console(message):
        # A page that is left early is asked for favicon.ico instead of the icon that it names.
        if message.type == "error" and not message.location["url"].endswith("favicon.ico"):
            wrong.append((message.text, message.location["url"]))

    def request(request):
        if not request.url.startswith((site, "data:")):
            wrong.append(("outside", request.url))

    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", console)
        page.on("request", request)
        page.on("pageerror", lambda error: wrong.append((page.url, str(error))))
        page.on("requestfailed", lambda request: wrong.append(("failed", request.url)))
        for name in pages():
            if name == "index.html":  # it only leads to docs/index.html
                continue
            page.goto(site + name)
            page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => 0) : 0")
            brightness = {}
            for width in (1280, 400):
                for scheme in ("light", "dark"):
                    page.set_viewport_size({"width": width, "height": 900})
                    page.emulate_media(color_scheme=scheme)
                    reached = page.evaluate("document.documentElement.scrollWidth")
                    if reached > width:
                        wrong.append((name, scheme, f"{reached} pixels wide at {width}"))
                    brightness[scheme] = background(page)
            if not brightness["dark"] < 80 < 200 < brightness["light"]:
                wrong.append((name, brightness))
            for image in page.locator("img").all():
                image.scroll_into_view_if_needed()  # some are loaded only then
                if not image.evaluate("i => i.decode().then(() => i.naturalWidth, () => 0)"):
                    wrong.append((name, image.get_attribute("src")))
    assert not wrong


def test_the_first_page_is_that_of_the_documentation(page, site):
    page.goto(site)
    page.wait_for_url("**/docs/index.html")
    assert page.locator("h1").inner_text().startswith("Two papers on pruning")

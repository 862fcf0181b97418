"""A real Chromium, a bare page, and a real Jupyter in its own folders. Nothing outside this machine resolves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import BrowserContext, Error, Page, Request, sync_playwright

from tests.browser.shown import IS_LIGHT, turn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost",
]
LOCAL = ("http://localhost:", "ws://localhost:", "data:", "blob:", "about:")
STARTUP = 120  # seconds: a shared machine may be slow


@dataclass
class Visit:
    """A page, with its errors and its requests to other machines."""

    page: Page
    errors: list[Error] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.on("request", self._note)

    def _note(self, request: Request) -> None:
        if not request.url.startswith(LOCAL):
            self.outside.append(request.url)


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """Start Chromium once for this folder, with a profile that keeps the compiled code of JupyterLab."""
    # not for the whole session: Playwright's event loop would go on during the tests of notebooks
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: install the system's chromium package")
    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def opened(browser: BrowserContext, width: int, height: int) -> Page:
    """A new page of this size."""
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    return page


@pytest.fixture
def bare(browser: BrowserContext) -> Iterator[Visit]:
    """An empty page with the harness."""
    page = opened(browser, 820, 700)
    visit = Visit(page)
    page.goto("about:blank")
    page.add_script_tag(path=Path(__file__).parent / "harness.js")
    yield visit
    page.close()


@contextlib.contextmanager
def served(module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Start a server, ``"jupyterlab"`` or ``"notebook"``; yields its address and the folder that it serves."""
    notebooks, state = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("state")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {f"JUPYTER_{kind}_DIR": str(state / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(state / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += ["--LabApp.news_url=None", f"--ServerApp.root_dir={notebooks}"]
    notices = state / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notices.parent.mkdir(parents=True)
    notices.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # otherwise a question covers the charts
    log = (state / "log").open("w")
    server = subprocess.Popen(
        command,
        env=os.environ | folders | {"IPYTHONDIR": str(state / "ipython")},
        start_new_session=True,
        stdout=log,
        stderr=log,
    )
    address = f"http://localhost:{port}"
    try:
        _wait(server, address, state / "log")
        yield address, notebooks
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # and its kernels
        server.wait(30)
        log.close()


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=2):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"Jupyter did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


READY = """async () => {
  await window.jupyterapp.restored;
  for (;;) {
    const panel = window.jupyterapp.shell.currentWidget;
    if (panel?.sessionContext) {
      await panel.context.ready;
      await panel.sessionContext.ready;
      if (panel.sessionContext.session?.kernel?.status === "idle") return;
    }
    await new Promise((next) => setTimeout(next, 50));
  }
}"""


@contextlib.contextmanager
def opener(browser: BrowserContext, address: str, folder: Path, query: str = "") -> Iterator[Callable[..., Visit]]:
    """A function that writes cells to a notebook, opens it below an address and runs it."""
    pages: list[Page] = []

    def run(*cells: str, name: str = "test.ipynb") -> Visit:
        document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        document.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(document, folder / name)
        page = opened(browser, 1280, 1500)
        page.set_default_timeout(60_000)
        pages.append(page)
        visit = Visit(page)
        page.goto(f"{address}/{name}{query}")
        page.wait_for_function("window.jupyterapp !== undefined")
        page.evaluate(READY)
        if not page.evaluate(IS_LIGHT % "true"):
            turn(page, "Light")  # the server remembers the theme of another test
        # if the kernel were not idle yet, this would open a dialog and never return
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return visit

    yield run
    for page in pages:
        page.close()


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Start JupyterLab; yields its address and the folder that it serves."""
    with served("jupyterlab", tmp_path_factory) as place:
        yield place


@pytest.fixture
def notebook(lab: tuple[str, Path], browser: BrowserContext) -> Iterator[Callable[..., Visit]]:
    """A function that writes cells to a notebook, opens it in JupyterLab and runs it."""
    address, folder = lab
    with opener(browser, f"{address}/lab/tree", folder, "?reset") as run:
        yield run

"""The pages in a real Chromium: what they show, that they live, and that they reach nothing but the board."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmworks.core.run import RunFolder
from tests.board import folders
from tools.board import browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.PROGRAM, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs playwright: pip install playwright"
    ),
]
HOSTILE = "<img src=x onerror=alert(1)>"
PHONE = {"width": 390, "height": 800}
PAGES = (
    "",
    "runs/{id}",
    "runs/{id}/system",
    "runs/{ranks}/system",
    "runs/{id}/plan",
    "runs/{id}/samples",
    "runs/{id}/recipe",
    "runs/{id}/record",
    "compare?run={id}&run={other}",
    "methods",
    "methods/sophia",
)
BLANK = """canvas => { const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return d.every((v, i) => v === d[i % 4]); }"""
"""Whether a canvas has one colour only."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four ranks, one that is killed, one with a hostile name, columns, texts and settings."""
    root = tmp_path_factory.mktemp("page") / "runs"
    plain = folders.make(root / "plain")
    for rank in (1, 2, 3):
        place = plain / "ranks" / f"{rank:05d}"
        place.mkdir(parents=True)
        folders.events(place / "events.jsonl", range(1, 201), rank=rank, slow=1.5 if rank == 2 else 1.0)
    killed = folders.make(root / "killed", steps=90, done=False, height=3.2, optimizer={"use": "adamw", "lr": 3e-3})
    folders.lock(killed, 4_194_303)
    folders.silent(killed, 300)
    bad = folders.make(root / HOSTILE, optimizer={"use": HOSTILE})
    folders.append(bad / "samples.jsonl", [{"step": 200, "prompt": HOSTILE, "text": f"</script>{HOSTILE}"}])
    folders.append(bad / "metrics.jsonl", [{"step": 201, "loss": 2.0, HOSTILE: 1.0}, {"step": 202, "loss": "nan"}])
    told = folders.Events(bad / "events.jsonl", run="bad")
    told.write(HOSTILE, start=folders.BEGAN, end=folders.BEGAN + 1, stream=HOSTILE)
    told.write("note", text=HOSTILE)
    told.flush()
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with browser.board(root) as found:
        yield found


class Seen:
    """What a page did while it was open."""

    def __init__(self, page: Any) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """A page that must not complain, nor ask anybody but the board."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    seen = Seen(page)
    yield page
    context.close()
    assert seen.errors == []
    assert seen.requests
    assert [url for url in seen.requests if not url.startswith(address)] == []


def ids(page: Any, address: str) -> dict[str, str]:
    """The id of each run by its name."""
    page.goto(address)
    page.wait_for_selector(".run")
    return {
        link.inner_text(): link.get_attribute("href").split("/")[2] for link in page.query_selector_all(".run .name")
    }


def test_the_list_says_how_runs_go(page: Any, address: str) -> None:
    assert set(ids(page, address)) == {"plain", "killed", HOSTILE}
    line = page.locator(".run", has_text="killed")
    assert "dead" in line.inner_text()
    assert line.locator("svg path").count() == 1
    page.get_by_role("button", name="dead 1").click()
    assert page.locator(".run").count() == 1
    page.reload()
    page.wait_for_selector(".run")
    assert page.locator(".run").count() == 1, "the filter is in the address"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_its_window_or_complains(chromium: Any, address: str, width: int, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    seen = Seen(page)
    known = ids(page, address)
    for place in PAGES:
        page.goto("about:blank")
        page.goto(f"{address}#/{place.format(id=known[HOSTILE], ranks=known['plain'], other=known['killed'])}")
        page.locator("h1").wait_for()
        page.locator(".reading").first.wait_for(state="detached")
        page.wait_for_timeout(150)
        wide = page.evaluate("document.scrollingElement.scrollWidth")
        assert wide <= width, f"{place} is {wide} wide"
        assert page.locator("img[src='x']").count() == 0
        assert page.locator("h1").count() == 1
    context.close()
    assert seen.errors == []


def test_curves_are_drawn_and_the_axis_is_in_the_address(page: Any, address: str) -> None:
    page.goto(f"{address}#/runs/{ids(page, address)['plain']}")
    canvas = page.locator(".plot canvas").first
    canvas.wait_for()
    assert not canvas.evaluate(BLANK)
    page.locator("select[name=x]").select_option("joules_so_far")
    page.get_by_role("group", name="Loss", exact=True).wait_for()
    page.reload()
    page.locator(".plot canvas").first.wait_for()
    assert page.locator("select[name=x]").input_value() == "joules_so_far"


def test_the_system_view_names_the_slow_rank(page: Any, address: str) -> None:
    page.goto(f"{address}#/runs/{ids(page, address)['plain']}/system")
    page.get_by_text("rank 2").first.wait_for()
    assert "takes 50.0 % longer" in page.inner_text("main")
    page.locator(".chart canvas").nth(1).wait_for()
    page.wait_for_timeout(300)
    for i in range(2):
        assert not page.locator(".chart canvas").nth(i).evaluate(BLANK)


def test_runs_are_compared(page: Any, address: str) -> None:
    ids(page, address)
    for name in ("plain", "killed"):
        page.get_by_label(f"Compare {name}").check()
    page.get_by_role("link", name="Compare 2 runs").click()
    page.get_by_text("1 setting differs").wait_for()
    assert page.locator("table[aria-label='Settings that differ'] td").all_inner_texts() == [
        "optimizer.lr",
        "0.001",
        "0.003",
    ]
    page.locator(".plot canvas").first.wait_for()
    assert not page.locator(".plot canvas").first.evaluate(BLANK)


def test_methods_are_searched_and_opened(page: Any, address: str) -> None:
    page.goto(f"{address}#/methods")
    page.get_by_label("Search papers").fill("curvature")
    page.get_by_role("link", name="sophia").click()
    page.get_by_role("heading", name="How it works").wait_for()
    assert page.locator(".findings li").count() >= 1
    assert page.locator(".evidence canvas").count() >= 1
    page.go_back()
    page.wait_for_selector(".methods li")
    assert page.get_by_label("Search papers").input_value() == "curvature"
    page.locator("select[name=verdict]").select_option("planned")
    page.get_by_label("Search papers").fill("")
    page.locator(".methods li").nth(10).wait_for()
    assert page.locator(".methods li .verdict").first.inner_text().endswith("planned")


def test_the_page_lives_with_the_run(page: Any, address: str, root: Path) -> None:
    live = folders.make(root / "live", steps=10, done=False)
    with RunFolder(live).alone():
        page.goto(address)
        page.locator(".run", has_text="live").get_by_text("running").wait_for(timeout=15_000)
        page.goto(f"{address}#/runs/{ids(page, address)['live']}")
        page.locator(".tile", has_text="step").get_by_text("10").wait_for()
        folders.append(live / "metrics.jsonl", [{"step": 123, "loss": 1.2345, "tokens": 5, "seconds": 0.1}])
        page.locator(".tile", has_text="step").get_by_text("123").wait_for(timeout=15_000)
        assert "1.234" in page.locator(".tiles").inner_text()
    folders.lock(live, 4_194_303)
    folders.silent(live, 60)
    page.locator(".status.dead").wait_for(timeout=15_000)


def test_it_is_used_from_the_keyboard(page: Any, address: str) -> None:
    ids(page, address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "To the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, select, button, a')]
        .filter(one => !one.innerText.trim() && !one.ariaLabel && !one.labels?.length).map(one => one.outerHTML)"""
    )
    assert unnamed == []


def test_the_page_says_when_the_board_is_gone(chromium: Any, root: Path) -> None:
    context = chromium.new_context()
    page = context.new_page()
    with browser.board(root) as address:
        page.goto(address)
        page.wait_for_selector(".run")
    page.get_by_role("alert").wait_for(timeout=15_000)
    assert "does not answer" in page.get_by_role("alert").inner_text()
    assert page.locator(".run").count() >= 3, "what was seen stays"
    context.close()


def test_the_token_opens_the_board(chromium: Any, root: Path) -> None:
    with browser.board(root, "--host", "0.0.0.0") as address:
        port = address.split(":")[2].partition("/")[0]
        here = f"http://127.0.0.1:{port}/"
        context = chromium.new_context()
        page = context.new_page()
        page.goto(here)
        assert "token" in page.inner_text("body")
        page.goto(here + address[address.index("?") :])
        page.wait_for_selector(".run")
        assert page.url.startswith(here)
        assert "token" not in page.url
        assert page.evaluate("document.cookie") == ""
        context.close()


def test_another_site_reads_nothing(chromium: Any, address: str) -> None:
    """A page of another origin (another port of this machine) asks the board with scripts, pictures and frames."""
    with browser.board(*[Path(__file__).parent]) as other:
        context = chromium.new_context()
        page = context.new_page()
        page.route(f"{other}evil", lambda route: route.fulfill(body="<h1>evil</h1>", content_type="text/html"))
        page.goto(f"{other}evil")
        read = "url => fetch(url).then(answer => answer.text()).catch(() => 'refused')"
        assert page.evaluate(read, f"{address}api/runs") == "refused"
        framed = page.evaluate(
            """url => new Promise(done => { const frame = document.createElement('iframe'); frame.src = url;
            frame.onload = () => done(frame.contentDocument ? 'read' : 'refused');
            document.body.append(frame); })""",
            address,
        )
        assert framed == "refused"
        context.close()

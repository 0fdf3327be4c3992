"""The studio: access control, the answers of its server, and its page in a browser."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import web

from pipeline import open_run
from pipeline.condition import Condition
from pipeline.reader import RunError
from pipeline.storage import Store
from pipeline.studio.__main__ import main
from pipeline.studio.cuts import THRESHOLD, default_step
from pipeline.studio.server import application, picture_type
from pipeline.studio.studio import (
    LABELS,
    Studio,
    cuts_after,
    later_steps,
    read_labels,
    recipe_with,
)
from tests import painted as runs
from tests.browser import WIDTHS, chromium
from tests.conftest import ROOT

TOKEN = "a-token-of-the-tests"
CUTS = [{"column": "shade", "min": 0.5}, {"column": "depth", "top_fraction": 0.8}]


@dataclass
class Served:
    """A studio on loopback, and its run."""

    run: Path
    port: int
    studio: Studio

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Sends a request with the token's cookie; a header given as "" is left out."""
        sent = {"Host": f"127.0.0.1:{self.port}", "Cookie": f"winnow_studio_{self.port}={TOKEN}"}
        if body is not None:
            sent["Content-Type"] = "application/json"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        link.request(method, path, data, {name: value for name, value in sent.items() if value})
        answer = link.getresponse()
        found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        link.close()
        return found

    def ask(self, path: str, body: Any = None) -> Any:
        status, _, data = self.request("GET" if body is None else "POST", path, body)
        assert status == 200, data
        return json.loads(data)


@pytest.fixture(scope="module")
def served(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A studio of a copy of the run `out`, in which it may write labels."""
    folder = tmp_path_factory.mktemp("studio")
    run = Path(shutil.copytree(painted / "out", folder / "out"))
    made = Studio(open_run(run), "paint", str(folder))
    loop, runner = asyncio.new_event_loop(), None

    async def start() -> tuple[web.AppRunner, int]:
        hosts: list[str] = []  # the port is known only when it is open
        app = web.Application()
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        await runner.cleanup()
        hosts += [f"127.0.0.1:{port}", f"localhost:{port}"]
        runner = web.AppRunner(application(made, TOKEN, hosts), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner, port

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield Served(run, port, made)
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


# --- Who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/", {"Cookie": ""}, 403),
        ("GET", "/start", {"Cookie": ""}, 403),
        ("GET", "/picture/0", {"Cookie": ""}, 403),
        ("GET", "/studio.js", {"Cookie": ""}, 403),
        ("GET", "/?token=wrong", {"Cookie": ""}, 403),
        ("GET", f"/start?token={TOKEN}", {"Cookie": ""}, 403),
        ("GET", "/start", {"Host": "attacker.example"}, 403),
        ("GET", f"/?token={TOKEN}", {"Host": "attacker.example:80", "Cookie": ""}, 403),
        ("GET", "/studio.py", {}, 404),
        ("GET", "/page/__init__.py", {}, 404),
        ("GET", "/../pyproject.toml", {}, 404),
        ("GET", "/picture/99999999", {}, 404),
        ("GET", "/picture/-1", {}, 404),
        ("POST", "/label", {"Origin": "http://attacker.example"}, 403),
        ("POST", "/label", {"Content_Type": "text/plain"}, 415),
        ("POST", "/label", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ("GET", "/label", {}, 405),
    ],
)
def test_who_may_ask(served: Served, method: str, path: str, headers: dict[str, str], status: int) -> None:
    body = {"id": 0, "label": 1} if method == "POST" else None
    found, sent, _ = served.request(method, path, body, **headers)
    assert found == status
    assert "script-src 'self'" in sent["content-security-policy"]
    assert "unsafe" not in sent["content-security-policy"]
    assert sent["x-content-type-options"] == "nosniff"
    assert not (served.run / LABELS).exists()


def test_the_token_becomes_a_cookie(served: Served) -> None:
    status, headers, _ = served.request("GET", f"/?token={TOKEN}", Cookie="")
    assert (status, headers["location"]) == (303, "/")
    assert re.fullmatch(
        rf"winnow_studio_{served.port}={TOKEN}; HttpOnly; Path=/; SameSite=Strict", headers["set-cookie"]
    )


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/summary", b"{", "Invalid JSON"),
        ("/summary", {"cuts": [{"column": "nothing", "min": 1}]}, "no score 'nothing'"),
        ("/summary", {"cuts": [{"column": "shade"}]}, "exactly one of min and top_fraction"),
        ("/summary", {"cuts": [{"column": "shade", "top_fraction": 0}]}, "greater than 0"),
        ("/summary", b'{"cuts": [{"column": "shade", "min": NaN}]}', "finite number"),
        ("/summary", {"cuts": CUTS * 40}, "at most 64"),
        ("/summary", {"columns": ["image"]}, "no score 'image'"),
        ("/summary", {"unknown": 1}, "not permitted"),
        ("/tiles", {"show": 7}, "there is no cut 7"),
        ("/tiles", {"show": "../x"}, "invalid literal"),
        ("/tiles", {"show": "search", "like": 10**8}, "there is no row"),
        ("/tiles", {"show": "search", "text": "a red circle"}, "model that made the embeddings is not on this machine"),
        ("/label", {"id": -1, "label": 1}, "there is no row -1"),
        ("/label", {"id": 0, "label": 2}, "less than or equal to 1"),
    ],
)
def test_impossible_requests_are_refused(served: Served, path: str, body: Any, message: str) -> None:
    status, _, data = served.request("POST", path, body)
    assert status == 400
    assert message in json.loads(data)["error"]


# --- What it answers --------------------------------------------------------------------------------------------------


def test_it_begins_with_the_cuts_of_the_run(served: Served) -> None:
    about = served.ask("/start")
    assert about["cuts"] == [{"top_fraction": None, "min": 0.5, **CUTS[0]}, {"min": None, **CUTS[1]}]
    assert (about["after"], about["rows"], about["later"]) == ("paint", 600, ["balance", "write_shards"])
    assert [score["name"] for score in about["scores"]] == ["shade", "depth"]
    assert about["search"]["picture"] is True
    assert "Search by picture" in about["search"]["why"]
    found = served.ask("/summary", {"cuts": CUTS, "columns": ["shade"]})
    funnel = open_run(served.run).funnel.lines
    assert [cut["after"] for cut in found["cuts"]] == [funnel["threshold"].kept, funnel["threshold.2"].kept]
    assert found["kept"] == funnel["threshold.2"].kept


def test_hostile_captions_are_plain_and_short(served: Served) -> None:
    found = served.ask("/tiles", {"cuts": [], "view": {"text": "very long text"}})
    (tile,) = found["kept"]
    assert len(tile["caption"]) == 400
    (tile,) = served.ask("/tiles", {"view": {"text": "and an isolate"}})["kept"]
    assert tile["caption"].startswith("⟨U+202E⟩gnirts")
    (tile,) = served.ask("/tiles", {"view": {"text": "and bell"}})["kept"]
    assert tile["caption"].startswith("null \\x00 and bell \\x07")


def test_pictures(served: Served) -> None:
    run = open_run(served.run)
    rows = np.random.default_rng(0).permutation(600)[:5]
    for row in rows.tolist():
        status, headers, data = served.request("GET", f"/picture/{row}")
        unit, number = served.studio.rows.place[row].tolist()
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert data == run.take(unit, [number], "image")["image"][0].as_py()


def test_similar_pictures(served: Served) -> None:
    found = served.ask("/tiles", {"show": "search", "like": 50})["found"]
    captions = [tile["caption"] for tile in found]
    own = served.studio.rows.texts["caption"][50].as_py()
    numbers = [int(caption.split()[-1]) for caption in captions]
    assert abs(numbers[0] - int(own.split()[-1])) % 628 in (0, 1, 2, 626, 627)
    angle = int(own.split()[-1])
    assert max(min(abs(n - angle) % 628, -abs(n - angle) % 628) for n in numbers) < 30, "the nearest angles"


def test_search_by_text_with_a_local_model(painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Studio(open_run(painted / "out"), "paint", str(tmp_path))
    step = replace(made.run.steps[2], options={"model": str(ROOT / "pipeline/demo/scorer")})
    assert made.text_model() is None, "paint names no model"
    monkeypatch.setattr(made.run, "steps", [step])
    assert made.text_model() is step
    vector = made._encoder().texts(["a red star"])[0].numpy()
    noise = np.random.default_rng(0).normal(size=(600, len(vector)))
    made._vectors = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float16)
    made._vectors[123], made._vectors[124] = vector, 0
    ranked = made.ranking("a red star", None)
    assert ranked[0] == 123
    assert sorted(ranked) == [i for i in range(600) if i != 124], "without an embedding, a row is not found"


def test_labels(served: Served) -> None:
    uids = served.studio.rows.texts["uid"]
    assert served.ask("/label", {"id": 3, "label": 1}) == {"labels": 1}
    assert served.ask("/label", {"id": 9, "label": 0}) == {"labels": 2}
    assert served.ask("/label", {"id": 3, "label": 0}) == {"labels": 2}
    text = (served.run / LABELS).read_text()
    assert text == f"uid,label\n{uids[9].as_py()},0\n{uids[3].as_py()},0\n"
    assert served.ask("/label", {"id": 9, "label": None}) == {"labels": 1}
    assert served.ask("/label", {"id": 3, "label": None}) == {"labels": 0}
    (served.run / LABELS).unlink()


@pytest.mark.parametrize("text", ["", "a,b\n", "uid,label\nx,2\n", "uid,label\nx\n", b"\xff\xfe"])
def test_a_file_that_does_not_hold_labels_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / LABELS
    path.parent.mkdir()
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RunError, match=r"labels\.csv: expected the header uid,label"):
        read_labels(Store(str(tmp_path)))


def test_an_exported_recipe_keeps_what_was_counted(served: Served, painted: Path, ray_address: str) -> None:
    cuts = [
        {"column": "depth", "top_fraction": 0.37},
        {"column": "shade", "min": float(np.nextafter(np.float32(0.35), np.float32(1)))},
    ]
    counted = served.ask("/summary", {"cuts": cuts})
    exported = served.ask("/export", {"cuts": cuts})
    assert yaml.safe_load(exported["lines"]) == yaml.safe_load(exported["recipe"])["steps"][2:4]
    (painted / "exported.yaml").write_text(exported["recipe"])
    runs.run(painted, ray_address, "exported.yaml", "run=exported", "reuse=out")
    lines = open_run(painted / "exported").funnel.lines
    assert [cut["after"] for cut in counted["cuts"]] == [lines["threshold"].kept, lines["threshold.2"].kept]


def test_the_lines_around_the_cuts_stay() -> None:
    steps = [
        ("pool", "pool", {}),
        ("download", "pipeline.stages.download.Download", {}),
        ("threshold", THRESHOLD, {"column": "a", "min": 1}),
        ("balance", "pipeline.filters.balance.Balance", {}),
    ]
    recipe = {"name": "x", "steps": ["download", {"threshold": {"column": "a", "min": 1}}, "balance"], "reuse": None}
    run: Any = SimpleNamespace(
        recipe=recipe, steps=[SimpleNamespace(label=label, step=step, options=o) for label, step, o in steps]
    )
    assert yaml.safe_load(
        recipe_with(run, "download", [Condition("s", "min", 1e-7), Condition("t", "top_fraction", 0.3)])
    ) == {
        "name": "x",
        "steps": [
            "download",
            {"threshold": {"column": "s", "min": 1e-7}},
            {"threshold": {"column": "t", "top_fraction": 0.3}},
            "balance",
        ],
    }
    assert default_step(run) == "download"


def test_a_threshold_with_a_maximum_is_not_a_cut() -> None:
    options = [
        {"column": "a", "min": 1, "max": None, "top_fraction": None},
        {"column": "b", "min": None, "max": 0.1, "top_fraction": None},
        {"column": "c", "min": 0, "max": 1, "top_fraction": None},
    ]
    steps = [SimpleNamespace(label="download", step="pipeline.stages.download.Download", options={})]
    steps += [SimpleNamespace(label=f"threshold.{i}", step=THRESHOLD, options=o) for i, o in enumerate(options)]
    run: Any = SimpleNamespace(steps=steps)
    assert cuts_after(run, "download") == [Condition("a", "min", 1)]
    assert [step.label for step in later_steps(run, "download")] == ["threshold.1", "threshold.2"]
    assert default_step(run) == "download"


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\xff\xd8\xff\xe0", "image/jpeg"), (b"<svg onload=alert(1)>", None), (b"<html>", None), (b"", None)],
)
def test_only_pictures_are_served_as_pictures(data: bytes, kind: str | None) -> None:
    assert picture_type(data) == kind


def test_the_command_refuses(tmp_path: Path, painted: Path, capsys: pytest.CaptureFixture[str], served: Served) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(painted / "out"), "--after", "treshold"]) == 2
    assert "did you mean threshold?" in capsys.readouterr().err
    assert main([str(painted / "out"), "--port", str(served.port)]) == 2
    assert "give another --port" in capsys.readouterr().err


# --- A person's way through the page ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page of the studio, which must neither fail nor complain."""
    options = {"viewport": {"width": 1280, "height": 900}} | getattr(request, "param", {})
    context = browser.new_context(**options)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    opened.set_default_timeout(15_000)
    opened.goto(served.address)
    opened.wait_for_selector(".tiles li")
    yield opened
    context.close()
    (served.run / LABELS).unlink(missing_ok=True)
    assert not problems


def _kept(page: Any) -> int:
    return int(page.text_content("#kept b").replace(",", ""))


def _settled(page: Any, kept: int) -> None:
    page.wait_for_function(f"() => document.querySelector('#kept b').textContent === '{kept:,}'")


@pytest.mark.browser
def test_move_mark_export_and_run_again(page: Any, served: Served, painted: Path, ray_address: str) -> None:
    funnel = open_run(served.run).funnel.lines
    _settled(page, funnel["threshold.2"].kept)

    slider = page.get_by_label("Lowest shade kept")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.get_by_label("Cut of depth", exact=True).fill("0.6")
    at = float(page.get_by_label("Cut of shade", exact=True).input_value())
    assert at > 0.5
    _settled(
        page,
        served.ask("/summary", {"cuts": [{"column": "shade", "min": at}, {"column": "depth", "top_fraction": 0.6}]})[
            "kept"
        ],
    )
    counted = _kept(page)
    assert counted != funnel["threshold.2"].kept

    page.get_by_role("button", name="Both sides of shade").click()
    page.wait_for_selector("[data-group=above] li")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.tiles img')].some((image) => image.naturalWidth === 24)"
    )
    first = page.locator("[data-group=above] li").first
    first.get_by_role("button", name="Good").click()
    page.locator("[data-group=below] li").first.get_by_role("button", name="Bad").click()
    page.wait_for_function("() => document.querySelectorAll('.marks [aria-pressed=true]').length === 2")
    labels = read_labels(Store(str(served.run)))
    assert sorted(labels.values()) == [0, 1]
    good = served.studio.rows.texts["uid"][int(first.get_attribute("data-id"))].as_py()
    assert labels[good] == 1

    page.get_by_role("button", name="Export recipe").click()
    page.wait_for_selector("dialog[open]")
    assert "2 labelled rows" in page.text_content("#labelled")
    (painted / "again.yaml").write_text(page.input_value("#recipe"))
    page.get_by_role("button", name="Close").click()
    runs.run(painted, ray_address, "again.yaml", "run=again", "reuse=out")
    assert open_run(painted / "again").funnel.lines["threshold.2"].kept == counted


@pytest.mark.browser
def test_look_at_some_rows(page: Any, served: Served) -> None:
    page.get_by_label("Caption has").fill("RED")
    page.get_by_label("Host").fill("h2.example")
    by_hand = [
        i
        for i, row in enumerate(served.studio.rows.texts.to_pylist())
        if "red" in row["caption"].lower() and row["url"].startswith("http://h2.")
    ]
    page.wait_for_function(f"() => document.getElementById('seen').textContent.includes('of {len(by_hand)} ')")
    shown = page.locator(".tiles li")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.tiles .caption')].every((p) => /red/i.test(p.textContent))"
    )
    assert {int(tile.get_attribute("data-id")) for tile in shown.all()} <= set(by_hand)
    page.get_by_label("Host").fill("")
    page.get_by_role("button", name="red circle", exact=True).click()
    page.wait_for_function("() => document.querySelector('input[name=concept]').value === 'red circle'")
    shown.first.get_by_role("button", name="Similar to").click()
    page.wait_for_selector("[data-group=found] li")
    page.get_by_label("Remove the cut of depth").click()
    page.get_by_role("button", name="Cut depth").click()
    page.wait_for_function("() => document.querySelectorAll('#cuts .score').length === 2")
    page.get_by_role("button", name="Reset cuts").click()
    page.get_by_label("How depth is cut").select_option("min")
    page.wait_for_function("() => document.querySelector('[aria-label=\"Cut of depth\"]').value !== '0.8'")


@pytest.mark.browser
def test_hostile_captions_do_nothing(page: Any) -> None:
    title = page.title()
    for text in ("alert", "<img", "javascript:", "svg/onload", "isolate", "very long", "combining", "bell"):
        page.get_by_label("Caption has").fill(text)
        page.wait_for_function(
            "(text) => { const all = [...document.querySelectorAll('.tiles .caption')];"
            " return all.length && all.every((p) => p.textContent.toLowerCase().includes(text)); }",
            arg=text,
        )
        assert page.locator(".tiles script, .tiles a, .tiles svg, .tiles [onerror]").count() == 0
    assert page.title() == title
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


SIZES = [
    {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    for width in WIDTHS
    for scheme in ("light", "dark")
]


@pytest.mark.browser
@pytest.mark.parametrize("page", SIZES, indirect=True, ids=lambda o: f"{o['viewport']['width']}-{o['color_scheme']}")
def test_every_size_and_theme(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.get_by_role("button", name="Both sides of shade").click()
    page.wait_for_selector("[data-group=above] li")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    found = Axe().run(page).response["violations"]
    page.get_by_role("button", name="Export recipe").click()
    page.wait_for_selector("dialog[open]")
    found += Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []

import base64
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from taid_jax.settings import Settings, SettingsError, to_dict
from taid_jax.train.html import figure, render, run_page, visible

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\u202e{{ 733 * 733 }}"
TOP = [["\n", 0.5], [HOSTILE, 0.25], ["NaN", 0.125], ["b", 0.0625], ["c", 0.03125]]


@pytest.fixture
def folder(tmp_path):
    """What a run leaves that diverged, in whose texts everything is hostile."""
    metrics = [
        {"step": step, "loss": math.nan if step > 3 else 2.0 / step, "kl_teacher": 1.0}
        | {"t": 0.4, "learning_rate": 1e-3, "grad_norm": math.inf, "kl_target": 0.5}
        | {"skipped": step > 3, "not_finite": "loss" if step > 3 else None}
        | {"step_seconds": 2.0, "host_seconds": 0.5, "data_seconds": 0.25}
        for step in range(1, 7)
    ]
    held_out = [
        {"step": step, "kl_teacher": 3.0 - step, "student_perplexity": math.exp(4.0)}
        | {"teacher_perplexity": math.exp(2.0), "kl_reverse": 0.75, "tokens": 9}
        for step in (0, 2)
    ]
    counted = [HOSTILE, 2.5, 0.125, 0.25, TOP, TOP[::-1]]
    shown = {
        "outcome": f"stopped at step 6: {HOSTILE}",
        "title": HOSTILE,
        "lines": [f"teacher: {HOSTILE}"],
        "notes": [HOSTILE],
        "data": {
            "dropped": {HOSTILE: 3, "too_long": 41},
            "unused_keys": {HOSTILE: 1},
            "num_skipped_files": 7,
            "skipped_files": [HOSTILE],
            "problems": [f"a.jsonl, line 5: {HOSTILE}"],
        },
        "completions": {
            "prompts": [HOSTILE],
            "texts": {name: [HOSTILE] for name in ("teacher", "student before")},
        },
        "tokens": [[["The"], counted, [" cat", 0.5, 0.75, 0.5, TOP, TOP]]],
    }
    # JSON has no NaN: as the files of a run name it.
    text = json.dumps(shown)
    (tmp_path / "shown.json").write_text(text)
    for name, rows in (("metrics", metrics), ("evaluations", held_out)):
        lines = [re.sub(r"\b(NaN|Infinity)\b", r'"\1"', json.dumps(r)) for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = to_dict(Settings())
    settings["model"]["teacher"] = HOSTILE
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def _data(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</', page)
    return json.loads(text)


def test_run_page_no_text_becomes_markup(folder):
    page = run_page(folder)
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    # Templates do not look into what they are given; nothing hidden turns text round.
    assert "537289" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not {"\u2028", "\u202e"} & set(page)
    assert "⟨202e⟩" in page


def test_run_page_shows_the_texts_that_were_trained_on(folder):
    sample = {"prompt": HOSTILE, "completion": HOSTILE, "end": "truncated", "step": 3}
    texts = {
        "written": {"ended": 1234, "truncated": 5},
        "pushed_out": 6,
        "trained_by_age": {"0": 7, "1": 8, "4": 9},
        "samples": [sample],
    }
    (folder / "report.json").write_text(json.dumps({"texts": texts}))
    shown = json.loads((folder / "shown.json").read_text())
    (folder / "shown.json").write_text(json.dumps(shown | {"outcome": "done"}))
    page = run_page(folder)
    assert "<img" not in page
    assert "Written: 1,234 ended, 5 truncated; 6 left the buffer untrained." in page
    assert "0: 7, 1: 8, up to 4: 9." in page
    assert "truncated, before step 3" in page


def test_run_page_of_a_diverged_run_says_why_and_leaves_gaps(folder):
    page = run_page(folder)
    assert "without an export: stopped at step 6" in page
    assert "3 steps changed nothing" in page
    loss = next(c for c in _data(page)["charts"] if c["title"] == "Loss")
    points = [[1, 2.0], [2, 1.0], [3, 0.666667], [4, None], [5, None], [6, None]]
    assert loss["series"] == [{"name": "loss", "points": points}]
    # Nothing of it can be drawn.
    assert "Gradient norm" not in {c["title"] for c in _data(page)["charts"]}


def test_run_page_shows_figures_before_and_after_beside_the_teacher(folder):
    rows = re.findall(
        r"<tr><th[^>]*>(.*?)</th>((?:<td.*?</td>)+)</tr>", run_page(folder)
    )
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}
    assert cells["KL(teacher || student), nats"] == ["3.0000", "1.0000", "-"]
    assert cells["KL(student || teacher), nats"] == ["0.7500", "0.7500", "-"]
    assert cells["cross-entropy, nats"] == ["4.0000", "4.0000", "2.0000"]
    assert cells["too_long"] == ["41 records"]
    assert cells["passed over"] == ["7 files"]
    assert cells["waiting for the devices"] == ["7.5 s", "62%"]


def test_run_page_colours_tokens_and_lists_the_largest_first(folder):
    page = run_page(folder)
    shades = re.findall(r'data-at="0:(\d)" id="[^"]*" style="--k:([\d.]+)"', page)
    assert [number for number, _ in shades] == ["1", "2"]  # The first does not count.
    assert float(shades[0][1]) == 1 > float(shades[1][1]) > 0.15
    links = re.findall(r'<a class="mono" href="#t0-(\d)"', page)
    assert links == ["1", "2"]
    assert _data(page)["rows"][0][2][:4] == [" cat", 0.5, 0.75, 0.5]
    # A word of a text, and no number.
    assert _data(page)["rows"][0][2][4][2] == ["NaN", 0.125]


def test_run_page_draws_no_more_points_than_can_be_seen(folder):
    lines = [json.dumps({"step": n, "loss": 1.0 / n}) for n in range(1, 4001)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = run_page(folder)
    (points,) = [s["points"] for s in _data(page)["charts"][0]["series"]]
    assert len(points) == 1000
    assert points[-1] == [4000, 0.00025]
    assert "Every 4th logged step" in page


@pytest.mark.parametrize("content", [None, "{", "[]", '{"tokens": [[["a", "b"]]]}'])
def test_run_page_without_what_it_shows_is_a_note_or_refused(folder, content):
    (folder / "shown.json").unlink()
    if content:
        (folder / "shown.json").write_text(content)
    if content and "tokens" in content:
        with pytest.raises(SettingsError, match=r"shown.json is damaged"):
            run_page(folder)
    else:
        assert "shown.json" in run_page(folder)


def test_run_page_of_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"no settings.json"):
        run_page(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (3, "3"),
        (12345, "12,345"),
        (0.5, "0.5000"),
        (1e-5, "1.000e-05"),
        (1234.56, "1,234.6"),
        (math.nan, "nan"),
        ("loss", "loss"),
    ],
)
def test_figure_value_has_a_readable_text(value, text):
    assert figure(value) == text


def test_visible_keeps_every_script_and_shows_what_is_hidden():
    assert visible("né 日本\n\t👩\u200d🔬") == "né 日本\n\t👩\u200d🔬"
    assert visible("a\x1b[31m\u2066") == "a⟨001b⟩[31m⟨2066⟩"


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# The protocol's pipe: the browser reads from file 3 and writes to file 4.
_START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium and one page in it, over its debugging pipe."""

    def __init__(self, program, home):
        ours, theirs = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={home}"]
        files = [str(theirs[0]), str(ours[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *files, program, *flags],
            env=os.environ | {"HOME": home},
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._write = os.fdopen(theirs[1], "wb", buffering=0)
        self._read = os.fdopen(ours[0], "rb")
        self._session, self._number, self.events = None, 0, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def _message(self):
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def __call__(self, method, **params):
        self._number += 1
        call = {"id": self._number, "method": method, "params": params}
        call |= {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps(call).encode() + b"\0")
        while (found := self._message()).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, path, width, scheme, height=900):
        """Opens a file and waits until it is loaded and drawn."""
        phone = width < 600
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=media)
        begun = len(self.events)
        self("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in [e["method"] for e in self.events[begun:]]:
            self.events.append(self._message())
        frame = "new Promise(done => requestAnimationFrame(done))"
        self.value(f"{frame}.then(() => {frame}).then(() => 1)")

    def value(self, expression):
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def move_to(self, selector):
        """Points at the first element that a selector finds."""
        box = f"document.querySelector('{selector}')"
        self.value(f"{box}.scrollIntoView({{block: 'center'}})")
        at = f"{box}.getClientRects()[0]"
        x = self.value(f"{at}.x + {at}.width / 2")
        y = self.value(f"{at}.y + {at}.height / 2")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path):
        """Writes a picture of the whole page."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        with contextlib.suppress(OSError):
            self("Browser.close")
        self._process.wait()
        self._write.close()
        self._read.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a Chromium on the PATH, one of {', '.join(NAMES)}")
    found = Browser(program, str(tmp_path_factory.mktemp("browser")))
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_run_page_in_a_browser(folder, browser, width, scheme):
    path = folder / "report.html"
    path.write_text(run_page(folder), encoding="utf-8")
    browser.events.clear()
    browser.open(path, width, scheme)

    def count(selector):
        return browser.value(f"document.querySelectorAll('{selector}').length")

    assert browser.value("document.documentElement.scrollWidth") <= width
    assert count("figure svg polyline") >= 5
    assert count("img") == 0
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(n) for n in re.findall(r"\d+", paper)]) > 128
    assert light == (scheme == "light")
    assert count(".top li") == 0
    browser.move_to(".tokens b")
    assert count(".top li") == 10
    assert HOSTILE[:20] in browser.value("document.querySelector('.top').innerText")
    # The focus does the same, and the arrow keys lead on.
    browser.value("document.querySelector('.tokens b').focus()")
    browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert "KL 0.5 nats" in browser.value("document.querySelector('.top').innerText")

    asked = [e["params"] for e in browser.events if "request" in e.get("params", {})]
    assert [each["request"]["url"] for each in asked] == [path.as_uri()]
    complaints = (
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
    )
    assert [e for e in browser.events if e["method"] in complaints] == []


@pytest.mark.slow
def test_page_lets_no_other_script_run(browser, tmp_path):
    """Should a text ever become markup, the policy of the page stops it."""
    page = render(
        "comparison.html",
        data={"charts": [], "rows": []},
        title="A",
        folder="B",
        table=[["method"]],
        charts=[],
        cells=[],
        unfinished=[],
        shared={},
    )
    planted = (
        "<script>document.title = 1</script><img src=x onerror='document.title=1'>"
    )
    path = tmp_path / "page.html"
    path.write_text(page.replace("</h1>", f"</h1>{planted}"))
    browser.open(path, 800, "light")
    assert browser.value("document.title") == "A"

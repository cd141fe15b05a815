"""The page of a comparison: what it holds, and what a browser makes of it."""

import base64
import html
import json
import os
import re
import select
import shutil
import subprocess
import time
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.calibration import report, table
from dit_sparse.calibration.maps import Maps
from dit_sparse.calibration.report import grid_of, overlay, ticks, write_report
from dit_sparse.video import write_video

SETTINGS = ("dense", "anchor 0.1", "none 0.1")
PROMPTS = ("a red ball", '</script><b>&amp; a "blue" square</b>')
FRAMES, HEIGHT, WIDTH, FPS = 6, 32, 48, 8


def rows() -> list[table.Row]:
    found = []
    for s, name in enumerate(SETTINGS):
        for number, prompt in enumerate(PROMPTS, 1):
            found.append(
                {
                    "setting": name, "method": name.split()[0], "density_asked": None if s == 0 else 0.1,
                    "prompt_number": float(number), "prompt": prompt, "seed": float(number),
                    "dit_seconds": 4.0 / (s + 1) + number, "seconds": 6.0, "attention_seconds": 1.0,
                    "peak_memory_bytes": 2.0**30, "density": 1.0 if s == 0 else 0.125, "work": 1 / (s + 1),
                    "dense_share": 1 / (s + 1), "psnr_db": 30.0 + s if s else None, "ssim": 0.9 if s else None,
                    "ms_ssim": None, "lpips": None, "flicker": None if s == 0 else 0.01, "prompt_score": None,
                }
            )  # fmt: skip
    return found


def layers() -> list[table.Row]:
    return [
        {"setting": name, "layer": f"blocks.{layer}", "step": float(step), "work": 1.0 if step == 0 else 0.25 * s,
         "error": 0.0 if step == 0 else 0.1 * s * (layer + 1)}
        for s, name in enumerate(SETTINGS) for layer in range(2) for step in range(3)
    ]  # fmt: skip


def maps() -> Maps:
    """An error that falls from left to right; two heads, two frames of 3 x 4 tokens, the second head keeps one row."""
    error = np.tile(np.linspace(0.4, 0.0, 48, dtype=np.float32), (32, 1))
    kept = np.zeros((2, 2, 3, 4), dtype=bool)
    kept[0], kept[1, :, 1] = True, True
    return Maps(
        {"anchor 0.1": error / 2, "none 0.1": error}, {"anchor 0.1": kept}, {"anchor 0.1": 1},
        np.full((2, 3, 4, 3), 100, dtype=np.uint8), "transformer.blocks.1.attn1", (1, 1, 2), (0, 1),
    )  # fmt: skip


def facts(frames: int = FRAMES) -> dict:
    return {
        "model": "tiny", "request": {"num_frames": frames, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 3},
        "prompts": list(PROMPTS), "negative_prompt": None, "seeds": [1, 2],
        "settings": {n: {"x": 1} for n in SETTINGS},
        "device": "cpu", "dtype": "float32", "versions": {"torch": "2"}, "fps": FPS, "missing": ["LPIPS is left out."],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Each video is of one grey, and every frame a little lighter than the one before."""
    folder = tmp_path_factory.mktemp("page")
    for s, _ in enumerate(SETTINGS):
        for number in (1, 2):
            grey = 0.2 + 0.1 * s + 0.05 * np.arange(FRAMES).reshape(-1, 1, 1, 1)
            write_video(folder / f"{s}.{number}.mp4", np.broadcast_to(grey, (FRAMES, HEIGHT, WIDTH, 3)), FPS)
    write_report(
        folder / "report.html",
        facts(),
        rows(),
        layers(),
        maps(),
        lambda name, n: folder / f"{SETTINGS.index(name)}.{n}.mp4",
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> Path:
    """The page of images, each of one grey."""
    folder = tmp_path_factory.mktemp("still")
    for s, _ in enumerate(SETTINGS):
        for number in (1, 2):
            write_video(folder / f"{s}.{number}.png", np.full((1, HEIGHT, WIDTH, 3), 0.2 + 0.1 * s * number), FPS)
    write_report(
        folder / "report.html", facts(1), rows(), layers(), maps(),
        lambda name, n: folder / f"{SETTINGS.index(name)}.{n}.png",
    )  # fmt: skip
    return folder / "report.html"


class Reader(HTMLParser):
    """Tags with their attributes, in order, and the texts of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self._in_cell = False

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1][-1] += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def told(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text
    for _, attributes in read(page).tags:
        for name in ("src", "href", "poster", "data"):
            assert attributes.get(name) is None or attributes[name].startswith("data:"), attributes
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_the_videos_are_in_it_and_a_prompt_cannot_end_the_script(page):
    data = told(page)
    assert data["prompts"] == list(PROMPTS) and data["settings"] == list(SETTINGS) and data["fps"] == FPS
    for p in range(2):
        for s in range(3):
            kind, _, content = data["videos"][p][s].partition(",")
            assert kind == "data:video/mp4;base64"
            assert base64.b64decode(content) == (page.parent / f"{s}.{p + 1}.mp4").read_bytes()
    assert "PSNR dB 31.00" in data["about"][0][1] and data["about"][0][0] == "DiT 5.00 s"
    assert [tag for tag, _ in read(page).tags].count("b") == 0


def test_the_table_is_the_summary_of_the_rows(page):
    summary = table.summary(rows())
    columns = table.columns_of(summary)
    expected = [[table.TABLE[name][0] for name in columns]]
    expected += [[table.shown(name, row.get(name)) for name in columns] for row in summary]
    assert read(page).cells == expected
    # Of sums: (5 + 6) / (3 + 4) and (5 + 6) / (7/3 + 10/3).
    at = columns.index("dit_speedup")
    assert [row[at] for row in expected[1:]] == ["1.00x", "1.57x", "1.94x"]


def test_points_stand_where_the_numbers_say(page):
    text = page.read_text(encoding="utf-8")
    plot = re.search(r'<svg[^>]*aria-label="PSNR dB".*?</svg>', text, re.S)[0]
    dots = {html.unescape(n): (float(x), float(y)) for x, y, n in
            re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*data-setting="([^"]+)"', plot)}  # fmt: skip
    assert set(dots) == set(SETTINGS[1:])
    # Ticks are 0.2 and 0.2 apart: from 1 to 2, and from 31 to 32.
    across, down = (np.array(axis) for axis in zip(*dots.values(), strict=True))
    assert np.diff(across)[0] == pytest.approx((11 / (17 / 3) - 11 / 7) * (560 - 58 - 20) / 1.0, abs=0.2)
    assert np.diff(down)[0] == pytest.approx(-(380 - 16 - 46), abs=0.2)
    assert "1.571 times as fast, 31.00" in plot


@pytest.mark.parametrize(("low", "high"), [(0.97, 3.1), (29.4, 29.9), (0.99981, 0.99997), (5, 5), (-1, 250)])
def test_ticks_enclose_what_is_drawn_and_are_round(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert float(f"{step:.2g}") == pytest.approx(step)


def test_maps_are_the_grids_of_the_layers(page):
    assert grid_of(layers(), "none 0.1", "error") == pytest.approx(np.array([[0, 0.2, 0.2], [0, 0.4, 0.4]]))
    drawn = pictures(page)
    wanted = {(kind, name) for kind in ("work", "error", "place") for name in SETTINGS[1:]}
    assert set(drawn) == wanted | {("kept", "anchor 0.1")}
    picture = drawn["error", "none 0.1"]
    assert picture.shape == (2, 3, 3)
    # The worst of all settings is at the end of the ramp, no error at its start, half of the worst in the middle.
    assert picture[1, 1].tolist() == [253, 231, 37] and picture[0, 0].tolist() == [68, 1, 84]
    assert picture[0, 2].tolist() == [33, 145, 140]


def pictures(page: Path) -> dict[tuple[str, str], np.ndarray]:
    """By kind of map and setting."""
    sources = {(a["data-map"], a["data-setting"]): a["src"] for tag, a in read(page).tags if "data-map" in a}
    return {name: np.asarray(Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))))
            for name, source in sources.items()}  # fmt: skip


def test_where_the_error_is_has_one_scale(page):
    drawn = pictures(page)
    worst, half = drawn["place", "none 0.1"], drawn["place", "anchor 0.1"]
    assert worst.shape == half.shape == (32, 48, 3)
    assert worst[5, 0].tolist() == [253, 231, 37] and worst[5, -1].tolist() == [68, 1, 84]
    assert half[5, 0].tolist() == [33, 145, 140]
    assert "none 0.1, mean 0.2, most 0.4" in page.read_text(encoding="utf-8")


def test_what_heads_attend_to_is_drawn_over_the_frames(page):
    drawn = pictures(page)["kept", "anchor 0.1"]
    # Two heads of 3 rows and two frames of 4 columns, a white line between.
    assert drawn.shape == (7, 9, 3) and np.array_equal(drawn, overlay(maps(), maps().kept["anchor 0.1"]))
    kept, left_out, line = [185, 122, 45], [40, 40, 40], [255, 255, 255]
    assert drawn[0, 0].tolist() == drawn[2, 8].tolist() == kept and drawn[4, 0].tolist() == left_out
    assert drawn[5, 0].tolist() == kept and drawn[3, 0].tolist() == drawn[0, 4].tolist() == line
    # The token that asks is in the second frame, for both heads.
    asks = np.argwhere((drawn == report.ASKS).all(-1)).tolist()
    assert asks == [[1, 7], [5, 7]]
    text = page.read_text(encoding="utf-8")
    assert "frame 1, row 1, column 2 (blue)" in text and "step 1, keeps 100.0%, 33.3% of the tokens shown" in text


def test_images_are_shown_as_images(still):
    data = told(still)
    assert data["still"] is True and all(uri.startswith("data:image/png") for row in data["videos"] for uri in row)
    text = still.read_text(encoding="utf-8")
    assert "images of 32 x 48" in text and "frames of 32" not in text


def test_without_maps_there_are_none_and_videos_beyond_the_room_are_left_out(page, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", 3 * 4 * (page.parent / "0.1.mp4").stat().st_size // 3 + 2000)
    out = tmp_path / "small.html"
    none = Maps({}, {}, {})
    write_report(out, facts(), rows(), [], none, lambda name, n: page.parent / f"{SETTINGS.index(name)}.{n}.mp4")
    assert len(told(out)["videos"]) == 1
    text = out.read_text(encoding="utf-8")
    assert "The videos of 1 prompts are left out" in text and "data-map" not in text


# Run inside the page: it drives the players as a visitor would, and tells what it saw.
VISIT = """
(async () => {
  const saw = {};
  const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
  const until = async (what, ms) => { for (let i = 0; i < ms / 25 && !what(); i++) await wait(25); return what(); };
  const settled = () => until(() => a.readyState >= 2 && b.readyState >= 2 && !a.seeking && !b.seeking, 8000);
  const grey = video => { const c = document.createElement("canvas"); c.width = c.height = 1;
    const k = c.getContext("2d"); k.drawImage(video, 0, 0, 1, 1); return k.getImageData(0, 0, 1, 1).data[0]; };
  const middle = () => ink.getImageData(canvas.width >> 1, canvas.height >> 1, 1, 1).data[0];
  saw.ready = await settled();
  saw.wide = document.documentElement.scrollWidth <= innerWidth;
  saw.inner = innerWidth;
  saw.columns = getComputedStyle(document.querySelector(".players")).gridTemplateColumns.split(" ").length;
  saw.greys = [];
  for (let n = 0; n < 6; n++) {
    go(n); await wait(30); await settled(); await wait(100);
    saw.greys.push([grey(a), grey(b), middle(), at("frame").textContent]);
  }
  at("gain").value = "1"; await wait(100); saw.plain = middle();
  go(0); await settled(); at("play").click();
  saw.moved = await until(() => a.currentTime > 0.3, 8000); saw.apart = Math.abs(a.currentTime - b.currentTime);
  at("play").click(); saw.paused = a.paused && b.paused;
  at("right").value = "2"; at("prompt").value = "1"; at("right").dispatchEvent(new Event("change"));
  saw.loaded = await settled(); go(2); await wait(30); await settled(); await wait(100);
  saw.other = [grey(a), grey(b), at("about-b").textContent];
  saw.options = [...at("prompt").options].map(option => option.textContent);
  return saw;
})()
"""


class Browser:
    """Headless Chromium, spoken to through a pair of pipes: messages are JSON, each ended by a zero byte."""

    def __init__(self, program: str, home: Path):
        to_child, self._send = os.pipe()
        self._receive, from_child = os.pipe()
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe", f"--user-data-dir={home}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_child} 4>&{from_child}', *command],
            pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._count = b"", 0
        self.events: list[dict] = []

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(self._send, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._receive], [], [], 90)
                assert ready, f"no answer to {method}"
                told = os.read(self._receive, 1 << 20)
                assert told, f"the browser ended before it answered {method}"
                self._buffer += told
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def close(self) -> None:
        os.close(self._send)
        os.close(self._receive)
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture
def browser(tmp_path):
    names = ("chromium", "chromium-headless-shell", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    opened = Browser(program, tmp_path / "home")
    yield opened
    opened.close()


# The same for images.
LOOK = """
(async () => {
  const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
  const grey = x => { const c = document.createElement("canvas"); c.width = c.height = 1;
    const k = c.getContext("2d"); k.drawImage(x, 0, 0, 1, 1); return k.getImageData(0, 0, 1, 1).data[0]; };
  const middle = () => ink.getImageData(canvas.width >> 1, canvas.height >> 1, 1, 1).data[0];
  const saw = {};
  const settled = async () => {
    for (let i = 0; i < 200 && !(a.complete && b.complete); i++) await wait(25);
    await wait(200);
  };
  await settled();
  saw.first = [a.tagName, grey(a), grey(b), middle()];
  at("gain").value = "1"; at("right").value = "2"; at("prompt").value = "1";
  at("right").dispatchEvent(new Event("change"));
  await settled();
  saw.second = [grey(a), grey(b), middle(), canvas.width];
  saw.time = getComputedStyle(at("time")).display;
  saw.wide = document.documentElement.scrollWidth <= innerWidth;
  return saw;
})()
"""

# What a visitor sees of the maps: their size on the screen, and the colour of a pixel.
MAPS = """
(async () => {
  const found = {};
  for (const img of document.querySelectorAll("img[data-map]")) {
    await img.decode();
    const c = document.createElement("canvas"); c.width = img.naturalWidth; c.height = img.naturalHeight;
    const k = c.getContext("2d"); k.drawImage(img, 0, 0);
    const box = img.getBoundingClientRect();
    found[img.dataset.map + " " + img.dataset.setting] =
      [[...k.getImageData(0, 0, 1, 1).data].slice(0, 3), box.width / box.height, img.naturalWidth / img.naturalHeight];
  }
  return [found, document.documentElement.scrollWidth <= innerWidth];
})()
"""


def visit(browser: Browser, page: Path, width: int, script: str) -> dict:
    """What `script` finds in the page, in a window of that width; nothing is fetched and nothing goes wrong."""
    browser.events.clear()
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    browser.call("Network.enable", session)
    browser.call("Runtime.enable", session)
    phone = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 640)
    browser.call("Emulation.setDeviceMetricsOverride", session, **phone)
    browser.call("Page.navigate", session, url=page.as_uri())
    for _ in range(100):
        ready = browser.call("Runtime.evaluate", session, expression="document.readyState + location.protocol")
        if ready["result"]["value"] == "completefile:":
            break
        time.sleep(0.05)
    answer = browser.call("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    saw = answer["result"]["value"]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    return saw


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_plays_both_videos_in_step(page, browser, width):
    saw = visit(browser, page, width, VISIT)
    assert saw["ready"] and saw["loaded"]
    # The page is no wider than the window, on a laptop and on a phone.
    assert saw["wide"] and saw["inner"] == width and saw["columns"] == (3 if width > 640 else 2)
    for n, (left, right, difference, frame) in enumerate(saw["greys"]):
        lighter = 255 * 0.05 * n
        assert left == pytest.approx(51 + lighter, abs=4) and right == pytest.approx(76.5 + lighter, abs=4)
        assert difference == pytest.approx(4 * 25.5, abs=14) and frame == f"{n + 1} / {FRAMES}"
    assert saw["plain"] == pytest.approx(25.5, abs=4)
    assert saw["moved"] and saw["apart"] < 1.5 / FPS and saw["paused"]
    left, right, about = saw["other"]
    assert left == pytest.approx(51 + 25.5, abs=4) and right == pytest.approx(102 + 25.5, abs=4)
    assert "PSNR dB 32.00" in about and saw["options"] == list(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_images_and_maps(page, still, browser, width):
    saw = visit(browser, still, width, LOOK)
    assert saw["first"] == ["IMG", 51, 77, 4 * 26]
    # The second prompt's, dense beside the third setting.
    assert saw["second"] == [51, 153, 102, WIDTH] and saw["time"] == "none" and saw["wide"]
    found, wide = visit(browser, page, width, MAPS)
    assert wide and len(found) == 7
    assert found["kept anchor 0.1"][0] == [185, 122, 45] and found["place none 0.1"][0] == [253, 231, 37]
    for name in ("kept anchor 0.1", "place none 0.1", "place anchor 0.1"):
        # Frames keep their proportions.
        assert found[name][1] == pytest.approx(found[name][2], rel=0.03), name

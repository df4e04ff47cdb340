"""The page in a browser: with its script and without, many records, no errors."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from reporting import QUIET, answer, make_run, make_scores
from test_explore_browser import exploration, sample

from striate.runs.run import Run
from striate.studies.explore.page import page as page_of
from striate.studies.report import report as report_with_figures

pytestmark = pytest.mark.browser
report = partial(report_with_figures, page_only=True)
# A frame that holds the page, and a script beside it that uses it like a reader: `at` finds one element.
# Without its charset the browser guesses by what it has read so far, and the script no longer has its hash.
FRAME = """<meta charset="utf-8"><title>untouched</title><textarea id="source" hidden>\n%s</textarea>
<iframe width="%d" height="800"%s></iframe><script>
const frame = document.querySelector("iframe"), began = performance.now();
frame.onload = () => {
  const page = frame.contentDocument, opened = performance.now() - began;
  const at = (name) => page.querySelector(name), all = (name) => [...page.querySelectorAll(name)];
  const put = (name, value, kind) => { at(name).value = value; at(name).dispatchEvent(new Event(kind)); };
  const count = () => at(".count").textContent, cards = () => all("#browser .card").length;
  document.title = JSON.stringify((() => { %s })());
};
frame.srcdoc = document.getElementById("source").value;
</script>"""


def show(page: Path) -> tuple[str, list[str]]:
    """The elements of a page after it was shown, and the messages of its console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium to look at the report")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [program, *QUIET, profile, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return shown.stdout, [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]


def use(page: Path, script: str, *, width: int = 1200, scripts: bool = True) -> object:
    """What `script` returns after it has used the page; see `FRAME`."""
    sandbox = "" if scripts else ' sandbox="allow-same-origin"'
    frame = page.with_suffix(".frame.html")
    frame.write_text(FRAME % (html.escape(page.read_text("utf-8")), width, sandbox, script), encoding="utf-8")
    elements, messages = show(frame)
    assert not [message for message in messages if scripts or "sandboxed" not in message]
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", elements, re.DOTALL)[1]))  # type: ignore[index]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three runs on 30 records of two tasks: `all` is always right, `part` in "read", `none` never."""
    image = tmp_path / "image.png"
    Image.new("RGB", (300, 200), "red").save(image)
    paths = [
        answer(make_run(tmp_path / "all"), {"read": [1.0] * 20, "count": [1.0] * 10}),
        answer(make_run(tmp_path / "part", region="first:3"), {"read": [1.0] * 20, "count": [0.0] * 10}),
        answer(make_run(tmp_path / "none", region="last:3"), {"read": [0.0] * 20, "count": [0.0] * 10}),
    ]
    for path in paths:
        run = Run.open(path)
        run.write_predictions(one | {"images": [str(image)]} for one in run.predictions())
    return report([*paths, make_scores(tmp_path / "scores")], out=tmp_path / "report.html")


def test_the_script_runs_under_the_policy_of_the_page_without_a_message(page: Path) -> None:
    elements, messages = show(page)
    assert not messages
    assert re.search(r'<section id="browser">', elements)


def test_records_can_be_filtered_and_searched(page: Path) -> None:
    script = """
    const found = [count(), cards()];
    at(".more").click(); found.push(cards(), at(".more").hidden);
    put("[name=task]", 1, "change"); found.push(count());
    put("[name=who]", "wrong 1", "change"); found.push(count());
    put("[name=task]", -1, "change"); found.push(count());
    put("[name=who]", "1 0", "change"); found.push(count());
    put("[name=who]", "all", "change"); found.push(count());
    put("[name=who]", "disagree", "change"); found.push(count());
    put("[name=who]", "every", "change"); put("[name=text]", "READ 1", "input"); found.push(count());
    found.push(at("#browser .card img").src.slice(0, 11), at("#browser .card").innerText);
    return found;
    """
    *numbers, image, first = use(page, script)  # type: ignore[misc]
    assert numbers == [
        "30 of 30 records.", 24, 30, True, "10 of 30 records.", "10 of 30 records.", "10 of 30 records.",
        "10 of 30 records.", "0 of 30 records.", "30 of 30 records.", "11 of 30 records.",
    ]  # fmt: skip
    assert image == "data:image/"
    assert re.sub(r"\s+", " ", first) == "read read 1? truth yes ✓ right ● all yes ✓ right ■ part yes ✗ wrong ◆ none no"


def test_records_open_their_page_of_explore(page: Path) -> None:
    """The records of `explore` are known by id and question; those of other questions are not linked."""
    explored = exploration(*(replace(sample(), id=name, question=f" read {name}?") for name in ("1", "7", "30")))
    (page.parent / "part" / "explore.html").write_text(page_of(explored, numbers="explore.json"), encoding="utf-8")
    (page.parent / "none" / "explore.html").write_text("<p>not a page of explore</p>", encoding="utf-8")
    report([page.parent / name for name in ("all", "part", "none")], out=page)
    script = """
    at(".more").click();
    return all("#browser .card").map((one) => [...one.querySelectorAll("a")].map((link) => [
      one.querySelector("strong").innerText, link.innerText, link.getAttribute("href")])).flat();
    """
    assert use(page, script) == [
        ["read 1?", "layer by layer: part", "part/explore.html#1"],
        ["read 7?", "layer by layer: part", "part/explore.html#7"],
    ]  # fmt: skip


def test_tables_sort_by_any_column(page: Path) -> None:
    script = """
    const table = at("table.summary"), names = () => all("table.summary tbody th .run bdi").map((one) => one.innerText);
    const button = table.tHead.rows[0].cells[2].querySelector("button");
    const found = [names()];
    button.click(); found.push(names(), table.tHead.rows[0].cells[2].getAttribute("aria-sort"));
    button.click(); found.push(names(), table.tHead.rows[0].cells[2].getAttribute("aria-sort"));
    return found;
    """
    assert use(page, script) == [
        ["all", "part", "none", "scores"], ["all", "part", "none", "scores"], "descending",
        ["none", "part", "all", "scores"], "ascending",
    ]  # fmt: skip


def test_without_scripts_a_line_stands_for_the_records_and_there_are_no_buttons(page: Path) -> None:
    script = 'return [at("#browser").hidden, at("noscript").innerText.includes("scripts are off"), all(".sort").length]'
    assert use(page, script, scripts=False) == [True, True, 0]


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_nothing_sticks_out_sideways_with_scripts(page: Path, width: int) -> None:
    assert use(page, "return page.documentElement.scrollWidth", width=width) == width


def test_twenty_runs_with_five_thousand_records_open_soon(tmp_path: Path) -> None:
    paths = []
    for run in range(20):
        scores = {task: [float((record + run) % 3 > 0) for record in range(1000)] for task in "abcde"}
        region = "all" if not run else f"random:{1 + run % 5}@{run}"
        paths.append(answer(make_run(tmp_path / f"run {run}", region=region, seconds=None), scores))
    page = report(paths, out=tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    script = """
    const begun = performance.now();
    put("[name=text]", "a 99", "input");
    return [opened, performance.now() - begun, count()];
    """
    opened, searched, count = use(page, script)  # type: ignore[misc]
    assert count == "11 of 5,000 records."
    assert opened < 30_000  # the promise is 2 s on a machine with nothing else to do; tests may run beside other work
    assert searched < 10_000

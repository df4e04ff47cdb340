"""The page of `explore` in a browser: a token, a layer, a patch, a head, by pointer and by keyboard, at two widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reporting import QUIET

from striate.exploration import Attention, Exploration, Lens, Lesion, Sample, View
from striate.region import Region
from striate.studies.explore.page import page as page_of

pytestmark = pytest.mark.browser
DEPTH, HEADS, SIDE = 6, 2, 4
WHOLE = View(0, 0, SIDE, SIDE, SIDE, (0.0, 0.0, 1.0, 1.0))
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
# A frame that holds the page, and a script beside it that uses it like a reader. Time is virtual, and it waits.
FRAME = """<meta charset="utf-8"><title>untouched</title><textarea id="source" hidden>\n%s</textarea>
<iframe width="%d" height="900"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = async () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const at = (name) => page.querySelector(name), all = (name) => [...page.querySelectorAll(name)];
  const wait = () => new Promise((resolve) => setTimeout(resolve, 50));
  const press = (name, key) => at(name).dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true }));
  const slide = (layer) => { at("#layer").value = layer; at("#layer").dispatchEvent(new Event("input")); };
  const point = (x, y) => {
    const canvas = at("#images canvas"), box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new view.PointerEvent("pointermove",
      { clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
  };
  const color = (x, y) => {
    const shown = at("#images canvas"), canvas = document.createElement("canvas");
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(shown, x * shown.width, y * shown.height, 1, 1, 0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const near = () => all("#near > *").map((one) => one.innerText.replace(/\\s+/g, " "));
  for (let tries = 0; tries < 100 && !at("#near *"); tries++) await wait();
  await wait();
  document.title = JSON.stringify(await (async () => { %s })());
};
frame.srcdoc = document.getElementById("source").value;
</script>"""


def show(page: Path, *more: str) -> tuple[str, list[str]]:
    """The elements of a page after it was shown, and the messages of its console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium to look at the page")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    options = ("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", *more)
    command = [program, *QUIET, profile, *options, page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return shown.stdout, [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]


def use(page: Path, script: str, *, width: int = 1400) -> Any:
    """What `script` returns after it has used the page; see `FRAME`."""
    frame = page.with_suffix(".frame.html")
    frame.write_text(FRAME % (html.escape(page.read_text("utf-8")), width, script), encoding="utf-8")
    elements, messages = show(frame)
    assert not messages
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", elements, re.DOTALL)[1]))  # type: ignore[index]


def sample(**changes: Any) -> Sample:
    """Token t looks in layer l at patch (l + t) of 16 with 0.4 and at the next with 0.1; head 1 at the one after."""
    texts, roles = ("What", " is", " it", "?", " cat", "</s>"), ("prompt",) * 4 + ("answer",) * 2
    mean = torch.zeros(DEPTH, len(texts), SIDE**2)
    heads = torch.zeros(DEPTH, HEADS, len(texts), SIDE**2, dtype=torch.float16)
    for layer in range(DEPTH):
        for token in range(len(texts)):
            mean[layer, token, layer + token], mean[layer, token, layer + token + 1] = 0.4, 0.1
            heads[layer, :, token, layer + token], heads[layer, 1, token, layer + token + 2] = 0.5, 0.25
    mean[3] *= 1.5
    words = torch.arange(DEPTH * (SIDE**2 + len(texts)) * 3).view(DEPTH, -1, 3) % 1000
    likely = torch.tensor([0.6, 0.2, 0.1]).expand(words.shape)
    names = {f"layer {layer}": Region((layer,), DEPTH) for layer in range(DEPTH)}
    names |= {"region": Region((0, 3), DEPTH), "outside the region": Region((1, 2, 4, 5), DEPTH)}
    lesions = [
        Lesion(name, layers, kind, (-1.0, -0.1), "dog" if 3 in layers else "cat", 3 in layers)
        for kind in ("bypass", "image")
        for name, layers in names.items()
    ]
    return Sample(
        id="a", source="test.json:1", question="What is it?", truth=("cat",), answer="cat", log_prob=(-0.1, 0.0),
        images=(Image.new("RGB", (80, 60), (0, 60, 200)),), views=(WHOLE,), texts=texts, roles=roles,
        influence={"image": torch.linspace(0.3, 0.1, DEPTH).double(), "text": torch.linspace(0.1, 0.4, DEPTH).double()},
        attention=Attention(mean, heads, 1), lens=Lens(words, likely, SIDE**2), lesions=tuple(lesions), notes=(),
        **changes,
    )  # fmt: skip


def exploration(*samples: Sample) -> Exploration:
    words = {number: f" w{number}" for number in range(1000)}
    return Exploration("model", DEPTH, Region((0, 3), DEPTH), Region((0, 1, 3), DEPTH), samples, words)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "explore.html"
    file.write_text(page_of(exploration(sample(), sample()), numbers="explore.json"), encoding="utf-8")
    return file


def test_tokens_layers_patches_and_heads(page: Path) -> None:
    script = """
    const start = [at(".bar output").innerText, at("#talk [aria-pressed=true]").innerText];
    slide(2); at("[data-token='0']").click();
    const hot = color(.6, .1), warm = color(.85, .1), cold = color(.1, .1);
    const about = at("#scale").innerText, said = near();
    point(.6, .1); const patch = near()[1];
    slide(3); const other = near()[1], ring = color(.9, .1);
    at("[data-head='1']").click(); const scale = at("#scale").innerText;
    return { start, hot, warm, cold, about, said, patch, other, ring, scale };
    """
    found = use(page, script)
    assert found["start"] == ["3 of 6", "?"]  # the token before the answer, where it looks at the image most
    brightness = [sum(found[name][:2]) for name in ("hot", "warm", "cold")]
    assert brightness == sorted(brightness, reverse=True)
    assert "60 % per patch, in all layers (mean over heads)" in found["about"]
    assert "50 % of the token's attention is on the image" in found["about"]
    assert found["said"][0].startswith("token “What” w180 60 % w181 20 % w182 10 %")
    assert found["patch"] == "patch in row 1, column 3 w138 60 % w139 20 % w140 10 %"
    assert found["other"] == "patch in row 1, column 3 w204 60 % w205 20 % w206 10 %"
    assert sum(found["ring"][:2]) > 300  # the brightest patch of the next layer
    assert "50 % per patch, in all layers (head 1)" in found["scale"]


def test_the_keyboard_does_all_of_it(page: Path) -> None:
    script = """
    const found = [];
    at("#talk [tabindex='0']").focus(); press("#talk [tabindex='0']", "ArrowLeft");
    found.push(at("#talk [aria-pressed=true]").innerText.trim(), page.activeElement.innerText.trim());
    at("#images canvas").focus(); press("#images canvas", "ArrowRight"); found.push(near()[1].slice(0, 24));
    press("#images canvas", "ArrowRight"); press("#images canvas", "ArrowDown"); found.push(near()[1].slice(0, 24));
    at("#heads [tabindex='0']").focus(); press("#heads [tabindex='0']", "ArrowRight");
    found.push(at("#heads [aria-pressed=true]").innerText);
    found.push(all("main [tabindex='0']").length, at("#layer").type);
    return found;
    """
    assert use(page, script) == [
        "it", "it", "patch in row 1, column 1", "patch in row 2, column 2", "0", 4, "range",
    ]  # fmt: skip


def test_lesions_stand_out_where_the_answer_changes(page: Path) -> None:
    script = """
    const rows = () => all(".lesions tbody tr").map((one) => one.innerText.replace(/\\s+/g, " ").trim());
    slide(3); const changed = rows(), red = all("#rows .mark").length, mark = at("#marks").innerText;
    slide(4);
    return [changed, rows()[1], red, mark, at("#marks").innerText, all("#rows .row").length];
    """
    changed, same, red, mark, outside, rows = use(page, script)
    assert changed == [
        "unchanged cat 95 %", "layer 3 ≠ changed: dog 58 % ≠ changed: dog 58 %",
        "region ≠ changed: dog 58 % ≠ changed: dog 58 %", "outside the region same 58 % same 58 %",
    ]  # fmt: skip
    assert same == "layer 4 same 58 % same 58 %"
    assert red == 2
    assert (mark, outside) == ("in the region, in the route", "")
    assert rows == 2 + 2 + 2 + 1  # region and route; influence and attention; lesions; layers


def test_the_address_names_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "explore.html"
    explored = exploration(sample(), replace(sample(), id="b 100%"), sample())
    file.write_text(page_of(explored, numbers="explore.json"), encoding="utf-8")
    script = """
    const found = [];
    for (const hash of ["", "#b%20100%25", "#nowhere", "#%"]) {
      view.location.hash = hash; await wait(); await wait();
      const chosen = all("#samples button").findIndex((one) => one.getAttribute("aria-pressed") === "true");
      found.push([chosen, page.activeElement === all("#samples button")[chosen]]);
    }
    return found;
    """
    assert use(file, script) == [[0, False], [1, True], [1, True], [1, True]]


def test_what_cannot_be_shown_is_left_out(tmp_path: Path) -> None:
    text = replace(sample(), images=(), views=(), attention=None, notes=("this record has no image",))
    text = replace(
        text,
        lens=replace(
            text.lens, words=text.lens.words[:, 16:], probabilities=text.lens.probabilities[:, 16:], num_image=0
        ),
    )
    tiles = tuple(
        View(0, 4 * n, 2, 2, 2, (n % 2 / 2, n // 2 / 2, n % 2 / 2 + 0.5, n // 2 / 2 + 0.5), True) for n in range(3)
    )
    tiled = replace(sample(), views=(*tiles, View(0, 12, 2, 2, 2, (0.0, 0.0, 1.0, 1.0))))
    unplaced = replace(sample(), views=(replace(WHOLE, box=None),))
    file = tmp_path / "explore.html"
    file.write_text(page_of(exploration(text, tiled, unplaced), numbers="explore.json"), encoding="utf-8")
    script = """
    const found = [[all("#images > *").length, at("#notes").innerText, at("#by-head").hidden, near().length]];
    for (const number of [1, 2]) {
      all("#samples button")[number].click(); await wait(); await wait();
      found.push([all("#images canvas").length, all("#images figcaption").map((one) => one.innerText)]);
    }
    return found;
    """
    assert use(file, script) == [
        [0, "this record has no image", True, 1], [2, ["image, in detail", "image, as a whole"]], [1, []],
    ]  # fmt: skip


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = replace(sample(), question=HOSTILE, answer=HOSTILE, texts=(HOSTILE,) * 6, notes=(HOSTILE,), truth=(HOSTILE,))
    explored = exploration(bad)
    explored = replace(explored, model=HOSTILE, notes=(HOSTILE,), words=dict.fromkeys(explored.words, HOSTILE))
    file = tmp_path / "explore.html"
    file.write_text(page_of(explored, numbers="a b.json"), encoding="utf-8")
    script = 'return [all("script").length, all("img[src=x]").length, at("#talk button").innerText]'
    assert use(file, script) == [2, 0, HOSTILE]


def test_nothing_sticks_out_sideways(page: Path) -> None:
    script = """
    const found = [];
    for (const width of [320, 390, 1400]) {
      frame.width = width; await wait();
      found.push(page.documentElement.scrollWidth - width);
    }
    return found;
    """
    assert use(page, script) == [0, 0, 0]

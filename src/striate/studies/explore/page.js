"use strict";
// Shows the data of the page: text is always set as text, so nothing in a record can become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (name) => document.querySelector(name);
const KINDS = { bypass: "bypassed", image: "bypassed by image tokens", revert: "reverted to the backbone" };
const state = { sample: 0, layer: 0, token: 0, head: -1, patch: -1 };
let sample, attention, heads, words, shares; // of the chosen sample

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const percent = (value) => value === null || value === undefined ? "–" : value > 0 && value < 0.001 ? "< 0.1 %" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
// A token as it can be seen: white space that stands alone has a sign.
const seen = (text) => text === "" ? "∅" : /^\s+$/.test(text) ? text.replaceAll("\n", "↵").replaceAll(" ", "␣").replaceAll("\t", "⇥") : text.replaceAll("\n", "↵");

// Maps of cells.

const STOPS = [[0, 10, 10, 38, .62], [.25, 62, 16, 112, .56], [.5, 178, 42, 96, .56], [.75, 246, 128, 44, .62], [1, 255, 242, 150, .8]];
function heat(share) {
  const above = STOPS.findIndex((stop) => stop[0] >= share), [low, high] = [STOPS[Math.max(0, above - 1)], STOPS[above < 0 ? STOPS.length - 1 : above]];
  const part = high[0] > low[0] ? (share - low[0]) / (high[0] - low[0]) : 1;
  const [red, green, blue, alpha] = [1, 2, 3, 4].map((i) => low[i] + part * (high[i] - low[i]));
  return `rgba(${red | 0},${green | 0},${blue | 0},${alpha.toFixed(3)})`;
}

const cellsOf = (factor) => sample.views.map((view) => [Math.ceil(view.rows / factor), Math.ceil(view.columns / factor)]);

// The codes of one map, view by view; of one head or of the mean.
function mapOf(head) {
  const packed = head < 0 ? attention : heads;
  if (!packed) return null;
  const count = head < 0 ? 1 : packed.count, row = (state.layer * count + Math.max(0, head)) * sample.tokens.length + state.token;
  const sizes = cellsOf(packed.factor), total = sizes.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
  let start = row * total;
  return { factor: packed.factor, peak: packed.peak, views: sizes.map(([rows, columns]) => {
    const codes = packed.codes.subarray(start, start += rows * columns);
    return { codes, rows, columns };
  }) };
}

// The rectangle of some rows and columns of a view, in pixels of a canvas.
function place(view, top, left, rows, columns, canvas) {
  const [x0, y0, x1, y1] = view.box || [0, 0, 1, 1], across = (x1 - x0) / view.columns * canvas.width, down = (y1 - y0) / view.rows * canvas.height;
  const x = x0 * canvas.width + left * across, y = y0 * canvas.height + top * down;
  return [x, y, Math.min(columns, view.columns - left) * across, Math.min(rows, view.rows - top) * down];
}

function paint(canvas, views, map) {
  const pen = canvas.getContext("2d");
  if (map) for (const number of views) {
    const view = sample.views[number], { codes, rows, columns } = map.views[number];
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      pen.fillStyle = heat(codes[row * columns + column] / 255);
      pen.fillRect(...place(view, row * map.factor, column * map.factor, map.factor, map.factor, canvas));
    }
  }
}

// Panels: an image with its tiles, or with the view of the whole.

let panels = [];

function makePanels() {
  const groups = new Map();
  sample.views.forEach((view, number) => {
    const key = `${view.image} ${view.is_tile}`;
    if (!groups.has(key)) groups.set(key, { image: view.image, tiles: view.is_tile, views: [] });
    groups.get(key).views.push(number);
  });
  const bare = sample.images.map((_, image) => image).filter((image) => ![...groups.values()].some((one) => one.image === image && sample.views[one.views[0]].box));
  const several = groups.size > 1;
  panels = [...groups.values()].map((group) => {
    const first = sample.views[group.views[0]], placed = first.box !== null;
    const canvas = make("canvas", { tabindex: "0", role: "img" });
    const name = `image${sample.images.length > 1 ? ` ${group.image + 1}` : ""}${several ? group.tiles ? ", in detail" : ", as a whole" : ""}`;
    const figure = make("figure", { class: "panel" }, canvas);
    if (several || sample.images.length > 1) figure.append(make("figcaption", {}, name));
    const panel = { ...group, canvas, name, loaded: null, ratio: placed ? 1 : first.rows / first.columns, figure };
    if (placed) {
      panel.loaded = new Image();
      panel.loaded.onload = () => { panel.ratio = panel.loaded.naturalHeight / panel.loaded.naturalWidth; show(); };
      panel.loaded.src = sample.images[group.image];
    }
    canvas.addEventListener("pointermove", (event) => point(panel, event));
    canvas.addEventListener("pointerdown", (event) => point(panel, event));
    canvas.addEventListener("keydown", (event) => step(panel, event));
    return panel;
  });
  at("#images").replaceChildren(...panels.map((panel) => panel.figure), ...bare.map((image) => make("figure", { class: "panel" }, make("img", { src: sample.images[image], alt: `image ${image + 1}`, style: "width: 100%; border-radius: 6px" }))));
}

function showPanel(panel) {
  const { canvas } = panel, scale = Math.min(2, window.devicePixelRatio || 1), width = canvas.clientWidth || 400;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(width * panel.ratio * scale);
  const pen = canvas.getContext("2d"), map = mapOf(state.head);
  if (panel.loaded?.complete) pen.drawImage(panel.loaded, 0, 0, canvas.width, canvas.height);
  paint(canvas, panel.views, map);
  pen.lineWidth = 1;
  for (const number of panel.views) {
    const view = sample.views[number];
    const [, , across] = place(view, 0, 0, 1, 1, canvas);
    if (across < 5 * scale) continue;
    pen.strokeStyle = "rgba(255,255,255,.22)";
    for (let row = 0; row < view.rows; row++) for (let column = 0; column < view.columns; column++) pen.strokeRect(...place(view, row, column, 1, 1, canvas));
  }
  const chosen = located(state.patch);
  if (chosen && panel.views.includes(chosen.number)) {
    const [x, y, w, h] = place(sample.views[chosen.number], chosen.row, chosen.column, 1, 1, canvas);
    pen.lineWidth = 3 * scale; pen.strokeStyle = "#000"; pen.strokeRect(x, y, w, h);
    pen.lineWidth = 1.5 * scale; pen.strokeStyle = "#fff"; pen.strokeRect(x, y, w, h);
  }
  const token = sample.tokens[state.token];
  canvas.setAttribute("aria-label", `${panel.name}: attention of ${seen(token[0]).trim()} in layer ${state.layer}; arrow keys choose a patch`);
}

// The view, row and column of an image token.
function located(patch) {
  for (const [number, view] of sample.views.entries()) {
    const row = Math.floor((patch - view.first) / view.stride), column = (patch - view.first) % view.stride;
    if (patch >= view.first && row < view.rows && column < view.columns) return { number, row, column };
  }
  return null;
}

function choosePatch(number, row, column) {
  const view = sample.views[number];
  state.patch = view.first + row * view.stride + column;
  panels.forEach(showPanel);
  showWords();
}

function point(panel, event) {
  const frame = panel.canvas.getBoundingClientRect();
  const x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
  for (const number of panel.views) {
    const view = sample.views[number], [x0, y0, x1, y1] = view.box || [0, 0, 1, 1];
    const column = Math.floor((x - x0) / (x1 - x0) * view.columns), row = Math.floor((y - y0) / (y1 - y0) * view.rows);
    if (row >= 0 && row < view.rows && column >= 0 && column < view.columns) return choosePatch(number, row, column);
  }
}

// Arrow keys: the nearest patch in that direction, also over the border of a tile.
function step(panel, event) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [];
  if (dx === undefined) return;
  event.preventDefault();
  const size = { width: 1, height: 1 };
  const centers = panel.views.flatMap((number) => Array.from({ length: sample.views[number].rows * sample.views[number].columns }, (_, cell) => {
    const view = sample.views[number], row = Math.floor(cell / view.columns), column = cell % view.columns;
    const [x, y, w, h] = place(view, row, column, 1, 1, size);
    return { number, row, column, x: x + w / 2, y: y + h / 2 };
  }));
  const chosen = located(state.patch), from = chosen && centers.find((one) => one.number === chosen.number && one.row === chosen.row && one.column === chosen.column);
  if (!from) return choosePatch(centers[0].number, centers[0].row, centers[0].column);
  const ahead = centers.filter((one) => (one.x - from.x) * dx + (one.y - from.y) * dy > 1e-6);
  const far = (one) => Math.hypot(one.x - from.x, one.y - from.y) + 4 * Math.abs((one.x - from.x) * dy) + 4 * Math.abs((one.y - from.y) * dx);
  const next = ahead.sort((one, other) => far(one) - far(other))[0];
  if (next) choosePatch(next.number, next.row, next.column);
}

// Words.

function near(position, title) {
  const list = make("ol"), start = 3 * (state.layer * (sample.lens.image + sample.tokens.length) + position);
  for (let rank = 0; rank < 3; rank++) {
    const share = shares[start + rank] / 255;
    const item = make("li", {}, make("b", {}, seen(data.words[words[start + rank]])), make("small", {}, share ? percent(share) : "< 1 %"));
    item.style.setProperty("--share", share);
    list.append(item);
  }
  return make("div", {}, make("h3", {}, title), list);
}

function showWords() {
  const blocks = [near(sample.lens.image + state.token, `token “${seen(sample.tokens[state.token][0]).trim()}”`)];
  if (state.patch >= 0 && state.patch < sample.lens.image) {
    const chosen = located(state.patch);
    blocks.push(near(state.patch, `patch in row ${chosen.row + 1}, column ${chosen.column + 1}`));
  } else if (sample.views.length) blocks.push(make("p", { class: "quiet" }, "Point at a patch of the image for its words."));
  at("#near").replaceChildren(...blocks);
}

// Question and answer.

function makeTokens() {
  const special = /^\s*(<[^<>\s]*>|\[[A-Z_/]+\])\s*$/;
  const buttons = sample.tokens.map(([text, role], number) => {
    const button = make("button", { type: "button", class: `token ${role}${special.test(text) ? " special" : ""}`, "data-token": number }, seen(text));
    button.addEventListener("click", () => { state.token = number; show(); });
    return button;
  });
  const list = at("#talk");
  list.replaceChildren(...buttons.flatMap((button, number) => number && sample.tokens[number][1] === "answer" && sample.tokens[number - 1][1] !== "answer" ? [make("span", { class: "break" }), button] : [button]));
  const truth = sample.truth.length ? `Answer in the data: ${sample.truth.join(", ")}. ` : "";
  at("#truth").textContent = `${truth}The model's answer has a likelihood of ${percent(sample.likelihood)}.`;
}

// Left and right move between the buttons of a group, of which one is in the order of the tab key.
function rove(group, event) {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move) return;
  const buttons = [...group.querySelectorAll("button")], next = buttons[buttons.indexOf(document.activeElement) + move];
  if (next) { event.preventDefault(); next.focus(); next.click(); }
}

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button === chosen);
    button.tabIndex = button === chosen ? 0 : -1;
  }
}

// Heads.

function makeHeads() {
  at("#by-head").hidden = !heads;
  if (!heads) return;
  const panel = panels.find((one) => !one.tiles) || panels[0];
  const choose = (head, ...children) => {
    const button = make("button", { type: "button", class: head < 0 ? "head mean" : "head", "data-head": head }, ...children);
    button.addEventListener("click", () => { state.head = head; show(); });
    return button;
  };
  const each = Array.from({ length: heads.count }, (_, head) => choose(head, make("canvas", { width: 48, height: 48 * Math.min(2, Math.max(.5, panel.ratio)) | 0 }), `${head}`));
  at("#heads").replaceChildren(choose(-1, "mean"), ...each);
  each.forEach((button, head) => { button.title = `head ${head}`; });
}

function showHeads() {
  if (!heads) return;
  const panel = panels.find((one) => !one.tiles) || panels[0];
  for (const button of at("#heads").children) {
    const head = Number(button.dataset.head), canvas = button.querySelector("canvas");
    if (canvas) { canvas.getContext("2d").clearRect(0, 0, 99, 99); paint(canvas, panel.views, mapOf(head)); }
  }
  press(at("#heads"), at(`[data-head="${state.head}"]`));
}

// By layer.

const WIDE = 1000;
const spot = (layer) => WIDE / data.depth * layer;

function row(title, height, build) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDE} ${height}`, height, preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(draw("rect", { class: "cursor", y: 0, width: WIDE / data.depth, height }));
  build(svg);
  svg.addEventListener("click", (event) => {
    const frame = svg.getBoundingClientRect();
    state.layer = Math.min(data.depth - 1, Math.max(0, Math.floor((event.clientX - frame.left) / frame.width * data.depth)));
    show();
  });
  return make("div", { class: "row" }, make("span", {}, ...title), svg);
}

const key = (color) => { const mark = make("i", { class: "key" }); mark.style.background = color; return mark; };

function line(svg, values, height, top, color) {
  const points = values.map((value, layer) => value === null ? null : `${(spot(layer) + WIDE / data.depth / 2).toFixed(1)},${(height - 2 - (height - 4) * value / top).toFixed(1)}`);
  svg.append(draw("polyline", { points: points.filter(Boolean).join(" "), fill: "none", stroke: color, "stroke-width": 2, "vector-effect": "non-scaling-stroke" }));
}

function bars(svg, values, height, color) {
  const gap = data.depth > 60 ? .1 : .22, width = WIDE / data.depth;
  values.forEach((value, layer) => {
    if (value === null) return;
    const tall = Math.max(1.5, (height - 1) * value);
    svg.append(draw("rect", { x: spot(layer) + gap * width / 2, y: height - tall, width: width * (1 - gap), height: tall, fill: color(layer), class: "value" }));
  });
}

const lesionsOf = (kind) => Array.from({ length: data.depth }, (_, layer) => sample.lesions.find((one) => one[0] === `layer ${layer}` && one[1] === kind));

function makeRows() {
  const rows = [];
  const marks = (name, layers, color) => row([name], 14, (svg) => bars(svg, Array.from({ length: data.depth }, (_, layer) => layers.includes(layer) ? 1 : .12), 14, (layer) => layers.includes(layer) ? color : "var(--cell)"));
  if (data.region) rows.push(marks("region", data.region, "var(--run-2)"));
  if (data.route) rows.push(marks("route of image tokens", data.route, "var(--run-3)"));
  const { image, text } = sample.influence, top = Math.max(1e-6, ...image.concat(text).filter((value) => value !== null));
  const has = image.some((value) => value !== null);
  rows.push(row(["block influence, up to ", top.toFixed(2), ": ", ...(has ? [key("var(--run-0)"), "image ", ] : []), key("var(--run-1)"), "text"], 60, (svg) => {
    svg.append(draw("line", { class: "ground", x2: WIDE, y1: 60, y2: 60 }));
    if (has) line(svg, image, 60, top, "var(--run-0)");
    line(svg, text, 60, top, "var(--run-1)");
  }));
  if (attention) rows.push(make("div", { id: "looking" }));
  for (const [kind, name] of Object.entries(KINDS)) {
    const found = lesionsOf(kind);
    if (!found[0]) continue;
    rows.push(row([`likelihood, layer ${name}`], 56, (svg) => {
      bars(svg, found.map((one) => one[2]), 56, (layer) => found[layer][3] === null ? "var(--quiet)" : "var(--wrong)");
      found.forEach((one, layer) => { if (one[3] !== null) svg.append(draw("path", { class: "mark", d: `M${spot(layer) + WIDE / data.depth / 2},5h0`, "vector-effect": "non-scaling-stroke" })); });
      const y = 56 - 55 * sample.likelihood;
      svg.append(draw("line", { class: "clean", x2: WIDE, y1: y, y2: y, "vector-effect": "non-scaling-stroke" }));
    }));
  }
  const every = data.depth > 48 ? 8 : data.depth > 16 ? 4 : 1;
  const axis = make("div", { class: "axis" }, ...Array.from({ length: data.depth }, (_, layer) => make("i", {}, layer % every ? "" : `${layer}`)));
  rows.push(make("div", { class: "row", "aria-hidden": "true" }, make("span", {}, "layer"), axis));
  at("#rows").replaceChildren(...rows);
  const mark = make("span", { class: "wrong" }, "● red");
  const dashed = sample.lesions.length ? ["Dashed: the likelihood of the answer of the unchanged model. ", mark, ": the answer changes. "] : [];
  at("#legend").replaceChildren(...dashed, "Click a layer to choose it.");
}

function showRows() {
  if (attention) {
    const values = sample.shares.map((layer) => layer[state.token]);
    const made = row(["attention on the image of ", make("b", {}, seen(sample.tokens[state.token][0]).trim())], 60, (svg) => {
      svg.append(draw("line", { class: "ground", x2: WIDE, y1: 60, y2: 60 }));
      line(svg, values, 60, 1, "var(--run-1)");
    });
    made.id = "looking";
    at("#looking").replaceWith(made);
  }
  for (const cursor of document.querySelectorAll(".cursor")) cursor.setAttribute("x", spot(state.layer));
}

// Lesions.

function showLesions() {
  at("#lesions").hidden = !sample.lesions.length;
  const kinds = Object.keys(KINDS).filter((kind) => sample.lesions.some((one) => one[1] === kind));
  const names = [`layer ${state.layer}`, ...new Set(sample.lesions.map((one) => one[0]).filter((name) => !name.startsWith("layer ")))];
  const cell = ([, , likelihood, answer]) => make("td", {},
    answer === null ? make("span", {}, "same") : make("span", { class: "changed", title: answer }, make("span", { "aria-hidden": "true" }, "≠ "), make("span", { class: "hidden" }, "changed: "), answer.trim() || "(nothing)"),
    make("small", {}, percent(likelihood)));
  at(".lesions thead").replaceChildren(make("tr", {}, make("th", { scope: "col" }, "layers"), ...kinds.map((kind) => make("th", { scope: "col" }, KINDS[kind]))));
  const clean = make("tr", {}, make("th", { scope: "row" }, "unchanged"), make("td", { colspan: kinds.length }, make("b", {}, sample.answer.trim() || "(nothing)"), make("small", {}, percent(sample.likelihood))));
  at(".lesions tbody").replaceChildren(clean, ...names.map((name, number) => make("tr", number ? {} : { class: "now" }, make("th", { scope: "row" }, name),
    ...kinds.map((kind) => cell(sample.lesions.find((one) => one[0] === name && one[1] === kind))))));
}

// All of it.

function showScale() {
  const map = mapOf(state.head);
  if (!map) return at("#scale").replaceChildren();
  const ramp = make("i");
  ramp.style.background = `linear-gradient(90deg, ${Array.from({ length: 9 }, (_, n) => heat(n / 8).replace(/[\d.]+\)$/, "1)")).join(",")})`;
  const share = sample.shares[state.layer][state.token];
  const whose = state.head < 0 ? "mean over heads" : `head ${state.head}`;
  const coarse = map.factor > 1 ? `, means over ${map.factor} × ${map.factor} patches` : "";
  const whole = share === null ? "this layer has no self-attention weights" : `${percent(share)} of the token's attention is on the image`;
  at("#scale").replaceChildren("0", ramp, `${percent(map.peak)} per patch, in all layers (${whose}${coarse})`, make("b", {}, whole));
}

function show() {
  at("#layer").value = state.layer;
  at("#layer").setAttribute("aria-valuetext", `layer ${state.layer}`);
  at(".bar output").textContent = `${state.layer} of ${data.depth}`;
  for (const name of document.querySelectorAll(".layer-name")) name.textContent = `layer ${state.layer}`;
  const marks = [data.region?.includes(state.layer) && "in the region", data.route?.includes(state.layer) && "in the route"];
  at("#marks").textContent = marks.filter(Boolean).join(", ");
  press(at("#talk"), at(`[data-token="${state.token}"]`));
  if (attention) for (const button of at("#talk").querySelectorAll("button")) button.style.setProperty("--share", sample.shares[state.layer][button.dataset.token] ?? 0);
  panels.forEach(showPanel);
  showScale();
  showWords();
  showHeads();
  showRows();
  showLesions();
}

async function choose(number) {
  const chosen = data.samples[number];
  const [codes, fine, named, likely] = await Promise.all([
    chosen.attention && inflate(chosen.attention.data), chosen.heads && inflate(chosen.heads.data), inflate(chosen.lens.words), inflate(chosen.lens.shares)]);
  sample = chosen;
  attention = codes && { ...sample.attention, codes };
  heads = fine && { ...sample.heads, codes: fine };
  words = new Uint32Array(named.buffer);
  shares = likely;
  // Where the answer is decided: the token before it, in the layer in which that looks at the image most.
  const first = sample.tokens.findIndex(([, role]) => role === "answer"), token = Math.max(0, first - 1);
  const looks = attention ? sample.shares.map((layer) => layer[token] ?? 0) : [0];
  Object.assign(state, { sample: number, token, head: -1, patch: -1, layer: looks.indexOf(Math.max(...looks)) });
  press(at("#samples"), at("#samples").children[number]);
  at("#notes").replaceChildren(...sample.notes.map((note) => make("p", { class: "quiet" }, note)));
  makePanels();
  makeTokens();
  makeHeads();
  makeRows();
  show();
}

at("#samples").append(...data.samples.map((one, number) => {
  const button = make("button", { type: "button" }, make("span", {}, one.question || one.id || `sample ${number + 1}`));
  if (one.images.length) button.prepend(make("img", { src: one.images[0], alt: "" }));
  button.addEventListener("click", () => choose(number));
  return button;
}));
for (const name of ["#samples", "#talk", "#heads"]) at(name).addEventListener("keydown", (event) => rove(at(name), event));
at("#layer").addEventListener("input", (event) => { state.layer = Number(event.target.value); show(); });
at(".bar").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("resize", () => panels.forEach(showPanel));
at("main").hidden = false;

// The address may name a sample by its id: explore.html#ID.
async function open() {
  let id = "";
  try { id = decodeURIComponent(location.hash.slice(1)); } catch { /* no id is written so */ }
  const number = id ? data.samples.findIndex((one) => one.id === id) : -1;
  if (number >= 0 || !sample) await choose(Math.max(0, number));
  if (number >= 0) at("#samples").children[number].focus();
}
window.addEventListener("hashchange", open);
open();

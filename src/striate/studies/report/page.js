"use strict";
// The page is whole without this script: it adds tables that sort, and the browser of all records.

// An element with attributes and children; strings become text, so nothing in the data can be taken for HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function sortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = make("button", { type: "button", class: "sort", title: "sort" });
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const falling = header.getAttribute("aria-sort") !== "descending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", falling ? "descending" : "ascending");
      for (const body of table.tBodies) sort(body, column, falling);
    });
  });
}

// Rows of a body by one column, numbers by size; what has no value comes last, headings stay first.
function sort(body, column, falling) {
  const rows = [...body.rows].filter((row) => row.cells.length > column);
  const key = (row) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.innerText.trim();
    return cell.dataset.value === "" ? undefined : Number(cell.dataset.value);
  };
  const keyed = rows.map((row) => [key(row), row]);
  keyed.sort(([one], [other]) => {
    if (one === undefined || other === undefined) return (one === undefined) - (other === undefined);
    const order = typeof one === "number" && typeof other === "number"
      ? one - other : String(one).localeCompare(String(other), "en", { numeric: true });
    return falling ? -order : order;
  });
  body.append(...keyed.map(([, row]) => row));
}

function browse(section, data) {
  const form = section.querySelector("form"), list = section.querySelector(".cards");
  const more = section.querySelector(".more"), count = section.querySelector(".count");
  const { set, task, who, text } = form.elements;
  const step = 24;
  let chosen, found = [], shown = 0;

  const option = (label, value) => new Option(label, value);
  const right = (run, record) => chosen.score[run][record] >= 1;

  function choose() {
    chosen = data.sets[Number(set.value)];
    task.replaceChildren(option("all", "-1"), ...chosen.tasks.map((name, i) => option(name, i)));
    const groups = [["all", [["every record", "every"], ["runs disagree", "disagree"], ["all wrong", "none"], ["all right", "all"]]]];
    chosen.runs.forEach(([name], run) => {
      const others = chosen.runs.flatMap(([other], i) => i === run ? [] : [[`${name} wrong, ${other} right`, `${run} ${i}`]]);
      groups.push([name, [[`${name} wrong`, `wrong ${run}`], [`${name} right`, `right ${run}`], ...others]]);
    });
    who.replaceChildren(...groups.map(([name, options]) => {
      const group = make("optgroup", { label: name });
      group.append(...options.map(([label, value]) => option(label, value)));
      return group;
    }));
    filter();
  }

  function wanted() {
    const [kind, run] = who.value.split(" "), runs = chosen.runs.map((_, i) => i);
    if (kind === "every") return () => true;
    if (kind === "wrong") return (record) => !right(run, record);
    if (kind === "right") return (record) => right(run, record);
    if (run !== undefined) return (record) => !right(kind, record) && right(run, record);
    return (record) => {
      const number = runs.filter((i) => right(i, record)).length;
      if (kind === "none") return number === 0;
      return kind === "all" ? number === runs.length : number > 0 && number < runs.length;
    };
  }

  function filter() {
    const fits = wanted(), only = Number(task.value), words = text.value.trim().toLowerCase();
    // Each text is searched once, however often it was said.
    const holds = words && data.pool.map((one) => one.toLowerCase().includes(words));
    found = [];
    for (let record = 0; record < chosen.task.length; record++) {
      if (only >= 0 && chosen.task[record] !== only) continue;
      if (holds && !holds[chosen.question[record]] && !holds[chosen.truth[record]]
        && !chosen.answer.some((answers) => holds[answers[record]])) continue;
      if (fits(record)) found.push(record);
    }
    const total = chosen.task.length;
    count.textContent = `${found.length.toLocaleString("en")} of ${total.toLocaleString("en")} records.`;
    list.replaceChildren();
    shown = 0;
    extend();
  }

  function extend() {
    list.append(...found.slice(shown, shown + step).map(card));
    shown = Math.min(shown + step, found.length);
    more.hidden = shown >= found.length;
    more.textContent = `${Math.min(step, found.length - shown)} more`;
  }

  function card(record) {
    const text = make("div", {},
      make("small", {}, make("bdi", {}, chosen.tasks[chosen.task[record]])),
      make("p", { dir: "auto" }, make("strong", {}, data.pool[chosen.question[record]])),
      make("p", { dir: "auto" }, make("small", {}, "truth"), " ", data.pool[chosen.truth[record]]));
    const pages = chosen.explored.filter(([place]) => place === record);
    text.append(...pages.map(([, run, address]) => make("p", {}, make("small", {},
      make("a", { href: address }, "layer by layer: ", make("bdi", {}, chosen.runs[run][0]))))));
    const header = make("header", {}, text);
    const images = chosen.images[record].map((number) => make("img", { src: data.images[number], alt: "", loading: "lazy" }));
    if (images.length) header.prepend(make("div", { class: "images" }, ...images));
    const replies = make("ul", { class: "replies" }, ...chosen.runs.map((run, i) => reply(run, i, record)));
    return make("article", { class: "card" }, header, replies);
  }

  function reply([name, arm], run, record) {
    const score = chosen.score[run][record];
    const [word, sign] = score >= 1 ? ["right", "✓"] : score <= 0 ? ["wrong", "✗"] : ["partly right", "≈"];
    const [color, glyph] = data.marks[arm];
    const mark = make("span", { class: "glyph", "aria-hidden": "true" }, glyph);
    mark.style.color = color;
    return make("li", {},
      make("span", { class: `verdict ${word}` },
        make("span", { "aria-hidden": "true" }, sign), make("span", { class: "hidden" }, word)), " ",
      make("span", { class: "run" }, mark, " ", make("bdi", {}, name)), " ",
      make("span", { dir: "auto" }, data.pool[chosen.answer[run][record]] || "(nothing)"));
  }

  set.replaceChildren(...data.sets.map(({ name, runs }, i) => option(`${name} (${runs.length} runs)`, i)));
  set.parentElement.hidden = data.sets.length < 2;
  set.addEventListener("change", choose);
  task.addEventListener("change", filter);
  who.addEventListener("change", filter);
  text.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", extend);
  choose();
  section.hidden = false;
}

document.querySelectorAll("table.sortable").forEach(sortable);
const records = document.getElementById("records");
if (records) browse(document.getElementById("browser"), JSON.parse(records.textContent));

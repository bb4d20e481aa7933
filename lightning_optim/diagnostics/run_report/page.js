"use strict";
// Which runs and series are shown, by their buttons.
const hidden = { run: new Set(), series: new Set() };
const figures = () => (window.Bokeh ? Bokeh.documents.flatMap((each) => each.roots()) : []);

function show() {
  for (const figure of figures()) {
    for (const renderer of figure.renderers) {
      const [chart, run, series] = renderer.tags;
      renderer.visible = !hidden.run.has(run) && !hidden.series.has(`${chart}/${series}`);
    }
  }
}

function toggle(button, set, key) {
  const off = button.getAttribute("aria-pressed") === "true";
  button.setAttribute("aria-pressed", String(!off));
  set[off ? "add" : "delete"](key);
  show();
}

for (const button of document.querySelectorAll("button.run")) {
  button.addEventListener("click", (event) => {
    if (event.shiftKey || event.altKey) { // only this one, and all of them again
      const others = [...document.querySelectorAll("button.run")].filter((other) => other !== button);
      const alone = others.every((other) => other.getAttribute("aria-pressed") === "false");
      for (const other of others) {
        other.setAttribute("aria-pressed", String(alone));
        hidden.run[alone ? "delete" : "add"](Number(other.dataset.run));
      }
      button.setAttribute("aria-pressed", "true");
      hidden.run.delete(Number(button.dataset.run));
      show();
    } else {
      toggle(button, hidden.run, Number(button.dataset.run));
    }
  });
}
for (const button of document.querySelectorAll("button.series")) {
  const key = `${button.dataset.chart}/${button.dataset.series}`;
  if (button.getAttribute("aria-pressed") === "false") hidden.series.add(key);
  button.addEventListener("click", () => toggle(button, hidden.series, key));
}

// Tables sort by the column whose header is clicked.
const numberIn = (text) => {
  const found = text.replace(/,/g, "").match(/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
};
for (const head of document.querySelectorAll("table.sorts th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table");
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const textOf = (row) => row.cells[column].textContent.trim();
    rows.sort((a, b) => {
      const [x, y] = [numberIn(textOf(a)), numberIn(textOf(b))];
      if (isNaN(x) && isNaN(y)) return textOf(a).localeCompare(textOf(b)) * (down ? -1 : 1);
      if (isNaN(x) || isNaN(y)) return isNaN(x) ? 1 : -1; // without a number last, either way
      return (x - y) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  });
}

// Light or dark, as the reader has it; the charts are drawn on canvas, and follow.
const root = document.documentElement;
const preferred = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  for (const figure of figures()) {
    for (const axis of [...figure.below, ...figure.left]) {
      axis.major_label_text_color = axis.axis_label_text_color = colour("--dim");
      axis.axis_line_color = axis.major_tick_line_color = colour("--line");
      axis.minor_tick_line_color = null;
    }
    for (const grid of figure.center) grid.grid_line_color = colour("--grid");
  }
}
function setMode(dark) {
  root.dataset.mode = dark ? "dark" : "light";
  paint();
}
setMode(preferred.matches);
preferred.addEventListener("change", (event) => setMode(event.matches));
document.getElementById("mode").addEventListener("click", () => setMode(root.dataset.mode !== "dark"));

// The charts come when the page is complete.
(function wait(tries) {
  if (figures().length) { paint(); show(); } else if (tries) setTimeout(wait, 50, tries - 1);
})(200);

"use strict";
// Draws the charts, follows the colour scheme, sorts tables. Tests read the marks left on <body>:
// data-ready after the last chart, data-js-error with the first error.

window.addEventListener("error", (event) => {
  document.body.dataset.jsError ??= event.message;
});

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const config = { responsive: true, displayModeBar: false, displaylogo: false };

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim();
  const card = style.getPropertyValue("--card").trim();
  const line = style.getPropertyValue("--line").trim();
  return {
    ...layout,
    font: { ...layout.font, color: text, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } },
  };
}

async function draw() {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawings = Object.entries(figures).map(([id, figure]) =>
    Plotly.newPlot(id, figure.data, themed(figure.layout), config),
  );
  await Promise.all(drawings);
  dark.addEventListener("change", () => {
    for (const [id, figure] of Object.entries(figures)) Plotly.relayout(id, themed(figure.layout));
  });
}

function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what has no value stays last
  const x = Number(a);
  const y = Number(b);
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
}

function sortBy(head) {
  const table = head.closest("table");
  const column = [...head.parentElement.children].indexOf(head);
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const body = table.tBodies[0];
  const value = (row) => row.children[column].dataset.value ?? "";
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
}

for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

draw().then(
  () => (document.body.dataset.ready = "true"),
  (error) => (document.body.dataset.jsError ??= String(error)),
);

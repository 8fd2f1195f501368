"use strict";
// Reads a chart at the pointer or with the arrow keys: a line at the step, and below it every curve's value there.
const runs = [...document.querySelectorAll(".run-card h2")].map((heading) => heading.textContent.trim());

function shown(run) {
  const box = document.getElementById(`show-${run}`);
  return !box || box.checked;
}

function short(value) {
  return value === null ? "-" : String(Number(value.toPrecision(4)));
}

function nearest(steps, step) {
  return steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
}

for (const svg of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const output = svg.parentElement.querySelector("output");
  const every = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const several = new Set(chart.lines.map((line) => line.run)).size > 1;
  const labeled = new Set(chart.lines.map((line) => line.label)).size > 1;
  let at = every.length - 1;

  function show() {
    const step = every[at];
    const x = chart.x0 + ((step - chart.first) / (chart.last - chart.first)) * (chart.x1 - chart.x0);
    cursor.setAttribute("d", `M${x} ${cursor.dataset.top}V${cursor.dataset.bottom}`);
    const parts = chart.lines.filter((line) => shown(line.run)).map((line) => {
      const i = nearest(line.steps, step);
      const band = line.low.length ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
      const name = [several ? runs[line.run] : "", labeled ? line.label : ""].join(" ").trim();
      return `${name} ${short(line.values[i])}${band}`.trim();
    });
    output.textContent = `step ${step}: ${parts.join(", ")}`;
  }

  function hide() {
    cursor.setAttribute("d", "");
    output.textContent = "";
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    at = nearest(every, chart.first + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.last - chart.first));
    show();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", show);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      at = Math.min(Math.max(at + move, 0), every.length - 1);
      show();
      event.preventDefault();
    }
  });
}

// How the charts are read, zoomed and saved.
function nearest(values, x) {
  return values.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(values[best] - x) ? i : best), 0);
}

/** Every x of a chart that is shown. */
function places(chart) {
  return [...new Set(chart.lines.flatMap((line) => line.x))].filter(isShown).sort((a, b) => a - b);
}

/** Says what the lines' values are at the cursor, below the chart that has it. */
function read(chart) {
  const own = chart.plot.matches(":hover") || document.activeElement === chart.plot;
  const left = chart.drawing?.cursor.left ?? -1;
  const every = own && left >= 0 ? places(chart) : [];
  if (!every.length) {
    chart.output.textContent = "";
    return;
  }
  chart.at = nearest(every, chart.drawing.posToVal(left, "x"));
  const x = every[chart.at];
  const several = new Set(chart.lines.map((line) => line.name)).size > 1;
  const labeled = new Set(chart.lines.map((line) => line.label)).size > 1;
  const parts = chart.lines.map((line) => {
    const i = nearest(line.x, x);
    const band = line.low.length ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
    const name = [several ? line.name : "", labeled ? line.label : ""].join(" ").trim();
    return `${name} ${short(line.values[i])}${band}`.trim();
  });
  const place = view.axis === "steps" ? `step ${short(x)}` : `${short(x)} ${timeUnit()[0]}`;
  chart.output.textContent = `${place}: ${parts.join(", ")}`;
}

function moveTo(chart, i) {
  const every = places(chart);
  if (!every.length || !chart.drawing) return;
  const x = every[Math.min(Math.max(i, 0), every.length - 1)];
  chart.drawing.setCursor({ left: chart.drawing.valToPos(x, "x"), top: 10 });
}

function zoomTo(plot) {
  if (plot.select.width < 5) return;
  const ends = [plot.select.left, plot.select.left + plot.select.width].map((left) => plot.posToVal(left, "x"));
  plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  setRange(view.axis === "steps" ? [Math.floor(ends[0]), Math.ceil(ends[1])] : ends);
}

/** Shows a part of the axis in all charts; null: all of it. */
function setRange(range) {
  const [first, last] = extent();
  if (range) {
    const [low, high] = [Math.max(range[0], first), Math.min(range[1], last)];
    range = high > low && (low > first || high < last) ? [low, high] : null;
  }
  view.range = range;
  const [from, to] = range ?? [first, last];
  document.getElementById("from").value = Number(from.toPrecision(4));
  document.getElementById("to").value = Number(to.toPrecision(4));
  document.getElementById("all").disabled = !range;
  charts.forEach(scale);
}

function zoomBy(chart, factor) {
  const [low, high] = view.range ?? extent();
  const every = places(chart);
  const middle = every[chart.at] ?? (low + high) / 2;
  const half = Math.max(((high - low) * factor) / 2, view.axis === "steps" ? 1 : 0);
  setRange([middle - half, middle + half]);
}

function onKey(chart, event) {
  const at = chart.at ?? places(chart).length - 1;
  const acts = {
    ArrowLeft: () => moveTo(chart, at - 1),
    ArrowRight: () => moveTo(chart, at + 1),
    Home: () => moveTo(chart, 0),
    End: () => moveTo(chart, Infinity),
    "+": () => zoomBy(chart, 0.5),
    "=": () => zoomBy(chart, 0.5),
    "-": () => zoomBy(chart, 2),
    0: () => setRange(null),
    Escape: () => setRange(null),
  };
  if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  acts[event.key]();
  event.preventDefault();
}

function csvOf(chosen) {
  const rows = [["chart", "run", "metric", "step", "seconds", "value", "low", "high"]];
  for (const chart of chosen) {
    for (const line of chart.lines) {
      line.steps.forEach((step, i) => {
        const seconds = xOf({ ...line }, step);
        const clock =
          view.axis === "time"
            ? seconds * timeUnit()[1]
            : line.runs.reduce((sum, run) => sum + (clockOf(run).get(step) ?? 0), 0) / line.runs.length;
        if (isShown(line.x[i]))
          rows.push([chart.data.title, line.name, line.metric, step, clock, line.values[i], line.low[i], line.high[i]]);
      });
    }
  }
  return rows;
}

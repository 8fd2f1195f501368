// The charts: all have one x axis (steps or time) and one range of it; drawn by uPlot.
const view = { axis: "steps", range: null, grouped: true, hidden: new Set() };
const charts = []; // {data, figure, plot, output, lines, drawing}
let report = null; // runs, groups, charts
const SMOOTHED_FROM = 24; // points; a shorter curve is shown as it is
const MARKED_UNTIL = 40; // points; a shorter curve has a dot at each
const UNITS = [["h", 3600], ["min", 60], ["s", 1]];

// ---- what is shown

function clockOf(run) {
  const [steps, seconds] = report.runs[run].clock;
  report.runs[run].at ??= new Map(steps.map((step, i) => [step, seconds[i]]));
  return report.runs[run].at;
}

function timeUnit() {
  const longest = Math.max(...report.runs.map((run) => run.clock[1].at(-1)));
  return UNITS.find(([, seconds]) => longest >= 2 * seconds) ?? UNITS.at(-1);
}

/** The place of a step on the axis. */
function xOf(line, step) {
  if (view.axis === "steps") return step;
  const seconds = line.runs.map((run) => clockOf(run).get(step) ?? 0);
  return seconds.reduce((sum, value) => sum + value, 0) / seconds.length / timeUnit()[1];
}

/** A chart's lines as they are shown: of the runs that are, and those of seeds as one. */
function linesOf(chart) {
  const shown = chart.lines.filter((line) => !view.hidden.has(line.run));
  const groups = view.grouped && chart.kind === "lines" ? report.groups.filter((group) => group.runs.length > 1) : [];
  const lines = [];
  const done = new Set();
  for (const line of shown) {
    if (done.has(line)) continue;
    const group = groups.find((one) => one.runs.includes(line.run));
    const same = group ? shown.filter((one) => group.runs.includes(one.run) && one.metric === line.metric) : [line];
    same.forEach((one) => done.add(one));
    const name = same.length > 1 ? group.name : report.runs[line.run].name;
    lines.push({ ...(same.length > 1 ? merged(same) : line), runs: same.map((one) => one.run), name });
  }
  for (const line of lines) line.x = line.steps.map((step) => xOf(line, step));
  return lines;
}

/** The mean of several seeds' lines at the steps that all of them have, in a band from the lowest to the highest. */
function merged(lines) {
  const at = lines.map((line) => new Map(line.steps.map((step, i) => [step, line.values[i]])));
  const steps = lines[0].steps.filter((step) => at.every((values) => values.has(step)));
  const every = steps.map((step) => at.map((values) => values.get(step)));
  const over = (summary) => every.map((values) => (values.includes(null) ? null : summary(values)));
  return {
    ...lines[0],
    steps,
    values: over((values) => values.reduce((sum, value) => sum + value, 0) / values.length),
    low: over((values) => Math.min(...values)),
    high: over((values) => Math.max(...values)),
  };
}

/** The mean of the last `size` known values; null where a value is missing. */
function runningMean(values, size) {
  const last = [];
  return values.map((value) => {
    if (value === null) return null;
    last.push(value);
    if (last.length > Math.max(size, 1)) last.shift();
    return last.reduce((sum, one) => sum + one, 0) / last.length;
  });
}

function extent() {
  const xs = charts.flatMap((chart) => chart.lines.flatMap((line) => [line.x[0], line.x.at(-1)]));
  const low = Math.min(...xs);
  return xs.length ? [low, Math.max(...xs, low + (view.axis === "steps" ? 1 : 1e-9))] : [0, 1];
}

function isShown(x) {
  return !view.range || (x >= view.range[0] && x <= view.range[1]);
}

// ---- how it is drawn

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const runColor = (run) => color(`c${run % 8}`);
const PHASES = ["c4", "c5", "c3", "c6", "c0", "c2", "c1", "c7", "c8", "c9"]; // as in page.css

const DASHES = [undefined, [4, 4], [1, 4], [9, 4]]; // of a chart's metrics, as in page.css

/** uPlot's series, their values and the bands between them. */
function seriesOf(chart) {
  const series = [{}];
  const tables = [];
  const bands = [];
  const add = (x, values, look) => {
    tables.push([x, values]);
    series.push({ points: { show: false }, ...look });
    return series.length - 1;
  };
  if (chart.data.kind === "layers") {
    const sums = chart.lines.length ? chart.lines[0].x.map(() => 0) : [];
    const tops = chart.lines.map((line) => line.values.map((value, i) => (sums[i] += value ?? 0)));
    for (let i = tops.length - 1; i >= 0; i -= 1) {
      const fill = () => color(PHASES[i % PHASES.length]);
      add(chart.lines[i].x, tops[i], { fill, stroke: fill, width: 0, points: { show: tops[i].length === 1, size: 9, fill } });
    }
  }
  const labels = [...new Set(chart.data.lines.map((line) => line.label))];
  for (const line of chart.data.kind === "lines" ? chart.lines : []) {
    const own = () => runColor(line.run);
    const dash = DASHES[labels.indexOf(line.label) % DASHES.length];
    if (line.low.length) {
      const [high, low] = [line.high, line.low].map((values) => add(line.x, values, { stroke: "transparent", width: 0 }));
      bands.push({ series: [high, low], fill: () => `${own()}26` });
    }
    const smooth = line.values.length >= SMOOTHED_FROM;
    const points = { show: line.values.length <= MARKED_UNTIL && !smooth, size: 5, stroke: own, fill: own };
    add(line.x, line.values, { stroke: smooth ? () => `${own()}66` : own, width: smooth ? 1 : 2, dash, points });
    if (smooth) add(line.x, runningMean(line.values, Math.floor(line.values.length / 10)), { stroke: own, width: 2, dash });
  }
  return { series, bands, data: tables.length ? uPlot.join(tables) : [[]] };
}

/** Wide enough that rounding does not look like a curve, and down to 0 if that is near. */
function yRange(plot, low, high) {
  if (low === null || high === null) return [0, 1];
  const least = Math.max(Math.abs(low), Math.abs(high)) / 50 || 1;
  if (high - low < least) return [(low + high - least) / 2, (low + high + least) / 2];
  return uPlot.rangeNum(low, high, 0.08, true);
}

function ticks(plot, splits) {
  const gap = splits.length > 1 ? Math.abs(splits[1] - splits[0]) : 1;
  const digits = Math.max(0, -Math.floor(Math.log10(gap) + 1e-9));
  return splits.map((value) => {
    for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
      if (Math.abs(value) >= limit && gap >= limit / 1000) {
        return `${Number((value / (unit === "k" ? 1e3 : limit)).toPrecision(6))}${unit}`;
      }
    }
    if (value === 0) return "0";
    return digits > 3 ? value.toExponential(Math.max(0, Math.floor(Math.log10(Math.abs(value)) + 1e-9) + digits)) : value.toFixed(digits);
  });
}

function markLines(chart) {
  return (plot) => {
    for (const mark of chart.data.marks.filter((one) => !view.hidden.has(one.run))) {
      const x = xOf({ runs: [mark.run] }, mark.step);
      if (!isShown(x)) continue;
      const left = Math.round(plot.valToPos(x, "x", true));
      plot.ctx.save();
      plot.ctx.strokeStyle = runColor(mark.run);
      plot.ctx.lineWidth = 1.5 * devicePixelRatio;
      plot.ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
      plot.ctx.beginPath();
      plot.ctx.moveTo(left, plot.bbox.top);
      plot.ctx.lineTo(left, plot.bbox.top + plot.bbox.height);
      plot.ctx.stroke();
      plot.ctx.restore();
    }
  };
}

function draw(chart) {
  chart.drawing?.destroy();
  chart.drawing = null;
  chart.figure.classList.toggle("hidden", chart.lines.length === 0);
  chart.figure.classList.toggle("merged", chart.lines.some((line) => line.runs.length > 1));
  const [width, height] = [chart.plot.clientWidth, chart.plot.clientHeight];
  if (!width || !chart.lines.length) return;
  const { series, bands, data } = seriesOf(chart);
  const axis = {
    stroke: () => color("quiet"),
    grid: { stroke: () => color("rule"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  const options = {
    width,
    height,
    padding: [8, 10, 0, 0],
    legend: { show: false },
    cursor: {
      y: false,
      points: { show: false },
      drag: { x: true, y: false, setScale: false, dist: 5 },
      sync: { key: "longgrpo", scales: ["x", null], setSeries: false },
      bind: { dblclick: () => () => setRange(null) },
    },
    scales: { x: { time: false, range: (plot, low, high) => [low, high] }, y: { range: yRange } },
    axes: [
      { ...axis, size: 24, gap: 4, grid: { show: false }, space: 45, incrs: incrementsFrom(view.axis === "steps" ? 0 : -9), values: ticks },
      { ...axis, size: (plot, labels) => 14 + 6.4 * Math.max(3, ...(labels ?? []).map((label) => label.length)), gap: 4, space: 32, incrs: incrementsFrom(-18), values: ticks },
    ],
    series,
    bands,
    hooks: {
      draw: [markLines(chart)],
      setCursor: [() => read(chart)],
      setSelect: [(plot) => zoomTo(plot)],
    },
  };
  chart.drawing = new uPlot(options, data, chart.plot);
  scale(chart);
}

/** 1, 2 and 5 times the powers of ten from 10 ** `first` on. */
function incrementsFrom(first) {
  return Array.from({ length: 18 - first }, (_, n) => first + n).flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`)));
}

function scale(chart) {
  const [min, max] = view.range ?? extent();
  chart.drawing?.setScale("x", { min, max });
}

// ---- read and zoomed

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
        const clock = view.axis === "time" ? seconds * timeUnit()[1] : line.runs.reduce((sum, run) => sum + (clockOf(run).get(step) ?? 0), 0) / line.runs.length;
        if (isShown(line.x[i])) rows.push([chart.data.title, line.name, line.metric, step, clock, line.values[i], line.low[i], line.high[i]]);
      });
    }
  }
  return rows;
}

// ---- put together

function redraw() {
  for (const chart of charts) chart.lines = linesOf(chart.data);
  setRange(view.range);
  charts.forEach(draw);
}

function startCharts(data) {
  report = data;
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = charts.find((one) => one.plot === target);
      if (chart.drawing && target.clientWidth) chart.drawing.setSize({ width: target.clientWidth, height: target.clientHeight });
      else draw(chart);
    }
  });
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = { data: report.charts[figure.dataset.chart], figure, plot: figure.querySelector(".plot"), output: figure.querySelector("output") };
    charts.push(chart);
    chart.plot.addEventListener("keydown", (event) => onKey(chart, event));
    chart.plot.addEventListener("focus", () => moveTo(chart, chart.at ?? Infinity));
    chart.plot.addEventListener("blur", () => chart.drawing?.setCursor({ left: -10, top: -10 }));
    chart.plot.addEventListener("mouseleave", () => (chart.output.textContent = ""));
    figure.querySelector(".csv").addEventListener("click", () => saveCsv(chart.data.title, csvOf([chart])));
    sizes.observe(chart.plot);
  }
  const on = (id, event, act) => document.getElementById(id)?.addEventListener(event, (e) => act(e.target));
  for (const axis of ["steps", "time"]) {
    on(`axis-${axis}`, "change", () => {
      Object.assign(view, { axis, range: null });
      redraw();
    });
  }
  const fromTo = () => setRange(["from", "to"].map((id) => Number(document.getElementById(id).value)));
  on("from", "change", fromTo);
  on("to", "change", fromTo);
  on("all", "click", () => setRange(null));
  on("csv-all", "click", () => saveCsv("charts", csvOf(charts)));
  on("grouped", "change", (box) => {
    view.grouped = box.checked;
    redraw();
  });
  report.runs.forEach((_, run) => {
    on(`show-${run}`, "change", (box) => {
      view.hidden[box.checked ? "delete" : "add"](run);
      for (const element of document.querySelectorAll(`.of-run-${run}`)) element.classList.toggle("hidden", !box.checked);
      redraw();
    });
  });
  document.getElementById("unit").textContent = `, ${timeUnit()[0]}`;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
  redraw();
}

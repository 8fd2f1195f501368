// How the charts are drawn, by uPlot.
const SMOOTHED_FROM = 24; // points; a shorter curve is shown as it is
const MARKED_UNTIL = 40; // points; a shorter curve has a dot at each

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
      add(chart.lines[i].x, tops[i], {
        fill,
        stroke: fill,
        width: 0,
        points: { show: tops[i].length === 1, size: 9, fill },
      });
    }
  }
  const labels = [...new Set(chart.data.lines.map((line) => line.label))];
  for (const line of chart.data.kind === "lines" ? chart.lines : []) {
    const own = () => runColor(line.run);
    const dash = DASHES[labels.indexOf(line.label) % DASHES.length];
    if (line.low.length) {
      const [high, low] = [line.high, line.low].map((values) =>
        add(line.x, values, { stroke: "transparent", width: 0 }),
      );
      bands.push({ series: [high, low], fill: () => `${own()}26` });
    }
    const smooth = line.values.length >= SMOOTHED_FROM;
    const points = { show: line.values.length <= MARKED_UNTIL && !smooth, size: 5, stroke: own, fill: own };
    add(line.x, line.values, { stroke: smooth ? () => `${own()}66` : own, width: smooth ? 1 : 2, dash, points });
    if (smooth)
      add(line.x, runningMean(line.values, Math.floor(line.values.length / 10)), { stroke: own, width: 2, dash });
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
    for (const [limit, unit] of [
      [1e9, "G"],
      [1e6, "M"],
      [1e4, "k"],
    ]) {
      if (Math.abs(value) >= limit && gap >= limit / 1000) {
        return `${Number((value / (unit === "k" ? 1e3 : limit)).toPrecision(6))}${unit}`;
      }
    }
    if (value === 0) return "0";
    return digits > 3
      ? value.toExponential(Math.max(0, Math.floor(Math.log10(Math.abs(value)) + 1e-9) + digits))
      : value.toFixed(digits);
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
  chart.figure.classList.toggle(
    "merged",
    chart.lines.some((line) => line.runs.length > 1),
  );
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
      {
        ...axis,
        size: 24,
        gap: 4,
        grid: { show: false },
        space: 45,
        incrs: incrementsFrom(view.axis === "steps" ? 0 : -9),
        values: ticks,
      },
      {
        ...axis,
        size: (plot, labels) => 14 + 6.4 * Math.max(3, ...(labels ?? []).map((label) => label.length)),
        gap: 4,
        space: 32,
        incrs: incrementsFrom(-18),
        values: ticks,
      },
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
  return Array.from({ length: 18 - first }, (_, n) => first + n).flatMap((power) =>
    [1, 2, 5].map((digit) => Number(`${digit}e${power}`)),
  );
}

function scale(chart) {
  const [min, max] = view.range ?? extent();
  chart.drawing?.setScale("x", { min, max });
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
      if (chart.drawing && target.clientWidth)
        chart.drawing.setSize({ width: target.clientWidth, height: target.clientHeight });
      else draw(chart);
    }
  });
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = {
      data: report.charts[figure.dataset.chart],
      figure,
      plot: figure.querySelector(".plot"),
      output: figure.querySelector("output"),
    };
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
      for (const element of document.querySelectorAll(`.of-run-${run}`))
        element.classList.toggle("hidden", !box.checked);
      redraw();
    });
  });
  document.getElementById("unit").textContent = `, ${timeUnit()[0]}`;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
  redraw();
}

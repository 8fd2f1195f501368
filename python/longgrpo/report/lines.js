// What the charts show: all have one x axis (steps or time) and one range of it.
const view = { axis: "steps", range: null, grouped: true, hidden: new Set() };
const charts = []; // {data, figure, plot, output, lines, drawing}
let report = null; // runs, groups, charts
const UNITS = [
  ["h", 3600],
  ["min", 60],
  ["s", 1],
];

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

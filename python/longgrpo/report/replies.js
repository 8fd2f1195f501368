// Two lists that are filtered, searched and turned page by page: held-out replies, and completions.
const EACH = 12; // items of a page
const byId = (id) => document.getElementById(id);

/** A text in which what is searched for is marked. */
function marked(text, wanted) {
  if (!wanted) return [text];
  const parts = [];
  const low = text.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(wanted); at >= 0 && low.length === text.length; at = low.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), make("mark", { textContent: text.slice(at, at + wanted.length) }));
    from = at + wanted.length;
  }
  return [...parts, text.slice(from)];
}

function written(tag, className, text, wanted = "") {
  return make(tag, { className, dir: "auto" }, ...marked(text, wanted));
}

/** A list below `root`. find() gives {rows, shared, wanted, note}; item(row, wanted) an element; csv(rows) rows of cells. */
function list(root, name, find, item, csv) {
  let found = { rows: [], shared: "", wanted: "" };
  let page = 0;
  let asked = 0;
  const part = (selector) => root.querySelector(selector);

  function show() {
    const { rows, shared, wanted, note = "" } = found;
    const shown = rows.slice(page * EACH, (page + 1) * EACH);
    part(".count").textContent = rows.length
      ? `${page * EACH + 1} to ${page * EACH + shown.length} of ${rows.length}${note}`
      : `none${note}`;
    part(".previous").disabled = page === 0;
    part(".next").disabled = (page + 1) * EACH >= rows.length;
    part(".shared").textContent = shared && `All prompts begin with:\n${shared.trimEnd()}`;
    part(".items").replaceChildren(...shown.map((row) => item(row, wanted)));
  }

  async function update() {
    const mine = (asked += 1);
    const result = await find();
    if (mine !== asked) return; // somebody has typed on
    found = result;
    page = 0;
    show();
  }

  const turn = (by) => {
    page += by;
    show();
    root.scrollIntoView({ block: "nearest" });
  };
  part(".previous").addEventListener("click", () => turn(-1));
  part(".next").addEventListener("click", () => turn(1));
  part(".csv").addEventListener("click", () => saveCsv(name, csv(found.rows)));
  return update;
}

/** Follows the controls of a form: at once, and a moment after the last letter that is typed. */
function follow(form, update) {
  let waits = 0;
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    clearTimeout(waits);
    if (event.target.type === "search") waits = setTimeout(update, 150);
  });
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
  if (pairs.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** Unpacks each template once, when it is first asked for. */
const unpacked = new Map();
function once(template) {
  if (!unpacked.has(template)) unpacked.set(template, unpack(template));
  return unpacked.get(template);
}

// ---- held-out replies

function outcomeOf(row) {
  const [before, after] = [row.before.right, row.after.right];
  return before ? (after ? "both right" : "lost") : after ? "gained" : "both wrong";
}

function pairItem(row, wanted) {
  const reply = (when, one) =>
    make(
      "div",
      { className: one.right ? "right" : "wrong" },
      make(
        "header",
        {},
        make("b", { textContent: one.right ? "✓ right" : "✗ wrong" }),
        make("span", { textContent: when }),
        ...(one.score === Number(one.right) ? [] : [make("span", { textContent: `score ${short(one.score)}` })]),
        ...(one.sampled ? [make("span", { textContent: one.sampled })] : []),
      ),
      written("pre", "", one.text, wanted),
    );
  return make(
    "article",
    { className: "item pair" },
    written("p", "question", row.question, wanted),
    make("div", { className: "two" }, reply("before training", row.before), reply(`after step ${row.step}`, row.after)),
  );
}

async function findReplies() {
  const template = document.querySelectorAll("template.pair")[byId("replies-set")?.value ?? 0];
  const { rows, shared } = await once(template);
  const wanted = byId("replies-search").value.toLowerCase();
  const outcome = document.querySelector("[name=outcome]:checked").value;
  const matching = rows.filter((row) =>
    [row.question, row.before.text, row.after.text].some((text) => text.toLowerCase().includes(wanted)),
  );
  for (const label of byId("outcomes").querySelectorAll("label")) {
    const own = label.querySelector("input").value;
    label.querySelector("span").textContent = matching.filter((row) => own === "all" || outcomeOf(row) === own).length;
  }
  const left = matching.filter((row) => outcome === "all" || outcomeOf(row) === outcome);
  const { step, count, shown } = template.dataset;
  const note = shown === count ? "" : `; only the first ${shown} of ${count} problems are on this page`;
  return { rows: left.map((row) => ({ ...row, step })), shared, wanted, note };
}

function repliesCsv(rows) {
  const cells = rows.map((row) => [
    row.question,
    row.before.text,
    row.before.score,
    row.after.text,
    row.after.score,
    outcomeOf(row),
  ]);
  return [["question", "before", "score before", "after", "score after", "outcome"], ...cells];
}

// ---- completions

function completionItem(row, wanted) {
  const header = make("header", {}, make("b", { className: "total", textContent: short(row.total) }));
  for (const [name, value] of Object.entries(row.rewards))
    header.append(make("span", { textContent: `${name} ${short(value)}` }));
  header.append(make("span", { textContent: `advantage ${short(row.advantage)}` }));
  header.append(make("span", { textContent: `${row.tokens} tokens${row.cut ? ", cut off" : ""}` }));
  header.append(make("span", { textContent: `step ${row.step}, group ${row.group}` }));
  const item = make(
    "article",
    { className: "item completion" },
    header,
    written("p", "question", row.question, wanted),
  );
  if (row.failed) item.append(make("p", { className: "role", textContent: `left out of its group: ${row.failed}` }));
  for (const said of row.talk) {
    item.append(make("p", { className: "role", textContent: said.role }), written("pre", "", said.text, wanted));
    item.append(...said.calls.map((call) => make("p", { className: "call" }, ...marked(call, wanted))));
  }
  if (!row.talk.length) item.append(written("pre", "", row.text, wanted));
  const extra = Object.entries(row.extra);
  if (extra.length) {
    item.append(
      make(
        "dl",
        {},
        ...extra.flatMap(([name, value]) => [
          make("dt", { textContent: name }),
          make("dd", {}, ...marked(value, wanted)),
        ]),
      ),
    );
  }
  return item;
}

const ORDERS = {
  best: ["best first", (row) => -(row.total ?? -Infinity)],
  worst: ["worst first", (row) => row.total ?? -Infinity],
  sampled: ["as sampled", () => 0],
  long: ["longest first", (row) => -row.tokens],
  short: ["shortest first", (row) => row.tokens],
  advantage: ["highest advantage", (row) => -(row.advantage ?? -Infinity)],
};

function texts(row) {
  return [
    row.question,
    row.text,
    row.failed,
    ...row.talk.flatMap((said) => [said.text, ...said.calls]),
    ...Object.values(row.extra),
  ];
}

function stepsOf(run) {
  return [...document.querySelectorAll(`template.step[data-run="${run}"]`)];
}

async function findCompletions() {
  const run = byId("completions-run")?.value ?? "0";
  const [step, group, order] = ["step", "group", "order"].map((name) => byId(`completions-${name}`));
  if (step.dataset.run !== run) {
    const steps = stepsOf(run).map((template) => [template.dataset.step, template.dataset.step]);
    options(step, [["all", `all ${steps.length}`], ...steps], steps.at(-1)?.[0] ?? "all");
    step.dataset.run = run;
  }
  const chosen = stepsOf(run).filter((template) => step.value === "all" || template.dataset.step === step.value);
  const parts = await Promise.all(chosen.map(once));
  const every = parts.flatMap((part, i) =>
    part.rows.map((row) => ({ ...row, step: chosen[i].dataset.step, begins: part.shared })),
  );
  const groups = [...new Set(every.map((row) => row.group))].sort((a, b) => a - b);
  options(group, [["all", `all ${groups.length}`], ...groups.map((one) => [one, one])], group.value);
  const names = [...new Set(every.flatMap((row) => Object.keys(row.rewards)))];
  const orders = names.length > 1 ? names.map((name, i) => [`reward-${i}`, `highest ${name}`]) : [];
  options(order, [...Object.entries(ORDERS).map(([value, [text]]) => [value, text]), ...orders], order.value || "best");
  const worth = order.value.startsWith("reward-")
    ? (row) => -(row.rewards[names[Number(order.value.slice(7))]] ?? -Infinity)
    : ORDERS[order.value][1];
  const wanted = byId("completions-search").value.toLowerCase();
  const rows = every.filter(
    (row) =>
      (group.value === "all" || String(row.group) === group.value) &&
      (!wanted || texts(row).some((text) => text.toLowerCase().includes(wanted))),
  );
  const ranked = rows
    .map((row) => [worth(row), row])
    .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
    .map(([, row]) => row);
  const shared = new Set(parts.map((part) => part.shared)).size === 1 ? parts[0].shared : "";
  return {
    rows: shared ? ranked : ranked.map((row) => ({ ...row, question: row.begins + row.question })),
    shared,
    wanted,
  };
}

function completionsCsv(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.rewards)))];
  const cells = rows.map((row) => [
    Number(row.step),
    row.group,
    row.question,
    row.text,
    row.total,
    row.advantage,
    row.tokens,
    ...names.map((name) => row.rewards[name] ?? ""),
  ]);
  return [["step", "group", "question", "completion", "reward", "advantage", "tokens", ...names], ...cells];
}

async function startLists() {
  const kinds = [
    ["replies", "replies", findReplies, pairItem, repliesCsv],
    ["completions", "sampled", findCompletions, completionItem, completionsCsv],
  ];
  for (const [name, root, find, item, csv] of kinds) {
    const form = document.querySelector(`[data-list=${name}]`);
    if (!form) continue;
    const update = list(byId(root), name, find, item, csv);
    follow(form, update);
    await update();
  }
}

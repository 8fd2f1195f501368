// The start; and a page that is written again and again loads itself, and is then as it was left.
const KEPT = `longgrpo ${location.pathname}`;
const kept = () => [...document.querySelectorAll("input[id], select[id], details[id]")];
const stateOf = (element) =>
  ({
    DETAILS: element.open,
    SELECT: element.value,
    INPUT: /radio|checkbox/.test(element.type) ? element.checked : element.value,
  })[element.tagName];

function keep(initial) {
  const changed = kept()
    .filter((element) => stateOf(element) !== initial.get(element.id))
    .map((element) => [element.id, stateOf(element)]);
  const range = view.range ?? [];
  sessionStorage.setItem(KEPT, JSON.stringify({ changed, range, scroll: scrollY }));
}

async function restore(left) {
  for (const [id, state] of left.changed.filter(([name]) => !["from", "to"].includes(name))) {
    const element = byId(id);
    if (!element || (element.tagName === "SELECT" && ![...element.options].some((option) => option.value === state)))
      continue;
    if (element.tagName === "DETAILS") element.open = state;
    else if (typeof state === "boolean") element.checked = state;
    else element.value = state;
    element.dispatchEvent(new Event("change", { bubbles: true }));
  }
  if (left.range.length) setRange(left.range);
  await new Promise((done) => setTimeout(done, 50));
  scrollTo(0, left.scroll);
}

function reloadLater(seconds) {
  setTimeout(() => {
    const busy = byId("paused").checked || document.activeElement?.type === "search" || !getSelection().isCollapsed;
    if (busy) reloadLater(seconds);
    else location.reload();
  }, seconds * 1000);
}

async function start() {
  startCharts(await unpack(byId("data")));
  await startLists();
  const initial = new Map(kept().map((element) => [element.id, stateOf(element)]));
  try {
    const left = JSON.parse(sessionStorage.getItem(KEPT));
    if (left && performance.getEntriesByType("navigation")[0]?.type === "reload") await restore(left);
    addEventListener("pagehide", () => keep(initial));
  } catch {
    // without storage a page begins anew
  }
  if (document.body.dataset.refresh) reloadLater(Number(document.body.dataset.refresh));
  document.body.dataset.ready = "yes";
}

start();

"use strict";

// The state of the page, its controls and its keys.

const at = (id) => document.getElementById(id);
const state = { filters: noFilters(), order: "worst", selected: null, mode: "response", colour: "weight", cursor: null };
let view = []; // the samples that the filters take, in order
const list = new SampleList(at("list"), at("rows"), choose);

function refresh() {
  view = select(state.filters, state.order);
  list.show(view);
  const share = view.length === NUM_SAMPLES ? String(NUM_SAMPLES) : view.length + " of " + NUM_SAMPLES;
  at("count").textContent = share + (NUM_SAMPLES === 1 ? " sample" : " samples");
  if (!list.places.has(state.selected)) choose(view.length ? view[0] : null);
  else choose(state.selected);
}

function choose(sample) {
  if (sample !== state.selected) state.cursor = null;
  state.selected = sample;
  list.choose(sample);
  showDetail();
  saveState();
}

function showDetail() {
  const sample = state.selected;
  const bodies = at("bodies");
  bodies.className = state.mode === "group" ? "group" : "";
  at("mode-response").setAttribute("aria-pressed", String(state.mode === "response"));
  at("mode-group").setAttribute("aria-pressed", String(state.mode === "group"));
  at("token-line").textContent = "";
  bodies.replaceChildren();
  at("prompt").textContent = sample === null ? "" : visible(promptOf(sample).text);
  if (sample === null) {
    at("facts").replaceChildren();
    at("legend").replaceChildren();
    return;
  }
  at("facts").replaceWith(facts(sample));
  const together = state.mode === "group" ? GROUPS.get(field("group", sample)) : [sample];
  bodies.append(...together.map((each) => card(each, each === sample, state.mode, state.colour)));
  if (state.mode === "group") bodies.querySelector(".selected").scrollIntoView({ block: "nearest" });
  else bodies.scrollTop = 0;
  showColours(sample);
  markFound(bodies, state.filters.search);
}

function showColours(sample) {
  const options = coloursFor(sample).map((name) => {
    const option = element("option", "", COLOURINGS[name].label);
    option.value = name;
    return option;
  });
  at("colour").replaceChildren(...options);
  at("colour").value = colourOf(sample, state.colour);
  writeLegend(at("legend"), sample, state.colour);
}

function setMode(mode) {
  state.mode = mode;
  showDetail();
  saveState();
}

function setColour(colour) {
  state.colour = colour;
  showDetail();
}

function setOrder(order) {
  state.order = order;
  state.selected = null;
  at("order").value = order;
  refresh();
}

// Steps through the list. A sample that the filters leave out is reached from its group, and is left to the first row.
function move(count) {
  if (view.length === 0) return;
  const place = list.places.get(state.selected);
  const next = place === undefined ? 0 : Math.max(0, Math.min(view.length - 1, place + count));
  choose(view[next]);
}

function moveInGroup(count) {
  if (state.selected === null) return;
  const together = GROUPS.get(field("group", state.selected));
  const place = together.indexOf(state.selected) + count;
  choose(together[(place + together.length) % together.length]);
}

function moveToGroup(count) {
  if (state.selected === null) return;
  const group = field("group", state.selected);
  let place = list.places.get(state.selected) ?? 0;
  while (view[place] !== undefined && field("group", view[place]) === group) place += count;
  if (view[place] !== undefined) choose(view[place]);
}

function moveCursor(count) {
  const tokens = state.selected === null ? null : tokensOf(state.selected);
  if (!tokens || tokens.texts.length === 0) return;
  const last = tokens.texts.length - 1;
  showToken(state.cursor === null ? (count > 0 ? 0 : last) : Math.max(0, Math.min(last, state.cursor + count)));
}

function showToken(index) {
  state.cursor = index;
  const box = at("bodies").querySelector(".selected");
  for (const old of at("bodies").querySelectorAll(".cursor")) old.classList.remove("cursor");
  const token = box.querySelector('[data-index="' + index + '"]');
  if (token) {
    token.classList.add("cursor");
    token.scrollIntoView({ block: "nearest" });
  }
  at("token-line").textContent = visible(describeToken(state.selected, index));
}

function nextColour() {
  if (state.selected === null) return;
  const known = coloursFor(state.selected);
  setColour(known[(known.indexOf(colourOf(state.selected, state.colour)) + 1) % known.length]);
}

function nextTheme() {
  const themes = ["", "light", "dark"];
  const root = document.documentElement;
  const next = themes[(themes.indexOf(root.dataset.theme || "") + 1) % themes.length];
  root.dataset.theme = next;
  at("theme").textContent = next === "" ? "Theme" : "Theme: " + next;
}

// The controls of the filters.

function bound(id) {
  const value = at(id).valueAsNumber;
  return Number.isFinite(value) ? value : null;
}

function readControls() {
  const filters = noFilters();
  filters.search = at("search").value;
  filters.disagrees = at("disagrees").checked;
  for (const name of RANGES) filters[name] = [bound(name + "-low"), bound(name + "-high")];
  for (const name of NAMES) {
    const chosen = at(name + "-set").querySelectorAll("input:checked");
    filters[name] = Array.from(chosen, (box) => known[name][Number(box.value)]);
  }
  state.filters = filters;
  refresh();
}

function writeControls() {
  const filters = state.filters;
  at("search").value = filters.search;
  at("disagrees").checked = filters.disagrees;
  at("order").value = state.order;
  for (const name of RANGES) {
    at(name + "-low").value = filters[name][0] ?? "";
    at(name + "-high").value = filters[name][1] ?? "";
  }
  for (const name of NAMES) {
    for (const box of at(name + "-set").querySelectorAll("input")) box.checked = filters[name].includes(known[name][Number(box.value)]);
  }
}

function clearFilters() {
  state.filters = noFilters();
  writeControls();
  refresh();
}

// name -> the values that samples have, the most frequent first
const known = {};
function makeBoxes(name, unnamed) {
  const counts = new Map();
  for (const value of COLUMNS[name] || []) counts.set(value, (counts.get(value) || 0) + 1);
  known[name] = Array.from(counts.keys()).sort((one, other) => counts.get(other) - counts.get(one) || (one < other ? -1 : 1));
  known[name].forEach((value, number) => {
    const label = element("label", "check");
    const box = element("input");
    box.type = "checkbox";
    box.value = number;
    label.append(box, document.createTextNode(" " + visible(value || unnamed) + " "), element("span", "number", counts.get(value)));
    at(name + "-set").append(label);
  });
}

let waiting = 0;
function afterTyping() {
  clearTimeout(waiting);
  waiting = setTimeout(readControls, 120);
}

// The state stands in the address, so that a page that was made anew opens where the old one was.

function saveState() {
  const kept = { filters: state.filters, order: state.order, mode: state.mode, colour: state.colour };
  if (state.selected !== null) kept.at = [field("step", state.selected), field("row", state.selected)];
  try {
    history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(kept)));
  } catch (error) {
    // A browser may refuse many changes in a short time; the next one is kept.
  }
}

function restoreState() {
  let kept = null;
  try {
    kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
  } catch (error) {
    return; // no state, or not one of ours
  }
  if (kept === null || typeof kept !== "object") return;
  const filters = noFilters();
  const given = kept.filters || {};
  if (typeof given.search === "string") filters.search = given.search;
  filters.disagrees = given.disagrees === true;
  const isEnd = (value) => value === null || Number.isFinite(value);
  for (const name of RANGES) {
    if (Array.isArray(given[name]) && given[name].length === 2 && given[name].every(isEnd)) filters[name] = given[name];
  }
  for (const name of NAMES) {
    if (Array.isArray(given[name])) filters[name] = given[name].filter((value) => known[name].includes(value));
  }
  state.filters = filters;
  if (kept.order === "run" || kept.order === "worst" || Object.hasOwn(BY_COLUMN, kept.order)) state.order = kept.order;
  if (kept.mode === "group") state.mode = "group";
  if (Object.hasOwn(COLOURINGS, kept.colour)) state.colour = kept.colour;
  if (Array.isArray(kept.at)) {
    const found = ALL.find((sample) => field("step", sample) === kept.at[0] && field("row", sample) === kept.at[1]);
    state.selected = found ?? null;
  }
}

// Each key: its names, what it does, and the words for the help.
const KEYS = [
  [["j", "ArrowDown"], () => move(1), "next sample"],
  [["k", "ArrowUp"], () => move(-1), "previous sample"],
  [["PageDown"], () => move(10), "ten samples on"],
  [["PageUp"], () => move(-10), "ten samples back"],
  [["Home"], () => move(-view.length), "first sample"],
  [["End"], () => move(view.length), "last sample"],
  [["n"], () => moveToGroup(1), "next group"],
  [["p"], () => moveToGroup(-1), "previous group"],
  [["]"], () => moveInGroup(1), "next sample of the group, whatever the filters"],
  [["["], () => moveInGroup(-1), "previous sample of the group"],
  [["g", "Enter"], () => setMode(state.mode === "group" ? "response" : "group"), "the group side by side, and back"],
  [["ArrowRight"], () => moveCursor(1), "next token"],
  [["ArrowLeft"], () => moveCursor(-1), "previous token"],
  [["c"], nextColour, "next colours"],
  [["w"], () => setOrder(state.order === "worst" ? "run" : "worst"), "worst first, and back to the order of the run"],
  [["d"], () => { at("disagrees").checked = !at("disagrees").checked; readControls(); }, "only where judge and rules disagree"],
  [["/"], () => { at("search").focus(); at("search").select(); }, "search"],
  [["x"], clearFilters, "clear the filters"],
  [["t"], nextTheme, "light or dark"],
  [["?"], () => at("help").showModal(), "this help"],
];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || at("help").open) return;
  const target = event.target;
  const isTyping = target instanceof HTMLInputElement && target.type !== "checkbox";
  if (event.key === "Escape" || (event.key === "Enter" && isTyping)) {
    target.blur();
    if (isTyping) event.preventDefault();
    return;
  }
  if (isTyping || target instanceof HTMLSelectElement) return;
  if (event.key === "Enter" && target instanceof HTMLButtonElement) return;
  const found = KEYS.find(([names]) => names.includes(event.key));
  if (found) {
    event.preventDefault();
    found[1]();
  }
}

// Shows in empty fields what the samples have.
function showRange(name) {
  const values = (COLUMNS[name] || []).filter((value) => value !== null);
  if (values.length === 0) return;
  at(name + "-low").placeholder = shown(values.reduce((one, other) => Math.min(one, other)));
  at(name + "-high").placeholder = shown(values.reduce((one, other) => Math.max(one, other)));
}

function start() {
  makeBoxes("status", "no verdict");
  makeBoxes("source", "not named");
  RANGES.forEach(showRange);
  at("source-set").hidden = known.source.length < 2 && (known.source[0] || "") === "";
  at("disagrees-label").hidden = !(COLUMNS.judge || []).some((judge) => judge !== null);
  at("notes").textContent = visible(DATA.notes.join("; "));
  at("notes").title = at("notes").textContent;
  for (const [names, , words] of KEYS) {
    const row = element("tr");
    row.append(element("td", "", names.join(" or ")), element("td", "", words));
    at("keys").append(row);
  }
  restoreState();
  writeControls();
  at("filters").addEventListener("input", afterTyping);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("order").addEventListener("change", () => {
    setOrder(at("order").value);
    at("order").blur(); // so that the keys reach the list
  });
  at("clear").addEventListener("click", clearFilters);
  at("mode-response").addEventListener("click", () => setMode("response"));
  at("mode-group").addEventListener("click", () => setMode("group"));
  at("colour").addEventListener("change", () => {
    setColour(at("colour").value);
    at("colour").blur();
  });
  at("theme").addEventListener("click", nextTheme);
  at("help-button").addEventListener("click", () => at("help").showModal());
  at("bodies").addEventListener("click", (event) => {
    const chosen = event.target.closest(".card");
    if (chosen && Number(chosen.dataset.sample) !== state.selected) choose(Number(chosen.dataset.sample));
  });
  at("bodies").addEventListener("mouseover", (event) => {
    const token = event.target.closest(".token");
    if (!token) return;
    const sample = Number(token.closest(".card").dataset.sample);
    at("token-line").textContent = visible(describeToken(sample, Number(token.dataset.index)));
  });
  document.addEventListener("keydown", onKey);
  refresh();
  // After the browser has painted: the page can be used.
  requestAnimationFrame(() => setTimeout(() => { document.documentElement.dataset.ready = Math.round(performance.now()); }));
}

start();

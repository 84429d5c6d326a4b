"use strict";

// The samples of the page, their filters and their order. A sample is a number: its place in the columns.

const DATA = JSON.parse(document.getElementById("samples").textContent);
const COLUMNS = DATA.columns;
const NUM_SAMPLES = DATA.worst.length;
const ALL = Uint32Array.from({ length: NUM_SAMPLES }, (_, sample) => sample);
const RANGES = ["step", "reward", "tokens"];
const NAMES = ["status", "source"];

// group -> its samples
const GROUPS = new Map();
for (let sample = 0; sample < NUM_SAMPLES; sample += 1) {
  const group = COLUMNS.group[sample];
  if (!GROUPS.has(group)) GROUPS.set(group, []);
  GROUPS.get(group).push(sample);
}

const field = (name, sample) => COLUMNS[name][sample];
const promptOf = (sample) => {
  const [id, text, answer] = DATA.prompts[COLUMNS.prompt[sample]];
  return { id, text, answer };
};

function noFilters() {
  return { search: "", disagrees: false, step: [null, null], reward: [null, null], tokens: [null, null], status: [], source: [] };
}

// The text that a search looks at, made at the first search: lower case costs time.
const searched = new Array(NUM_SAMPLES);
function searchedText(sample) {
  if (searched[sample] === undefined) {
    const { id, text, answer } = promptOf(sample);
    searched[sample] = [id, text, answer, field("extracted", sample) || "", field("response", sample)].join("\n").toLowerCase();
  }
  return searched[sample];
}

function isWithin(value, [low, high]) {
  if (low === null && high === null) return true;
  return value !== null && (low === null || value >= low) && (high === null || value <= high);
}

function holds(filters, wanted, sample) {
  return (
    RANGES.every((name) => isWithin(field(name, sample), filters[name])) &&
    NAMES.every((name) => filters[name].length === 0 || filters[name].includes(field(name, sample))) &&
    (!filters.disagrees || field("disagrees", sample) === 1) &&
    (wanted === "" || searchedText(sample).includes(wanted))
  );
}

// order -> [column, sign]; samples whose value is unknown come last
const BY_COLUMN = {
  newest: ["step", -1],
  longest: ["tokens", -1],
  shortest: ["tokens", 1],
  difference: ["difference", -1],
  logprob: ["logprob", 1],
  pass_rate: ["passRate", 1],
};

function inOrder(order) {
  if (order === "worst") return DATA.worst;
  if (!(order in BY_COLUMN)) return ALL;
  const [name, sign] = BY_COLUMN[order];
  const values = COLUMNS[name];
  const rank = (sample) => (values[sample] === null ? Infinity : sign * values[sample]);
  return Array.from(ALL).sort((one, other) => {
    const [first, second] = [rank(one), rank(other)];
    return first === second ? one - other : first - second;
  });
}

function select(filters, order) {
  const wanted = filters.search.toLowerCase();
  return Array.from(inOrder(order)).filter((sample) => holds(filters, wanted, sample));
}

// Makes characters visible that a browser would hide, obey or reorder text by.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
function visible(text) {
  return text.replace(HIDDEN, (found) => {
    const code = found.charCodeAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return "\u27e8U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
}

const shown = (value, digits = 4) => {
  if (value === null || value === undefined) return "-";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(digits - 1);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
};

// A new element with text in it. Text of samples reaches the page here and nowhere else, and never as HTML.
function element(tag, className = "", content = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== "") made.textContent = visible(String(content));
  return made;
}

function statusClass(status) {
  if (status === "correct") return "good";
  return ["", "timeout", "crash", "judge_failed", "reward_failed"].includes(status) ? "warn" : "bad";
}

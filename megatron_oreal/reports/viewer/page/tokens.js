"use strict";

// The tokens of a response, and how they are coloured.

// step -> the tokens of its samples, read when a sample of the step is first shown
const tokenSteps = new Map();
function tokensOf(sample) {
  if (!field("recorded", sample)) return null;
  const step = field("step", sample);
  if (!tokenSteps.has(step)) tokenSteps.set(step, JSON.parse(document.getElementById("tokens-" + step).textContent));
  return tokenSteps.get(step)[sample];
}

const STRONGEST = 0.62; // the opacity of the strongest colour: text stays readable on it
const RARE_NATS = 5; // the log-prob from which on a token has the full colour

const valueAt = (values, index) => (values === undefined ? null : values.length === 1 ? values[0] : values[index]);
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 0);

// Each colouring: what it is called, the column of the tokens that it needs, and (tokens, sample) -> index -> [class, share].
const COLOURINGS = {
  weight: {
    label: "token weight",
    needs: "weights",
    paint: (tokens, sample) => {
      const most = Math.max(largest(tokens.weights), 1e-12);
      const pushes = valueAt(tokens.advantages, 0);
      const name = (pushes === null ? field("status", sample) === "correct" : pushes > 0) ? "up" : "down";
      return (index) => [name, (tokens.weights[index] || 0) / most];
    },
    legend: (tokens) => [["up", "made likelier"], ["down", "made less likely"], ["", "strongest: " + shown(largest(tokens.weights))]],
  },
  difference: {
    label: "log-prob difference",
    needs: "differences",
    paint: (tokens) => {
      const most = Math.max(largest(tokens.differences), 1e-12);
      return (index) => [tokens.differences[index] > 0 ? "more" : "less", Math.abs(tokens.differences[index] || 0) / most];
    },
    legend: (tokens) => [["more", "trainer above engine"], ["less", "trainer below engine"], ["", "largest: " + shown(largest(tokens.differences))]],
  },
  advantage: {
    label: "advantage",
    needs: "advantages",
    paint: (tokens) => {
      const most = Math.max(largest(tokens.advantages), 1e-12);
      return (index) => {
        const value = valueAt(tokens.advantages, index) || 0;
        return [value > 0 ? "up" : "down", Math.abs(value) / most];
      };
    },
    legend: (tokens) => [["up", "above zero"], ["down", "below zero"], ["", "largest: " + shown(largest(tokens.advantages))]],
  },
  logprob: {
    label: "log-prob",
    needs: "logprobs",
    paint: (tokens) => (index) => ["rare", Math.min(1, -(tokens.logprobs[index] || 0) / RARE_NATS)],
    legend: () => [["rare", "unlikely: log-prob of -" + RARE_NATS + " or less"]],
  },
  none: { label: "none", needs: "texts", paint: () => () => ["", 0], legend: () => [] },
};

function coloursFor(sample) {
  const tokens = tokensOf(sample);
  return Object.keys(COLOURINGS).filter((name) => name === "none" || (tokens && tokens[COLOURINGS[name].needs] !== undefined));
}

// The colouring that was asked for where the sample has it, else the first that it has.
function colourOf(sample, asked) {
  const known = coloursFor(sample);
  return known.includes(asked) ? asked : known[0];
}

// Writes up to `limit` tokens into `target`, one element each; returns how many are left.
function writeTokens(target, sample, asked, limit) {
  const tokens = tokensOf(sample);
  const paint = COLOURINGS[colourOf(sample, asked)].paint(tokens, sample);
  const count = Math.min(limit, tokens.texts.length);
  const fragment = document.createDocumentFragment();
  for (let index = 0; index < count; index += 1) {
    const [name, share] = paint(index);
    const token = element("span", "token " + name, tokens.texts[index]);
    if (tokens.texts[index] === "") token.classList.add("silent");
    if (share > 0) token.style.setProperty("--strength", (STRONGEST * Math.min(1, share)).toFixed(3));
    token.dataset.index = index;
    fragment.append(token);
  }
  target.append(fragment);
  return tokens.texts.length - count;
}

function writeLegend(target, sample, asked) {
  target.replaceChildren();
  if (!tokensOf(sample)) {
    target.append(element("span", "", "tokens not recorded (logging.rollout_tokens)"));
    return;
  }
  for (const [name, words] of COLOURINGS[colourOf(sample, asked)].legend(tokensOf(sample))) {
    const swatch = element("span", name ? "swatch " + name : "", words);
    if (name) swatch.style.setProperty("--strength", STRONGEST);
    target.append(swatch);
  }
}

// What is known of one token, in a line.
function describeToken(sample, index) {
  const tokens = tokensOf(sample);
  const words = ["token " + (index + 1) + " of " + tokens.texts.length, JSON.stringify(tokens.texts[index])];
  const named = { logprobs: "log-prob", differences: "trainer - engine", weights: "weight", advantages: "advantage" };
  for (const [column, name] of Object.entries(named)) {
    const value = valueAt(tokens[column], index);
    if (value !== null && value !== undefined) words.push(name + " " + shown(value));
  }
  return words.join("   ");
}

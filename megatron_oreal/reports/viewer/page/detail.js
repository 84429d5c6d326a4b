"use strict";

// A response with its tokens, or the responses of its group side by side.

const MOST_CHARACTERS = { response: 300000, group: 20000 }; // shown at once; a button shows the rest
const MOST_TOKENS = { response: 20000, group: 2000 };

function facts(sample) {
  const list = element("dl");
  list.id = "facts";
  const { id, answer } = promptOf(sample);
  const named = [
    ["status", field("status", sample) || "no verdict", statusClass(field("status", sample))],
    ["reward", shown(field("reward", sample))],
    ["answer found", field("extracted", sample) ?? "none"],
    ["right answer", answer],
    ["tokens", shown(field("tokens", sample))],
    ["ended by", field("finish", sample) || "-"],
    ["pass rate of the group", shown(field("passRate", sample), 3)],
    ["log-prob", shown(field("logprob", sample))],
    ["mean |difference|", shown(field("difference", sample), 3)],
    ["prompt", id],
    ["data set", field("source", sample) || "-"],
    ["step", field("step", sample) + ", row " + field("row", sample)],
    ["weights of step", shown(field("version", sample))],
  ];
  const judge = field("judge", sample);
  if (judge !== null) {
    named.splice(1, 0, ["rules", field("rules", sample), statusClass(field("rules", sample))]);
    named.splice(2, 0, ["judge", judge, judge === "correct" ? "good" : judge === "incorrect" ? "bad" : "warn"]);
  }
  for (const [name, value, className] of named) {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", className || "", value));
    list.append(pair);
  }
  return list;
}

// The text of a response; with recorded tokens each token is an element.
function body(sample, mode, colour) {
  const text = element("div", "text");
  const write = (most) => {
    text.replaceChildren();
    if (tokensOf(sample)) {
      const left = writeTokens(text, sample, colour, most ? MOST_TOKENS[mode] : Infinity);
      if (left > 0) text.append(moreButton("show " + left + " more tokens", write));
      return;
    }
    const response = field("response", sample);
    const left = most ? response.length - MOST_CHARACTERS[mode] : 0;
    text.append(document.createTextNode(visible(left > 0 ? response.slice(0, MOST_CHARACTERS[mode]) : response)));
    if (left > 0) text.append(moreButton("show " + left + " more characters", write));
  };
  write(true);
  return text;
}

function moreButton(words, write) {
  const button = element("button", "", words);
  button.type = "button";
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    write(false);
  });
  return button;
}

function card(sample, isSelected, mode, colour) {
  const made = element("article", "card" + (isSelected ? " selected" : ""));
  made.dataset.sample = sample;
  if (mode === "group") {
    const head = element("div", "head");
    head.append(
      element("span", "badge " + statusClass(field("status", sample)), field("status", sample) || "no verdict"),
      element("span", "", "reward " + shown(field("reward", sample))),
      element("span", "", shown(field("tokens", sample)) + " tokens"),
      element("span", "", "answer " + (field("extracted", sample) ?? "none")),
    );
    if (field("judge", sample) !== null) head.append(element("span", "", "judge " + field("judge", sample)));
    made.append(head);
  }
  made.append(body(sample, mode, colour));
  return made;
}

// Marks what was searched for, without touching the elements.
function markFound(target, words) {
  if (!window.Highlight || !CSS.highlights) return;
  CSS.highlights.delete("search");
  const wanted = words.toLowerCase();
  if (wanted === "") return;
  const ranges = [];
  for (const box of target.querySelectorAll(".text")) {
    const nodes = textNodes(box);
    const text = nodes.map((node) => node.data).join("").toLowerCase();
    let [number, begin] = [0, 0];
    const place = (offset) => {
      while (number + 1 < nodes.length && offset > begin + nodes[number].length) {
        begin += nodes[number].length;
        number += 1;
      }
      return [nodes[number], Math.min(offset - begin, nodes[number].length)];
    };
    for (let at = text.indexOf(wanted); at >= 0 && ranges.length < 2000; at = text.indexOf(wanted, at + wanted.length)) {
      const range = new Range();
      range.setStart(...place(at));
      range.setEnd(...place(at + wanted.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set("search", new Highlight(...ranges));
}

function textNodes(box) {
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  return nodes;
}

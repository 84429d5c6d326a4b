"use strict";

// The list of samples. Only the rows in sight exist, so its length does not matter.

const ROW_HEIGHT = 48;
const SPARE_ROWS = 6;

class SampleList {
  constructor(box, rows, onChoose) {
    this.box = box;
    this.rows = rows;
    this.onChoose = onChoose;
    this.samples = [];
    this.places = new Map();
    this.selected = null;
    this.made = new Map(); // place -> its row
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
    rows.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.onChoose(this.samples[Number(row.dataset.place)]);
    });
  }

  show(samples) {
    this.samples = samples;
    this.places = new Map(samples.map((sample, place) => [sample, place]));
    this.rows.style.height = samples.length * ROW_HEIGHT + "px";
    this.made.clear();
    this.rows.replaceChildren();
    if (samples.length === 0) this.rows.append(element("p", "empty", "No sample fits these filters."));
    this.draw();
  }

  choose(sample) {
    this.selected = sample;
    const place = this.places.get(sample);
    if (place !== undefined) {
      const [top, height] = [place * ROW_HEIGHT, this.box.clientHeight];
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      if (top + ROW_HEIGHT > this.box.scrollTop + height) this.box.scrollTop = top + ROW_HEIGHT - height;
    }
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const last = Math.min(this.samples.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + SPARE_ROWS);
    for (const [place, row] of this.made) {
      if (place < first || place >= last) {
        row.remove();
        this.made.delete(place);
      }
    }
    for (let place = first; place < last; place += 1) {
      if (!this.made.has(place)) {
        const row = makeRow(this.samples[place], place);
        this.made.set(place, row);
        this.rows.append(row);
      }
    }
    for (const [place, row] of this.made) row.setAttribute("aria-selected", String(this.samples[place] === this.selected));
  }
}

const oneLine = (text) => text.slice(0, 160).replace(/\s+/g, " ");

function makeRow(sample, place) {
  const row = element("div", "row");
  row.dataset.place = place;
  row.dataset.sample = sample;
  row.setAttribute("role", "option");
  row.style.top = place * ROW_HEIGHT + "px";
  const { text, answer } = promptOf(sample);
  const facts = element("div", "facts");
  facts.append(
    element("span", "badge " + statusClass(field("status", sample)), field("status", sample) || "no verdict"),
    element("span", "", shown(field("reward", sample))),
    element("span", "", shown(field("tokens", sample)) + " tok."),
  );
  if (field("disagrees", sample)) facts.append(element("span", "warn", "judge " + field("judge", sample)));
  facts.append(element("span", "end", "step " + field("step", sample) + " row " + field("row", sample)));
  const extracted = field("extracted", sample);
  const found = extracted === null ? "no answer" : oneLine(extracted);
  const line = element("div", "line", oneLine(text) + "  \u2192  " + found + (extracted === answer ? "" : "  (" + oneLine(answer) + ")"));
  row.append(line, facts);
  return row;
}

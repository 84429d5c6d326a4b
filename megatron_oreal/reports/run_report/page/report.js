"use strict";
// Draws each chart with uPlot when it comes near the visible part of the page.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const HEIGHT = 230;
  const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3], [12, 5], [1, 4]];
  const PALETTE = 8;
  const drawn = new Map(); // figure -> its uPlot

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourOf = (series) => style(`--c${series.colour % PALETTE}`);
  const dashesOf = (series) => DASHES[(series.dashes + Math.floor(series.colour / PALETTE)) % DASHES.length];
  const faded = (colour) => `${colour}33`;

  function shown(value) {
    if (value === null || value === undefined) return "-";
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  function stackedValues(chart) {
    const sums = chart.x.map(() => 0);
    return chart.series.map((series) => series.values.map((value, at) => (sums[at] += value || 0)));
  }

  // The columns that uPlot draws, the options of each, and which of them belong to which series of the chart.
  function columnsOf(chart) {
    const columns = [chart.x], options = [{}], bands = [], places = [];
    const stacked = chart.kind === "stacked" ? stackedValues(chart) : null;
    const order = chart.series.map((_, index) => index);
    if (stacked) order.reverse(); // the largest sum first, so that the smaller ones are painted over it
    for (const index of order) {
      const series = chart.series[index], colour = colourOf(series);
      const isLonely = series.values.filter((value) => value !== null).length < 60;
      places[index] = [columns.length];
      columns.push(stacked ? stacked[index] : series.values);
      options.push({
        label: series.label, stroke: colour, width: stacked ? 1 : 1.5, dash: dashesOf(series), spanGaps: true,
        fill: stacked ? colour : chart.kind === "bars" ? faded(colour) : undefined,
        paths: chart.kind === "bars" ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: isLonely && chart.kind === "lines", size: 4 },
      });
      if (series.low) {
        for (const side of [series.high, series.low]) {
          places[index].push(columns.length);
          columns.push(side);
          options.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
        }
        bands.push({ series: [columns.length - 2, columns.length - 1], fill: faded(colour) });
      }
    }
    return { columns, options, bands, places };
  }

  function addLegend(figure, chart, plotOf, places) {
    const list = document.createElement("ul");
    list.className = "legend";
    const values = chart.series.map((series, index) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      swatch.setAttribute("width", "22");
      swatch.setAttribute("height", "8");
      swatch.setAttribute("class", "swatch");
      for (const [name, value] of [["x1", 0], ["x2", 22], ["y1", 4], ["y2", 4], ["stroke", colourOf(series)],
        ["stroke-width", chart.kind === "stacked" ? 8 : 3], ["stroke-dasharray", dashesOf(series).join(" ")]]) line.setAttribute(name, value);
      swatch.append(line);
      const label = document.createElement("span"), value = document.createElement("span");
      label.textContent = series.label || "value";
      value.className = "value";
      button.append(swatch, label, value);
      if (chart.kind === "stacked") button.disabled = true;
      button.addEventListener("click", () => {
        const isOn = button.getAttribute("aria-pressed") === "false";
        button.setAttribute("aria-pressed", String(isOn));
        for (const place of places[index]) plotOf().setSeries(place, { show: isOn });
      });
      item.append(button);
      list.append(item);
      return value;
    });
    figure.querySelector(".plot").after(list);
    return (at) => chart.series.forEach((series, index) => {
      const last = series.values.findLastIndex((value) => value !== null);
      values[index].textContent = shown(series.values[at === null || at === undefined ? last : at]);
    });
  }

  // A dashed line and a name for each alarm within the visible part; names that would overlap are left out.
  function drawMarks(plot, marks) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio || 1;
    let end = -Infinity;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = style("--c1");
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "top";
    for (const mark of [...marks].sort((one, other) => one.x - other.x)) {
      const x = plot.valToPos(mark.x, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(mark.label).width, isLate = x + width > bbox.left + bbox.width;
      const left = isLate ? x - width - 3 * ratio : x + 3 * ratio;
      if (left < Math.max(end, bbox.left)) continue;
      ctx.fillText(mark.label, left, bbox.top + 2 * ratio);
      end = left + width + 6 * ratio;
    }
    ctx.restore();
  }

  function draw(figure) {
    const chart = charts[Number(figure.dataset.chart)], place = figure.querySelector(".plot");
    figure.querySelector(".legend")?.remove();
    place.replaceChildren();
    const { columns, options, bands, places } = columnsOf(chart);
    let plot = null;
    const tell = addLegend(figure, chart, () => plot, places);
    const axis = { stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 } };
    plot = new uPlot({
      width: place.clientWidth || 400, height: HEIGHT, legend: { show: false }, series: options, bands,
      cursor: { y: false, drag: { x: true, y: false } },
      scales: {
        x: { time: false },
        y: { range: (_, low, high) => {
          if (low === null) return [0, 1];
          if (chart.kind !== "lines") return [0, high > 0 ? high * 1.05 : 1];
          return low === high ? [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10] : uPlot.rangeNum(low, high, 0.1, true);
        } },
      },
      axes: [
        { ...axis, label: chart.xLabel, labelSize: 18, size: 34, values: (_, ticks) => ticks.map(shown) },
        { ...axis, size: 72, values: (_, ticks) => ticks.map(shown) },
      ],
      hooks: { setCursor: [(self) => tell(self.cursor.idx)], draw: [(self) => drawMarks(self, chart.marks || [])] },
    }, columns, place);
    tell(null);
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent}: ` + chart.series.map((series) =>
      `${series.label || "value"}, last ${shown(series.values.findLast((value) => value !== null))}`).join("; ") +
      (chart.marks || []).map((mark) => `; alarm ${mark.label} at step ${mark.x}`).join(""));
    drawn.set(figure, plot);
  }

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "600px" });
  figures.forEach((figure) => near.observe(figure));

  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const plot = drawn.get(target), width = target.querySelector(".plot").clientWidth;
      if (plot && width && Math.abs(plot.width - width) > 1) plot.setSize({ width, height: HEIGHT });
    }
  });
  figures.forEach((figure) => resized.observe(figure));

  function redraw() {
    for (const [figure, plot] of [...drawn]) {
      plot.destroy();
      draw(figure);
    }
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement, isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    redraw();
  });
  addEventListener("beforeprint", () => figures.filter((figure) => !drawn.has(figure)).forEach(draw));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 12;

function make(parent, name, attributes, text) {
  const svg = parent instanceof SVGElement || name === "svg";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function figure(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "-" : String(value);
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

/* Ticks at 1, 2 and 5 times powers of ten, on a linear axis or on a long logarithmic one. */
function ticks(low, high, count, log) {
  const found = [];
  if (log && high / low > 8) {
    const decades = Math.log10(high / low);
    const steps = decades > count ? [1] : decades > count / 3 ? [1, 3] : [1, 2, 5];
    const every = Math.ceil(decades / count);
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += every)
      for (const step of steps) found.push(step * 10 ** e);
  } else {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
    for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n++) found.push(Number((n * step).toPrecision(12)));
  }
  return found.filter((value) => value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9));
}

function draw(chart, place) {
  const svg = place.querySelector("svg"), legend = place.querySelector(".legend");
  const width = svg.clientWidth, height = place.closest(".large") ? 300 : 190;
  const colour = (n) => `var(--c${n % COLOURS})`;
  const all = chart.series.flatMap((s) => s.points);
  const values = all.flatMap((p) => p.slice(1)).filter((y) => y !== null);
  const log = chart.log && values.some((y) => y > 0);
  const shown = (y) => y !== null && (!log || y > 0);
  const xs = all.map((p) => p[0]), ys = values.filter(shown);
  let [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (left === right) { left -= 0.5; right += 0.5; }
  if (low === high) { const room = Math.abs(low) * 0.1 || 0.1; low -= room; high += room; }
  else if (log) { const room = (high / low) ** 0.05; low /= room; high *= room; }
  else { const room = (high - low) * 0.05; if (low < 0 || low - room > 0) low -= room; high += room; }
  const yticks = ticks(low, high, 6, log), indent = 12 + 6.4 * Math.max(1, ...yticks.map((t) => figure(t).length));
  const scale = log ? Math.log : Number;
  const X = (x) => indent + ((x - left) / (right - left)) * (width - indent - 8);
  const Y = (y) => height - 22 - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (height - 32);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  for (const y of yticks) {
    make(svg, "line", { class: "grid", x1: indent, x2: width - 8, y1: Y(y), y2: Y(y) });
    make(svg, "text", { x: indent - 6, y: Y(y) + 4, "text-anchor": "end" }, figure(y));
  }
  for (const x of ticks(left, right, Math.max(2, Math.floor(width / 90)), false))
    if (Number.isInteger(x)) make(svg, "text", { x: X(x), y: height - 6, "text-anchor": "middle" }, figure(x));
  chart.series.forEach((series, n) => {
    const runs = [[]];
    for (const p of series.points) shown(p[1]) ? runs.at(-1).push(p) : runs.push([]);
    const style = { stroke: colour(n), fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-dasharray": n >= COLOURS ? "5 3" : "none" };
    for (const run of runs.filter((r) => r.length)) {
      if (run[0].length > 2) {
        const edge = (p, i) => `${X(p[0])},${Y(shown(p[i]) ? p[i] : log ? low : p[1])}`;
        const points = [...run.map((p) => edge(p, 3)), ...run.toReversed().map((p) => edge(p, 2))].join(" ");
        make(svg, "polygon", { points, fill: colour(n), opacity: 0.18 });
      }
      make(svg, "polyline", { ...style, points: run.map((p) => `${X(p[0])},${Y(p[1])}`).join(" ") });
      if (run.length === 1 || series.points.length <= 15)
        for (const p of run) make(svg, "circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.6, fill: colour(n) });
    }
  });
  const cursor = make(svg, "line", { class: "cursor", y1: 8, y2: height - 22, visibility: "hidden" });
  const name = (at) => {
    legend.replaceChildren();
    if (at !== null) make(legend, "b", {}, `step ${figure(at)}`);
    chart.series.forEach((series, n) => {
      const point = at === null ? null : series.points.find((p) => p[0] === at);
      make(legend, "span", { style: `--c:${colour(n)}` }, point ? `${series.name} ${figure(point[1])}` : series.name);
    });
  };
  name(null);
  svg.onpointermove = (event) => {
    const x = left + ((event.offsetX - indent) / (width - indent - 8)) * (right - left);
    const at = xs.reduce((best, each) => (Math.abs(each - x) < Math.abs(best - x) ? each : best));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(at));
    cursor.setAttribute("visibility", "visible");
    name(at);
  };
  svg.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); name(null); };
}

const places = [...document.querySelectorAll("figure[data-chart]")];
const drawAll = () => places.forEach((place) => draw(data.charts[place.dataset.chart], place));
let drawnAt = 0;
new ResizeObserver(() => {
  if (drawnAt !== document.body.clientWidth) { drawnAt = document.body.clientWidth; drawAll(); }
}).observe(document.body);

/* The most probable tokens of the token that is pointed at, tapped or has the focus. */
const panel = document.querySelector(".top");
let chosen = null;
function tell(token) {
  if (!token || token === chosen) return;
  chosen?.classList.remove("on");
  chosen?.setAttribute("tabindex", -1);
  chosen = token;
  token.classList.add("on");
  token.setAttribute("tabindex", 0);
  const [row, number] = token.dataset.at.split(":").map(Number);
  const [text, kl, teacher, student, ...tops] = data.rows[row][number];
  const seen = (piece) => piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "·");
  panel.replaceChildren();
  const head = make(panel, "h3", {});
  make(head, "span", { class: "mono" }, seen(text));
  make(head, "span", { class: "soft" }, `  KL ${figure(kl)} nats`);
  const pair = make(panel, "div", { class: "pair" });
  tops.forEach((top, n) => {
    const side = make(pair, "div", {});
    make(side, "span", { class: "soft" }, `${["teacher", "student"][n]} gives it ${figure([teacher, student][n])}`);
    const list = make(side, "ol", {});
    for (const [piece, prob] of top) {
      const item = make(list, "li", { style: `--p:${Number(prob) || 0}`, class: piece === text ? "right" : "" });
      make(item, "span", {}, seen(piece));
      make(item, "span", {}, typeof prob === "number" ? prob.toFixed(3) : prob);
    }
  });
}
/* Text that scrolls under a pointer at rest is not pointed at. */
let rest = "";
function pointed(event) {
  const here = `${event.screenX},${event.screenY}`;
  if (here !== rest) tell(event.target.closest("b"));
  rest = here;
}
for (const text of document.querySelectorAll(".tokens")) {
  const tokens = [...text.querySelectorAll("b")];
  tokens[0]?.setAttribute("tabindex", 0);
  text.addEventListener("pointermove", pointed);
  for (const kind of ["click", "focusin"])
    text.addEventListener(kind, (event) => tell(event.target.closest("b")));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step && tokens[tokens.indexOf(event.target) + step];
    if (next) { event.preventDefault(); tell(next); next.focus(); }
  });
}
for (const link of document.querySelectorAll("a[data-at]"))
  link.addEventListener("click", () => tell(document.querySelector(`.tokens b[data-at="${link.dataset.at}"]`)));

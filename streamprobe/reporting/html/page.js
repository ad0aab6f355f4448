"use strict";
const data = JSON.parse(document.getElementById("held").textContent);
const levels = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-";
const names = ["solver", "label", "target", "site", "layer", "lag"];
const chooser = document.getElementById("chooser");
const place = (id) => document.getElementById(id);
const probability = (letter) => (letter === "." ? null : (levels.indexOf(letter) / 63) ** 2);
const signed = (lag) => (lag > 0 ? "+" : "") + lag;

// One <select> for each of solver, label, target, layer and lag; names with one value only are not asked for.
const selects = {};
for (const name of names) {
  const values = [...new Set(data.probes.map((probe) => probe[name]))];
  const select = document.createElement("select");
  for (const value of values) select.append(new Option(name === "lag" ? signed(value) : value, value));
  if (data.chosen) select.value = data.chosen[name];
  select.addEventListener("change", paint);
  selects[name] = select;
  if (values.length < 2) continue;
  const label = document.createElement("label");
  label.append(name + " ", select);
  chooser.append(label);
}
const shift = document.createElement("input");
shift.type = "checkbox";
shift.addEventListener("change", paint);
const shiftLabel = document.createElement("label");
shiftLabel.append(shift, " paint the token that is predicted, t + lag");
if (data.chains.length) chooser.append(shiftLabel);

const spans = data.chains.map((chain, number) => {
  const text = place("chain" + number);
  return chain.tokens.map((token) => text.appendChild(Object.assign(document.createElement("span"), { textContent: token })));
});

function chosen() {
  return data.probes.findIndex((probe) => names.every((name) => String(probe[name]) === selects[name].value));
}

// A curve with a dot for each of its points, both axes from 0 to `most`, and a dashed line beside it.
// Returns where what is said of the plot stands; null where the page has no such plot.
function plot(name, points, beside, most) {
  const svg = place(name);
  if (!svg) return null;
  const frame = svg.querySelector(".frame");
  const [left, top, width, height] = ["x", "y", "width", "height"].map((side) => Number(frame.getAttribute(side)));
  const at = ([x, y]) => [left + (width * x) / most, top + height - (height * y) / most];
  const line = (of) => of.map((point) => at(point).map((n) => n.toFixed(1)).join(",")).join(" ");
  svg.querySelector(".curve").setAttribute("points", line(points));
  svg.querySelector(".beside").setAttribute("points", line(beside));
  for (const axis of ["x", "y"])
    svg.querySelectorAll("text." + axis).forEach((tick, i) => { tick.textContent = String(Number(((most * i) / 2).toFixed(4))); });
  svg.querySelector(".dots").replaceChildren(...points.map((point) => {
    const dot = document.createElementNS(svg.namespaceURI, "circle"), [x, y] = at(point);
    for (const [side, n] of [["cx", x], ["cy", y], ["r", points.length > 12 ? 1.6 : 3.2]]) dot.setAttribute(side, n.toFixed(1));
    return dot;
  }));
  return place(name + "-said");
}

// The numbers of one probe: calibration, precision-recall, and what is right and wrong at its threshold.
function measure(number) {
  const probe = data.probes[number], { said = [], share = [], recall = [], precision = [], counts = null } = data.numbers[number];
  const read = probe.site === "resid_post" ? `Layer ${probe.layer}` : `${probe.site} of layer ${probe.layer}`;
  place("named").textContent =
    `${read}, lag ${signed(probe.lag)}, ${probe.label}, target ${probe.target}, solver ${probe.solver}.`;
  const highest = Math.max(0, ...said, ...share);
  const most = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8].find((step) => highest <= step) ?? 1;
  const calibration = plot("calibration", said.map((x, i) => [x, share[i]]), [[0, 0], [most, most]], most);
  if (calibration) calibration.textContent = said.length
    ? "A dot for each tenth of the test tokens, by their probability. Dashed: probabilities that mean what they say."
    : "There are no test tokens to tell.";
  const all = counts ? counts.reduce((a, b) => a + b, 0) : 0, base = all ? (counts[0] + counts[2]) / all : null;
  const curve = plot("recall", recall.map((x, i) => [x, precision[i]]), base === null ? [] : [[0, base], [1, base]], 1);
  if (curve) curve.textContent = recall.length
    ? "The threshold falls from left to right." + (base === null ? "" : ` Dashed: chance, at the base rate of ${base.toFixed(3)}.`)
    : "There is no positive test token.";
  confuse(counts, probe.threshold);
}

function confuse(counts, threshold) {
  const said = place("confusion-said"), percent = (a, b) => (b ? ((100 * a) / b).toFixed(1) + "%" : "none");
  if (!said) return;
  const [tp, fp, fn, tn] = counts ?? [0, 0, 0, 0];
  for (const [id, n, all] of [["tp", tp, tp + fn], ["fn", fn, tp + fn], ["fp", fp, fp + tn], ["tn", tn, fp + tn]]) {
    place(id).textContent = counts ? n.toLocaleString("en") : "";
    place(id + "-rate").textContent = counts ? percent(n, all) : "";
  }
  said.textContent = counts
    ? `Test tokens, and what share of their row. From probability ${threshold?.toFixed(3) ?? "?"} on, which validation chose: ` +
      `precision ${percent(tp, tp + fp)}, recall ${percent(tp, tp + fn)}, F1 ${(tp ? (2 * tp) / (2 * tp + fp + fn) : 0).toFixed(3)}.`
    : "Validation could choose no threshold for this probe.";
}

function paint() {
  const number = chosen(), said = place("said");
  if (number < 0) {
    place("named").textContent = "There is no such probe: not every site is read at every layer, and target within looks ahead only.";
    return;
  }
  measure(number);
  if (!data.chains.length) return;
  const probe = data.probes[number], move = shift.checked ? probe.lag : 0;
  const all = data.chains.flatMap((chain) => [...chain.said[number]].map(probability));
  const most = all.reduce((a, b) => Math.max(a, b ?? 0), 0);
  const threshold = probe.threshold ?? 2;
  said.textContent = `Deepest colour: probability ${most.toFixed(3)}, the highest here.` +
    (probe.threshold === null ? "" : ` Bold: at least ${probe.threshold.toFixed(3)}, the threshold of the validation chains.`);
  data.chains.forEach((chain, c) => {
    const codes = chain.codes[data.labels.indexOf(probe.label)];
    spans[c].forEach((span, t) => {
      const p = probability(chain.said[number][t - move] ?? ".");
      const inside = codes[t] === "1" || codes[t] === "2", next = codes[t + 1];
      span.classList.toggle("in", inside);
      span.classList.toggle("begin", codes[t] === "2");
      span.classList.toggle("end", inside && next !== "1");
      span.classList.toggle("unasked", p === null);
      span.classList.toggle("over", p !== null && p >= threshold);
      const token = chain.first + t;
      span.classList.toggle("picked", token >= chain.at[0] && token <= chain.at[1]);
      span.style.backgroundColor = p === null || !most ? "" : `rgba(var(--paint), calc(var(--depth) * ${Math.sqrt(p / most).toFixed(2)}))`;
      span.title = `token ${token}: ` + (p === null ? "not asked" : `probability ${p.toFixed(3)}`);
    });
  });
  if (shown) show(...shown);
}

// What stands at the foot of the page: one token of a chain, what the probe says there, and of which token.
const meanings = { "-": "without a label", 0: "in no section", 1: "in a section", 2: "the first of a section" };
let shown = null;
function show(c, t) {
  const chain = data.chains[c], number = chosen();
  hide();
  shown = [c, t];
  spans[c][t].classList.add("at");
  if (number < 0) return;
  const probe = data.probes[number], from = shift.checked ? t - probe.lag : t, to = from + probe.lag;
  const p = probability(chain.said[number][from] ?? "."), code = chain.codes[data.labels.indexOf(probe.label)][to];
  const named = (n) => `token ${chain.first + n}` + (n in chain.tokens ? ` “${chain.tokens[n]}”` : "");
  const above = probe.threshold === null ? "" : p >= probe.threshold ? ", above its threshold," : ", below its threshold,";
  place("token").textContent = p === null
    ? `At ${named(from)} the probe is not asked.`
    : `At ${named(from)}: probability ${p.toFixed(3)}${above} for ${named(to)}, which is ${meanings[code] ?? "not in this excerpt"}.`;
}

function hide() {
  for (const span of document.querySelectorAll(".at")) span.classList.remove("at");
  place("token").textContent = "";
  shown = null;
}

// A token is clicked, tapped, or reached from the one before by the arrow keys.
spans.forEach((own, c) => {
  const box = place("chain" + c), start = Math.max(0, data.chains[c].at[0] - data.chains[c].first);
  box.addEventListener("click", (event) => {
    const t = own.indexOf(event.target);
    if (t >= 0) show(c, t);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const now = shown && shown[0] === c ? shown[1] : null;
    const next = { ArrowLeft: now === null ? start : now - 1, ArrowRight: now === null ? start : now + 1, Home: 0, End: own.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(c, Math.max(0, Math.min(own.length - 1, next)));
    const span = own[shown[1]];
    if (span.offsetTop < box.scrollTop || span.offsetTop + span.offsetHeight > box.scrollTop + box.clientHeight)
      box.scrollTop = span.offsetTop - box.clientHeight / 2;
  });
});

// Headings that a link leads to land below the chooser, where it sticks.
function makeRoom() {
  const sticks = getComputedStyle(chooser).position === "sticky";
  document.documentElement.style.setProperty("--chooser", (sticks ? chooser.offsetHeight : 0) + "px");
}
addEventListener("resize", makeRoom);
makeRoom();
if (data.probes.length) paint();
data.chains.forEach((chain, c) => {
  const text = place("chain" + c), span = spans[c][chain.at[0] - chain.first];
  if (span) text.scrollTop = span.offsetTop - text.clientHeight / 2;
});
if (location.hash) place(location.hash.slice(1))?.scrollIntoView();


"use strict";
const data = JSON.parse(document.getElementById("held").textContent);
const levels = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-";
const names = ["solver", "label", "target", "layer", "lag"];
const chooser = document.getElementById("chooser");
const probability = (letter) => (letter === "." ? null : (levels.indexOf(letter) / 63) ** 2);
const signed = (lag) => (lag > 0 ? "+" : "") + lag;

// One <select> for each of solver, label, target, layer and lag; names with one value only are not asked for.
const selects = {};
for (const name of names) {
  const values = [...new Set(data.probes.map((probe) => probe[name]))];
  const select = document.createElement("select");
  for (const value of values) select.append(new Option(name === "lag" ? signed(value) : value, value));
  if (data.reference) select.value = data.reference[name];
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
  const text = document.getElementById("chain" + number);
  return chain.tokens.map((token) => text.appendChild(Object.assign(document.createElement("span"), { textContent: token })));
});

function chosen() {
  return data.probes.findIndex((probe) => names.every((name) => String(probe[name]) === selects[name].value));
}

function paint() {
  const number = chosen(), said = document.getElementById("said");
  if (number < 0) {
    said.textContent = "There is no such probe: target within looks ahead only.";
    return;
  }
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
      const place = chain.first + t;
      span.classList.toggle("picked", place >= chain.at[0] && place <= chain.at[1]);
      span.style.backgroundColor = p === null || !most ? "" : `rgba(var(--paint), calc(var(--depth) * ${Math.sqrt(p / most).toFixed(2)}))`;
      span.title = `token ${place}: ` + (p === null ? "not asked" : `probability ${p.toFixed(3)}`);
    });
  });
}
if (data.chains.length) paint();
data.chains.forEach((chain, c) => {
  const text = document.getElementById("chain" + c), span = spans[c][chain.at[0] - chain.first];
  if (span) text.scrollTop = span.offsetTop - text.clientHeight / 2;
});

// The table: a click on a column's name sorts by it, a second one the other way; numbers first, then text.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[head.cellIndex].textContent;
    const order = (a, b) => {
      const x = parseFloat(a), y = parseFloat(b);
      if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? (down ? b.localeCompare(a) : a.localeCompare(b)) : isNaN(x) ? 1 : -1;
      return down ? y - x : x - y;
    };
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  });
}

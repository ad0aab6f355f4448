"use strict";
const data = JSON.parse(document.getElementById("held").textContent);
const meanings = { "-": "no label", 0: "in no section", 1: "in a section", 2: "the first token of a section" };
const signs = { ".": "·", 0: "○", 1: "●" };
const signed = (lag) => (lag > 0 ? "+" : "") + lag;
const unique = (values) => [...new Set(values)];
const boxes = [...document.querySelectorAll(".fed[data-chain]")].map((box) => ({ box, tokens: [...box.querySelectorAll("b")] }));
const chooser = document.getElementById("chooser"), panel = document.getElementById("token");

// What one column asks: a tick, and a <select> for each of label, target and lag that has several values.
const tick = Object.assign(document.createElement("input"), { type: "checkbox" });
const tickLabel = document.createElement("label");
tickLabel.append(tick, " show what one column asks:");
chooser.append(tickLabel);
tick.addEventListener("change", paint);
const selects = ["label", "target", "lag"].map((name, place) => {
  const select = document.createElement("select"), label = document.createElement("label");
  for (const value of unique(data.columns.map((column) => column[place])))
    select.append(new Option(place === 0 ? data.labels[value] : place === 2 ? signed(value) : value, value));
  select.addEventListener("change", () => { tick.checked = true; paint(); });
  label.append(name + " ", select);
  chooser.append(label);
  return select;
});

function chosen() {
  return data.columns.findIndex((column) => selects.every((select, place) => select.value === String(column[place])));
}

function state(chain, t, k) {
  return data.patterns[data.chains[chain].patterns[t]][data.labels.length + k];
}

function paint() {
  const k = tick.checked ? chosen() : -1, said = document.getElementById("said");
  const counts = { ".": 0, 0: 0, 1: 0 };
  boxes.forEach(({ box, tokens }, chain) => {
    box.classList.toggle("asked", tick.checked);
    tokens.forEach((token, t) => {
      const is = k < 0 ? "." : state(chain, t, k);
      counts[is] += 1;
      token.classList.toggle("no", is === "0");
      token.classList.toggle("yes", is === "1");
      token.classList.remove("ahead");
    });
  });
  said.textContent = !tick.checked ? "" : k < 0 ? "There is no such column: target within looks ahead only." :
    `Of the tokens shown ${counts[1]} are positive, ${counts[0]} negative, ${counts["."]} not asked. ` +
    "Point at a token to see, dashed, the one whose label it must predict.";
}

let at = null;
function show(chain, t) {
  const { tokens } = boxes[chain], { first, length, ids, patterns } = data.chains[chain], pattern = data.patterns[patterns[t]];
  for (const token of document.querySelectorAll(".at, .ahead")) token.classList.remove("at", "ahead");
  at = [chain, t];
  tokens[t].classList.add("at");
  const k = tick.checked ? chosen() : -1;
  if (k >= 0 && tokens[t + data.columns[k][2]]) tokens[t + data.columns[k][2]].classList.add("ahead");
  const head = document.createElement("p"), table = document.createElement("table");
  const labels = data.labels.map((label, c) => `${label}: ${meanings[pattern[c]]}`).join("; ");
  head.textContent = `Token ${first + t} of ${length}, id ${ids[t]}, ${tokens[t].textContent}. ${labels}`;
  const lags = unique(data.columns.map((column) => column[2])).sort((a, b) => a - b);
  const row = (cells, tag) => cells.forEach((cell, i) => {
    if (!i) table.append(document.createElement("tr"));
    table.lastChild.append(Object.assign(document.createElement(i ? tag : "th"), { textContent: cell }));
  });
  row(["asked at lag", ...lags.map(signed)], "th");
  for (const family of unique(data.columns.map((column) => JSON.stringify(column.slice(0, 2))))) {
    const [label, target] = JSON.parse(family);
    const places = lags.map((lag) => data.columns.findIndex((c) => c[0] === label && c[1] === target && c[2] === lag));
    row([`${data.labels[label]}, ${target}`, ...places.map((k) => (k < 0 ? "" : signs[pattern[data.labels.length + k]]))], "td");
  }
  panel.replaceChildren(head, table);
}

// A token is pointed at, or reached from the one before by the arrow keys.
boxes.forEach(({ box, tokens }, chain) => {
  box.addEventListener("mouseover", (event) => {
    if (event.target.tagName === "B") show(chain, tokens.indexOf(event.target));
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = at && at[0] === chain ? at[1] + step : 0;
    show(chain, Math.max(0, Math.min(tokens.length - 1, now)));
    tokens[at[1]].scrollIntoView({ block: "center" });
  });
});

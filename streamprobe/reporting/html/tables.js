// A click on a column's name sorts the table by it, a second one the other way; numbers first, then text.
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

// What is folded away is on paper, too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});

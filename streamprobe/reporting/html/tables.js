// A click on a column's name sorts the table by it, a second one the other way; numbers first, then text.  The names are
// no buttons, which browsers leave out where they print the head of a table again on the next page.
function sortBy(head) {
  const body = head.closest("table").tBodies[0], down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[head.cellIndex].textContent;
  const order = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? (down ? b.localeCompare(a) : a.localeCompare(b)) : isNaN(x) ? 1 : -1;
    return down ? y - x : x - y;
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
}
for (const name of document.querySelectorAll("th [role=button]")) {
  name.addEventListener("click", () => sortBy(name.parentElement));
  name.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sortBy(name.parentElement);
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

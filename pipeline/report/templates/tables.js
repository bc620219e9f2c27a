"use strict";
// Tables with the class "sortable": a button in each head cell sorts the rows by that column. Without this script they
// are plain tables. A cell's data-sort holds the number behind what it shows; missing values stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const missing = (row) => row.cells[column].querySelector(".missing") !== null;
      const rows = [...body.rows].sort((a, b) => {
        if (missing(a) !== missing(b)) return missing(a) ? 1 : -1;
        const [x, y] = [value(a), value(b)];
        const order = x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y, "en", { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
// In print every folded part is open, but for the numbers of curves: the drawing is enough there.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { if (d.closest(".curve") === null) d.open = true; }));

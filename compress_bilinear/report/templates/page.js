"use strict";
const said = document.getElementById("said");
for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = head.classList.contains("number");
    const key = (row) => {
      const cell = row.cells[column];
      return number ? parseFloat(cell.dataset.value) : cell.textContent.trim();
    };
    const keyed = [...body.rows].map((row) => [key(row), row]);
    keyed.sort(([a], [b]) => {
      if (!number) return (down ? -1 : 1) * a.localeCompare(b, "en", {numeric: true});
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what is not known stays below
      return down ? b - a : a - b;
    });
    body.append(...keyed.map(([, row]) => row));
    said.textContent = `Sorted by ${head.textContent.trim()}, ${down ? "descending" : "ascending"}`;
  }));
}

for (const input of document.querySelectorAll("[data-find]")) {
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    let count = 0;
    for (const one of document.querySelectorAll("[data-name]")) {
      one.hidden = !one.dataset.name.toLowerCase().includes(wanted);
      count += !one.hidden && one.tagName === "TR";
    }
    said.textContent = `${count} found`;
  });
}

for (const button of document.querySelectorAll("[data-open]")) {
  button.addEventListener("click", () => {
    for (const one of document.querySelectorAll("details")) one.open = button.dataset.open === "true";
  });
}

const reveal = () => {
  const target = /^#layer-\d+$/.test(location.hash) && document.querySelector(location.hash);
  if (target) {
    target.open = true;
    target.firstElementChild.focus();
    target.scrollIntoView();
  }
};
addEventListener("hashchange", reveal);
reveal();

"use strict";
// Outlines: a checkbox, or its number on the keyboard, switches a layer in every picture of the page.
const toggles = [...document.querySelectorAll("input[data-layer]")];
const main = toggles.filter((box) => box.closest(".controls"));
function show(box) {
  document.body.classList.toggle("hide-" + box.dataset.layer, !box.checked);
}
// A browser that goes back to a page may keep its checkboxes.
toggles.forEach((box) => { box.addEventListener("change", () => show(box)); show(box); });

const size = document.getElementById("size");
if (size) {
  const resize = () => document.documentElement.style.setProperty("--size", size.value + "px");
  size.addEventListener("input", resize);
  // Print has a size of its own.
  window.addEventListener("beforeprint", () => document.documentElement.style.removeProperty("--size"));
  window.addEventListener("afterprint", resize);
}

// A lesion is chosen in a table or in a picture, and is then marked everywhere.
function choose(name, from) {
  document.querySelectorAll(".chosen, .here").forEach((node) => node.classList.remove("chosen", "here"));
  if (!name) return;
  const same = [...document.querySelectorAll("[data-lesion]")].filter((node) => node.dataset.lesion === name);
  same.forEach((node) => node.classList.add("chosen"));
  const section = document.querySelector("#slices");
  const seen = same.filter((node) => node.matches(".line"));
  seen.forEach((node) => node.closest(".picture").classList.toggle("here", section.contains(node)));
  if (from === "table") {
    const first = seen.find((node) => section.contains(node)) || seen[0];
    if (first) first.closest(".picture").scrollIntoView({ block: "center" });
  }
}
document.addEventListener("click", (event) => {
  const place = event.target.closest("[data-lesion]");
  if (!place) return;
  const line = place.matches(".line");
  choose(place.classList.contains("chosen") && line ? "" : place.dataset.lesion, line ? "picture" : "table");
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=range]")) return;
  if (event.key === "Escape") choose("");
  const number = Number(event.key);
  if (event.key === " " || !Number.isInteger(number)) return;
  const chosen = number === 0 ? main : main.slice(number - 1, number);
  const on = number === 0 ? main.some((box) => !box.checked) : null;
  chosen.forEach((box) => { box.checked = on === null ? !box.checked : on; show(box); });
});

// Tables: the head of a column sorts by it, and once more turns the order around.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    if ("fixed" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.setAttribute("aria-label", "Sort by " + head.textContent);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      // Numbers begin with the largest, words with the first.
      const before = head.getAttribute("aria-sort");
      const up = before === "none" ? !numeric : before === "descending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => { const value = parseFloat(text(row)); return Number.isNaN(value) ? -Infinity : value; };
      const compare = numeric ? (a, b) => number(a) - number(b) : (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true });
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
    });
  });
}

// Tables: sorted by a column, filtered; of many rows only those in view are in the page.
const data = JSON.parse(document.getElementById("data").textContent);
const MOST_ROWS = 60, MARGIN = 20; // above and below those in view
const tables = [...document.querySelectorAll("table.sortable")].map(readTable);
let picked = null;

function readTable(element) {
  const rows = [...element.tBodies[0].rows];
  const table = { element, rows, shown: rows, box: element.closest(".tall"), height: 0 };
  if (rows.length > MOST_ROWS && table.box) {
    [...element.tHead.rows[0].cells].forEach((cell) => { cell.style.minWidth = `${cell.offsetWidth}px`; });
    table.height = rows[0].offsetHeight || 30;
    table.box.addEventListener("scroll", () => requestAnimationFrame(() => show(table)));
    const details = element.closest("details");
    if (details) details.addEventListener("toggle", () => show(table));
  }
  [...element.tHead.rows[0].cells].forEach((cell, column) => {
    cell.tabIndex = 0;
    cell.addEventListener("click", (event) => event.target.closest("a") || sort(table, cell, column));
    cell.addEventListener("keydown", (event) => event.key === "Enter" && sort(table, cell, column));
  });
  return table;
}

function show(table) {
  const { element, shown, box, height } = table, body = element.tBodies[0];
  if (!height || shown.length <= MOST_ROWS) return body.replaceChildren(...shown);
  const first = Math.max(0, Math.floor(box.scrollTop / height) - MARGIN);
  const last = first + Math.ceil((box.clientHeight || 480) / height) + 2 * MARGIN;
  const columns = element.tHead.rows[0].cells.length;
  body.replaceChildren(gap(first * height, columns), ...shown.slice(first, last),
    gap(Math.max(0, shown.length - last) * height, columns));
}

function gap(height, columns) {
  const row = document.createElement("tr"), cell = row.insertCell();
  row.className = "gap";
  cell.colSpan = columns;
  cell.style.height = `${height}px`;
  return row;
}

function value(row, column) {
  const text = row.cells[column].textContent.trim().replace(/^<\s*/, "").replaceAll(",", "");
  const number = Number.parseFloat(text);
  return Number.isNaN(number) ? text : number;
}

function compare(one, other, way) {
  if (one === "" || other === "") return (one === "") - (other === ""); // blanks last
  if (typeof one !== typeof other) return typeof one === "number" ? -1 : 1;
  return way * (one < other ? -1 : one > other ? 1 : 0);
}

function sort(table, cell, column) {
  const way = cell.getAttribute("aria-sort") === "descending" ? 1 : -1;
  table.element.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  cell.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
  const hasRuns = table.rows.some((row) => row.dataset.run);
  const place = (row) => (hasRuns && !row.dataset.run ? 0 : 1); // the base stays on top
  const order = (a, b) => place(a) - place(b) || compare(value(a, column), value(b, column), way);
  table.rows.sort(order);
  table.shown = [...table.shown].sort(order);
  showTop(table);
}

function filter(table, text) {
  const words = text.toLowerCase().split(/\s+/);
  table.shown = table.rows.filter((row) => {
    const content = `${row.dataset.run || ""} ${row.textContent}`.toLowerCase();
    return words.every((word) => content.includes(word));
  });
  showTop(table);
}

function showTop(table) {
  if (table.box) table.box.scrollTop = 0;
  show(table);
}

function markRows(run) {
  tables.forEach((table) => {
    table.rows.forEach((row) => row.classList.toggle("picked", !!run && row.dataset.run === run));
    const place = table.shown.findIndex((row) => row.dataset.run === run);
    if (!run || place < 0 || !table.height) return;
    const top = place * table.height, { scrollTop, clientHeight } = table.box;
    if (top < scrollTop || top > scrollTop + clientHeight - 2 * table.height) {
      table.box.scrollTop = Math.max(0, top - clientHeight / 2);
      show(table);
    }
  });
}

tables.forEach(show);
document.querySelectorAll(".filter").forEach((field) => {
  const table = tables.find(({ element }) => field.nextElementSibling.contains(element));
  field.addEventListener("input", () => filter(table, field.value));
});
tables.forEach((table) => table.rows.forEach((row) => row.addEventListener("click", (event) => {
  if (row.dataset.run && !event.target.closest("a")) pick(row.dataset.run === picked ? null : row.dataset.run);
})));

// Charts, and the tables beside them: a run that is clicked in one is found in all.
const specs = JSON.parse(document.getElementById("specs").textContent);
const places = [...document.querySelectorAll(".chart")];
const dark = matchMedia("(prefers-color-scheme: dark)");
let views = [];
let picked = null;

function config() {
  const ink = dark.matches ? "#ddd" : "#222", grid = dark.matches ? "#444" : "#e4e4e4";
  const words = { labelColor: ink, titleColor: ink };
  return {
    background: null, font: "system-ui, sans-serif", view: { stroke: null },
    axis: { ...words, gridColor: grid, domainColor: grid, tickColor: grid },
    legend: words, header: words, title: { color: ink },
  };
}

async function draw() {
  views.forEach((view) => view.finalize());
  views = await Promise.all(places.map(async (place, n) => {
    const options = { actions: false, renderer: "svg", config: config() };
    const { view } = await vegaEmbed(place, specs[n], options);
    view.addEventListener("click", (event, item) => pick(item && item.datum && item.datum.run));
    return view;
  }));
  pick(picked);
}

function pick(run) {
  picked = run || null;
  views.forEach((view) => view.signal("picked", picked).runAsync());
  document.querySelectorAll("[data-run]").forEach((row) =>
    row.classList.toggle("picked", row.dataset.run === picked));
}

function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = Number.parseFloat(text);
  return Number.isNaN(number) ? text : number;
}

function compare(one, other) {
  if (typeof one !== typeof other) return typeof one === "number" ? 1 : -1;
  return one < other ? -1 : one > other ? 1 : 0;
}

function sort(table, column, up) {
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => (up ? 1 : -1) * compare(value(a, column), value(b, column)));
  table.tBodies[0].append(...rows);
}

document.querySelectorAll(".sortable").forEach((table) =>
  [...table.tHead.rows[0].cells].forEach((cell, column) => cell.addEventListener("click", () => {
    const up = cell.getAttribute("aria-sort") === "descending";
    table.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    sort(table, column, up);
  })));
document.querySelectorAll(".filter").forEach((field) => field.addEventListener("input", () => {
  const wanted = field.value.toLowerCase().split(/\s+/);
  field.nextElementSibling.querySelectorAll("tbody tr").forEach((row) => {
    const text = `${row.dataset.run || ""} ${row.textContent}`.toLowerCase();
    row.classList.toggle("hidden", !wanted.every((word) => text.includes(word)));
  });
}));
document.querySelectorAll("[data-run]").forEach((row) => row.addEventListener("click", () =>
  pick(row.dataset.run === picked ? null : row.dataset.run)));
dark.addEventListener("change", draw);
window.drawn = draw();

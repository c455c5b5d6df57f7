// Charts, and the tables beside them: a run that is clicked in one is found in all.
const places = [...document.querySelectorAll(".chart")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const bar = document.getElementById("picked");
let views = [];

function config() {
  const ink = dark.matches ? "#ddd" : "#222", grid = dark.matches ? "#444" : "#e4e4e4";
  const words = { labelColor: ink, titleColor: ink };
  return {
    background: null, font: "system-ui, sans-serif", view: { stroke: null },
    axis: { ...words, gridColor: grid, domainColor: grid, tickColor: grid },
    legend: words, header: words, title: { color: ink }, text: { color: ink },
  };
}

// The palette's two blues: the darker one is hard to see on a dark page.
function inColour(spec) {
  const other = { "#0072B2": "#56B4E9", "#56B4E9": "#0072B2" };
  return dark.matches ? JSON.parse(JSON.stringify(spec).replace(/#0072B2|#56B4E9/g, (one) => other[one])) : spec;
}

async function draw() {
  views.forEach((view) => view.finalize());
  views = await Promise.all(places.map(async (place) => {
    const options = { actions: false, renderer: "svg", config: config(), tooltip: { theme: dark.matches ? "dark" : "light" } };
    const { view } = await vegaEmbed(place, inColour(data.specs[place.dataset.chart]), options);
    view.addEventListener("click", (event, item) => pick(item && item.datum && item.datum.run));
    return view;
  }));
  pick(picked);
}

function pick(run) {
  picked = run || null;
  views.forEach((view) => view.signal("picked", picked).runAsync());
  markRows(picked);
  bar.hidden = !picked;
  if (!picked) return;
  const clear = document.createElement("button");
  clear.textContent = "clear";
  clear.addEventListener("click", () => pick(null));
  bar.replaceChildren(`${picked} `, clear);
}

dark.addEventListener("change", draw);
window.drawn = draw();

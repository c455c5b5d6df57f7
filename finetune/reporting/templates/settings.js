// Settings that differ between the two runs that are picked.
const choices = ["one", "other"].map((name) => document.getElementById(name));

function compareSettings() {
  const [one, other] = choices.map((choice) => Number(choice.value));
  const { runs, keys } = data.settings, table = document.getElementById("differing");
  [one, other].forEach((run, n) => { table.tHead.rows[0].cells[n + 1].textContent = runs[run]; });
  const rows = Object.entries(keys).filter(([, { of }]) => of[one] !== of[other]).map(
    ([key, { values, of }]) => cells(key, values[of[one]], values[of[other]]));
  table.tBodies[0].replaceChildren(...(rows.length ? rows : [cells("no setting differs", "", "")]));
}

function cells(...texts) {
  const row = document.createElement("tr");
  texts.forEach((text) => { row.insertCell().textContent = text; });
  return row;
}

if (choices[0]) {
  choices.forEach((choice, n) => {
    choice.append(...data.settings.runs.map((label, run) => new Option(label, run)));
    choice.value = n ? data.settings.first.find((run) => run !== data.settings.first[0]) : data.settings.first[0];
    choice.addEventListener("change", compareSettings);
  });
  compareSettings();
}

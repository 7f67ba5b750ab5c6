"use strict";
// Whatever comes from the data is set as text, never as markup.

const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line") };
  const tip = { bgcolor: of("--raised"), bordercolor: of("--line"), font: { color: of("--text") } };
  return { ground: of("--ground"), text: of("--text"), axis, tip };
}

function dressed(layout) {
  const { ground, text, axis, tip } = colours();
  return {
    ...layout,
    autosize: true,
    paper_bgcolor: ground,
    plot_bgcolor: ground,
    font: { color: text, family: "system-ui, sans-serif", size: 12 },
    hoverlabel: tip,
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

function draw() {
  for (const plot of plots) {
    const figure = plot.figure;
    Plotly.react(plot, figure.data, dressed(figure.layout), {
      responsive: true,
      displayModeBar: false,
    });
  }
}

for (const plot of plots) {
  const data = plot.querySelector("script");
  plot.figure = JSON.parse(data.textContent);
  data.remove();
}
draw();
dark.addEventListener("change", draw);

// A legend speaks of the plots beside it: of its figure, or of its section.
const plotsOf = (legend) => legend.parentElement.querySelectorAll(".plot");
const legendsOf = (plot) =>
  [plot.closest("figure"), plot.closest("section")].flatMap((place) => [...place.querySelectorAll(":scope > .legend")]);

// Lines whose entry is not pressed are hidden; those of an entry that is pointed at stand out.
function restyle(plot, pointed) {
  const off = legendsOf(plot).flatMap((legend) => [...legend.querySelectorAll('[aria-pressed="false"]')]);
  const hidden = new Set(off.map((entry) => entry.dataset.mark));
  const shown = plot.data.map((line) => !line.meta?.some((mark) => hidden.has(mark)));
  if (shown.some((seen, n) => seen !== (plot.data[n].visible ?? true))) Plotly.restyle(plot, { visible: shown });
  const strength = plot.data.map((line) => (!pointed || line.meta?.includes(pointed) ? 1 : 0.12));
  Plotly.restyle(plot, { opacity: strength });
}

for (const legend of document.querySelectorAll(".legend")) {
  const all = (pointed) => plotsOf(legend).forEach((plot) => restyle(plot, pointed));
  for (const entry of legend.children) {
    entry.addEventListener("click", () => {
      entry.setAttribute("aria-pressed", entry.getAttribute("aria-pressed") === "false");
      all();
    });
    for (const begins of ["mouseenter", "focus"]) entry.addEventListener(begins, () => all(entry.dataset.mark));
    for (const ends of ["mouseleave", "blur"]) entry.addEventListener(ends, () => all());
  }
}

const tip = document.getElementById("tip");

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
const percent = (share) => (100 * share).toFixed(1) + " %";

function show(token) {
  const told = JSON.parse(token.dataset.token);
  const gates = Object.entries(told.weights).map(([name, weight]) => `${name} ${weight.toFixed(3)}`);
  const table = element("table", "", element("caption", visible(told.text)));
  table.append(element("tr", "", element("td", "student"), element("td", ""), element("td", "teacher"), element("td", "")));
  told.student.forEach(([text, share], place) => {
    const [other, theirs] = told.teacher[place];
    table.append(
      element("tr", "", element("td", visible(text)), element("td", percent(share)),
        element("td", visible(other)), element("td", percent(theirs))),
    );
  });
  const weight = `weight ${told.weight.toFixed(3)}` + (gates.length > 1 ? `: ${gates.join(" × ")}` : "");
  tip.replaceChildren(table, element("div", weight));
  tip.hidden = false;
  const at = token.getClientRects()[0];
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - width - 8)) + "px";
  tip.style.top = (at.bottom + height + 12 < innerHeight ? at.bottom + 6 : Math.max(8, at.top - height - 6)) + "px";
}

function hide() {
  tip.hidden = true;
}

for (const [begins, ends] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  document.addEventListener(begins, (event) => {
    const token = event.target.closest?.(".token");
    if (token) show(token);
  });
  document.addEventListener(ends, hide);
}
addEventListener("scroll", hide, { passive: true });

// All rounds stand below each other where scripts do not run; here one is shown at a time.
for (const replay of document.querySelectorAll(".replay")) {
  const rounds = [...replay.querySelectorAll(".round")];
  const steps = replay.querySelector(".steps");
  const choose = (place) => {
    rounds.forEach((round, n) => (round.hidden = n !== place));
    steps.querySelector("output").textContent = `${place + 1} of ${rounds.length}`;
  };
  const range = steps.querySelector("input");
  range.addEventListener("input", () => choose(Number(range.value) - 1));
  steps.hidden = rounds.length < 2;
  if (rounds.length) choose(0);
}

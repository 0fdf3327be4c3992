"use strict";
// The studio's page. Text from the run enters the document only as text nodes.

const $ = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en-US");
const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");
const short = (x) => (x === null ? "–" : Number.isInteger(x) ? count(x) : Number(x.toPrecision(4)).toString());

// Makes an element. An attribute on… is a listener; true sets an empty attribute, false and null leave it out.
function make(tag, attributes = {}, ...children) {
  const made = tag === "svg" || tag === "path" || tag === "line" ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const foreign = (text) => make("bdi", { dir: "auto" }, text);

async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const data = answer.headers.get("Content-Type").startsWith("application/json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(data.error);
  return data;
}

function say(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
}

// Runs one request of a kind at a time; of the calls during a request, only the last is run.
function latest(run) {
  let busy = false, again = false;
  return async function go() {
    if (busy) { again = true; return; }
    busy = true;
    try { await run(); say(null); } catch (error) { say(error); }
    busy = false;
    if (again) { again = false; go(); }
  };
}

let about = null;
const state = { cuts: [], view: { text: "", language: "", host: "", concept: "" }, show: "sample", text: "", like: null };
const marked = new Map(); // labels set on this page, by row; answers to earlier requests lack them
const cards = new Map(); // by the number of a cut, or by the name of a score without a cut

const score = (name) => about.scores.find((one) => one.name === name);
const plain = () => state.cuts.filter(usable).map(({ column, min, top_fraction }) => ({ column, min, top_fraction }));
const usable = (cut) => (cut.top_fraction === null ? Number.isFinite(cut.min) : cut.top_fraction > 0 && cut.top_fraction <= 1);
const question = (more) => ({ cuts: plain(), view: state.view, ...more });

function places(of) { // decimals of the step of a slider with about 1,000 steps
  return Math.max(0, Math.ceil(-Math.log10((of.high - of.low) / 1000)));
}

// --- Curves ---------------------------------------------------------------------------------------------------------

function bars(counts, top, from, to) {
  let path = "";
  for (let i = from; i < to; i++) if (counts[i]) path += `M${i} 40v${(-40 * counts[i]) / top}h1V40z`;
  return path;
}

function card(name, cut, number) {
  const of = score(name), step = 10 ** -places(of);
  const paths = ["all", "below", "above"].map((kind) => make("path", { class: kind }));
  const picture = make("svg", { viewBox: "0 0 80 40", preserveAspectRatio: "none", "aria-hidden": "true" }, ...paths, make("line", { class: "base", x1: 0, x2: 80, y1: 40, y2: 40 }));
  const curve = make("div", { class: "curve" }, picture);
  const said = make("p", { class: "note" });
  const knobs = make("div", { class: "knobs" });
  const made = { name, cut, paths, said };
  const title = make("h3", {}, name);
  if (cut) {
    made.slider = make("input", { type: "range", min: of.low, max: of.high, step, "aria-label": `Lowest ${name} kept`, oninput: (event) => {
      Object.assign(cut, { min: Number(Number(event.target.value).toFixed(places(of))), top_fraction: null });
      moved();
    } });
    made.mode = make("select", { "aria-label": `How ${name} is cut`, onchange: (event) => {
      const at = made.at ?? of.low;
      Object.assign(cut, event.target.value === "min" ? { min: at, top_fraction: null } : { min: null, top_fraction: Math.max(0.001, Number((made.part ?? 1).toFixed(3))) });
      moved();
    } }, make("option", { value: "min" }, "at least"), make("option", { value: "top_fraction" }, "top fraction"));
    made.number = make("input", { type: "number", step: "any", "aria-label": `Cut of ${name}`, oninput: (event) => {
      const value = event.target.value === "" ? NaN : Number(event.target.value);
      cut[cut.top_fraction === null ? "min" : "top_fraction"] = value;
      event.target.setCustomValidity(usable(cut) ? "" : "A number; a fraction is above 0 and at most 1.");
      event.target.reportValidity();
      moved(event.target);
    } });
    curve.append(made.slider);
    knobs.append(made.mode, made.number,
      make("button", { type: "button", onclick: () => show(number) }, "Both sides"),
      make("button", { type: "button", onclick: () => { state.cuts.splice(number, 1); state.show = "sample"; redraw(); }, "aria-label": `Remove the cut of ${name}` }, "Remove"));
  } else {
    knobs.append(make("button", { type: "button", onclick: () => { state.cuts.push({ column: name, min: of.low, top_fraction: null }); redraw(); }, "aria-label": `Cut ${name}` }, "Add a cut"));
  }
  const ends = make("div", { class: "ends" }, make("span", {}, short(of.low)), make("span", {}, short(of.high)));
  made.element = make("section", { class: "score card", "aria-label": name }, title, curve, ends, knobs, said);
  return made;
}

function fill(made, data, result) {
  const { all, kept } = data, top = Math.max(1, ...all), of = score(made.name);
  let edge = 0;
  if (made.cut) {
    made.at = result?.at ?? null;
    edge = made.at === null ? 80 : Math.min(80, Math.max(0, (80 * (made.at - of.low)) / (of.high - of.low)));
    made.mode.value = made.cut.top_fraction === null ? "min" : "top_fraction";
    if (made.at !== null && document.activeElement !== made.slider) made.slider.value = made.at;
    if (document.activeElement !== made.number) made.number.value = made.cut.top_fraction ?? made.cut.min;
    made.slider.setAttribute("aria-valuetext", `${short(made.at)}, keeps ${count(result?.after ?? 0)} rows`);
    const before = result.before;
    made.part = before ? result.after / before : 1;
    made.said.textContent = `${made.cut.top_fraction === null ? "" : `Cut at ${short(made.at)}. `}Keeps ${count(result.after)} of ${count(before)}; ${count(result.alone)} are dropped by this cut alone.`;
  } else {
    made.said.textContent = of.present < about.rows ? `${count(about.rows - of.present)} rows have no value.` : "";
  }
  const whole = Math.round(edge);
  made.paths[0].setAttribute("d", bars(all, top, 0, 80));
  made.paths[1].setAttribute("d", bars(kept, top, 0, whole));
  made.paths[2].setAttribute("d", bars(kept, top, whole, 80));
}

// --- Counts ---------------------------------------------------------------------------------------------------------

const recount = latest(async () => {
  const asked = state.cuts.filter(usable);
  const drawn = [...cards.values()].filter((one) => one.cut || $("more").open).map((one) => one.name);
  const data = await ask("summary", question({ columns: [...new Set(drawn)] }));
  $("kept").replaceChildren("Kept ", make("b", {}, count(data.kept)), ` of ${count(data.rows)} (${share(data.kept, data.rows)})`);
  $("seen").textContent = data.seen === data.rows ? "" : `In view: ${count(data.seen_kept)} of ${count(data.seen)} (${share(data.seen_kept, data.seen)})`;
  data.cuts.forEach((one, i) => { one.before = i ? data.cuts[i - 1].after : data.rows; });
  for (const made of cards.values()) {
    const result = made.cut ? data.cuts[asked.indexOf(made.cut)] : null;
    if (data.columns[made.name] && (!made.cut || result)) fill(made, data.columns[made.name], result);
  }
  const tables = [["languages", "Language", "language"], ["hosts", "Host", "host"], ["concepts", "Concept", "concept"]];
  $("tables").replaceChildren(...tables.filter(([key]) => data[key].length).map(([key, title, field]) => table(title, field, data[key])));
  for (const [key] of tables) $(key).replaceChildren(...data[key].map((one) => make("option", { value: one.name })));
});

function table(title, field, rows) {
  const head = make("tr", {}, ...[title, "In view", "Kept", "Share"].map((name, i) => make("th", { scope: "col", class: i ? "number" : null }, name)));
  const body = rows.map((one) => make("tr", {},
    make("td", {}, make("button", { type: "button", class: "link", onclick: () => { $("view").elements[field].value = one.name; look(); } }, foreign(one.name))),
    make("td", { class: "number" }, count(one.seen)), make("td", { class: "number" }, count(one.kept)), make("td", { class: "number" }, share(one.kept, one.seen))));
  return make("div", {}, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

// --- Rows -----------------------------------------------------------------------------------------------------------

const TITLES = { kept: "Kept", dropped: "Dropped", above: "Just above the cut", below: "Just below the cut", found: "Nearest first" };

const refill = latest(async () => {
  const which = typeof state.show === "number" ? state.cuts.slice(0, state.show).filter(usable).length : state.show;
  const groups = await ask("tiles", question({ show: which, text: state.text, like: state.like }));
  $("groups").replaceChildren(...Object.entries(groups).map(([name, tiles]) => make("div", {},
    make("h3", {}, `${TITLES[name]}${tiles.length ? "" : ": no rows"}`),
    make("ul", { class: "tiles", "data-group": name, "aria-label": TITLES[name] }, ...tiles.map(tile)))));
});

function tile(row) {
  const picture = make("img", { src: `picture/${row.id}`, alt: "", loading: "lazy", decoding: "async" });
  picture.addEventListener("error", () => picture.replaceWith(make("div", { class: "missing", role: "img", "aria-label": "no picture" })));
  const about_it = row.caption.slice(0, 60);
  if (marked.has(row.id)) row.label = marked.get(row.id);
  const mark = (value, word) => make("button", { type: "button", "data-label": value, "aria-pressed": String(row.label === value), "aria-label": `${word}: ${about_it}`, onclick: async () => {
    const label = row.label === value ? null : value;
    try {
      about.labels = (await ask("label", { id: row.id, label })).labels;
      row.label = label;
      marked.set(row.id, label);
      for (const button of document.querySelectorAll(`[data-id="${row.id}"] [data-label]`)) button.setAttribute("aria-pressed", String(label === Number(button.dataset.label)));
      say(null);
    } catch (error) { say(error); }
  } }, word);
  const scores = [...new Set(state.cuts.map((cut) => cut.column))].map((name) => `${name} ${short(row.scores[name])}`);
  return make("li", { "data-id": row.id },
    about.has_pictures ? picture : null,
    make("p", { class: "caption", title: row.url, tabindex: 0 }, foreign(row.caption)),
    ...scores.map((line) => make("p", { class: "note" }, line)),
    row.dropped_by.length ? make("p", { class: "out" }, `dropped by ${row.dropped_by.join(", ")}`) : null,
    make("div", { class: "marks" }, mark(1, "Good"), mark(0, "Bad"),
      about.search.picture ? make("button", { type: "button", "aria-label": `Similar to: ${about_it}`, onclick: () => { Object.assign(state, { text: "", like: row.id }); show("search"); } }, "Similar") : null));
}

function show(what) {
  state.show = what;
  tabs();
  refill();
}

function tabs() {
  const all = [["sample", "Kept and dropped"], ...state.cuts.map((cut, i) => [i, `Both sides of ${cut.column}`])];
  if (state.text || state.like !== null) all.push(["search", state.text ? `Search: ${state.text.slice(0, 40)}` : "Similar pictures"]);
  $("tabs").replaceChildren(...all.map(([what, name]) => make("button", { type: "button", "aria-pressed": String(state.show === what), onclick: () => show(what) }, name)));
}

// --- What the user does --------------------------------------------------------------------------------------------

let due = 0;
function moved() {
  recount();
  clearTimeout(due);
  due = setTimeout(refill, 200);
}

function look() {
  for (const name of Object.keys(state.view)) state.view[name] = $("view").elements[name].value;
  moved();
}

function redraw() {
  cards.clear();
  state.cuts.forEach((cut, i) => cards.set(i, card(cut.column, cut, i)));
  const cut = new Set(state.cuts.map((one) => one.column));
  for (const one of about.scores) if (!cut.has(one.name)) cards.set(one.name, card(one.name, null, null));
  $("cuts").replaceChildren(...[...cards.values()].filter((one) => one.cut).map((one) => one.element));
  $("others").replaceChildren(...[...cards.values()].filter((one) => !one.cut).map((one) => one.element));
  tabs();
  moved();
}

async function open_export() {
  try {
    const data = await ask("export", question({}));
    $("exported-after").textContent = data.after;
    $("later").textContent = about.later.length ? ` The steps after them decide as before: ${about.later.join(", ")}.` : "";
    $("lines").value = data.lines;
    $("recipe").value = data.recipe;
    $("download").href = URL.createObjectURL(new Blob([data.recipe], { type: "text/yaml" }));
    $("labelled").textContent = about.labels ? `${count(about.labels)} labelled rows are in ${about.labels_path}: winnow learn RUN --labels ${about.labels_path}` : "";
    $("exported").showModal();
    say(null);
  } catch (error) { say(error); }
}

async function begin() {
  about = await ask("start");
  $("where").textContent = about.path;
  $("about").textContent = `${count(about.rows)} rows that survived ${about.after}.`;
  $("by-language").hidden = !about.has_languages;
  $("by-concept").hidden = !about.has_concepts;
  $("search").hidden = !about.search.text;
  $("search-note").textContent = about.search.why;
  const reset = () => { state.cuts = about.cuts.map((cut) => ({ ...cut })); state.show = "sample"; redraw(); };
  $("reset").addEventListener("click", reset);
  $("export").addEventListener("click", open_export);
  $("close").addEventListener("click", () => $("exported").close());
  $("copy").addEventListener("click", () => { $("lines").select(); navigator.clipboard?.writeText($("lines").value); });
  $("view").addEventListener("submit", (event) => event.preventDefault());
  let typed = 0;
  $("view").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(look, 250); });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    Object.assign(state, { text: event.target.elements.query.value.trim(), like: null });
    if (state.text) show("search");
  });
  $("more").open = matchMedia("(min-width: 1000px)").matches; // on a phone they would hide the rows
  $("more").addEventListener("toggle", recount);
  reset();
}

begin().catch(say);

"use strict";

const PAGE = 48; // cards at a time; thousands would take seconds
const WORST = 4; // cards of each scorer under worst regressions
const MARKS = { win: "▲", tie: "=", loss: "▼" };

const data = JSON.parse(document.getElementById("data").textContent);
const scorers = Object.keys(data.scorers);
const state = { comparison: 0, scorer: "", descending: false, words: "", shown: PAGE };
const find = (id) => document.getElementById(id);

/** Make an element. Children that are strings become text, never HTML. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function difference(scorer, number) {
  const { model, against } = data.comparisons[state.comparison];
  return data.scores[scorer][model][number] - data.scores[scorer][against][number];
}

function outcome(scorer, number) {
  const value = difference(scorer, number);
  if (Math.abs(value) <= data.scorers[scorer].tie_tolerance) return "tie";
  return value > 0 ? "win" : "loss";
}

/** Sort numbers of prompts by the difference in a scorer, ties by number; without a scorer by number. */
function sorted(numbers, scorer, descending) {
  const value = (number) => (scorer ? difference(scorer, number) : number);
  const sign = descending ? -1 : 1;
  return [...numbers].sort((a, b) => sign * (value(a) - value(b)) || a - b);
}

function fixed(value, scorer, signed) {
  const text = Math.abs(value).toFixed(data.scorers[scorer].decimals);
  const sign = Number(text) === 0 ? "" : value < 0 ? "−" : signed ? "+" : "";
  return sign + text;
}

function picture(model, number) {
  const image = element("img", {
    src: `data:image/webp;base64,${data.images[model][number]}`,
    alt: `${model}: ${data.prompts[number].prompt}`,
    decoding: "async",
  });
  const file = `${String(number).padStart(5, "0")}.png`;
  const href = `images/${encodeURIComponent(model)}/${file}`;
  const link = element("a", { href, target: "_blank", rel: "noopener", title: "full size" }, image);
  return element("figure", {}, link, element("figcaption", {}, model));
}

/** Texts of a scorer for the pictures of a prompt: score before, score after, marked difference. */
function scoreTexts(scorer, number) {
  const { model, against } = data.comparisons[state.comparison];
  const [before, after] = [against, model].map((name) => fixed(data.scores[scorer][name][number], scorer));
  return [before, after, `${MARKS[outcome(scorer, number)]} ${fixed(difference(scorer, number), scorer, true)}`];
}

function scoreRow(scorer, number) {
  const [before, after, marked] = scoreTexts(scorer, number);
  const kind = outcome(scorer, number);
  return element(
    "tr",
    { class: kind + (scorer === state.scorer ? " chosen" : "") },
    element("th", { scope: "row" }, scorer),
    element("td", {}, before),
    element("td", {}, after),
    element("td", { class: "mark", title: kind }, marked),
  );
}

/** One scorer's scores in a line, under the pictures that name the models. */
function scoreLine(scorer, number) {
  const [before, after, marked] = scoreTexts(scorer, number);
  const kind = outcome(scorer, number);
  const mark = element("strong", { class: "mark", title: kind }, marked);
  return element("p", { class: `line ${kind}` }, element("span", {}, `${before} → ${after}`), mark);
}

function scoreTable(number) {
  const { model, against } = data.comparisons[state.comparison];
  const names = ["", against, model, "difference"].map((name) => element("th", { scope: "col" }, name));
  const rows = scorers.map((scorer) => scoreRow(scorer, number));
  return element("table", {}, element("thead", {}, element("tr", {}, ...names)), element("tbody", {}, ...rows));
}

/** Both pictures of a prompt above an element with their scores. */
function card(number, scores) {
  const { model, against } = data.comparisons[state.comparison];
  const { prompt, seed } = data.prompts[number];
  return element(
    "article",
    { class: "card", "data-number": number },
    element("div", { class: "pair" }, picture(against, number), picture(model, number)),
    element("p", { class: "prompt", title: `prompt ${number}, seed ${seed}`, dir: "auto" }, prompt),
    scores,
  );
}

function regressions(scorer) {
  const all = data.prompts.map((_, number) => number);
  const lost = sorted(all.filter((number) => outcome(scorer, number) === "loss"), scorer, false);
  const title = element("h3", {}, `${scorer} `, element("small", {}, `${lost.length} of ${all.length} prompts lost`));
  if (!lost.length) return element("div", { class: "scorer" }, title);
  const button = element("button", { type: "button", "data-scorer": scorer }, "See all, worst first");
  button.addEventListener("click", () => {
    find("filter").value = "";
    choose({ scorer, descending: false, words: "" });
    find("pictures").scrollIntoView();
  });
  const cards = lost.slice(0, WORST).map((number) => card(number, scoreLine(scorer, number)));
  const line = element("div", { class: "line" }, title, button);
  return element("div", { class: "scorer" }, line, element("div", { class: "cards few" }, ...cards));
}

function showRegressions() {
  find("worst").replaceChildren(...scorers.map(regressions));
}

function showCards() {
  const words = state.words.trim().toLowerCase();
  const all = data.prompts.map((_, number) => number);
  const wanted = all.filter((number) => data.prompts[number].prompt.toLowerCase().includes(words));
  const shown = sorted(wanted, state.scorer, state.descending).slice(0, state.shown);
  find("cards").replaceChildren(...shown.map((number) => card(number, scoreTable(number))));
  find("count").textContent = `${shown.length} of ${all.length} prompts`;
  find("more").hidden = find("all").hidden = shown.length === wanted.length;
  find("sort").value = state.scorer;
  find("direction").textContent = state.descending ? "↓ descending" : "↑ ascending";
}

/** Change the order or the choice of cards, and show the first page of it. */
function choose(changes) {
  Object.assign(state, { shown: PAGE }, changes);
  showCards();
}

function compare(comparison) {
  for (const section of document.querySelectorAll(".summary")) {
    section.hidden = section.id !== `comparison-${comparison}`;
  }
  find("comparison").value = comparison;
  state.comparison = comparison;
  showRegressions();
  choose({});
}

find("sort").append(...scorers.map((scorer) => element("option", { value: scorer }, `difference in ${scorer}`)));
find("comparison").append(
  ...data.comparisons.map(({ model, against }, number) => element("option", { value: number }, `${model} against ${against}`)),
);
find("sort").addEventListener("change", (event) => choose({ scorer: event.target.value }));
find("direction").addEventListener("click", () => choose({ descending: !state.descending }));
find("worst-first").addEventListener("click", () => choose({ scorer: state.scorer || scorers[0], descending: false }));
find("filter").addEventListener("input", (event) => choose({ words: event.target.value }));
find("more").addEventListener("click", () => choose({ shown: state.shown + PAGE }));
find("all").addEventListener("click", () => choose({ shown: data.prompts.length }));
find("comparison").addEventListener("change", (event) => compare(Number(event.target.value)));
document.body.classList.toggle("small", data.small);
find("chooser").hidden = data.comparisons.length < 2;
find("regressions").hidden = find("pictures").hidden = false;
compare(0);

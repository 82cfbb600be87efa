"use strict";
// The page works without this script. Texts from files are compared and set as text, never as HTML.

const root = document.documentElement;
root.classList.add("scripted");

const remembered = {
  get() {
    try { return localStorage.getItem("antipasto-theme"); } catch { return null; } // storage may be forbidden
  },
  set(value) {
    try { localStorage.setItem("antipasto-theme", value); } catch { /* not remembered */ }
  },
};

function setTheme(theme) {
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
}

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

setTheme(remembered.get());

function startTheme(button) {
  const say = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `${button.textContent} colours`); };
  button.addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    remembered.set(root.dataset.theme);
    say();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", say);
  say();
}

// ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const PAGE = 20;

function startFilters(form) {
  const lists = [...document.querySelectorAll(`[data-lists="${form.dataset.filters}"] .list`)].map((list) => ({
    count: list.querySelector("[data-count]"),
    more: list.querySelector("[data-more]"),
    shown: PAGE,
    cards: [...list.querySelectorAll(".card")].map((card) => ({
      card,
      text: [...card.querySelectorAll(".text")].map((part) => part.textContent).join("\n").toLowerCase(),
      step: Number(card.dataset.step),
      reward: Number(card.dataset.reward),
    })),
  }));
  const field = (name) => form.elements.namedItem(name)?.value.trim() ?? ""; // not every page has all fields

  function matches({ card, text, step, reward }) {
    const words = field("text").toLowerCase();
    const same = (name) => !field(name) || card.dataset[name] === field(name);
    return (!words || text.includes(words))
      && (!field("from") || step >= Number(field("from")))
      && (!field("to") || step <= Number(field("to")))
      && (!field("reward") || reward >= Number(field("reward")))
      && same("outcome") && same("flagged") && same("view");
  }

  function show() {
    let found = 0, all = 0;
    for (const list of lists) {
      let here = 0;
      for (const item of list.cards) {
        const fits = matches(item);
        here += fits;
        item.card.classList.toggle("off", !fits || here > list.shown);
      }
      list.count.textContent = here === list.cards.length ? `${here} rollouts` : `${here} of ${list.cards.length} rollouts`;
      list.more.hidden = here <= list.shown;
      list.more.textContent = `Show ${Math.min(PAGE, here - list.shown)} more of ${here - list.shown}`;
      found += here;
      all += list.cards.length;
    }
    form.querySelector("output").textContent = `${found} of ${all} rollouts match`;
  }

  for (const list of lists) list.more.addEventListener("click", () => { list.shown += PAGE; show(); });
  const afresh = () => { for (const list of lists) list.shown = PAGE; show(); };
  form.addEventListener("input", afresh);
  form.addEventListener("reset", () => setTimeout(afresh)); // fields are emptied after this event
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

// ── answers side by side ─────────────────────────────────────────────────────────────────────────────────────────────

function startPicker(form) {
  const rows = [...document.querySelectorAll(`[data-rows="${form.dataset.picker}"] > .row`)];
  const { which, row: chosen, previous, next } = form.elements;
  let fitting = rows;

  function show() {
    const row = fitting[chosen.selectedIndex];
    for (const other of rows) other.classList.toggle("off", other !== row);
    previous.disabled = chosen.selectedIndex <= 0;
    next.disabled = chosen.selectedIndex >= fitting.length - 1;
    form.querySelector("output").textContent = fitting.length
      ? `prompt ${chosen.selectedIndex + 1} of ${fitting.length}` : "none of the prompts shown here";
  }

  function filter() {
    fitting = rows.filter((row) =>
      !which.value || (which.value === "differs" ? row.dataset.differs === "yes" : row.dataset.pattern === which.value));
    chosen.replaceChildren(...fitting.map((row) => {
      const texts = row.querySelectorAll(".prompt .text");
      const text = texts[texts.length - 1].textContent.replace(/\s+/g, " ").trim();
      return new Option(`${row.dataset.number}: ${text.length > 70 ? `${text.slice(0, 70)}…` : text}`);
    }));
    chosen.disabled = !fitting.length;
    chosen.selectedIndex = fitting.length ? 0 : -1;
    show();
  }

  function go(by) {
    chosen.selectedIndex += by;
    show();
  }

  which.addEventListener("input", filter);
  chosen.addEventListener("input", show);
  previous.addEventListener("click", () => go(-1));
  next.addEventListener("click", () => go(1));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-theme-button]").forEach(startTheme);
  document.querySelectorAll("[data-filters]").forEach(startFilters);
  document.querySelectorAll("[data-picker]").forEach(startPicker);
});

// Elements and numbers: what every part of the page uses.

export const $ = (id) => document.getElementById(id);

/** A new element. Keys that begin with "on" are listeners; `style` is an object of CSS properties. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "style") for (const [name, v] of Object.entries(value)) made.style.setProperty(name, v);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const known = (x) => typeof x === "number" && Number.isFinite(x);

export const count = (n) => (known(n) ? n.toLocaleString("en-US") : "–");
export const number = (x, digits) => (known(x) ? x.toFixed(digits).replace(/^-/, "−") : "–");
export const percent = (x) => (known(x) ? `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %` : "–");
export const signed = (x, digits) => (known(x) && x > 0 ? "+" : "") + number(x, digits);

/** A large number with three digits: 1.38 M. */
export function short(n) {
  const at = [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e3, " k"]].find(([size]) => n >= size);
  return at && n >= 1e4 ? `${Number((n / at[0]).toPrecision(3))}${at[1]}` : count(n);
}

/** Calls `run` when it has not been asked to for `ms`. */
export function later(ms, run) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...given), ms);
  };
}

/** The memories compared, in the order of the page, and what a request says for each. */
export const MEMORIES = [
  { name: "none", meaning: "the anchor alone", ask: () => "off" },
  { name: "generic", meaning: "the same blocks for every text", ask: () => "generic" },
  { name: "fetched", meaning: "the blocks on the text’s own path", ask: (path) => path || "auto" },
];

/** The head of what is shown for one memory: its mark, its name, what it is. */
export const memoryHead = (memory, meaning = memory.meaning) =>
  element("h3", { class: `m-${memory.name}` }, element("i", { class: "mark" }), memory.name, element("small", {}, meaning));

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const TERMS_IN_NAME = 3;
const DRAWN_PIXELS = 3; // lower clusters are drawn together as one hatched piece

// ---- the tree ----

const root = { level: -1, index: 0, n: 0, path: "", children: [], parent: null };
const byPath = new Map([["", root]]);
{
  let above = new Map([[0, root]]);
  data.clusters.forEach((rows, level) => {
    const here = new Map();
    for (const row of rows) {
      const parent = above.get(Math.floor(row.i / data.branching[level]));
      if (!parent) continue;
      const path = parent.path ? `${parent.path}/${row.i}` : String(row.i);
      const node = { ...row, level, index: row.i, path, parent, children: [] };
      parent.children.push(node);
      here.set(row.i, node);
      byPath.set(path, node);
    }
    above = here;
  });
}
const isLeaf = (node) => node.children.length === 0;
const ancestors = (node) => (node ? [...ancestors(node.parent), node] : []);
const within = (node, other) => other === node || (other !== null && other !== root && within(node, other.parent)) || node === root;
root.n = root.children.reduce((sum, child) => sum + child.n, 0);
const spread = 280 / Math.max(root.children.length, 4); // degrees of hue that a cluster's children share
root.children.forEach((child, i) => (child.hue = (25 + (360 * i) / root.children.length) % 360));
// Children from largest to smallest, each over a share of its parent's height.
(function arrange(node) {
  node.children.sort((a, b) => b.n - a.n || a.index - b.index);
  let top = node.top ?? 0;
  for (const [i, child] of node.children.entries()) {
    // Around the hue of level 1, and within the room that it has there.
    child.hue ??= node.hue + (spread / child.level) * (i / node.children.length - 0.5);
    child.height = ((node.height ?? 1) * child.n) / Math.max(node.children.reduce((sum, c) => sum + c.n, 0), 1);
    child.top = top;
    top += child.height;
    arrange(child);
  }
})(Object.assign(root, { top: 0, height: 1 }));
const terms = (node, n) => (node.t ?? []).slice(0, n).map((id) => data.words[id]);
const name = (node) => (node === root ? "All" : terms(node, TERMS_IN_NAME).join(", ") || `cluster ${node.index}`);
const labelled = (node) => (node.l ?? []).reduce((sum, [, n]) => sum + n, node.m ?? 0);
const purity = (node) => (node.l?.length ? node.l[0][1] / labelled(node) : null);
const labelHue = (label) => (250 + (360 * label) / Math.max(data.labels.length, 1)) % 360;

// ---- numbers ----

const count = (n) => n.toLocaleString("en-US");
const number = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "style") for (const [name, v] of Object.entries(value)) made.style.setProperty(name, v);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---- state ----

let focus = root; // what the map is zoomed to
let chosen = root; // what the panel tells of
let mode = "cluster";
let hits = null; // clusters that match the search, or null without one
let around = null; // those and all above them

const tree = $("tree");
const drawn = new Map(); // elements by key, kept so that a zoom moves them

function zoom(node) {
  focus = isLeaf(node) && node !== root ? node.parent : node;
  choose(node);
}

function choose(node) {
  chosen = node;
  if (!within(focus, node)) focus = node.parent;
  // A chosen cluster must be seen: levels further down than the map shows are zoomed to.
  while (node.level - focus.level >= columns()) focus = ancestors(node).find((a) => a.parent === focus);
  history.replaceState(null, "", node === root ? location.pathname + location.search : `#${node.path}`);
  drawMap();
  drawPanel();
}

// ---- the map ----

const columns = () => (tree.clientWidth < 620 ? 3 : 4);

function drawMap() {
  const [width, height] = [tree.clientWidth, tree.clientHeight];
  const depth = Math.min(columns(), data.branching.length - focus.level);
  const first = depth > 1 ? Math.min(Math.max(width * 0.13, 66), 120) : width;
  const wide = depth > 1 ? (width - first) / (depth - 1) : 0;
  const kept = new Set();
  const place = (key, make, [left, w], top, h) => {
    let box = drawn.get(key);
    if (!box) {
      drawn.set(key, (box = make()));
      tree.append(box);
    }
    kept.add(key);
    Object.assign(box.style, { left: `${left}px`, width: `${w}px`, top: `${top}px`, height: `${h}px` });
    return box;
  };
  const draw = (node) => {
    const column = node.level - focus.level;
    if (column >= depth) return;
    const across = column === 0 ? [0, first] : [first + (column - 1) * wide, wide];
    const [top, h] = [((node.top - focus.top) / focus.height) * height, (node.height / focus.height) * height];
    const box = place(node.path, () => makeBox(node), across, top, h);
    dress(box, node, column, h);
    // Small clusters come last: the first that is too low begins the piece that stands for the rest.
    const small = node.children.findIndex((child) => (child.height / focus.height) * height < DRAWN_PIXELS);
    node.children.slice(0, small < 0 ? undefined : small).forEach(draw);
    if (small >= 0 && column + 1 < depth) {
      const rest = node.children[small];
      const from = ((rest.top - focus.top) / focus.height) * height;
      const piece = place(`${node.path}+`, () => element("div", { class: "rest" }), [first + column * wide, wide], from, top + h - from);
      piece.onclick = () => zoom(node);
      piece.title = `${count(node.children.length - small)} small clusters`;
      piece.style.setProperty("--h", node.hue ?? 90);
      piece.classList.toggle("faint", around !== null && !node.children.slice(small).some((child) => around.has(child)));
    }
  };
  draw(focus);
  for (const [key, box] of drawn) {
    if (!kept.has(key)) {
      box.remove();
      drawn.delete(key);
    }
  }
  tree.setAttribute("aria-activedescendant", idOf(chosen));
  drawCrumbs();
}

const idOf = (node) => `n-${node.path.replaceAll("/", "-")}`;

function makeBox(node) {
  const box = element("div", { role: "treeitem", id: idOf(node), "aria-level": node.level + 2 });
  box.setAttribute("aria-label", `${node.path ? `${node.path}: ` : ""}${name(node)}, ${count(node.n)} points, ${percent(shareOf(node))} of its parent`);
  // A click on what the map is zoomed to goes back up.
  box.onclick = () => (node === focus && chosen === node && node.parent ? zoom(node.parent) : zoom(node));
  return box;
}

function dress(box, node, column, h) {
  const byLabel = mode === "label" && node.l?.length;
  const hue = byLabel ? labelHue(node.l[0][0]) : node.hue;
  box.className = `node d${node === root ? "0 whole" : node.level}`;
  box.style.setProperty("--h", hue ?? 90);
  if (mode === "label" && node !== root) {
    // The purer, the stronger the colour; without labels it is grey.
    box.style.setProperty("--chroma", byLabel ? (0.015 + 0.115 * Math.max(0, (purity(node) - 0.3) / 0.7)).toFixed(3) : 0);
  } else box.style.removeProperty("--chroma");
  box.classList.toggle("chosen", node === chosen);
  box.classList.toggle("hit", hits !== null && hits.has(node));
  box.classList.toggle("faint", around !== null && !around.has(node));
  box.setAttribute("aria-selected", node === chosen);
  if (!isLeaf(node)) box.setAttribute("aria-expanded", within(focus, node));
  const lines = [];
  if (h >= 14) lines.push(element("span", {}, name(node)));
  if (h >= 36) lines.push(element("span", { class: "size" }, `${count(node.n)}${node === root || column === 0 ? "" : ` · ${percent(shareOf(node))}`}`));
  box.classList.toggle("low", h < 36);
  box.style.fontSize = h < 18 ? ".72rem" : "";
  box.replaceChildren(...lines);
}

const shareOf = (node) => (node.parent ? node.n / Math.max(node.parent.n, 1) : 1);

function drawCrumbs() {
  const path = ancestors(chosen);
  const crumb = (node) => element("button", { onclick: () => zoom(node), "aria-current": node === chosen ? "true" : null }, node === root ? "All" : `${node.index} ${terms(node, 2).join(", ")}`);
  $("crumbs").replaceChildren(...path.flatMap((node, i) => (i ? [element("span", {}, "›"), crumb(node)] : [crumb(node)])));
}

function drawLegend() {
  if (mode === "cluster") return $("legend").replaceChildren();
  const shown = data.labels.slice(0, 12).map((label, i) => element("span", {}, element("i", { style: { "--h": labelHue(i) } }), label));
  const more = data.labels.length > 12 ? [`and ${data.labels.length - 12} more`] : [];
  $("legend").replaceChildren(...shown, ...more, element("span", {}, "the greyer, the more mixed"));
}

// ---- the panel ----

function bars(rows) {
  return element("ul", { class: "bars" }, ...rows.map(([label, value, share, open]) => {
    const inside = [element("span", {}, label), element("span", {}, value)];
    const bar = open ? element("button", { onclick: open }, ...inside) : element("div", {}, ...inside);
    return element("li", { style: { "--share": `${100 * share}%` } }, bar);
  }));
}

const section = (title, content) => (content ? [element("h2", {}, title), content] : []);

function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined);
  return element("dl", {}, ...shown.flatMap(([key, value]) => [element("dt", {}, key), value instanceof Node ? value : element("dd", {}, value)]));
}

function texts(list) {
  return list?.length ? element("ul", { class: "texts" }, ...list.map((text) => element("li", {}, element("p", {}, text.text),
    element("small", {}, `document ${count(text.doc)}${text.label ? ` · ${text.label}` : ""} · ${number(text.distance, 3)} away`)))) : null;
}

function childrenOf(node) {
  const shown = node.children.slice(0, 64).map((child) => [`${child.index}  ${name(child)}`, `${count(child.n)} · ${percent(shareOf(child))}`, shareOf(child), () => zoom(child)]);
  return shown.length ? bars(shown) : null;
}

function drawPanel() {
  const panel = $("panel");
  panel.scrollTop = 0;
  if (chosen === root) return panel.replaceChildren(...overview());
  const level = data.levels[chosen.level];
  const share = shareOf(chosen);
  const over = share > level.cap;
  const above = chosen.level ? "its parent" : "the whole";
  const shareText = element("dd", over ? { class: "over" } : {}, `${percent(share)} of ${above}${over ? `, over the cap of ${percent(level.cap)}` : ""}`);
  const labels = (chosen.l ?? []).map(([label, n]) => [data.labels[label], `${count(n)} · ${percent(n / labelled(chosen))}`, n / labelled(chosen)]);
  if (chosen.m) labels.push(["others", `${count(chosen.m)} · ${percent(chosen.m / labelled(chosen))}`, chosen.m / labelled(chosen)]);
  panel.replaceChildren(
    element("p", { class: "path" }, `Cluster ${chosen.path}`),
    element("h1", {}, name(chosen)),
    facts([
      ["level", `${chosen.level + 1} of ${data.branching.length}`],
      ["points", count(chosen.n)],
      ["share", shareText],
      ["of all", percent(chosen.n / root.n)],
      ["mean distance²", chosen.d === undefined ? null : number(chosen.d, 3)],
      ["label purity", purity(chosen) === null ? null : percent(purity(chosen))],
    ]),
    ...section("Terms", chosen.t?.length ? element("div", { class: "terms" }, ...terms(chosen).map((term) => element("button", { title: "Search this term", onclick: () => search(term) }, term))) : null),
    ...section("Labels", labels.length ? bars(labels) : null),
    ...section("Children", childrenOf(chosen)),
    ...section("Nearest texts", texts(chosen.near)),
    ...section("Farthest texts", texts(chosen.far)),
  );
}

function overview() {
  const rows = [
    ["clusters", (l) => count(l.clusters)], ["not empty", (l) => count(l.non_empty)], ["smallest", (l) => count(l.min)],
    ["median", (l) => count(l.median)], ["largest", (l) => count(l.max)], ["variation", (l) => number(l.variation, 2)],
    ["largest share", (l) => percent(l.largest_share)], ["cap", (l) => percent(l.cap)], ["distance²", (l) => number(l.distance, 3)],
  ];
  if (data.levels.some((level) => level.labels)) {
    rows.push(["label purity", (l) => percent(l.labels?.purity)], ["label NMI", (l) => number(l.labels?.nmi, 2)], ["label ARI", (l) => number(l.labels?.rand, 2)]);
  }
  const head = element("tr", {}, element("th", {}, "level"), ...data.levels.map((_, i) => element("th", { scope: "col" }, String(i + 1))));
  const body = rows.map(([title, value]) => element("tr", {}, element("th", { scope: "row" }, title), ...data.levels.map((level) => element("td", {}, value(level)))));
  return [
    element("h1", {}, `${count(root.n)} points in ${data.branching.join(" × ")} clusters`),
    facts(data.facts),
    ...section("Sizes", element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)))),
    ...section("Children", childrenOf(root)),
  ];
}

// ---- search ----

function search(text) {
  $("search").value = text;
  const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
  hits = around = null;
  if (wanted.length) {
    const ids = wanted.map((word) => new Set(data.words.flatMap((known, id) => (word.length < 3 ? known.startsWith(word) : known.includes(word)) ? [id] : [])));
    const texts = (node) => [...(node.near ?? []), ...(node.far ?? [])].map((text) => text.text.toLowerCase());
    const matches = (node) => wanted.every((word, i) => (node.t ?? []).some((id) => ids[i].has(id)) || texts(node).some((text) => text.includes(word)));
    hits = new Set([...byPath.values()].filter((node) => node !== root && matches(node)));
    around = new Set([...hits].flatMap(ancestors));
  }
  const n = hits?.size;
  $("status").textContent = hits === null ? "" : n ? `${count(n)} cluster${n === 1 ? " matches" : "s match"} “${text.trim()}”. Enter goes to the next.` : `No cluster matches “${text.trim()}”.`;
  drawMap();
}

function nextHit() {
  if (!hits?.size) return;
  const list = [...hits];
  choose(list[(list.indexOf(chosen) + 1) % list.length]);
}

// ---- keys ----

function move(key) {
  const siblings = chosen.parent?.children ?? [chosen];
  const at = siblings.indexOf(chosen);
  const to = {
    ArrowUp: siblings[at - 1], ArrowDown: siblings[at + 1], ArrowRight: chosen.children[0], ArrowLeft: chosen.parent, Home: root,
  }[key];
  if (to) choose(to);
}

tree.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") zoom(chosen);
  else if (event.key === "Escape") zoom(focus.parent ?? root);
  else if (event.key.startsWith("Arrow") || event.key === "Home") move(event.key);
  else return;
  event.preventDefault();
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") nextHit();
  else if (event.key === "Escape") search("");
});
let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => search($("search").value), 120);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) {
    $("search").focus();
    event.preventDefault();
  }
});
$("modes").addEventListener("change", (event) => {
  mode = event.target.value;
  drawMap();
  drawLegend();
});
// A new size is drawn at once, a zoom moves there.
new ResizeObserver(() => {
  tree.classList.add("still");
  drawMap();
  requestAnimationFrame(() => tree.classList.remove("still"));
}).observe(tree);
addEventListener("hashchange", () => zoom(byPath.get(location.hash.slice(1)) ?? root));

$("name").textContent = data.name;
document.title = `${data.name} · cluster tree`;
$("modes").hidden = data.labels.length === 0;
zoom(byPath.get(location.hash.slice(1)) ?? root);

// The map of the tree: zoom, search, keys, and what a screen reader is told of it.

import { $, count, element, later, percent } from "./dom.js";
import { Icicle } from "./icicle.js";

const ZOOM_MS = 260;
const SIBLINGS_TOLD = 32; // on each side of the chosen cluster

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

export class TreeMap {
  /** `chosen` is called with a cluster when another becomes the chosen one. */
  constructor(tree, chosen) {
    this.tree = tree;
    this.onChosen = chosen;
    this.box = $("tree");
    this.icicle = new Icicle($("canvas"));
    this.icicle.resize();
    this.state = { tree, focus: tree.root, chosen: tree.root, hover: null, mode: "cluster", hits: null, around: null, lit: [] };
    this.view = this.icicle.view(tree, tree.root);
    this.listen();
    new ResizeObserver(() => this.resized()).observe(this.box);
    this.choose(tree.root);
  }

  // ---- what is shown ----

  /** Zooms to a cluster and chooses it; to a leaf's parent. */
  zoom(node) {
    this.state.focus = node.isLeaf && node.parent ? node.parent : node;
    this.choose(node);
  }

  /** Chooses a cluster; zooms no further than it takes to see it. */
  choose(node) {
    const { state } = this;
    const isNew = state.chosen !== node;
    state.chosen = node;
    if (!node.within(state.focus)) state.focus = node.parent ?? node;
    while (node.level - state.focus.level > this.icicle.nShown) state.focus = node.ancestors.find((a) => a.parent === state.focus);
    this.move();
    this.tell();
    if (isNew) this.onChosen(node);
  }

  /** Lights paths up, the best first; the others are faint. */
  light(paths) {
    const clusters = paths.map((path) => this.tree.find(path)).filter(Boolean);
    this.state.lit = clusters.map((cluster, i) => ({ path: cluster.ancestors.slice(1), faint: i > 0 }));
    this.draw();
  }

  /** After counts of fetches have changed. */
  counted() {
    if (this.state.mode === "fetches") this.draw();
  }

  // From what is seen to what the focus is, at once or by and by.
  move() {
    const [from, to] = [this.view, this.icicle.view(this.tree, this.state.focus)];
    const same = from.top === to.top && from.height === to.height && from.edges.every((edge, i) => edge === to.edges[i]);
    if (same || still.matches) {
      this.target = null;
      this.view = to;
      return this.draw();
    }
    const moving = { from, to, start: performance.now() };
    this.target = moving;
    const step = (now) => {
      if (this.target !== moving) return;
      const t = Math.min(Math.max((now - moving.start) / ZOOM_MS, 0), 1);
      this.view = t === 1 ? to : Icicle.between(from, to, t * t * (3 - 2 * t));
      this.paint();
      if (t < 1) requestAnimationFrame(step);
      else this.target = null;
    };
    requestAnimationFrame(step);
  }

  draw() {
    if (this.asked || this.target) return;
    this.asked = requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.asked = 0;
    this.icicle.paint(this.view, this.state);
  }

  resized() {
    this.icicle.resize();
    this.target = null;
    this.view = this.icicle.view(this.tree, this.state.focus);
    this.paint(); // at once: a canvas is empty after it was resized
  }

  // ---- what is told ----

  tell() {
    const { chosen } = this.state;
    const siblings = chosen.parent?.children ?? [chosen];
    const at = siblings.indexOf(chosen);
    const near = siblings.slice(Math.max(0, at - SIBLINGS_TOLD), at + SIBLINGS_TOLD + 1);
    $("items").replaceChildren(...chosen.ancestors.slice(0, -1).map((node) => this.item(node)), ...near.map((node) => this.item(node)));
    this.box.setAttribute("aria-activedescendant", idOf(chosen));
    const crumb = (node) => element("button", { type: "button", onclick: () => this.zoom(node), "aria-current": node === chosen ? "true" : null }, node.level < 0 ? "All" : `${node.index} ${node.terms.slice(0, 2).join(", ")}`);
    $("crumbs").replaceChildren(...chosen.ancestors.flatMap((node, i) => (i ? [element("span", { "aria-hidden": "true" }, "›"), crumb(node)] : [crumb(node)])));
  }

  item(node) {
    const siblings = node.parent?.children ?? [node];
    const about = `${node.path ? `${node.path}: ` : ""}${node.name}, ${count(node.n)} windows${node.parent ? `, ${percent(node.share)} of its parent` : ""}, fetched ${count(node.fetches)} times`;
    return element("div", {
      role: "treeitem", id: idOf(node), "aria-level": node.level + 2, "aria-setsize": siblings.length, "aria-posinset": siblings.indexOf(node) + 1,
      "aria-selected": String(node === this.state.chosen), "aria-expanded": node.isLeaf ? null : String(this.state.chosen.within(node)), "aria-label": about,
    });
  }

  /** Fades what does not match `text`. */
  search(text) {
    $("search").value = text;
    const hits = this.tree.search(text);
    this.state.hits = hits;
    this.state.around = hits && new Set([...hits].flatMap((hit) => hit.ancestors));
    const n = hits?.size;
    const found = n ? `${count(n)} cluster${n === 1 ? " matches" : "s match"} “${text.trim()}”. Enter goes to the next.` : `No cluster matches “${text.trim()}”.`;
    $("map-said").textContent = hits === null ? "" : found;
    this.draw();
  }

  nextHit() {
    const list = [...(this.state.hits ?? [])];
    if (!list.length) return;
    this.zoom(list[(list.indexOf(this.state.chosen) + 1) % list.length]);
  }

  // ---- the hand ----

  listen() {
    const under = (event) => {
      const around = this.box.getBoundingClientRect();
      return this.icicle.at(this.tree, this.view, this.state.focus, event.clientX - around.left, event.clientY - around.top);
    };
    this.box.addEventListener("click", (event) => {
      const node = under(event);
      const { focus, chosen } = this.state;
      // What the map is zoomed to leads back up.
      this.zoom(node === focus && chosen === node && node.parent ? node.parent : node);
    });
    this.box.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.hover(under(event), event));
    this.box.addEventListener("pointerleave", () => this.hover(null));
    this.box.addEventListener("keydown", (event) => this.key(event));
    $("search").addEventListener("input", later(120, () => this.search($("search").value)));
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.nextHit();
      else if (event.key === "Escape") this.search("");
    });
    $("modes").addEventListener("change", (event) => {
      this.state.mode = event.target.value;
      this.draw();
    });
    dark.addEventListener("change", () => {
      this.icicle.dress();
      this.draw();
    });
  }

  hover(node, event) {
    const tip = $("tip");
    tip.hidden = !node || node.level < 0;
    if (!tip.hidden) {
      if (node !== this.state.hover) {
        tip.replaceChildren(element("b", {}, node.path), ` ${node.terms.join(", ")}`, element("br"), `${count(node.n)} windows · ${percent(node.share)} · fetched ${count(node.fetches)} times`);
      }
      const around = this.box.getBoundingClientRect();
      const [x, y] = [event.clientX - around.left, event.clientY - around.top];
      const left = Math.max(0, Math.min(x + 14, around.width - tip.offsetWidth));
      const below = y + 18 + tip.offsetHeight < around.height;
      tip.style.transform = `translate(${left}px, ${below ? y + 18 : y - 10 - tip.offsetHeight}px)`;
    }
    if (node === this.state.hover) return;
    this.state.hover = node;
    this.draw();
  }

  key(event) {
    const { chosen, focus } = this.state;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") this.zoom(chosen);
    else if (event.key === "Escape") this.zoom(focus.parent ?? this.tree.root);
    else {
      const siblings = chosen.parent?.children ?? [chosen];
      const at = siblings.indexOf(chosen);
      const to = { ArrowUp: siblings[at - 1], ArrowDown: siblings[at + 1], ArrowRight: chosen.children[0], ArrowLeft: chosen.parent, Home: this.tree.root };
      if (!(event.key in to)) return;
      if (to[event.key]) this.choose(to[event.key]);
    }
    event.preventDefault();
  }
}

const idOf = (node) => `n-${node.path.replaceAll("/", "-")}`;

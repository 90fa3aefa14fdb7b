// The tree as nested columns on a canvas: a level a column, the height of a cluster its share of the documents.
// Only what is at least a pixel high is drawn; smaller siblings are drawn together, a band of about a pixel for several.

const LEAST = 1; // pixels of a cluster that is drawn by itself
const LIT = 3; // pixels at least of a cluster that is lit or chosen
const HANDLE = 26; // pixels across of the cluster that the map is zoomed to
const NARROWEST = 68; // pixels across of a level that is shown
const NAME = 14; // pixels of height that a name needs
const NAME_AND_SIZE = 37;

const LIGHT = { l: [0.8, 0.87, 0.915, 0.935], chroma: [0.075, 0.065, 0.045, 0.032], cold: [0.93, 0.008, 80], hot: [0.7, 0.17, 50] };
const DARK = { l: [0.44, 0.37, 0.31, 0.27], chroma: [0.065, 0.06, 0.05, 0.04], cold: [0.27, 0.008, 80], hot: [0.53, 0.15, 47] };

const oklch = (l, c, h) => `oklch(${l.toFixed(3)} ${c.toFixed(3)} ${h.toFixed(1)})`;
const mix = (a, b, t) => a + (b - a) * t;

export class Icicle {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d", { alpha: false });
    this.fitted = new Map(); // text as it fits, by font, width and text
    this.dress();
  }

  /** Reads the colours of the style sheet: at the start, and when the scheme changes. */
  dress() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    this.colours = { paper: colour("--paper"), ink: colour("--ink"), soft: colour("--ink-2"), lit: colour("--fetched"), mark: colour("--mark") };
    this.look = matchMedia("(prefers-color-scheme: dark)").matches ? DARK : LIGHT;
    this.sans = colour("--sans");
    this.fitted.clear();
  }

  /** Takes the size of the element around it. */
  resize() {
    this.width = this.canvas.parentElement.clientWidth;
    this.height = this.canvas.parentElement.clientHeight;
    this.ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
  }

  /** Levels that fit beside the one zoomed to. */
  get nShown() {
    return Math.max(1, Math.floor((this.width - HANDLE) / NARROWEST));
  }

  /** What is seen when zoomed to `focus`: a part of the height, and where the columns of each level begin; the root's is first. */
  view(tree, focus) {
    const below = Math.min(tree.nLevels - 1 - focus.level, this.nShown);
    const first = below > 0 ? HANDLE : this.width;
    const edges = [];
    for (let level = -1; level <= tree.nLevels; level++) {
      const column = level - focus.level;
      edges.push(column <= 0 ? 0 : column > below ? this.width : first + ((this.width - first) * (column - 1)) / below);
    }
    return { top: focus.top, height: focus.height, edges };
  }

  /** Between two views, `t` 0 to 1. */
  static between(a, b, t) {
    const edges = a.edges.map((edge, i) => mix(edge, b.edges[i], t));
    // Of the height the logarithm moves evenly, as a zoom does.
    const height = Math.exp(mix(Math.log(a.height), Math.log(b.height), t));
    const moved = a.height === b.height ? t : (height - a.height) / (b.height - a.height);
    return { top: mix(a.top, b.top, moved), height, edges };
  }

  /** The cluster at a point. One too low to aim at counts as its parent, but never as what the map is zoomed to: so every child of that can be reached. */
  at(tree, view, focus, x, y) {
    const place = view.top + (y / this.height) * view.height;
    let node = tree.root;
    while (!node.isLeaf && view.edges[node.level + 2] <= x) {
      const child = node.at(place);
      if (node.level > focus.level && child.height * (this.height / view.height) < LIT) break;
      node = child;
    }
    return node;
  }

  /** Draws. `state`: `tree`, `focus`, `chosen`, `hover`, `mode` "cluster" or "fetches", `hits` clusters to mark or null, `around` clusters not to fade or null, `lit` [{ path: clusters, faint }]. */
  paint(view, state) {
    this.state = state;
    this.seen = view;
    this.scale = this.height / view.height;
    const { pen } = this;
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.fillStyle = this.colours.paper;
    pen.fillRect(0, 0, this.width, this.height);
    pen.textBaseline = "alphabetic";
    this.labels = []; // drawn last, over what is lit
    this.paintCluster(state.tree.root);
    for (const { path, faint } of [...state.lit].reverse()) path.forEach((node) => this.paintLit(node, faint));
    if (state.hover && state.hover !== state.chosen) this.outline(state.hover, this.colours.soft, 1);
    if (state.chosen.level >= 0) this.outline(state.chosen, this.colours.ink, 2);
    for (const label of this.labels) this.label(...label);
    pen.globalAlpha = 1;
  }

  // Left, top, width and height, the last two of whole device pixels.
  box(node, least = 0) {
    const snap = (x) => Math.round(x * this.ratio) / this.ratio;
    const [x0, x1] = [snap(this.seen.edges[node.level + 1]), snap(this.seen.edges[node.level + 2])];
    let top = (node.top - this.seen.top) * this.scale;
    const height = Math.max(node.height * this.scale, least);
    if (height === least) top -= (least - node.height * this.scale) / 2;
    const [y0, y1] = [snap(Math.max(top, -4)), snap(Math.min(top + height, this.height + 4))];
    return [x0, y0, x1 - x0, y1 - y0];
  }

  isSeen(top, height) {
    return (top + height - this.seen.top) * this.scale > 0 && (top - this.seen.top) * this.scale < this.height;
  }

  paintCluster(node) {
    const [x, y, width, height] = this.box(node);
    if (width > 0.5) {
      const { pen } = this;
      pen.globalAlpha = this.faded(node) ? 0.22 : 1;
      pen.fillStyle = this.colour(node, node.fetches, 0);
      const gap = height >= 3 ? 1 : 0;
      pen.fillRect(x, y, width - 1, Math.max(height - gap, 0.5));
      if (this.state.hits?.has(node)) {
        pen.fillStyle = this.colours.mark;
        pen.fillRect(x, y, 3, Math.max(height - gap, 0.5));
      }
      pen.globalAlpha = 1;
      this.labels.push([node, x, Math.max(y, 0), width - 1, Math.min(y + height, this.height) - Math.max(y, 0)]);
    }
    for (const [i, child] of node.children.entries()) {
      if (child.height * this.scale < LEAST) return this.paintBands(node.children, i);
      if (this.isSeen(child.top, child.height)) this.paintCluster(child);
    }
  }

  // Siblings from the `from`th on, each lower than a pixel.
  paintBands(siblings, from) {
    for (let i = from, band = 0; i < siblings.length; band++) {
      const first = siblings[i];
      let [height, fetches, faded] = [0, 0, true];
      for (; i < siblings.length && height * this.scale < LEAST; i++) {
        height += siblings[i].height;
        fetches = Math.max(fetches, siblings[i].fetches);
        faded &&= this.faded(siblings[i]);
      }
      if (this.isSeen(first.top, height)) this.paintBand(first, height, fetches, faded, band);
    }
  }

  // To the right edge: what is below would be lower still.
  paintBand(first, height, fetches, faded, band) {
    const { pen, seen, ratio } = this;
    const snap = (x) => Math.round(x * ratio) / ratio;
    const y = snap((first.top - seen.top) * this.scale);
    const end = snap((first.top + height - seen.top) * this.scale);
    pen.globalAlpha = faded ? 0.22 : 1;
    for (let level = first.level; level < this.state.tree.nLevels; level++) {
      const [x0, x1] = [snap(seen.edges[level + 1]), snap(seen.edges[level + 2])];
      if (x1 - x0 < 0.5) continue;
      pen.fillStyle = this.colour(first, fetches, level - first.level, band % 2 ? 0.012 : -0.012);
      pen.fillRect(x0, y, x1 - x0 - 1, Math.max(end - y, 1 / ratio));
    }
    pen.globalAlpha = 1;
  }

  faded(node) {
    return this.state.around !== null && !this.state.around.has(node);
  }

  colour(node, fetches, further, shade = 0) {
    const { look, state } = this;
    if (state.mode === "fetches") {
      const most = node.level < 0 ? fetches : state.tree.mostFetches[node.level];
      const t = fetches && most ? 0.12 + 0.88 * Math.sqrt(fetches / most) : 0;
      const [l, c, h] = look.cold.map((cold, i) => mix(cold, look.hot[i], t));
      return oklch(l + shade * (t ? 1 : 0.6), c, h);
    }
    if (node.level < 0) return oklch(look === DARK ? 0.3 : 0.9, 0, 90);
    const level = Math.min(node.level + further, look.l.length - 1);
    return oklch(look.l[level] + shade, look.chroma[level], node.hue);
  }

  label(node, x, y, width, height) {
    const { pen } = this;
    pen.globalAlpha = this.faded(node) ? 0.45 : 1;
    if (node === this.state.focus && width <= HANDLE) return this.labelUpwards(node, x, y, width, height);
    if (height < NAME - 2 || width < 24) return;
    const size = height < 18 ? 11 : 12.5;
    pen.fillStyle = this.colours.ink;
    pen.font = `${size}px ${this.sans}`;
    const two = height >= NAME_AND_SIZE;
    const base = two ? y + 16 : y + Math.min(height, 22) / 2 + size * 0.36;
    pen.fillText(this.fit(node.name, width - 12), x + 6, base);
    if (!two) return;
    pen.font = `11px ${this.sans}`;
    pen.fillStyle = this.colours.soft;
    const more = this.state.mode === "fetches" ? `${node.fetches.toLocaleString("en-US")} fetches` : `${node.n.toLocaleString("en-US")} · ${Math.round(100 * node.share)} %`;
    pen.fillText(this.fit(more, width - 12), x + 6, base + 14.5);
  }

  labelUpwards(node, x, y, width, height) {
    const { pen } = this;
    pen.save();
    pen.fillStyle = this.colours.ink;
    pen.font = `12.5px ${this.sans}`;
    const text = this.fit(node.level < 0 ? `All ${node.n.toLocaleString("en-US")}` : node.name, height - 12);
    pen.translate(x + width / 2 + 4.5, y + height / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(text, -pen.measureText(text).width / 2, 0);
    pen.restore();
  }

  fit(text, width) {
    const key = `${this.pen.font}|${Math.round(width)}|${text}`;
    let fitted = this.fitted.get(key);
    if (fitted === undefined) {
      let [low, high] = [0, text.length];
      const shown = (n) => (n === text.length ? text : n ? `${text.slice(0, n).trimEnd()}…` : "");
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (this.pen.measureText(shown(middle)).width <= width) low = middle;
        else high = middle - 1;
      }
      if (this.fitted.size > 5000) this.fitted.clear();
      this.fitted.set(key, (fitted = shown(low)));
    }
    return fitted;
  }

  paintLit(node, faint) {
    const [x, y, width, height] = this.box(node, LIT);
    if (width < 0.5 || y > this.height || y + height < 0) return;
    const { pen } = this;
    pen.fillStyle = pen.strokeStyle = this.colours.lit;
    pen.globalAlpha = faint ? 0.4 : 1;
    if (height < 8) pen.fillRect(x, y, width - 1, height - (faint ? 1 : 0));
    else this.stroke(x, y, width, height, faint ? 1 : 2.5);
    if (!faint && height >= 8) {
      pen.globalAlpha = 0.2;
      pen.fillRect(x, y, width - 1, height - 1);
    }
    pen.globalAlpha = 1;
  }

  outline(node, colour, thick) {
    const [x, y, width, height] = this.box(node, LIT + 2);
    if (width < 0.5) return;
    this.pen.strokeStyle = colour;
    this.stroke(x, y, width, height, thick);
  }

  stroke(x, y, width, height, thick) {
    this.pen.lineWidth = thick;
    this.pen.strokeRect(x + thick / 2, y + thick / 2, width - 1 - thick, height - 1 - thick);
  }
}

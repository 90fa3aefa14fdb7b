// The cluster tree as a value: sizes, places from top to bottom, search.

const TERMS_IN_NAME = 3;
const HUES = 32; // clusters that can be told apart by colour

class Cluster {
  constructor(level, row, parent) {
    this.level = level; // −1 is the root
    this.index = row.index;
    this.n = row.n;
    this.terms = row.terms ?? [];
    this.fetches = row.fetches ?? 0;
    this.parent = parent;
    this.children = []; // from largest to smallest
    this.top = 0; // of the whole height, 0 to 1
    this.height = 1;
    this.hue = null; // degrees; none at the root
    this.words = this.terms.join("\n").toLowerCase();
  }

  get path() {
    return this.level <= 0 ? (this.level < 0 ? "" : String(this.index)) : `${this.parent.path}/${this.index}`;
  }

  get name() {
    return this.level < 0 ? "All" : this.terms.slice(0, TERMS_IN_NAME).join(", ") || `cluster ${this.index}`;
  }

  get isLeaf() {
    return this.children.length === 0;
  }

  /** The leaf with most windows below it, itself of a leaf: memory is that of whole paths. */
  get largestLeaf() {
    return this.isLeaf ? this : this.children[0].largestLeaf;
  }

  /** Of its parent's windows, 0 to 1. */
  get share() {
    return this.parent ? this.n / Math.max(this.parent.n, 1) : 1;
  }

  /** From the root to itself. */
  get ancestors() {
    return this.parent ? [...this.parent.ancestors, this] : [this];
  }

  within(other) {
    return other === this || (this.parent !== null && this.parent.within(other));
  }

  /** The child over a place of the whole height. */
  at(place) {
    let [low, high] = [0, this.children.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.children[middle].top <= place) low = middle;
      else high = middle - 1;
    }
    return this.children[low];
  }
}

const bySize = (a, b) => b.n - a.n || a.index - b.index;

// Children from largest to smallest, each over a share of its parent's height, around its parent's hue.
function arrange(node, spread) {
  node.children.sort(bySize);
  const total = Math.max(node.children.reduce((sum, child) => sum + child.n, 0), 1);
  let top = node.top;
  for (const [i, child] of node.children.entries()) {
    child.hue ??= node.hue + (spread / child.level) * (i / node.children.length - 0.5);
    child.top = top;
    child.height = (node.height * child.n) / total;
    top += child.height;
    arrange(child, spread);
  }
}

export class Tree {
  /** From what `/v1/tree` tells: `branching`, and by level the clusters that are not empty. */
  constructor({ branching, levels }) {
    this.branching = branching;
    this.root = new Cluster(-1, { index: 0, n: 0 }, null);
    this.levels = []; // Map of index -> Cluster, coarse to fine
    let above = new Map([[0, this.root]]);
    for (const [level, rows] of levels.entries()) {
      const here = new Map();
      for (const row of rows) {
        const parent = above.get(Math.floor(row.index / branching[level]));
        if (!parent) continue;
        const cluster = new Cluster(level, row, parent);
        parent.children.push(cluster);
        here.set(row.index, cluster);
      }
      this.levels.push(here);
      above = here;
    }
    const first = this.root.children;
    this.root.n = first.reduce((sum, child) => sum + child.n, 0);
    // Few are told apart by their colours, of many the colour goes evenly from top to bottom.
    const inOrder = first.length <= HUES ? first : [...first].sort(bySize);
    inOrder.forEach((child, i) => (child.hue = (25 + (360 * i) / first.length) % 360));
    arrange(this.root, 280 / Math.max(first.length, 4));
    this.countMost();
  }

  get nLevels() {
    return this.branching.length;
  }

  /** The cluster of a path such as "3/49", the root for "", undefined if there is none. */
  find(path) {
    if (path === "") return this.root;
    const parts = path.split("/");
    const found = this.levels[parts.length - 1]?.get(Number(parts.at(-1)));
    return found?.path === path ? found : undefined;
  }

  /** Takes in what `/v1/tree/fetches` tells: by level, pairs of index and count. True if something is new. */
  count(levels) {
    let isNew = false;
    for (const [level, pairs] of levels.entries()) {
      for (const [index, n] of pairs) {
        const cluster = this.levels[level]?.get(index);
        if (!cluster || cluster.fetches === n) continue;
        cluster.fetches = n;
        isNew = true;
      }
    }
    if (isNew) this.countMost();
    return isNew;
  }

  // The most fetches of a cluster by level, and all that began at the root.
  countMost() {
    this.mostFetches = this.levels.map((clusters) => {
      let most = 0;
      for (const cluster of clusters.values()) most = Math.max(most, cluster.fetches);
      return most;
    });
    this.root.fetches = this.root.children.reduce((sum, child) => sum + child.fetches, 0);
  }

  /** Clusters with all words of `text` among their terms; a path finds itself. Null for no text. */
  search(text) {
    const wanted = text.toLowerCase().trim();
    if (!wanted) return null;
    if (/^\d+(\/\d+)*\/?$/.test(wanted)) {
      const found = this.find(wanted.replace(/\/$/, ""));
      return new Set(found ? [found] : []);
    }
    const words = wanted.split(/\s+/);
    const hits = new Set();
    for (const clusters of this.levels) {
      for (const cluster of clusters.values()) {
        if (words.every((word) => cluster.words.includes(word))) hits.add(cluster);
      }
    }
    return hits;
  }
}

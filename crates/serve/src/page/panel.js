// What is known of the chosen cluster.

import { get, isAbort } from "./api.js";
import { $, count, element, percent } from "./dom.js";

const CHILDREN_SHOWN = 32;
const WAIT_MS = 120; // so that walking through the tree asks only for where it ends

const section = (title, content) => (content ? [element("h3", {}, title), content] : []);

function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "–");
  return element("dl", {}, ...shown.map(([key, value]) => element("div", {}, element("dt", {}, key), element("dd", {}, value))));
}

export class Panel {
  /** `actions`: zoom(cluster), search(term), use(path) the path of a leaf as memory. */
  constructor(tree, actions) {
    this.tree = tree;
    this.actions = actions;
  }

  async show(cluster) {
    this.cluster = cluster;
    this.told = this.error = null;
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    clearTimeout(this.timer);
    this.draw();
    await new Promise((resolve) => (this.timer = setTimeout(resolve, WAIT_MS)));
    try {
      const told = await get(cluster.path ? `v1/explain/${cluster.path}` : "v1/explain", asking.signal);
      if (this.cluster === cluster) this.told = told;
    } catch (error) {
      if (isAbort(error) || this.cluster !== cluster) return;
      this.error = error.message;
    }
    if (this.cluster === cluster) this.draw();
  }

  /** After counts of fetches have changed: those alone are written anew, what is focused stays. */
  counted() {
    const fetches = $("panel").querySelector("[data-fetches]");
    if (fetches && this.cluster) fetches.textContent = count(this.cluster.fetches);
    for (const item of $("panel").querySelectorAll("[data-child]")) {
      const child = this.tree.levels[this.cluster.level + 1].get(Number(item.dataset.child));
      item.textContent = this.childCounts(child);
    }
  }

  childCounts(child) {
    return `${count(child.n)} · ${percent(child.share)} · ${count(child.fetches)}`;
  }

  draw() {
    const { cluster, told } = this;
    const isRoot = cluster.level < 0;
    $("panel").replaceChildren(...[
      element("div", { class: "bar" },
        element("h2", {}, isRoot ? `${count(cluster.n)} windows in ${this.tree.branching.join(" × ")} clusters` : cluster.name),
        isRoot ? null : element("button", { type: "button", class: "small", onclick: () => this.actions.use(cluster.largestLeaf.path) }, cluster.isLeaf ? "Use as memory" : "Use its largest leaf as memory")),
      isRoot ? element("p", { class: "soft" }, "Choose a cluster in the tree to see what it holds.") : element("p", { class: "soft" }, `Cluster ${cluster.path}`),
      this.error ? element("p", { class: "error", role: "alert" }, this.error) : null,
      this.facts(cluster, told ?? {}),
      ...section("Terms", this.terms(cluster, told)),
      ...section("Examples", this.examples(told)),
      ...section(element("span", {}, "Children ", element("small", {}, "windows, share, fetches")), this.children(cluster)),
    ].filter(Boolean));
  }

  facts(cluster, told) {
    return facts([
      ["level", cluster.level < 0 ? null : `${cluster.level + 1} of ${this.tree.nLevels}`],
      ["windows", cluster.level < 0 ? null : count(told.n_windows ?? cluster.n)],
      ["share", cluster.level < 0 ? null : cluster.level ? `${percent(cluster.share)} of its parent, ${percent(cluster.n / Math.max(this.tree.root.n, 1))} of all` : `${percent(cluster.share)} of all`],
      ["updates", cluster.level < 0 || told.updates === undefined || told.updates === null ? null : `${count(told.updates)} in training`],
      ["fetched", element("span", { "data-fetches": "" }, count(cluster.fetches))],
    ]);
  }

  terms(cluster, told) {
    const terms = told?.terms?.length ? told.terms : cluster.terms.map((term) => ({ term }));
    if (!terms.length) return null;
    const chip = ({ term, weight }) => element("li", {}, element("button", { type: "button", title: `Search this term${weight === undefined ? "" : ` (weight ${weight})`}`, onclick: () => this.actions.search(term) }, term));
    return element("ul", { class: "terms" }, ...terms.map(chip));
  }

  examples(told) {
    if (!told?.examples?.length) return null;
    const example = ({ title, text }) => element("li", {}, title ? element("b", {}, title) : null, element("p", {}, text));
    return element("ul", { class: "texts" }, ...told.examples.map(example));
  }

  children(cluster) {
    const shown = cluster.children.slice(0, CHILDREN_SHOWN);
    if (!shown.length) return null;
    const bar = (child) => element("li", { style: { "--share": `${100 * child.share}%` } },
      element("button", { type: "button", onclick: () => this.actions.zoom(child) },
        element("span", {}, `${child.index}  ${child.name}`), element("span", { "data-child": child.index }, this.childCounts(child))));
    const rest = cluster.children.length - shown.length;
    return element("div", {}, element("ul", { class: "bars" }, ...shown.map(bar)), rest ? element("p", { class: "soft" }, `and ${count(rest)} smaller ones`) : null);
  }
}

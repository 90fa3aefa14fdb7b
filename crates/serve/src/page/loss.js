// The loss of a text by token, with three memories beside each other.

import { isAbort, post } from "./api.js";
import { $, count, element, memoryHead, number, signed } from "./dom.js";

const MOST_LOSS = 8; // nats of the strongest colour
const MOST_DIFFERENCE = 3; // nats, either way

export class Loss {
  /** `page`: memories, bank(), model(), memory() a path or "". */
  constructor(page) {
    this.page = page;
    this.columns = [];
    $("score").addEventListener("submit", (event) => {
      event.preventDefault();
      this.go();
    });
    $("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("score").requestSubmit();
    });
    $("shades").addEventListener("change", () => this.shade());
  }

  get shadesDifference() {
    return $("shades").querySelector(":checked").value === "difference";
  }

  async go() {
    const text = $("text").value;
    if (!text.trim()) {
      $("score-error").textContent = "There is no text yet.";
      return $("text").focus();
    }
    this.running?.abort();
    const running = (this.running = new AbortController());
    $("score-error").textContent = "";
    $("scored").setAttribute("aria-busy", "true");
    const request = { model: this.page.model(), prompt: text, bank: this.page.bank(), max_tokens: 0, echo: true, logprobs: 1 };
    const path = this.page.memory();
    try {
      const replies = await Promise.all(this.page.memories.map((memory) => post("v1/completions", { ...request, memory: memory.ask(path) }, running.signal)));
      this.show(replies);
    } catch (error) {
      if (isAbort(error)) return;
      running.abort();
      $("score-error").textContent = error.message;
    }
    $("scored").removeAttribute("aria-busy");
  }

  show(replies) {
    this.columns = replies.map((reply, i) => {
      const { tokens, token_logprobs: logprobs, top_logprobs: likeliest } = reply.choices[0].logprobs;
      const losses = logprobs.map((logprob) => (logprob === null ? null : -logprob));
      return { memory: this.page.memories[i], tokens, losses, likeliest: likeliest ?? [], path: reply.anchorage?.path };
    });
    $("scored").hidden = false;
    $("token").textContent = "Point at a token, or step through them with the arrow keys.";
    $("scores").replaceChildren(...this.columns.map((column, i) => this.draw(column, i)));
    this.shade();
  }

  draw(column, i) {
    column.spans = column.tokens.map((token, at) => element("span", { role: "option", id: `t-${i}-${at}`, "aria-selected": "false", "aria-label": this.about(i, at), "data-at": at }, shown(token)));
    const list = element("div", { class: "tokens", role: "listbox", tabindex: 0, "aria-label": `Tokens with memory ${column.memory.name}` }, ...column.spans);
    list.addEventListener("pointerover", (event) => this.point(i, event.target.dataset.at));
    list.addEventListener("click", (event) => this.point(i, event.target.dataset.at));
    list.addEventListener("focus", () => this.point(i, this.at ?? 0));
    list.addEventListener("keydown", (event) => this.key(event, i));
    column.list = list;
    const { mean, n } = meanOf(column.losses);
    const none = meanOf(this.columns[0].losses).mean;
    const change = i ? ` (${signed(mean - none, 3)})` : "";
    const means = element("dl", {},
      element("dt", {}, "nats per token"), element("dd", {}, element("b", {}, number(mean, 3)), change),
      element("dt", {}, "perplexity"), element("dd", {}, number(Math.exp(mean), 2)),
      element("dt", {}, "tokens"), element("dd", {}, count(n)));
    const meaning = column.memory.name === "fetched" && column.path ? `the blocks of ${column.path}` : column.memory.meaning;
    return element("article", {}, memoryHead(column.memory, meaning), list, means);
  }

  // ---- one token ----

  /** What is known of a token, in words. The first has no loss: nothing comes before it. */
  about(i, at) {
    const { memory, tokens, losses } = this.columns[i];
    const told = losses[at] === null || losses[at] === undefined ? "no loss" : `${number(losses[at], 2)} nats with ${memory.name}`;
    const difference = this.difference(2, at);
    return `“${shown(tokens[at]).trim() || "space"}”, ${told}${difference === null ? "" : `, fetched against none ${signed(difference, 2)}`}`;
  }

  difference(i, at) {
    const [none, with_] = [this.columns[0].losses[at], this.columns[i]?.losses[at]];
    return known(none) && known(with_) ? with_ - none : null;
  }

  point(i, given) {
    if (given === undefined) return;
    const at = Number(given);
    for (const column of this.columns) {
      column.spans[this.at]?.classList.remove("at");
      column.spans[this.at]?.setAttribute("aria-selected", "false");
      column.spans[at]?.classList.add("at");
      column.spans[at]?.setAttribute("aria-selected", "true");
      column.list.setAttribute("aria-activedescendant", column.spans[at]?.id ?? "");
    }
    this.at = at;
    const losses = this.columns.map(({ memory, losses }) => element("span", { class: `m-${memory.name}` }, element("i", { class: "mark" }), `${memory.name} ${number(losses[at], 2)}`));
    const difference = this.difference(2, at);
    const likeliest = Object.entries(this.columns[i].likeliest[at] ?? {}).sort((a, b) => b[1] - a[1])[0];
    $("token").replaceChildren(element("b", {}, `“${shown(this.columns[i].tokens[at])}”`), ...losses,
      element("span", {}, at === 0 ? "the first token has no loss" : difference === null ? "" : `fetched against none ${signed(difference, 2)} nats`),
      likeliest && likeliest[0] !== this.columns[i].tokens[at] ? element("span", { class: "soft" }, `${this.columns[i].memory.name} expected “${shown(likeliest[0])}” (${number(100 * Math.exp(likeliest[1]), 0)} %)`) : "");
  }

  key(event, i) {
    const last = this.columns[i].tokens.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, ArrowDown: this.at + 10, ArrowUp: this.at - 10, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.point(i, Math.max(0, Math.min(to, last)));
    const span = this.columns[i].spans[this.at];
    span.scrollIntoView({ block: "nearest" });
  }

  // ---- colours ----

  shade() {
    if (!this.columns.length) return;
    const byDifference = this.shadesDifference;
    for (const [i, column] of this.columns.entries()) {
      const asDifference = byDifference && i > 0;
      for (const [at, span] of column.spans.entries()) {
        const value = asDifference ? this.difference(i, at) : column.losses[at];
        const strength = known(value) ? Math.min(Math.abs(value) / (asDifference ? MOST_DIFFERENCE : MOST_LOSS), 1) : 0;
        span.className = `${asDifference && value < 0 ? "better" : "worse"}${at === this.at ? " at" : ""}`;
        span.style.setProperty("--strength", `${Math.round(100 * strength)}%`);
      }
    }
    const step = (kind, strength) => element("i", { class: kind, style: { "--strength": `${strength}%` } });
    const steps = (kind, from) => [0, 25, 50, 75, 100].map((s) => step(kind, Math.abs(from - s)));
    $("scale").replaceChildren(...(byDifference
      ? [`−${MOST_DIFFERENCE} nats, better than none`, ...steps("better", 100), ...steps("worse", 0), `+${MOST_DIFFERENCE}, worse`]
      : ["0 nats", ...steps("worse", 0), `${MOST_LOSS} and more`]));
  }
}

const known = (x) => typeof x === "number" && Number.isFinite(x);
// A part of a character has no text of its own.
const shown = (token) => token.replace(/^token_id:\d+$/, "▫").replaceAll("\n", "↵\n").replaceAll("\t", "⇥");

function meanOf(losses) {
  const scored = losses.filter(known);
  return { n: scored.length, mean: scored.reduce((sum, loss) => sum + loss, 0) / scored.length };
}

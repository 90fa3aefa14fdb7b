// A prompt: where it is routed to while it is typed, and its continuations with three memories.

import { isAbort, post, stream } from "./api.js";
import { $, count, element, later, memoryHead, number } from "./dom.js";

const ROUTES = 8; // asked for and lit
const ROUTES_LISTED = 4;
const WAIT_MS = 250; // after the last key
const GIVEN_CHARS = 90; // of the prompt's end, before a continuation
const PARTS = ["queue", "route", "fetch", "prefill", "decode"];

export class Prompt {
  /** `page`: tree or null of a run without memory, memories, bank(), model(), light(paths), zoom(cluster), changed(). */
  constructor(page) {
    this.page = page;
    this.answers = [];
    const ask = later(WAIT_MS, () => this.route());
    $("prompt").addEventListener("input", () => {
      page.changed();
      ask();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
    $("memory").addEventListener("input", () => {
      this.checkMemory();
      page.changed();
    });
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.go();
    });
    $("stop").addEventListener("click", () => this.running?.abort());
  }

  // ---- the path ----

  async route() {
    if (!this.page.tree) return;
    this.routing?.abort();
    const text = $("prompt").value;
    if (!text.trim()) return this.routed([]);
    const routing = (this.routing = new AbortController());
    try {
      const { routes } = await post("v1/route", { texts: [text], n: ROUTES }, routing.signal);
      $("ask-error").textContent = "";
      this.routed(routes[0]);
    } catch (error) {
      if (!isAbort(error)) $("ask-error").textContent = `The text is not routed: ${error.message}.`;
    }
  }

  routed(routes) {
    this.page.light(routes.map((route) => route.path));
    const [best, worst] = [routes[0]?.score ?? 0, routes.at(-1)?.score ?? 0];
    $("routes").replaceChildren(...routes.slice(0, ROUTES_LISTED).map(({ path, distance, score }) => {
      const leaf = this.page.tree.find(path);
      // From the worst of those asked for, which keeps a tenth, to the best: cosines differ little.
      const share = best > worst ? 0.1 + (0.9 * (score - worst)) / (best - worst) : 1;
      return element("li", { style: { "--share": `${100 * share}%` } },
        element("button", { type: "button", title: `cosine ${number(score, 4)}, distance ${number(distance, 4)}`, onclick: () => leaf && this.page.zoom(leaf) },
          element("span", {}, element("b", {}, path), ` ${leaf?.name ?? ""}`), element("span", {}, number(score, 3))));
    }));
  }

  // ---- continuations ----

  /** Memory is that of a whole path; which clusters there are, the server knows. */
  checkMemory() {
    const path = $("memory").value.trim();
    const [found, expected] = [path.split("/").length, this.page.tree?.nLevels ?? 0];
    $("memory").setCustomValidity(path && found !== expected ? `Expected ${expected} indices, one a level, found ${found}.` : "");
  }

  async go() {
    if (!$("prompt").value.trim()) {
      $("ask-error").textContent = "There is no prompt yet.";
      return $("prompt").focus();
    }
    this.running?.abort();
    const running = (this.running = new AbortController());
    $("ask-error").textContent = $("said").textContent = "";
    const prompt = $("prompt").value;
    const path = $("memory").value.trim();
    this.answers = this.page.memories.map((memory) => new Answer(memory, memory.name === "fetched" && path ? `the blocks of cluster ${path}` : memory.meaning, prompt));
    $("answers").hidden = false;
    $("answers").replaceChildren(...this.answers.map((answer) => answer.box));
    $("stop").hidden = false;
    const options = {
      model: this.page.model(), prompt, bank: this.page.bank(), stream: true, stream_options: { include_usage: true },
      max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value), top_p: Number($("top-p").value), seed: Number($("seed").value),
    };
    await Promise.all(this.answers.map((answer) => answer.run({ ...options, memory: answer.memory.ask(path) }, running.signal, () => this.scale())));
    if (this.running !== running) return;
    $("stop").hidden = true;
    $("said").textContent = this.answers.map((answer) => answer.summary).join(" ");
  }

  // Bars of all answers have one scale.
  scale() {
    const longest = Math.max(...this.answers.map((answer) => answer.total), 1);
    for (const answer of this.answers) answer.drawBar(longest);
  }
}

/** One continuation. */
class Answer {
  constructor(memory, meaning, prompt) {
    this.memory = memory;
    this.total = 0; // milliseconds, of all parts
    this.summary = "";
    const given = prompt.length > GIVEN_CHARS ? `…${prompt.slice(-GIVEN_CHARS)}` : prompt;
    this.text = element("span", { class: "new" });
    this.facts = element("p", { class: "soft" }, "waiting");
    this.error = element("p", { class: "error", role: "alert" });
    this.bar = element("div", { class: "latency", role: "img", hidden: "" });
    this.key = element("p", { class: "parts", "aria-hidden": "true" });
    this.box = element("article", {}, memoryHead(memory, meaning), element("p", { class: "answer" }, element("span", { class: "given" }, given), this.text), this.error, this.facts, this.bar, this.key);
  }

  async run(request, signal, changed) {
    const start = performance.now();
    let [first, n, usage, told] = [null, 0, null, null];
    try {
      for await (const chunk of stream("v1/completions", request, signal)) {
        const text = chunk.choices?.[0]?.text;
        if (text) {
          first ??= performance.now();
          n++;
          this.text.append(text);
          this.facts.textContent = `${count(n)} tokens`;
        }
        usage = chunk.usage ?? usage;
        told = chunk.anchorage ?? told;
      }
      this.done(usage?.completion_tokens ?? n, told ?? {}, performance.now() - (first ?? start));
      changed();
    } catch (error) {
      this.facts.textContent = isAbort(error) ? `stopped after ${count(n)} tokens` : "";
      if (!isAbort(error)) this.error.textContent = error.message;
      this.summary = `${this.memory.name}: ${isAbort(error) ? "stopped" : error.message}.`;
    }
  }

  // `streamed`: milliseconds from the first piece to the last, where the server does not tell how long it decoded.
  done(n, told, streamed) {
    this.timing = told.timing ?? {};
    this.total = PARTS.reduce((sum, part) => sum + this.ms(part), 0);
    const rate = (1000 * n) / (this.ms("decode") || streamed);
    const memory = told.path ? `path ${told.path}` : this.memory.name === "none" ? "no memory" : this.memory.name === "generic" ? "generic path" : "no path";
    const notes = [
      told.blocked?.length ? `blocked ${told.blocked.join(", ")}` : null,
      told.rerouted?.length ? `routed again ${count(told.rerouted.length)} times, last to ${told.rerouted.at(-1).path}` : null,
    ].filter(Boolean);
    this.facts.replaceChildren(element("b", {}, `${number(rate, 1)} tokens/s`), ` · ${count(n)} tokens · ${[memory, ...notes].join(" · ")}`);
    this.summary = `${this.memory.name}: ${count(n)} tokens, ${number(rate, 1)} a second, ${memory}.`;
  }

  ms(part) {
    return this.timing?.[`${part}_ms`] ?? 0;
  }

  drawBar(longest) {
    if (!this.total) return;
    const told = PARTS.map((part) => `${part} ${number(this.ms(part), this.ms(part) < 100 ? 1 : 0)}`);
    this.bar.hidden = false;
    this.bar.setAttribute("aria-label", `Milliseconds: ${told.join(", ")}`);
    this.bar.replaceChildren(...PARTS.map((part) => element("i", { class: `p-${part}`, title: `${part} ${number(this.ms(part), 1)} ms`, style: { width: `${(100 * this.ms(part)) / longest}%` } })));
    this.key.replaceChildren(...PARTS.map((part, i) => element("span", {}, element("i", { class: `p-${part}` }), told[i])), "milliseconds");
  }
}

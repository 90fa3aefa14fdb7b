// The page: loads what is served, joins the parts, keeps the state in the address.

import { get, onRefused, setKey } from "./api.js";
import { $, MEMORIES, count, element, later, short } from "./dom.js";
import { Loss } from "./loss.js";
import { TreeMap } from "./map.js";
import { Panel } from "./panel.js";
import { Prompt } from "./prompt.js";
import { Tree } from "./tree.js";

const POLL_MS = 3000;
const POLL_AFTER_ERROR_MS = 15000;

let model = null;
let banks = [];
let [map, panel, prompt] = [null, null, null];

// ---- the address ----

const changed = later(250, () => {
  const state = new URLSearchParams();
  const cluster = map?.state.chosen.path;
  if (cluster) state.set("cluster", cluster);
  if ($("prompt").value) state.set("prompt", $("prompt").value);
  if ($("memory").value.trim()) state.set("memory", $("memory").value.trim());
  const hash = state.toString().replaceAll("%2F", "/");
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
});

function readAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  $("prompt").value = state.get("prompt") ?? "";
  $("memory").value = state.get("memory") ?? "";
  prompt.checkMemory();
  const cluster = map?.tree.find(state.get("cluster") ?? "");
  if (cluster) map.zoom(cluster);
  else if (map) $("map-said").textContent = `There is no cluster ${state.get("cluster")}.`;
  prompt.route();
}

// ---- what is served ----

function showServed() {
  const about = model.anchorage ?? {};
  const facts = [["run", about.run ?? model.id], ["step", count(about.step)], ["parameters", short(about.parameters)]].filter(([, value]) => value !== "–");
  $("facts").replaceChildren(...facts.map(([key, value]) => element("div", {}, element("dt", {}, key), element("dd", {}, value))));
  const before = $("bank").value;
  $("bank").replaceChildren(...banks.map(({ name }) => element("option", { value: name }, name)));
  $("bank").disabled = banks.length === 0;
  if (banks.some(({ name }) => name === before)) $("bank").value = before;
  showBank();
  document.title = `${about.run ?? model.id} · Anchorage`;
}

function showBank() {
  const bank = banks.find(({ name }) => name === $("bank").value) ?? {};
  const facts = [bank.step === undefined ? null : `step ${count(bank.step)}`, bank.dtype, bank.n_parameters ? `${short(bank.n_parameters)} parameters` : null];
  $("bank-facts").title = bank.source ?? "";
  $("bank-facts").textContent = facts.filter(Boolean).join(" · ");
}

function useAsMemory(path) {
  $("memory").value = path;
  prompt.checkMemory();
  changed();
  $("memory").scrollIntoView({ block: "nearest" });
  $("memory").focus({ preventScroll: true });
}

// `tree` is null of a run without memory: what is about memory is not shown then.
function join(tree) {
  if (tree) {
    map = new TreeMap(tree, (cluster) => {
      panel.show(cluster);
      changed();
    });
    panel = new Panel(tree, { zoom: (cluster) => map.zoom(cluster), search: (term) => map.search(term), use: useAsMemory });
    panel.show(tree.root);
    poll();
  }
  const page = { tree, memories: tree ? MEMORIES : MEMORIES.slice(0, 1), changed, bank: () => $("bank").value || undefined, model: () => model.id, memory: () => $("memory").value.trim(), light: (paths) => map.light(paths), zoom: (cluster) => map.zoom(cluster) };
  prompt = new Prompt(page);
  new Loss(page);
  readAddress();
  addEventListener("hashchange", readAddress);
}

async function readTree() {
  try {
    return new Tree(await get("v1/tree"));
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

async function start() {
  $("status").textContent = "";
  try {
    const [models, found] = await Promise.all([get("v1/models"), get("v1/banks")]);
    model = models.data[0];
    banks = found.banks;
    showServed();
    if (prompt) return;
    $("reading").textContent = "Reading the tree …";
    const tree = await readTree();
    $("reading").textContent = "";
    document.querySelector("main").hidden = false; // first: the map takes its size
    document.body.classList.toggle("without", tree === null);
    join(tree);
  } catch (error) {
    $("reading").textContent = "";
    $("status").textContent = `What is served cannot be shown: ${error.message}.`;
  }
}

// Counts of fetches, while someone can see them.
async function poll() {
  let wait = POLL_MS;
  if (document.visibilityState === "visible") {
    try {
      if (map.tree.count((await get("v1/tree/fetches")).levels)) {
        map.counted();
        panel.counted();
      }
    } catch {
      wait = POLL_AFTER_ERROR_MS; // Shown where something is asked for; this is only a layer of the map.
    }
  }
  setTimeout(poll, wait);
}

// ---- the key ----

onRefused((had) => {
  $("key-form").hidden = false;
  $("key").setAttribute("aria-invalid", String(had));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  start();
});

$("bank").addEventListener("change", showBank);
document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  $("search").focus();
  event.preventDefault();
});

start();

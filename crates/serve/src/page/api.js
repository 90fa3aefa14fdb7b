// Requests to the server that the page came from. Addresses are relative, so that a proxy may add a prefix.

const KEY = "anchorage-key";

/** What went wrong, in one line for a reader. `status` is that of HTTP, or 0 without an answer. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const isAbort = (error) => error.name === "AbortError";

let refused = () => {};

/** `run` is called when the server asks for a key. */
export function onRefused(run) {
  refused = run;
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function failure(reply) {
  let message = `${reply.status} ${reply.statusText}`.trim();
  try {
    const told = (await reply.json()).error;
    message = (typeof told === "string" ? told : told.message) ?? message;
  } catch {
    // Not JSON: a proxy answered. The status has to do.
  }
  const wait = reply.headers.get("retry-after");
  return new Failure(reply.status, reply.status === 429 && wait ? `${message}; try again in ${wait} s` : message);
}

async function send(path, options) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    throw isAbort(error) ? error : new Failure(0, "the server does not answer");
  }
  if (reply.ok) return reply;
  if (reply.status === 401) refused(key !== null);
  throw await failure(reply);
}

const body = (value) => ({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) });

export const get = async (path, signal) => (await send(path, { signal })).json();
export const post = async (path, value, signal) => (await send(path, { ...body(value), signal })).json();

/** The values of server-sent events, as objects, until `[DONE]`. An event that tells of an error is thrown. */
export async function* stream(path, value, signal) {
  const reply = await send(path, { ...body(value), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value: text, done } = await reader.read();
      const events = (rest + (text ?? "")).split(/\r?\n\r?\n/);
      rest = done ? "" : events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const told = JSON.parse(data);
        if (told.error) throw new Failure(200, told.error.message ?? String(told.error));
        yield told;
      }
      if (done) throw new Failure(200, "the answer ended before it was done");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

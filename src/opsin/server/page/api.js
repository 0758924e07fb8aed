// The server's HTTP interface: one streamed question, small documents, and the key.

const STORE = "opsin-key";
const PATIENCE_MS = 10000;

/** The API key lives as long as the tab. */
export const apiKey = {
  get: () => sessionStorage.getItem(STORE) ?? "",
  set: (value) => sessionStorage.setItem(STORE, value),
};

/** The server said no, or broke off; `status` is 0 once an answer had begun. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  const key = apiKey.get();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// A proxy may have put a path in front of all addresses.
const ROOT = new URL("..", import.meta.url);

/** Where a path of the server is from here. */
export function at(path) {
  return new URL(`.${path}`, ROOT);
}

/** Read a small document; raises Refused, or what fetch raises. */
export async function get(path) {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch(at(path), { headers: headers(), cache: "no-store", signal });
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Ask, and yield the stream's events as they come; raises Refused. */
export async function* ask(body, signal) {
  const response = await fetch(at("/v1/chat/completions"), {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(event.error.message);
    yield event;
  }
  throw new Refused("The connection ended before the answer did: ask again.");
}

/** The data of each server-sent event; comments keep the connection alive and carry nothing. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) {
        data.push(line.slice(5).trimStart());
      } else if (line === "" && data.length > 0) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function refusal(response) {
  const fallback = `The server answered with status ${response.status}.`;
  const body = await response.json().catch(() => null);
  return new Refused(body?.error?.message ?? fallback, response.status);
}

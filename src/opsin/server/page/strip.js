// The live strip: throughput, queue and KV cache, read from /metrics while the page is looked at.

import { Refused, get } from "./api.js";
import { amount, byId, count } from "./dom.js";

const EVERY_MS = 2000;
const KEPT = 30;

/** The sum of a metric's samples over all labels; null when there is none. */
function reading(text, name) {
  let sum = null;
  for (const line of text.split("\n")) {
    const [, found, value] = /^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)/.exec(line) ?? [];
    if (found === name) sum = (sum ?? 0) + Number(value);
  }
  return sum;
}

/** Polls as long as the page is looked at, and tells `connection` each time whether the server is there. */
export class Strip {
  #path = "/metrics";
  #timer = 0;
  #tokens = null;
  #at = 0;
  #rates = [];

  constructor(connection) {
    this.node = byId("strip");
    this.connection = connection;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.#timer);
      if (!document.hidden) this.#look();
    });
  }

  /** Begin, or begin again after a key was given. */
  start() {
    this.#path = "/metrics";
    this.#look();
  }

  async #look() {
    let there = true;
    try {
      const reply = await (await get(this.#path)).text();
      if (this.#path === "/metrics") this.#draw(reply);
    } catch (error) {
      this.node.hidden = true;
      there = error instanceof Refused && error.status < 500;
      // Metrics may need a key; whether the server is there can be asked without one.
      if (there) this.#path = "/health";
    }
    this.connection(there);
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(), EVERY_MS);
  }

  #draw(text) {
    const now = performance.now();
    const tokens = reading(text, "opsin:generation_tokens_total");
    const grown = this.#tokens === null ? 0 : tokens - this.#tokens;
    // The count begins again at 0 when the server is started again.
    const rate = this.#at > 0 ? Math.max(0, grown) / ((now - this.#at) / 1000) : 0;
    this.#tokens = tokens;
    this.#at = now;
    this.#rates = [...this.#rates, rate].slice(-KEPT);
    byId("rate").textContent = rate > 0 ? amount(rate) : "0";
    byId("running").textContent = count(reading(text, "opsin:num_requests_running") ?? 0);
    byId("waiting").textContent = count(reading(text, "opsin:num_requests_waiting") ?? 0);
    byId("kv").textContent = `${count(100 * (reading(text, "opsin:kv_cache_usage_perc") ?? 0))} %`;
    const top = Math.max(1, ...this.#rates);
    const from = KEPT - this.#rates.length;
    const points = this.#rates.map((value, at) => `${from + at},${(15 - (14 * value) / top).toFixed(1)}`);
    this.node.querySelector("polyline").setAttribute("points", points.join(" "));
    this.node.hidden = tokens === null;
  }
}

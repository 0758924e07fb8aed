// The live strip: throughput, queue and KV cache, read from /metrics while the page is looked at.

import { Refused, get } from "./api.js";
import { amount, byId, count } from "./dom.js";

const EVERY_MS = 2000;
const KEPT = 30;

/** The sum of a metric's samples over all labels; null when there is none. */
export function reading(text, name) {
  let sum = null;
  for (const line of text.split("\n")) {
    const [, found, value] = /^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)/.exec(line) ?? [];
    if (found === name) sum = (sum ?? 0) + Number(value);
  }
  return sum;
}

/** Polls until the server says no; `start` may be called again, after a key was given. */
export class Strip {
  #timer = 0;
  #running = false;
  #tokens = null;
  #at = 0;
  #rates = [];

  constructor() {
    this.node = byId("strip");
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.#timer);
      if (this.#running && !document.hidden) this.#look();
    });
  }

  start() {
    if (this.#running) return;
    this.#running = true;
    this.#look();
  }

  async #look() {
    try {
      this.#draw(await (await get("/metrics")).text());
    } catch (error) {
      this.node.hidden = true;
      // A server that is down may come back; one that says no will go on saying so.
      if (error instanceof Refused && error.status < 500) {
        this.#running = false;
        return;
      }
    }
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

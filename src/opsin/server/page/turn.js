// One question and its answer, with the account under it.

import { amount, count, el, several, time } from "./dom.js";
import { waterfall } from "./waterfall.js";

const GUARD = {
  cycle: "it went round in circles",
  drift: "it went on without saying anything new",
  compression: "it repeated the same few things",
};
const TURNED = {
  2: "mirrored back",
  3: "turned by 180°",
  4: "turned by 180° and mirrored back",
  5: "turned by 90° and mirrored back",
  6: "turned by 90° clockwise",
  7: "turned by 90° and mirrored back",
  8: "turned by 90° counter-clockwise",
};

export class Turn {
  #text = document.createTextNode("");
  #thought = null;
  #began = performance.now();
  #first = null;
  #last = null;
  #pause = 0;
  #clock = 0;

  constructor(question, sees) {
    const elapsed = el("span", { "aria-hidden": "true" });
    this.#clock = setInterval(() => {
      elapsed.textContent = ` ${((performance.now() - this.#began) / 1000).toFixed(1)} s`;
    }, 100);
    this.status = el("p", { class: "quiet status", role: "status" }, sees ? "Looking…" : "Thinking…", elapsed);
    this.answer = el("div", { class: "answer", "aria-live": "polite", "aria-busy": "true" }, this.#text);
    this.notes = el("div", { class: "notes" });
    this.account = el("section", { class: "account", "aria-label": "Account of this answer", hidden: true });
    this.node = el(
      "article",
      { class: "turn" },
      el("h2", { class: "question" }, question),
      this.answer,
      this.status,
      this.notes,
      this.account,
    );
  }

  get text() {
    return this.#text.data;
  }

  /** A piece of the answer came. */
  say(piece) {
    this.#arrived();
    this.#text.appendData(piece);
  }

  /** A piece of the model's reasoning came. */
  think(piece) {
    this.#arrived();
    if (this.#thought === null) {
      this.#thought = document.createTextNode("");
      this.answer.before(el("details", { class: "thought" }, el("summary", {}, "Reasoning"), el("p", {}, this.#thought)));
    }
    this.#thought.appendData(piece);
  }

  /** The answer is whole; `account` is what the last events told. */
  finish(account) {
    this.#settle();
    if (this.text === "") this.#note("The answer is empty: the model had nothing to say.");
    if (account.guard) {
      const why = GUARD[account.guard.reason] ?? account.guard.reason;
      this.#note(`The guard ended this answer at token ${count(account.guard.at_token)}: ${why}.`);
    } else if (account.finish === "length") {
      this.#note(limitSentence(account));
    }
    if (account.stages) this.#explain(account);
  }

  /** The person stopped the answer. */
  stop() {
    this.#settle();
    this.#note("Stopped. A stopped answer has no account of its stages.");
  }

  /** The server refused, or broke off. */
  fail(message) {
    this.#settle();
    this.#note(message, "problem");
  }

  #arrived() {
    const now = performance.now();
    if (this.#first === null) {
      this.#first = now;
      this.#quiet();
    } else {
      this.#pause = Math.max(this.#pause, now - this.#last);
    }
    this.#last = now;
  }

  #quiet() {
    clearInterval(this.#clock);
    this.status.hidden = true;
  }

  #settle() {
    this.#quiet();
    this.answer.setAttribute("aria-busy", "false");
  }

  #note(text, kind = "note") {
    this.notes.append(el("p", { class: kind }, text));
  }

  #explain(account) {
    const { usage = {}, timings = {}, images = [] } = account;
    const facts = [
      ["in the server", time(account.stages.total_ms)],
      this.#first === null ? null : ["first token, seen here", time(this.#first - this.#began)],
      ["answer", several(usage.completion_tokens ?? timings.predicted_n ?? 0, "token")],
      timings.predicted_per_second > 0 ? ["tokens a second", amount(timings.predicted_per_second)] : null,
    ].filter(Boolean);
    const details = [
      ...images.map((image, at) => [images.length > 1 ? `Image ${at + 1}` : "Image", imageSentence(image)]),
      ["Prompt", promptSentence(usage)],
      images.length > 0 && account.placement ? ["Encoder", `ran on ${account.placement}`] : null,
      this.#pause > 0 ? ["Stream", `longest pause ${time(this.#pause)}, seen here`] : null,
    ].filter(Boolean);
    this.account.append(
      el("dl", { class: "facts" }, ...facts.map(pair)),
      waterfall(account),
      el("dl", { class: "details" }, ...details.map(pair)),
    );
    this.account.hidden = false;
    // An account that has room is brought into sight; a taller one must not push the answer out of it.
    const room = document.querySelector("footer").getBoundingClientRect().top - document.querySelector("header").offsetHeight;
    if (this.answer.offsetHeight + this.account.offsetHeight < room) this.account.scrollIntoView({ block: "nearest" });
  }
}

const pair = ([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text));

function imageSentence(image) {
  const turned = TURNED[image.orientation] ? `, ${TURNED[image.orientation]}` : "";
  const same = image.width === image.resized_width && image.height === image.resized_height;
  const size = same ? "seen at that size" : `resized to ${image.resized_width} × ${image.resized_height}`;
  const cached = image.cached ? "from the image cache: the encoder did not run" : "encoded for this answer";
  return `${image.width} × ${image.height}${turned}, ${size}, ${several(image.tiles, "tile")}, ${several(image.tokens, "token")}; ${cached}`;
}

function promptSentence(usage) {
  const all = usage.prompt_tokens ?? 0;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const origin = cached > 0 ? `${count(cached)} of them from the prefix cache` : "none of them from the prefix cache";
  return `${several(all, "token")}, ${origin}`;
}

function limitSentence({ limit, usage = {} }) {
  if (limit === "seconds") return "The answer was cut by the server's limit on time (--max-seconds).";
  if (limit === "context") return "The answer was cut because the context is full: begin a new conversation, or serve with a larger --ctx.";
  return `The answer was cut after ${several(usage.completion_tokens ?? 0, "token")}: a larger “Longest answer” below lifts the limit.`;
}

// One question and its answer, with the account under it.

import { amount, count, el, several, time } from "./dom.js";
import { follow } from "./follow.js";
import { waterfall } from "./waterfall.js";

const GUARD = {
  cycle: "it went round in circles",
  drift: "it went on without saying anything new",
  compression: "it repeated the same few things",
};
const ORIENTATION = {
  2: "mirrored back",
  3: "rotated by 180°",
  4: "rotated by 180° and mirrored back",
  5: "rotated by 90° and mirrored back",
  6: "rotated by 90° clockwise",
  7: "rotated by 90° and mirrored back",
  8: "rotated by 90° counter-clockwise",
};

/** A new record: what is kept of a turn. `account` collects what the server's events tell besides the text. */
export const begun = (text) => ({ text, images: [], answer: "", thought: "", account: {} });

export class Turn {
  cancel = new AbortController();
  #text = document.createTextNode("");
  #thought = null;
  #began = performance.now();
  #last = null;
  #clock = 0;

  constructor(record, sees) {
    this.record = record;
    const elapsed = el("span", { "aria-hidden": "true" });
    this.#clock = setInterval(() => {
      elapsed.textContent = ` ${((performance.now() - this.#began) / 1000).toFixed(1)} s`;
    }, 100);
    this.status = el("p", { class: "quiet status", role: "status" }, sees ? "Looking…" : "Thinking…", elapsed);
    this.answer = el("div", { class: "answer", "aria-live": "polite", "aria-busy": "true" }, this.#text);
    this.notes = el("div", { class: "notes" });
    this.account = el("div", { class: "account", role: "group", "aria-label": "Timings of this answer", hidden: true });
    this.node = el(
      "article",
      { class: "turn" },
      el("h2", { class: "question" }, record.text),
      this.answer,
      this.status,
      this.notes,
      this.account,
    );
  }

  /** A piece of the answer came. */
  say(piece) {
    this.#arrived();
    this.record.answer += piece;
    this.#text.appendData(piece);
    follow();
  }

  /** A piece of the model's reasoning came. */
  think(piece) {
    this.#arrived();
    if (this.#thought === null) {
      this.#thought = document.createTextNode("");
      this.answer.before(el("details", { class: "thought" }, el("summary", {}, "Reasoning"), el("p", {}, this.#thought)));
    }
    this.record.thought += piece;
    this.#thought.appendData(piece);
    follow();
  }

  /** Nothing more comes: show what the record's account says. */
  finish() {
    this.#settle();
    for (const sentence of notes(this.record)) this.#note(sentence);
    follow();
    if (this.record.account.stages) this.#explain();
  }

  /** The server refused, or broke off. */
  fail(message) {
    this.#settle();
    this.#note(message, "problem");
    follow();
  }

  /** What the reader sees is timed here, and stays in the account. */
  #arrived() {
    const now = performance.now();
    const { account } = this.record;
    if (this.#last === null) {
      account.first_ms ??= now - this.#began;
      this.#quiet();
    } else {
      account.pause_ms = Math.max(account.pause_ms ?? 0, now - this.#last);
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

  #explain() {
    const { account } = this.record;
    const { usage = {}, timings = {}, images = [] } = account;
    const facts = [
      ["in the server", time(account.stages.total_ms)],
      account.first_ms > 0 ? ["first token, seen here", time(account.first_ms)] : null,
      ["answer", several(usage.completion_tokens ?? timings.predicted_n ?? 0, "token")],
      timings.predicted_per_second > 0 ? ["tokens a second", amount(timings.predicted_per_second)] : null,
    ].filter(Boolean);
    const details = [
      ...images.map((image, at) => [images.length > 1 ? `Image ${at + 1}` : "Image", imageSentence(image)]),
      ["Prompt", promptSentence(usage)],
      images.length > 0 && account.placement ? ["Encoder", `ran on ${account.placement}`] : null,
      account.pause_ms > 0 ? ["Stream", `longest pause ${time(account.pause_ms)}, seen here`] : null,
    ].filter(Boolean);
    this.account.append(
      el("dl", { class: "facts" }, ...facts.map(pair)),
      waterfall(account),
      el("dl", { class: "details" }, ...details.map(pair)),
    );
    this.account.hidden = false;
    // An account that has room is brought into sight; a taller one must not push the answer out of it.
    const room = document.querySelector("footer").getBoundingClientRect().top - document.querySelector("header").offsetHeight;
    const fits = this.answer.offsetHeight + this.account.offsetHeight < room;
    if (fits && follow()) this.account.scrollIntoView({ block: "nearest" });
  }
}

const pair = ([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text));

/** What a reader should know of an answer besides its text. */
function notes({ answer, account, lost }) {
  const { demo, dropped, finish, guard } = account;
  const found = [];
  if (lost > 0) found.push(`Not kept over the reload: ${several(lost, "image")}. Add again what you want to ask about.`);
  if (finish === "stopped") found.push("Stopped. Timings are shown for complete answers only.");
  else if (answer === "") found.push("The answer is empty: the model had nothing to say.");
  if (guard) found.push(`The guard ended this answer at token ${count(guard.at_token)}: ${GUARD[guard.reason] ?? guard.reason}.`);
  else if (finish === "length") found.push(limitSentence(account));
  if (dropped > 0) found.push(`${several(dropped, "older image")} not sent: the conversation has more than this server takes.`);
  if (demo) {
    const known = "This is the demo model, which knows drawn scenes only. For photos, get another with ";
    const how = ", then start the server again.";
    found.push(el("span", {}, known, el("code", {}, "opsin pull qwen3-vl-4b"), how));
  }
  return found;
}

function imageSentence(image) {
  const rotated = ORIENTATION[image.orientation] ? `, ${ORIENTATION[image.orientation]}` : "";
  const same = image.width === image.resized_width && image.height === image.resized_height;
  const size = same ? "seen at that size" : `resized to ${image.resized_width} × ${image.resized_height}`;
  const cached = image.cached ? "from the image cache: the encoder did not run" : "encoded for this answer";
  return `${image.width} × ${image.height}${rotated}, ${size}, ${several(image.tiles, "tile")}, ${several(image.tokens, "token")}; ${cached}`;
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

// The stages of one answer as a table whose middle column is drawn: each bar begins where the one above it ended.

import { count, el, several, share, time } from "./dom.js";

/**
 * Name, label, and what the time was spent on: waiting, seeing the image, or saying the answer. In the order in which
 * a server comes to them; the three of each token take turns, and are drawn one after the other.
 */
const STAGES = [
  ["load_ms", "load model", "wait"],
  ["fetch_ms", "fetch", "wait"],
  ["image_decode_ms", "image decode", "see"],
  ["preprocess_ms", "preprocess", "see"],
  ["queue_ms", "queue", "wait"],
  ["encode_ms", "vision encode", "see"],
  ["image_prefill_ms", "image prefill", "see"],
  ["text_prefill_ms", "text prefill", "say"],
  ["decode_ms", "decode", "say"],
  ["sample_ms", "sample", "say"],
  ["detokenize_ms", "detokenize", "say"],
  ["other_ms", "other", "wait"],
];
const KINDS = { wait: "waiting", see: "seeing", say: "answering" };
const NOTHING_MS = 0.05;

/** The table of an account; a bar a stage, its milliseconds and its share. */
export function waterfall(account) {
  const stages = account.stages;
  const total = Math.max(stages.total_ms, NOTHING_MS);
  const rows = [];
  const idle = [];
  const sums = { wait: 0, see: 0, say: 0 };
  let before = 0;
  for (const [name, label, kind] of STAGES) {
    const ms = stages[name] ?? 0;
    const note = remark(name, account);
    // A stage that a cache spared is worth a row of its own.
    if (ms >= NOTHING_MS || note.spared) rows.push(row(label, kind, ms, before, total, note.text));
    else idle.push(label);
    sums[kind] += ms;
    before += ms;
  }
  const step = tick(total);
  const table = el(
    "table",
    { class: "waterfall", role: "table" },
    el("caption", {}, "Where the time went"),
    el("thead", { role: "rowgroup" }, line(head("stage"), axis(total, step), head("ms"), head("share"))),
    el("tbody", { role: "rowgroup" }, ...rows),
    el("tfoot", { role: "rowgroup" }, row("total", "", total, 0, total, "")),
  );
  table.style.setProperty("--step", `${(100 * step) / total}%`);
  return el("div", {}, table, legend(sums, total, idle));
}

const figure = (ms) => (ms < 100 ? ms.toFixed(1) : count(ms));
// Rows that a phone lays out as blocks are still read out as rows of a table: so their roles are written down.
const line = (...cells) => el("tr", { role: "row" }, ...cells);
const head = (name) => el("th", { scope: "col", role: "columnheader" }, name);
const cell = (text) => el("td", { role: "cell" }, text);

function row(label, kind, ms, before, total, note) {
  const name = el("th", { scope: "row", role: "rowheader" }, label, note ? el("small", {}, note) : null);
  return line(name, track(kind, ms, before, total), cell(figure(ms)), cell(share(ms, total)));
}

/** The drawn column; a row without a kind, the total's, has no bar. */
function track(kind, ms, before, total) {
  const track = el("td", { class: "track", "aria-hidden": "true" });
  if (kind && ms >= NOTHING_MS) {
    const bar = el("span", { class: `bar ${kind}` });
    bar.style.setProperty("--from", `${(100 * before) / total}%`);
    bar.style.setProperty("--length", `${(100 * ms) / total}%`);
    track.append(bar);
  }
  return track;
}

/** What went through a stage, as far as it is known; `spared` says that a cache made it needless. */
function remark(name, { usage = {}, images = [], stages, timings = {} }) {
  const seen = images.reduce((sum, image) => sum + image.tokens, 0);
  const prompt = usage.prompt_tokens ?? 0;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  if (name === "encode_ms" && images.length > 0) {
    const spared = images.every((image) => image.cached);
    return { text: spared ? "from the cache, not run" : several(seen, "token"), spared };
  }
  if (name === "image_prefill_ms" && cached === 0 && seen > 0) return { text: several(seen, "token") };
  if (name === "text_prefill_ms") {
    // Which of the cached tokens were of images is not told; without image prefill all that was computed is text.
    if (cached === 0) return { text: several(prompt - seen, "token") };
    if (stages.image_prefill_ms < NOTHING_MS) return { text: several(prompt - cached, "token") };
  }
  if (name === "decode_ms" && timings.predicted_n > 0) {
    return { text: `${several(timings.predicted_n, "token")}, ${count(timings.predicted_per_second)} a second` };
  }
  return {};
}

/** A round step that gives three to six marks. */
function tick(total) {
  const power = 10 ** Math.floor(Math.log10(total / 3));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => total / step <= 6) ?? 10 * power;
}

function axis(total, step) {
  const marks = [];
  for (let at = 0; at < total * 0.8; at += step) {
    const mark = el("span", {}, at === 0 ? "0" : time(at).replace(".0 ", " "));
    mark.style.setProperty("--from", `${(100 * at) / total}%`);
    marks.push(mark);
  }
  return el("th", { class: "axis", "aria-hidden": "true" }, ...marks);
}

function legend(sums, total, idle) {
  const parts = Object.entries(KINDS)
    .filter(([kind]) => sums[kind] >= NOTHING_MS)
    .map(([kind, label]) => el("span", { class: `key ${kind}` }, `${label} ${share(sums[kind], total)}`));
  const rest = idle.length > 0 ? el("span", {}, `No time: ${idle.join(", ")}`) : null;
  return el("p", { class: "legend quiet" }, ...parts, rest);
}

// The page's wiring: what people do, the conversation so far, and the connection to the server.

import { Refused, apiKey, ask, at, get } from "./api.js";
import { messagesOf, save, saved } from "./conversation.js";
import { byId, el, share } from "./dom.js";
import { begin } from "./follow.js";
import { Tray, dataAddress, shown } from "./images.js";
import { Strip } from "./strip.js";
import { Turn, begun } from "./turn.js";

const LOOK_AGAIN_MS = 1000;

const question = byId("question");
const strip = new Strip(connection);
const tray = new Tray(byId("tray"), (size) => {
  question.placeholder = size > 0 ? "What do you want to know?" : "Ask about an image";
});

let records = [];
let running = null;
let lost = false;
let lookAgain = 0;
let introduced = null;
const server = { model: "default", placement: "", demo: false, limits: { images: 16, bytes: 64 * 2 ** 20 } };

/** The model's name, the server's limits, and where the encoder was shown to run. */
async function introduce() {
  clearTimeout(lookAgain);
  try {
    const models = await (await get("/v1/models")).json();
    server.model = models.data[0].id;
    byId("model").textContent = server.model;
    const props = await (await get("/props")).json();
    server.demo = props.is_demo;
    server.limits = { images: props.max_images, bytes: props.max_body_bytes };
    server.placement = Object.entries(props.placement?.encoder ?? {})
      .filter(([, part]) => part.share_of_ops >= 0.005)
      .map(([backend, part]) => (part.share_of_ops > 0.995 ? backend : `${backend} (${share(part.share_of_ops, 1)})`))
      .join(" and ");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForKey();
    if (error instanceof Refused && error.status === 503) {
      byId("model").textContent = "loading the model…";
      lookAgain = setTimeout(introduce, LOOK_AGAIN_MS);
    }
  }
}

/** Show when the server is lost and when it is back, perhaps with another model. */
function connection(there) {
  if (there !== lost) return;
  lost = !there;
  const line = byId("connection");
  line.className = lost ? "problem" : "note";
  line.textContent = lost ? "The server does not answer. This page keeps trying to reach it." : "The server is back.";
  line.hidden = false;
  if (there) introduced = introduce();
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("unknown").hidden = apiKey.get() === "";
  byId("key").value = "";
  byId("key").focus();
}

function complain(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = text === "";
}

function addFiles(files) {
  const strange = tray.add(files);
  complain(strange.length ? `Not an image: ${strange.join(", ")}. Add JPEG, PNG, WebP, HEIC or the like.` : "");
  question.focus();
}

/** While an answer comes there is a way to stop it, and none to ask. */
function busy(turn) {
  running = turn;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("fresh").hidden = running !== null || byId("turns").childElementCount === 0;
}

async function send() {
  const text = question.value.trim();
  if (running) return;
  if (text === "") {
    complain("The question is empty: ask something.");
    question.focus();
    return;
  }
  complain("");
  byId("connection").hidden = !lost;
  const images = tray.take();
  const turn = new Turn(begun(text), images.length > 0);
  place(turn, images);
  question.value = "";
  question.focus();
  busy(turn);
  begin(images.length > 0 ? turn.node.closest(".group") : turn.node, turn.notes);
  try {
    await converse(turn, images);
  } catch (error) {
    if (turn.cancel.signal.aborted) stopped(turn, images);
    else refuse(error, turn, images);
  } finally {
    busy(null);
  }
}

/** Turns about the same images stand beside them. */
function place(turn, images) {
  const turns = byId("turns");
  if (images.length > 0 || turn.record.lost > 0 || turns.lastElementChild === null) {
    const seen = images.length > 0 ? el("div", { class: "images" }, ...images.map(shown)) : null;
    turns.append(el("section", { class: seen ? "group seeing" : "group" }, seen, el("div", { class: "column" })));
  }
  turns.lastElementChild.lastElementChild.append(turn.node);
  byId("welcome").hidden = true;
}

function withdraw(turn) {
  const column = turn.node.parentElement;
  turn.node.remove();
  if (column.childElementCount === 0) column.parentElement.remove();
  byId("welcome").hidden = byId("turns").childElementCount > 0;
}

/** Ask with the whole conversation; it grows only by what was answered. */
async function converse(turn, images) {
  const { record } = turn;
  const { account } = record;
  record.images = await Promise.all(images.map(async (image) => ({ name: image.name, data: await dataAddress(image) })));
  await introduced;
  const { messages, dropped } = messagesOf(records, record, server.limits);
  const body = { model: server.model, messages };
  const limit = Number.parseInt(byId("limit").value, 10);
  if (limit > 0) body.max_tokens = limit;
  account.placement = server.placement;
  account.demo = server.demo && !records.some((earlier) => earlier.account.demo);
  account.dropped = images.length > 0 ? dropped : 0;
  for await (const event of ask(body, turn.cancel.signal)) {
    for (const name of ["usage", "timings", "stages", "images", "guard", "limit"]) {
      if (event[name] != null) account[name] = event[name];
    }
    const choice = event.choices?.[0];
    if (choice?.delta?.reasoning_content) turn.think(choice.delta.reasoning_content);
    if (choice?.delta?.content) turn.say(choice.delta.content);
    if (choice?.finish_reason) account.finish = choice.finish_reason;
  }
  keep(turn);
}

function keep(turn) {
  turn.finish();
  records.push(turn.record);
  save(records);
}

function stopped(turn, images) {
  turn.record.account.finish = "stopped";
  if (turn.record.answer !== "") {
    keep(turn);
  } else {
    turn.finish();
    giveBack(turn.record.text, images);
  }
}

function refuse(error, turn, images) {
  giveBack(turn.record.text, images);
  if (error.status === 401) {
    withdraw(turn);
    askForKey();
  } else {
    const broken = "The connection to the server was lost: check that it is running, then ask again.";
    turn.fail(error instanceof TypeError ? broken : error.message);
  }
}

/** Question and images return to where they were written, so that nothing is lost. */
function giveBack(text, images) {
  if (question.value === "") question.value = text;
  tray.restore(images);
}

/** Show what a reload kept; a question without an answer returns to where it was written. */
function restore() {
  for (const record of saved()) {
    const images = record.images.map(({ name, data }) => ({ name, data, url: data }));
    if (record.answer === "" && record.account.finish === "stopped") {
      giveBack(record.text, images);
      continue;
    }
    const turn = new Turn({ ...record, answer: "", thought: "" });
    if (record.thought !== "") turn.think(record.thought);
    if (record.answer !== "") turn.say(record.answer);
    turn.finish();
    place(turn, images);
    records.push(turn.record);
  }
  busy(null);
}

function startAfresh() {
  for (const image of byId("turns").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  records = [];
  save(records);
  busy(null);
  question.focus();
}

async function takeExample() {
  const blob = await (await fetch(at("/page/example.png"))).blob();
  addFiles([new File([blob], "example.png", { type: "image/png" })]);
  if (question.value === "") question.value = "What do you see?";
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => {
  running?.cancel.abort();
  question.focus();
});
byId("fresh").addEventListener("click", startAfresh);
byId("example").addEventListener("click", takeExample);
for (const id of ["pick", "pick-first"]) byId(id).addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = "";
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key").value);
  byId("key-form").hidden = true;
  introduced = introduce();
  strip.start();
  if (question.value.trim() !== "") send();
  else question.focus();
});
document.addEventListener("keydown", (event) => {
  // These keys belong to an input method while it composes; Safari tells by the code alone.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Escape") running?.cancel.abort();
  if (event.key !== "Enter" || event.shiftKey || event.target !== question) return;
  event.preventDefault();
  send();
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  addFiles(event.clipboardData.files);
});
// A reload ends an answer that is under way: what came of it is kept.
addEventListener("pagehide", () => {
  if (running) save([...records, { ...running.record, account: { ...running.record.account, finish: "stopped" } }]);
});

// The whole page takes what is dropped. Entering a child leaves its parent, so the two are counted.
let depth = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const hovering = (change) => {
  depth = change === 0 ? 0 : Math.max(0, depth + change);
  byId("drop").hidden = depth === 0;
};
document.addEventListener("dragenter", (event) => carriesFiles(event) && hovering(1));
document.addEventListener("dragleave", (event) => carriesFiles(event) && hovering(-1));
const isText = (event) => !carriesFiles(event) && event.target === question;
document.addEventListener("dragover", (event) => isText(event) || event.preventDefault());
document.addEventListener("drop", (event) => {
  if (isText(event)) return;
  event.preventDefault();
  hovering(0);
  if (event.dataTransfer.files.length > 0) addFiles(event.dataTransfer.files);
  else complain("Only files can be dropped: save the image first, or copy and paste it.");
});

restore();
introduced = introduce();
strip.start();

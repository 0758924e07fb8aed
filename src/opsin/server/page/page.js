// The page's wiring: what people do, the conversation so far, and who is told.

import { Refused, apiKey, ask, at, get } from "./api.js";
import { byId, el, share } from "./dom.js";
import { Tray, dataAddress, shown } from "./images.js";
import { Strip } from "./strip.js";
import { Turn } from "./turn.js";

const LOOK_AGAIN_MS = 1000;

const question = byId("question");
const strip = new Strip();
const tray = new Tray(byId("tray"), (size) => {
  question.placeholder = size > 0 ? "What do you want to know?" : "Ask about an image";
});

let messages = [];
let running = null;
let model = "default";
let placement = "";

/** The model's name, and where the encoder was shown to run, as far as the server tells. */
async function introduce() {
  try {
    const models = await (await get("/v1/models")).json();
    model = models.data[0].id;
    byId("model").textContent = model;
    const props = await (await get("/props")).json();
    placement = Object.entries(props.placement?.encoder ?? {})
      .filter(([, part]) => part.share_of_ops >= 0.005)
      .map(([backend, part]) => (part.share_of_ops > 0.995 ? backend : `${backend} (${share(part.share_of_ops, 1)})`))
      .join(" and ");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForKey();
    if (error instanceof Refused && error.status === 503) {
      byId("model").textContent = "loading the model…";
      setTimeout(introduce, LOOK_AGAIN_MS);
    }
  }
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
  complain(strange.length ? `${strange.join(", ")} is no image: add JPEG, PNG, WebP, HEIC or the like.` : "");
  question.focus();
}

/** While an answer comes there is a way to stop it, and none to ask. */
function busy(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("fresh").hidden = running !== null || messages.length === 0;
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
  const images = tray.take();
  const turn = new Turn(text, images.length > 0);
  place(turn, images);
  question.value = "";
  question.focus();
  busy(new AbortController());
  (images.length > 0 ? turn.node.closest(".group") : turn.node).scrollIntoView({ block: "start" });
  try {
    await converse(turn, text, images);
  } catch (error) {
    if (running.signal.aborted) keepStopped(turn, text, images);
    else refuse(error, turn, text, images);
  } finally {
    busy(null);
  }
}

/** Turns about the same images stand beside them. */
function place(turn, images) {
  const turns = byId("turns");
  if (images.length > 0 || turns.lastElementChild === null) {
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
async function converse(turn, text, images) {
  const addresses = await Promise.all(images.map(dataAddress));
  const content = [
    ...addresses.map((url) => ({ type: "image_url", image_url: { url } })),
    { type: "text", text },
  ];
  turn.asked = { role: "user", content };
  const body = { model, messages: [...messages, turn.asked] };
  const limit = Number.parseInt(byId("limit").value, 10);
  if (limit > 0) body.max_tokens = limit;
  const account = { placement };
  for await (const event of ask(body, running.signal)) {
    for (const name of ["usage", "timings", "stages", "images", "guard", "limit"]) {
      if (event[name] != null) account[name] = event[name];
    }
    const choice = event.choices?.[0];
    if (choice?.delta?.reasoning_content) turn.think(choice.delta.reasoning_content);
    if (choice?.delta?.content) turn.say(choice.delta.content);
    if (choice?.finish_reason) account.finish = choice.finish_reason;
  }
  turn.finish(account);
  messages = [...messages, turn.asked, { role: "assistant", content: turn.text }];
}

function keepStopped(turn, text, images) {
  turn.stop();
  if (turn.text === "") giveBack(text, images);
  else messages = [...messages, turn.asked, { role: "assistant", content: turn.text }];
}

function refuse(error, turn, text, images) {
  giveBack(text, images);
  if (error.status === 401) {
    withdraw(turn);
    askForKey();
  } else {
    const lost = "The connection to the server is lost: see whether it is running, then ask again.";
    turn.fail(error instanceof TypeError ? lost : error.message);
  }
}

/** Question and images return to where they were written, so that nothing is lost. */
function giveBack(text, images) {
  if (question.value === "") question.value = text;
  tray.restore(images);
}

function startAfresh() {
  for (const image of byId("turns").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  messages = [];
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
byId("stop").addEventListener("click", () => running?.abort());
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
  introduce();
  strip.start();
  if (question.value.trim() !== "") send();
  else question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === question) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape") {
    running?.abort();
  }
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  addFiles(event.clipboardData.files);
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

introduce();
strip.start();

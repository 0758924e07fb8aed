// What is sent of the conversation, and what of it a reload keeps.

import { at } from "./api.js";

const STORE = `opsin-conversation ${at("/").pathname}`;
// Characters of images in the tab's storage. Browsers allow five million characters, some only half of that.
const ROOMS = [4_800_000, 2_300_000, 0];

const size = (image) => image.data.length;
const imagesOf = (records) => records.flatMap((record) => record.images);

/** The records without their oldest images, so that the others fit into the room. */
function fitting(records, room, cost) {
  let left = room;
  const fits = (image) => (left -= cost(image)) >= 0;
  return records.toReversed().map((record) => {
    return { ...record, images: record.images.toReversed().filter(fits).toReversed() };
  }).toReversed();
}

/** All messages with a new question, which keeps its own images, and how many older images are left out. */
export function messagesOf(records, asked, limits) {
  const own = asked.images.reduce((sum, image) => sum + size(image), 0);
  const few = fitting(records, limits.images - asked.images.length, () => 1);
  // Some of the body is text.
  const sent = fitting(few, 0.95 * limits.bytes - own, size);
  const messages = sent.flatMap((record) => [said(record), { role: "assistant", content: record.answer }]);
  return { messages: [...messages, said(asked)], dropped: imagesOf(records).length - imagesOf(sent).length };
}

function said({ text, images }) {
  const parts = images.map((image) => ({ type: "image_url", image_url: { url: image.data } }));
  return { role: "user", content: [...parts, { type: "text", text }] };
}

/** Keep the records as long as the tab lives; `lost` is the number of images that there was no room for. */
export function save(records) {
  sessionStorage.removeItem(STORE);
  for (const room of records.length > 0 ? ROOMS : []) {
    const kept = fitting(records, room, size).map((record, at) => {
      return { ...record, lost: (record.lost ?? 0) + records[at].images.length - record.images.length };
    });
    try {
      sessionStorage.setItem(STORE, JSON.stringify(kept));
      return;
    } catch {
      // The browser allows less: the next try keeps fewer images.
    }
  }
}

/** The records of this tab. */
export const saved = () => JSON.parse(sessionStorage.getItem(STORE) ?? "[]");

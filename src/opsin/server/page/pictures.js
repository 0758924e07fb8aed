// The pictures that go with the next question.

import { el } from "./dom.js";

const KINDS = /^image\//;
const NAMES = /\.(avif|bmp|gif|heic|heif|jpe?g|png|tiff?|webp)$/i;

/** A list of thumbnails that can be taken away again; `changed` is called with their number. */
export class Tray {
  #pictures = [];

  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
  }

  get size() {
    return this.#pictures.length;
  }

  /** Take what is a picture; the names of what is none come back. */
  add(files) {
    const strange = [];
    for (const file of files) {
      if (KINDS.test(file.type) || NAMES.test(file.name)) {
        this.#pictures.push({ file, name: file.name || "picture", url: URL.createObjectURL(file) });
      } else {
        strange.push(file.name || file.type || "something");
      }
    }
    this.#draw();
    return strange;
  }

  /** Hand the pictures over and be empty. */
  take() {
    const taken = this.#pictures;
    this.#pictures = [];
    this.#draw();
    return taken;
  }

  /** Have pictures back whose question was not answered. */
  restore(pictures) {
    this.#pictures = [...pictures, ...this.#pictures];
    this.#draw();
  }

  #remove(picture) {
    const at = this.#pictures.indexOf(picture);
    this.#pictures.splice(at, 1);
    URL.revokeObjectURL(picture.url);
    this.#draw();
    const buttons = this.list.querySelectorAll("button");
    buttons[Math.min(at, buttons.length - 1)]?.focus();
  }

  #draw() {
    this.list.replaceChildren(
      ...this.#pictures.map((picture) => {
        const remove = el("button", { type: "button", "aria-label": `Remove ${picture.name}`, title: "Remove" }, "×");
        remove.addEventListener("click", () => this.#remove(picture));
        return el("li", {}, shown(picture), remove);
      }),
    );
    this.list.hidden = this.size === 0;
    this.changed(this.size);
  }
}

/** The picture, or its name where the browser cannot show its kind. */
export function shown(picture) {
  const image = el("img", { src: picture.url, alt: picture.name });
  image.addEventListener("error", () => image.replaceWith(el("span", { class: "unshown" }, picture.name)));
  return image;
}

/** The file as a `data:` address. */
export function dataAddress(picture) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${picture.name} cannot be read: add it again.`)));
    reader.readAsDataURL(picture.file);
  });
}

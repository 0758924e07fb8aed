// The images that go with the next question.

import { el } from "./dom.js";

const KINDS = /^image\//;
const NAMES = /\.(png|apng|jpg|jpeg|jpe|jfif|jif|pjpeg|pjp|gif|tif|tiff|bmp|dib|webp|avif|avifs|heic|heif|heics|heifs|hif|pdf)$/i;

/** A list of thumbnails that can be taken away again; `changed` is called with their number. */
export class Tray {
  #images = [];

  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
  }

  get size() {
    return this.#images.length;
  }

  /** Take what is an image; the names of what is none come back. */
  add(files) {
    const strange = [];
    for (const file of files) {
      if (KINDS.test(file.type) || NAMES.test(file.name)) {
        this.#images.push({ file, name: file.name || "image", url: URL.createObjectURL(file) });
      } else {
        strange.push(file.name || file.type || "something");
      }
    }
    this.#draw();
    return strange;
  }

  /** Hand the images over and be empty. */
  take() {
    const taken = this.#images;
    this.#images = [];
    this.#draw();
    return taken;
  }

  /** Have images back whose question was not answered. */
  restore(images) {
    this.#images = [...images, ...this.#images];
    this.#draw();
  }

  #remove(image) {
    const at = this.#images.indexOf(image);
    this.#images.splice(at, 1);
    URL.revokeObjectURL(image.url);
    this.#draw();
    const buttons = this.list.querySelectorAll("button");
    buttons[Math.min(at, buttons.length - 1)]?.focus();
  }

  #draw() {
    this.list.replaceChildren(
      ...this.#images.map((image) => {
        const remove = el("button", { type: "button", "aria-label": `Remove ${image.name}`, title: "Remove" }, "×");
        remove.addEventListener("click", () => this.#remove(image));
        return el("li", {}, shown(image), remove);
      }),
    );
    this.list.hidden = this.size === 0;
    this.changed(this.size);
  }
}

/** The image, or its name where the browser cannot show its kind. */
export function shown(image) {
  const node = el("img", { src: image.url, alt: image.name });
  node.addEventListener("error", () => node.replaceWith(el("span", { class: "unshown" }, image.name)));
  return node;
}

/** The image as a `data:` address; one that a reload kept is that already. */
export function dataAddress(image) {
  if (image.data) return image.data;
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${image.name} cannot be read: add it again.`)));
    reader.readAsDataURL(image.file);
  });
}

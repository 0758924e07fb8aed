// Small helpers for elements and numbers. Text is only ever set as text.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; null children are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);

/** A quantity with one decimal while it is small. */
export const amount = (value) => (value < 9.95 ? tenth : whole).format(value);

/** "1 token", "12 tokens". */
export const several = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Milliseconds as people read them: seconds from ten thousand on. */
export const time = (ms) => (ms < 10000 ? `${amount(ms)} ms` : `${tenth.format(ms / 1000)} s`);

/** A part of a whole in percent. */
export function share(part, all) {
  const percent = all > 0 ? (100 * part) / all : 0;
  return percent > 0 && percent < 1 ? "< 1 %" : `${whole.format(percent)} %`;
}

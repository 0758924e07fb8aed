// Keeps the end of a growing answer in sight, unless the reader scrolls up; who scrolls down to it follows again.

const NEAR = 16;
const footer = document.querySelector("footer");

let end = null;
let following = false;
let before = 0;

/** How far the end is below the place where the footer begins. */
const below = () => end.getBoundingClientRect().bottom - footer.getBoundingClientRect().top;

/** Show a new answer from here, and follow its end. */
export function begin(here, itsEnd) {
  end = itsEnd;
  following = true;
  here.scrollIntoView({ block: "start" });
  before = scrollY;
}

/** Bring the end into sight if the reader is there; whether that is so. */
export function follow() {
  if (following) scrollBy(0, Math.max(0, below() + NEAR));
  return following;
}

addEventListener("scroll", () => {
  const up = scrollY < before;
  before = scrollY;
  // A page that becomes shorter scrolls up too, but only at its end.
  if (up && scrollY + innerHeight < document.scrollingElement.scrollHeight - 1) following = false;
  else if (end !== null && below() < NEAR) following = true;
});

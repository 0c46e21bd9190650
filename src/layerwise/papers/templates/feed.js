// The feed: words, filters and order decide which cards are shown and where; the address keeps them.
const $ = (id) => document.getElementById(id);
const feed = $("feed");
const controls = { words: $("words"), status: $("status"), year: $("year"), sort: $("sort") };
const buttons = [...$("families").querySelectorAll("button")];
const FIELDS = [["h2", 6], [".title", 4], [".family", 2], [".does", 1.5], [".claim", 1]];
const USUAL = "far"; // with words in the field, this order gives way to the best match
const ALONG = ["working", "subject", "not started"];
const plain = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
const split = (text) => (plain(text).match(/[\p{L}\p{N}]+/gu) || []).map((word) => word.replace(/(...)s$/, "$1")); // plurals

const cards = [...feed.children].map((node, place) => ({
  node, place, family: node.dataset.family, status: node.dataset.status, year: node.dataset.year,
  time: Number(node.dataset.time), name: plain(node.querySelector("h2").textContent), luck: 0,
  fields: FIELDS.map(([where, weight]) => [new Set(split(node.querySelector(where)?.textContent || "")), weight]),
}));
let family = "";

// A word counts where a word of the card begins with it, more in a name than in a text, and more when it is rare.
function rank(words) {
  const scores = cards.map(() => ({ words: 0, score: 0 }));
  for (const word of words) {
    const gains = cards.map(({ fields }) => {
      let best = 0;
      for (const [held, weight] of fields) {
        if (held.has(word)) best = Math.max(best, weight);
        else for (const other of held) if (other.startsWith(word)) { best = Math.max(best, weight * 0.7); break; }
      }
      return best;
    });
    const found = gains.filter(Boolean).length;
    const rarity = Math.log(1 + cards.length / (1 + found));
    gains.forEach((gain, i) => { if (gain) { scores[i].words += 1; scores[i].score += gain * rarity; } });
  }
  return scores;
}

const ORDERS = {
  feed: (a, b) => a.place - b.place,
  new: (a, b) => b.time - a.time || a.place - b.place,
  name: (a, b) => a.name.localeCompare(b.name),
  far: (a, b) => ALONG.indexOf(a.status) - ALONG.indexOf(b.status) || a.place - b.place,
  shuffle: (a, b) => a.luck - b.luck,
};

function show() {
  const words = split(controls.words.value);
  const scores = rank(words);
  const most = Math.max(1, ...scores.map((s) => s.words));
  const fits = (card) => (!words.length || scores[card.place].words === most)
    && (!controls.status.value || card.status === controls.status.value)
    && (!controls.year.value || card.year === controls.year.value);
  const open = cards.filter(fits);
  const shown = open.filter((card) => !family || card.family === family);
  const order = words.length && controls.sort.value === USUAL
    ? (a, b) => scores[b.place].score - scores[a.place].score || a.place - b.place
    : ORDERS[controls.sort.value];
  shown.sort(order);
  const keep = new Set(shown);
  for (const card of cards) card.node.hidden = !keep.has(card);
  feed.append(...shown.map((card) => card.node));
  for (const card of shown) highlight(card.node, words);
  for (const button of buttons) {
    const count = open.filter((card) => !button.dataset.family || card.family === button.dataset.family).length;
    button.querySelector("span").textContent = count;
    button.setAttribute("aria-pressed", String(button.dataset.family === family));
    button.disabled = !count && button.dataset.family !== family;
  }
  $("found").textContent = shown.length === cards.length ? `${cards.length} papers`
    : `${shown.length} of ${cards.length} papers`;
  $("none").hidden = shown.length > 0;
  pack();
}

// Cards of different heights stand close under each other: each spans as many thin rows as it is high.
const STEP = 4;
function pack() {
  feed.classList.add("packed");
  const gap = parseFloat(getComputedStyle(feed).columnGap);
  const heights = cards.map(({ node }) => (node.hidden ? 0 : node.offsetHeight));
  cards.forEach(({ node }, i) => { node.style.gridRowEnd = heights[i] ? `span ${Math.ceil((heights[i] + gap) / STEP)}` : ""; });
}

function highlight(card, words) {
  for (const where of ["h2", ".title", ".does"]) {
    const part = card.querySelector(where);
    if (!part || (!words.length && !part.querySelector("mark"))) continue;
    const pieces = part.textContent.split(/([\p{L}\p{N}]+)/u).map((piece) => {
      if (!words.some((word) => plain(piece).startsWith(word))) return document.createTextNode(piece);
      const mark = document.createElement("mark");
      mark.textContent = piece;
      return mark;
    });
    part.replaceChildren(...pieces);
  }
}

function remember() {
  const state = new URLSearchParams();
  if (family) state.set("family", family);
  for (const [name, control] of Object.entries(controls)) {
    if (control.value && control.value !== USUAL) state.set(name, control.value);
  }
  history.replaceState(null, "", state.size ? "#?" + state : location.pathname + location.search);
}

function recall() {
  const hash = decodeURIComponent(location.hash.slice(1));
  if (!hash.startsWith("?")) return show(), reveal(hash);
  const state = new URLSearchParams(location.hash.slice(2));
  family = buttons.some((b) => b.dataset.family === state.get("family")) ? state.get("family") : "";
  for (const [name, control] of Object.entries(controls)) {
    const value = state.get(name) || (name === "sort" ? USUAL : "");
    control.value = value;
    if (control.value !== value) control.value = name === "sort" ? USUAL : "";
  }
  show();
}

function reset() {
  family = "";
  for (const [name, control] of Object.entries(controls)) control.value = name === "sort" ? USUAL : "";
  show();
}

// A link to a card under which filters hide it opens all of them again.
function reveal(id) {
  const card = id && document.getElementById(id);
  if (!card || !card.classList.contains("card")) return;
  if (card.hidden) reset();
  for (const seen of document.querySelectorAll(".seen")) seen.classList.remove("seen");
  card.classList.add("seen");
  card.scrollIntoView({ block: "start" });
  card.focus({ preventScroll: true });
}

for (const control of Object.values(controls)) {
  control.addEventListener("input", () => {
    if (control.id === "sort") for (const card of cards) card.luck = Math.random();
    show();
    remember();
  });
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    family = button.dataset.family === family ? "" : button.dataset.family;
    show();
    remember();
  });
}
$("clear").addEventListener("click", () => { reset(); remember(); });
document.addEventListener("click", async (event) => {
  const copy = event.target.closest(".run button");
  const link = event.target.closest(".foot a");
  if (copy) {
    await navigator.clipboard?.writeText(copy.previousElementSibling.textContent);
    copy.textContent = "copied";
    setTimeout(() => { copy.textContent = "copy"; }, 1200);
  } else if (link) {
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    reveal(decodeURIComponent(link.hash.slice(1)));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    controls.words.focus();
  } else if (event.key === "Escape" && document.activeElement === controls.words) {
    controls.words.value = "";
    show();
    remember();
  }
});
window.addEventListener("hashchange", recall);
let width = 0;
new ResizeObserver(() => { if (feed.clientWidth !== width) { width = feed.clientWidth; pack(); } }).observe(feed);
$("bar").hidden = $("families").hidden = false;
for (const button of document.querySelectorAll(".run button")) button.hidden = false;
recall();

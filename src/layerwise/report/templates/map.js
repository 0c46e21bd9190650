// The layer map: rows are blocks, columns the linears of a block; below it, what hangs off the network.
const state = { stop: ownStop, mode: "bits" };
const mapBox = document.getElementById("map");
const tip = document.getElementById("tip");
const cells = []; // per site: its element

const tail = (name, prefix) => (prefix && name.startsWith(prefix + ".") ? name.slice(prefix.length + 1) : name);

// Labels: the shortest ending of each dotted name that no other shares, less a last part that several repeat.
function shortLabels(names, least = 1) {
  const unique = (list) => new Set(list).size === list.length && list.every(Boolean);
  const last = (name) => name.split(".").at(-1);
  const counts = names.reduce((map, name) => map.set(last(name), (map.get(last(name)) || 0) + 1), new Map());
  const dropped = names.map((n) => (counts.get(last(n)) > 1 && n.includes(".") ? n.slice(0, n.lastIndexOf(".")) : n));
  const base = unique(dropped) ? dropped : names;
  return base.map((name, i) => {
    const pieces = name.split(".");
    for (let k = 1; k < pieces.length; k++) {
      const end = pieces.slice(-k).join(".");
      if (end.length >= least && base.every((other, j) => j === i || (other !== end && !other.endsWith("." + end)))) return end;
    }
    return name;
  });
}

function commonPrefix(names) {
  const prefix = (names[0] || "").split(".").slice(0, -1).join(".");
  return prefix && names.length > 1 && names.every((name) => name.startsWith(prefix + ".")) ? prefix : "";
}

function breakable(text) {
  const node = el("span", {});
  text.split(/(?<=[._])/).forEach((piece, i) => node.append(...(i ? [el("wbr", {}), piece] : [piece])));
  return node;
}

function makeCell(i, tag) {
  const cell = el(tag, { class: "cell", tabindex: "-1", "data-site": i });
  if (tag === "td") cell.setAttribute("role", "gridcell");
  else cell.setAttribute("role", "listitem");
  cell.addEventListener("pointerenter", () => showTip(i));
  cell.addEventListener("pointerleave", hideTip);
  cell.addEventListener("focus", () => showTip(i));
  cell.addEventListener("blur", hideTip);
  cell.addEventListener("click", () => showTip(i));
  cells[i] = cell;
  return cell;
}

let grid = []; // rows of site indices (undefined where a block lacks the column), for the arrow keys
let blocks = [];
const outsideLabels = new Map(); // site index -> its short name in the strip
const sums = new Map(); // block -> its summary cell

function buildMap() {
  blocks = [...new Set(sites.map((site) => site.block).filter(Boolean))];
  const names = [...new Set(sites.filter((s) => s.block).map((site) => tail(site.site, site.block)))];
  const labels = shortLabels(names);
  const column = new Map(names.map((name, k) => [name, k]));
  const row = new Map(blocks.map((name, k) => [name, k]));
  grid = blocks.map(() => new Array(names.length));
  const outside = [];
  sites.forEach((site, i) => (site.block ? (grid[row.get(site.block)][column.get(tail(site.site, site.block))] = i) : outside.push(i)));
  const prefix = commonPrefix(blocks);
  if (blocks.length) {
    const head = el("tr", {}, el("td", { class: "first" }),
      ...labels.map((label, k) => el("th", { scope: "col", title: names[k] }, breakable(label))),
      el("th", { scope: "col", class: "last" }, breakable("block")));
    const body = grid.map((line, r) => {
      const sum = el("td", { class: "sum", role: "gridcell" });
      sums.set(blocks[r], sum);
      return el("tr", { role: "row" },
        el("th", { scope: "row", title: blocks[r] }, tail(blocks[r], prefix)),
        ...line, sum);
    });
    // Arrays with holes skip them, so the cells are put in by hand.
    grid.forEach((line, r) => {
      const tr = body[r];
      const sum = tr.lastChild;
      tr.replaceChildren(tr.firstChild);
      for (let k = 0; k < names.length; k++) tr.append(line[k] === undefined ? el("td", {}) : makeCell(line[k], "td"));
      tr.append(sum);
    });
    const table = el("table", { role: "grid", "aria-labelledby": "map-title", class: blocks.length <= 16 ? "tallrows" : "" },
      el("thead", {}, head), el("tbody", {}, ...body));
    table.style.setProperty("--least", names.length * 38 + 90 + "px");
    mapBox.append(el("div", { class: "scroll" }, table));
  }
  if (outside.length) {
    shortLabels(outside.map((i) => sites[i].site), 6).forEach((label, k) => outsideLabels.set(outside[k], label));
    mapBox.append(el("h4", {}, blocks.length ? "Outside the blocks" : "Sites"));
    mapBox.append(el("div", { class: "strip", role: "list" }, ...outside.map((i) => makeCell(i, "div"))));
    grid.push(...outside.map((i) => [i]));
  }
  mapBox.addEventListener("keydown", walk);
  const first = grid.flat().find((i) => i !== undefined);
  if (first !== undefined) cells[first].setAttribute("tabindex", "0");
}

// One tab stop for the whole map; arrows move inside it.
function walk(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Escape") return hideTip();
  const move = moves[event.key];
  const from = Number(event.target.dataset.site);
  if (!move || Number.isNaN(from)) return;
  event.preventDefault();
  let r = grid.findIndex((line) => line.includes(from));
  let k = grid[r].indexOf(from);
  for (;;) {
    r += move[0];
    k += move[1];
    if (r < 0 || r >= grid.length || k < 0) return;
    const line = grid[r];
    if (move[1] && k >= line.length) return;
    const to = line[Math.min(k, line.length - 1)];
    if (to === undefined) continue;
    cells[from].setAttribute("tabindex", "-1");
    cells[to].setAttribute("tabindex", "0");
    cells[to].focus();
    return;
  }
}

// ---------------------------------------------------------------- colours: nine steps, numbers in the cells

// Logarithmic in bits, over everything encoded that any stop uses, so that colours keep their meaning while sliding;
// what is stored as fp16 takes the last colour, or a few small tables would flatten all the others.
const bitRange = (() => {
  let low = Infinity;
  let high = 0;
  for (const stop of stops) {
    sites.forEach((_, i) => {
      const { bpw } = chosenAt(stop, i);
      if (bpw > 0 && bpw < 12) [low, high] = [Math.min(low, bpw), Math.max(high, bpw)];
    });
  }
  return low < high ? [low, high] : [2, 16];
})();
function bitStep(bpw) {
  const [low, high] = bitRange;
  const t = Math.log(Math.max(bpw, low) / low) / Math.log(high / low);
  return Math.max(0, Math.min(8, Math.round(t * 8)));
}

function showPlan() {
  const stop = stops[state.stop];
  const shown = state.mode === "damage" && knowsDamage(stop) ? "damage" : "bits";
  const picked = sites.map((_, i) => chosenAt(stop, i));
  const total = picked.reduce((sum, p) => sum + (p.damage || 0), 0) || 1;
  const largest = Math.max(...picked.map((p) => (p.damage || 0) / total), 1e-12);
  mapBox.dataset.mode = shown;
  sites.forEach((site, i) => {
    const p = picked[i];
    const share = (p.damage || 0) / total;
    const step = shown === "bits" ? bitStep(p.bpw) : Math.round(8 * Math.sqrt(share / largest));
    const text = shown === "bits" ? p.bpw.toFixed(p.bpw < 9.995 ? 2 : 1) : percent(share, "");
    const more = p.bpw - site.bpw;
    const change = stop.plan || p.recipe === site.recipe ? "" : more > 0 ? " up" : " down";
    const cell = cells[i];
    cell.className = "cell q" + step + change + (derived.coverage[i] ? " thin" : "");
    const under = el("small", {}, parts(p.recipe).encoder);
    if (site.block) cell.replaceChildren(text, cell.closest(".tallrows") ? under : "");
    else cell.replaceChildren(el("span", {}, outsideLabels.get(i)), text + (shown === "bits" ? "" : "%"), el("small", {}, megabytes(p.bytes) + " · " + parts(p.recipe).encoder));
    cell.setAttribute("aria-label", `${site.site}: ${p.recipe}, ${p.bpw.toFixed(2)} bits per weight, ${megabytes(p.bytes)}` +
      (p.damage === null ? "" : `, ${percent(share)} of the damage`));
  });
  for (const [block, node] of sums) {
    const inside = picked.map((p, i) => [p, sites[i]]).filter(([, site]) => site.block === block);
    const weights = inside.reduce((sum, [, site]) => sum + site.rows * site.columns, 0) || 1;
    const sum = (key) => inside.reduce((all, [p]) => all + (p[key] || 0), 0);
    node.textContent = shown === "bits" ? ((8 * sum("bytes")) / weights).toFixed(2) : percent(sum("damage") / total);
  }
  showLegend(shown, largest);
}

function percent(share, sign = "%") {
  const value = 100 * share;
  return (value >= 9.95 ? value.toFixed(0) : value >= 0.05 ? value.toFixed(1) : value > 0 ? "<0.1" : "0") + sign;
}

function showLegend(shown, largest) {
  const [low, high] = shown === "bits" ? bitRange.map((v) => v.toFixed(v < 9.95 ? 1 : 0)) : ["0", percent(largest)];
  const ramp = el("span", { class: "ramp", "data-mode": shown }, low,
    el("span", {}, ...[0, 1, 2, 3, 4, 5, 6, 7, 8].map((k) => el("i", { class: "q" + k }))),
    high + (shown === "bits" ? " bits and more" : " of the damage (cells in %)"));
  const prefix = commonPrefix(blocks);
  const remarks = [];
  if (prefix) remarks.push("rows: " + prefix);
  if (!stops[state.stop].plan) remarks.push("▴ ▾ differs from this plan");
  if (state.mode === "damage" && shown === "bits") remarks.push("damage by site is known for this plan only");
  if (derived.coverage.some(Boolean)) remarks.push("dotted edge: low coverage");
  document.getElementById("legend").replaceChildren(ramp, ...remarks.map((remark) => el("span", {}, remark)));
}

// ---------------------------------------------------------------- the tip

function showTip(i) {
  const stop = stops[state.stop];
  const site = sites[i];
  const p = chosenAt(stop, i);
  const lines = [["recipe", p.recipe], ["stored", `${megabytes(p.bytes)}, ${p.bpw.toFixed(2)} bits per weight`],
    ["shape", `${site.rows} × ${site.columns}`],
    ["damage", p.damage === null ? "known for this plan only" : significant(p.damage)]];
  if (!stop.plan && p.recipe !== site.recipe) lines.push(["this plan", site.recipe]);
  if (stop.plan) {
    const other = (label, choice) => choice && lines.push([label, `${choice.recipe}: ${signed(choice.bytes - site.bytes)}, damage ${significant(choice.damage)}`]);
    other("next better", site.next_better);
    other("next cheaper", site.next_cheaper);
  }
  lines.push(["coverage", site.tokens.toLocaleString("en") + " tokens"]);
  if (derived.coverage[i]) lines.push(["note", derived.coverage[i]]);
  const list = el("dl", {});
  for (const [label, text] of lines) list.append(el("dt", {}, label), el("dd", {}, text));
  tip.replaceChildren(el("b", {}, site.site), list);
  tip.hidden = false;
  const at = cells[i].getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const x = Math.max(8, Math.min(at.left + at.width / 2 - size.width / 2, document.documentElement.clientWidth - size.width - 8));
  const above = at.top - size.height - 8;
  const y = above >= 8 ? above : Math.min(at.bottom + 8, window.innerHeight - size.height - 8);
  tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}
const signed = (count) => (count < 0 ? "−" : "+") + megabytes(Math.abs(count));
function hideTip() {
  tip.hidden = true;
}

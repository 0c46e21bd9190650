// The predicted front, this plan and the uniform baselines on it, and the plan at the slider's budget in figures.
const frontBox = document.getElementById("front");

// Uniform settings, and the run's own baseline where it is not one of them.
function uniformPoints() {
  const all = (evidence.uniform || []).map((u) => ({ ...u, label: shortRecipe(u.recipe) }));
  const row = evidence.rows.find((r) => r.name === "baseline");
  const quality = row && derived.steering && row.quality[derived.steering];
  if (quality && quality.value > 0 && !all.some((u) => u.recipe === row.recipe && u.measured)) {
    all.push({ recipe: row.recipe || "baseline", bytes: row.bytes, damage: null, measured: quality.value, label: "baseline" });
  }
  return all;
}

function drawFront() {
  const uniform = uniformPoints();
  const own = stops[ownStop];
  const measured = evidence.predicted ? evidence.predicted.measured : null;
  const drawn = [...stops.map((s) => [s.bytes, s.damage]), ...uniform.flatMap((u) => [[u.bytes, u.damage], [u.bytes, u.measured]]),
    [own.bytes, measured]].filter(([, y]) => y > 0);
  if (stops.length + uniform.length < 2 || !drawn.length) return frontBox.replaceChildren();
  const width = Math.max(280, frontBox.clientWidth || 400);
  const height = 320;
  const edge = { left: 52, right: 14, top: 24, bottom: 42 };
  const xs = drawn.map((d) => d[0]);
  const ys = drawn.map((d) => d[1]);
  const pad = (Math.max(...xs) - Math.min(...xs)) * 0.05 || Math.max(...xs) * 0.1;
  const [x0, x1] = [Math.max(0, Math.min(...xs) - pad), Math.max(...xs) + pad];
  const [y0, y1] = [Math.min(...ys) / 1.5, Math.max(...ys) * 1.5];
  const x = (v) => edge.left + ((v - x0) / (x1 - x0)) * (width - edge.left - edge.right);
  const y = (v) => height - edge.bottom - (Math.log(v / y0) / Math.log(y1 / y0)) * (height - edge.top - edge.bottom);
  const unit = x1 >= 1e9 ? [1e9, "GB"] : x1 >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "Predicted damage against size for the plans of all budgets, with this plan and uniform settings" });
  for (const tick of logTicks(y0, y1, 7)) {
    chart.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: edge.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  for (const tick of linearTicks(x0 / unit[0], x1 / unit[0], width > 420 ? 7 : 5)) {
    chart.append(svg("text", { x: x(tick * unit[0]), y: height - edge.bottom + 18, "text-anchor": "middle" }, tickText(tick)));
  }
  chart.append(svg("text", { class: "title", x: edge.left, y: 12 }, `Damage, ${evidence.loss.unit.slice(0, 40)}`),
    svg("text", { class: "title", x: width - edge.right, y: height - 5, "text-anchor": "end" }, `Size, ${unit[1]}`));
  const line = stops.filter((s) => s.damage > 0);
  chart.append(svg("path", { class: "line", d: line.map((s, k) => (k ? "L" : "M") + x(s.bytes).toFixed(1) + " " + y(s.damage).toFixed(1)).join("") }));
  stops.forEach((s) => s.damage > 0 && !s.plan && chart.append(svg("circle", { class: "dot", cx: x(s.bytes), cy: y(s.damage), r: 2.5 })));
  const tags = [];
  for (const u of uniform) {
    const [top, bottom] = [u.measured, u.damage].map((v) => (v > 0 ? v : null));
    if (top && bottom) chart.append(svg("line", { class: "tie", x1: x(u.bytes), x2: x(u.bytes), y1: y(top), y2: y(bottom) }));
    if (bottom) chart.append(mark("circle", x(u.bytes), y(bottom), 4, "base-mark", `${u.recipe}, predicted ${significant(bottom)}`));
    if (top) chart.append(mark("circle", x(u.bytes), y(top), 4, "base-mark full", `${u.recipe}, measured ${significant(top)}`));
    if (top || bottom) tags.push({ x: x(u.bytes), y: y(Math.max(top || 0, bottom || 0)), text: u.label, kind: "label" });
  }
  if (own.damage > 0) {
    if (measured > 0) chart.append(svg("line", { class: "tie plan", x1: x(own.bytes), x2: x(own.bytes), y1: y(measured), y2: y(own.damage) }));
    chart.append(mark("diamond", x(own.bytes), y(own.damage), 5, "plan-mark", `this plan, predicted ${significant(own.damage)}`));
  }
  if (measured > 0) chart.append(mark("diamond", x(own.bytes), y(measured), 5, "plan-mark full", `this plan, measured ${significant(measured)}`));
  const low = Math.min(...[own.damage, measured].filter((v) => v > 0));
  if (Number.isFinite(low)) tags.push({ x: x(own.bytes), y: y(low) + 22, text: "this plan", kind: "label plan", left: true });
  placeTags(chart, tags, width);
  const now = svg("g", { id: "now" });
  chart.append(now);
  stops.forEach((s, k) => {
    if (!(s.damage > 0)) return;
    const hit = svg("circle", { class: "hit", cx: x(s.bytes), cy: y(s.damage), r: 11 }, svg("title", {}, `${megabytes(s.bytes)}, damage ${significant(s.damage)}`));
    hit.addEventListener("click", () => moveTo(k));
    chart.append(hit);
  });
  const legend = el("figcaption", { class: "legend" });
  const entry = (sample, text) => legend.append(el("span", {}, sample, text));
  if (stops.length > 1) entry(svg("svg", { width: 18, height: 13, "aria-hidden": "true" }, svg("path", { class: "line", d: "M0 7H18" })), "best plans, predicted");
  entry(swatch("diamond", "plan-mark"), "this plan, predicted");
  if (measured > 0) entry(swatch("diamond", "plan-mark full"), "measured");
  if (uniform.some((u) => u.damage > 0)) entry(swatch("circle", "base-mark"), "uniform, predicted");
  if (uniform.some((u) => u.measured > 0)) entry(swatch("circle", "base-mark full"), "measured");
  frontBox.replaceChildren(legend, chart);
  frontBox.point = (s) => {
    if (!(s.damage > 0)) return now.replaceChildren();
    now.replaceChildren(
      svg("line", { class: "guide", x1: x(s.bytes), x2: x(s.bytes), y1: edge.top, y2: height - edge.bottom }),
      ...(s.plan ? [] : [svg("circle", { class: "now", cx: x(s.bytes), cy: y(s.damage), r: 8 })]));
  };
  frontBox.point(stops[state.stop]);
}

// Labels beside their points, pushed up from one another; left of the point where the right edge is near.
function placeTags(chart, tags, width) {
  const taken = [];
  for (const tag of tags.sort((a, b) => b.y - a.y)) {
    const wide = tag.text.length * 6.3;
    const left = tag.left || tag.x + wide + 12 > width;
    const box = { x: left ? tag.x - 9 - wide : tag.x + 9, y: tag.y };
    for (let tries = 0; tries < 8 && taken.some((t) => Math.abs(t.y - box.y) < 12 && t.x < box.x + wide && box.x < t.x + t.wide); tries++) box.y -= 12;
    // Where marks crowd, a label that would end up far from its mark is left to the mark's tooltip.
    if (tag.kind === "label" && (tag.y - box.y > 26 || box.y < 20)) continue;
    taken.push({ ...box, wide });
    chart.append(svg("text", { class: tag.kind, x: left ? tag.x - 9 : tag.x + 9, y: box.y + 4, "text-anchor": left ? "end" : "start" }, tag.text));
  }
}

// ---------------------------------------------------------------- the slider

const slider = document.getElementById("budget");

function moveTo(index) {
  state.stop = index;
  slider.value = index;
  const stop = stops[index];
  const words = `${megabytes(stop.bytes)}, ${bitsPerWeight(stop.bytes).toFixed(2)} bits per weight, damage ${significant(stop.damage)}`;
  slider.setAttribute("aria-valuetext", (stop.plan ? "this plan: " : "") + words);
  document.getElementById("stop").replaceChildren(el("b", {}, megabytes(stop.bytes)),
    ` · ${bitsPerWeight(stop.bytes).toFixed(2)} bits per weight`, el("span", { class: "dot" }, " · "), el("span", { class: "damage" }, `damage ${significant(stop.damage)}`));
  document.getElementById("reset").disabled = stop.plan;
  document.querySelector(".here").classList.toggle("covered", stop.plan);
  hideTip();
  showPlan();
  showChosen(stop);
  if (frontBox.point) frontBox.point(stop);
}

function showChosen(stop) {
  const own = stops[ownStop];
  const picked = sites.map((_, i) => chosenAt(stop, i));
  const differ = picked.filter((p, i) => p.recipe !== sites[i].recipe).length;
  const factor = own.damage > 0 && stop.damage > 0 ? ` (${significant(stop.damage / own.damage, 2)}×)` : "";
  const tally = new Map();
  for (const p of picked) {
    const entry = tally.get(p.recipe) || [0, 0];
    tally.set(p.recipe, [entry[0] + 1, entry[1] + p.bytes]);
  }
  const ranked = [...tally].sort((a, b) => b[1][1] - a[1][1] || (a[0] < b[0] ? -1 : 1));
  const tables = [];
  if (stops.length > 1) {
    const lines = [["Size", megabytes(stop.bytes), megabytes(own.bytes)],
      ["Bits per weight", bitsPerWeight(stop.bytes).toFixed(2), bitsPerWeight(own.bytes).toFixed(2)],
      ["Predicted damage", significant(stop.damage) + (stop.plan ? "" : factor), significant(own.damage)],
      ["Sites that differ", String(differ), "–"]];
    tables.push(el("table", { class: "small" },
      el("thead", {}, el("tr", {}, el("td", {}), el("th", { scope: "col" }, "At this budget"), el("th", { scope: "col" }, "This plan"))),
      el("tbody", {}, ...lines.map(([label, a, b]) => el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, a), el("td", {}, b))))));
  }
  tables.push(el("table", { class: "small" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Recipe"), el("th", { scope: "col" }, "Sites"), el("th", { scope: "col" }, "Bytes"))),
    el("tbody", {}, ...ranked.slice(0, 10).map(([recipe, [count, bytes]]) =>
      el("tr", {}, el("th", { scope: "row", class: "mono" }, recipe), el("td", {}, String(count)), el("td", {}, megabytes(bytes)))))));
  // Under a short map there is room for the recipes; beside a tall one they go below the front.
  const below = blocks.length <= 12 ? tables.pop() : null;
  document.getElementById("chosen").replaceChildren(...tables);
  if (below) document.getElementById("recipes").replaceChildren(below);
}

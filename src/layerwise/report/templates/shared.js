// The evidence, how its figures are written, and how elements are made. Names from outside become text nodes only.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const evidence = read("evidence");
const derived = read("derived");
const sites = evidence.sites;
const planRow = evidence.rows.find((row) => row.name === "plan");

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function megabytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (Math.abs(count) < 0.9995 * size) continue;
    return (count / size).toFixed(count < 9.995 * size ? 2 : count < 99.95 * size ? 1 : 0) + " " + unit;
  }
  return Math.round(count) + " B";
}

function significant(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "unknown";
  if (value === 0) return "0";
  const power = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
  if (power < -4 || power >= 6) return value.toExponential(digits - 1);
  return value.toFixed(Math.max(0, digits - 1 - power));
}

// "awq+gptq:bits=4,group=32" -> {encoder: "awq+gptq", bits: "4"}; the shortest name that still tells recipes apart.
function parts(recipe) {
  const bits = /\bbits=(\d+)\b/.exec(recipe);
  return { encoder: recipe.replace(/:[^+]*/g, ""), bits: bits ? bits[1] : null };
}
function shortRecipe(recipe) {
  const { encoder, bits } = parts(recipe);
  const name = encoder.length > 18 ? encoder.slice(0, 17) + "…" : encoder;
  return bits ? name + " " + bits + "-bit" : name;
}

// ---------------------------------------------------------------- plans, one per stop of the slider

// Stops in order of size: the front, and this plan among them. A stop that equals this plan is this plan.
function makeStops() {
  const names = evidence.recipe_names || [];
  const same = (point) => point.recipes.every((index, i) => names[index] === sites[i].recipe);
  const damage = evidence.predicted ? evidence.predicted.damage : sites.reduce((sum, site) => sum + site.damage, 0);
  const all = (evidence.front || []).filter((point) => !same(point)).map((point) => ({ ...point, plan: false }));
  all.push({ bytes: planRow.bytes, damage, plan: true });
  return all.sort((a, b) => a.bytes - b.bytes || b.damage - a.damage);
}
const stops = makeStops();
const ownStop = stops.findIndex((stop) => stop.plan);

// What a stop chose at a site: recipe, bytes, bits per weight, damage (null when the evidence does not say).
function chosenAt(stop, i) {
  const site = sites[i];
  if (stop.plan) return { recipe: site.recipe, bytes: site.bytes, bpw: site.bpw, damage: site.damage };
  const recipe = evidence.recipe_names[stop.recipes[i]];
  const weights = site.rows * site.columns;
  const known = (evidence.recipe_bpw || {})[recipe];
  const own = recipe === site.recipe;
  let bytes = stop.site_bytes ? stop.site_bytes[i] : own ? site.bytes : known ? (known * weights) / 8 : null;
  const bpw = bytes !== null && weights > 0 ? (8 * bytes) / weights : known || 0;
  if (bytes === null) bytes = (bpw * weights) / 8;
  return { recipe, bytes, bpw, damage: stop.site_damage ? stop.site_damage[i] : own ? site.damage : null };
}
const knowsDamage = (stop) => stop.plan || Boolean(stop.site_damage);
const bitsPerWeight = (bytes) => (8 * bytes) / evidence.network.parameters;

// ---------------------------------------------------------------- charts

// Ticks of a logarithmic axis from low to high: powers of ten, with 2 and 5 between when there is room.
function logTicks(low, high, most) {
  const ticks = [];
  const decades = Math.log10(high / low);
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const step of decades < 1.2 ? [1, 2, 5] : decades < 2.2 ? [1, 3] : [1]) {
      const tick = step * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  const skip = Math.ceil(ticks.length / most);
  return ticks.filter((_, i) => i % skip === 0);
}
function linearTicks(low, high, most) {
  const raw = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) ticks.push(k * step);
  return ticks;
}
function tickText(value) {
  if (value >= 0.001 && value < 1e4) return String(Number(value.toPrecision(2)));
  return value.toExponential(0).replace("e", "e").replace("+", "");
}
const shapes = {
  circle: (x, y, r) => svg("circle", { cx: x, cy: y, r }),
  diamond: (x, y, r) => svg("path", { d: `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}Z` }),
  square: (x, y, r) => svg("rect", { x: x - r * 0.9, y: y - r * 0.9, width: r * 1.8, height: r * 1.8 }),
  triangle: (x, y, r) => svg("path", { d: `M${x} ${y - r * 1.2}L${x + r * 1.15} ${y + r * 0.9}L${x - r * 1.15} ${y + r * 0.9}Z` }),
};
function mark(shape, x, y, r, kind, title) {
  const node = shapes[shape](x, y, r);
  node.setAttribute("class", kind);
  if (title) node.append(svg("title", {}, title));
  return node;
}
const swatch = (shape, kind) => svg("svg", { width: 13, height: 13, "aria-hidden": "true" }, mark(shape, 6.5, 6.5, 4, kind));

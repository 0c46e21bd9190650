// Predicted against measured damage of the sampled candidates, one colour and shape per bit width.
const scatterBox = document.getElementById("scatter");

function drawScatter() {
  if (!scatterBox) return;
  const pairs = (evidence.sampled || []).filter((p) => p.predicted > 0 && p.measured > 0);
  if (!pairs.length) return scatterBox.replaceChildren(el("p", { class: "note" }, "No sampled candidate had a positive rise to draw."));
  const width = Math.max(280, scatterBox.clientWidth || 500);
  const height = Math.min(440, Math.max(300, width * 0.72));
  const edge = { left: 54, right: 14, top: 26, bottom: 44 };
  const values = pairs.flatMap((p) => [p.predicted, p.measured]);
  const [low, high] = [Math.min(...values) / 1.6, Math.max(...values) * 1.6];
  const t = (v) => Math.log(v / low) / Math.log(high / low);
  const x = (v) => edge.left + t(v) * (width - edge.left - edge.right);
  const y = (v) => height - edge.bottom - t(v) * (height - edge.top - edge.bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Predicted against measured damage of ${pairs.length} candidates on logarithmic axes` });
  for (const tick of logTicks(low, high, 7)) {
    chart.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick) }),
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: edge.top, y2: height - edge.bottom }),
      svg("text", { x: edge.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)),
      svg("text", { x: x(tick), y: height - edge.bottom + 18, "text-anchor": "middle" }, tickText(tick)));
  }
  chart.append(svg("text", { class: "title", x: edge.left, y: 13 }, "Measured rise"),
    svg("text", { class: "title", x: width - edge.right, y: height - 5, "text-anchor": "end" }, "Predicted damage"));
  const diagonal = (factor, kind) => {
    const [from, to] = factor > 1 ? [low, high / factor] : [low / factor, high];
    if (from < to) chart.append(svg("line", { class: kind, x1: x(from), y1: y(from * factor), x2: x(to), y2: y(to * factor) }));
  };
  diagonal(1, "line");
  diagonal(2, "guide");
  diagonal(0.5, "guide");
  const widths = [...new Set(pairs.map((p) => parts(p.recipe).bits || "other"))].sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  const names = ["circle", "square", "triangle", "diamond"];
  const look = (bits) => {
    const k = widths.indexOf(bits);
    const step = widths.length > 1 ? Math.round(1 + (7 * k) / (widths.length - 1)) : 4;
    return [names[k % names.length], `fill:var(--b${step})`];
  };
  for (const p of pairs) {
    const [shape, style] = look(parts(p.recipe).bits || "other");
    const node = mark(shape, x(p.predicted), y(p.measured), 4.2, "point",
      `${p.site}, ${p.recipe}: predicted ${significant(p.predicted)}, measured ${significant(p.measured)}`);
    node.setAttribute("style", style);
    chart.append(node);
  }
  const legend = el("figcaption", { class: "legend" });
  for (const bits of widths) {
    const [shape, style] = look(bits);
    const sample = swatch(shape, "point");
    sample.firstChild.setAttribute("style", style);
    legend.append(el("span", {}, sample, bits === "other" ? "other" : bits + " bits"));
  }
  scatterBox.replaceChildren(legend, chart);
}

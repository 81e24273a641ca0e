// Curves with uPlot. A series has x and y of its own; they are laid on one axis here. The legend says the values under
// the pointer; drag to zoom, double click to see all again.
import { html, uPlot, useEffect, useRef, useState } from "./vendor.js";
import { bytes, count, figure, tick } from "./words.js";

export const COLOURS = 8;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const colourOf = (place) => css(`--c${place % COLOURS}`);
const POWERS = Array.from({ length: 50 }, (_, i) => 2 ** i);
const THEME = matchMedia("(prefers-color-scheme: dark)");

// Renders again when the reader's light or dark setting changes: canvases do not know CSS.
export function useTheme() {
  const [dark, set] = useState(THEME.matches);
  useEffect(() => {
    const changed = () => set(THEME.matches);
    THEME.addEventListener("change", changed);
    return () => THEME.removeEventListener("change", changed);
  }, []);
  return dark;
}

function joined(series, logX, logY) {
  const tables = series.map(({ x, y }) => {
    const kept = x.map((_, i) => i).filter((i) => x[i] !== null && x[i] !== undefined && (!logX || x[i] > 0));
    kept.sort((a, b) => x[a] - x[b]);
    return [kept.map((i) => x[i]), kept.map((i) => (logY && y[i] <= 0 ? null : (y[i] ?? null)))];
  });
  return tables.length ? uPlot.join(tables) : [[]];
}

const axis = (label, format, size) => ({
  label,
  labelSize: 18,
  labelFont: "12px system-ui, sans-serif",
  font: "11px system-ui, sans-serif",
  stroke: css("--soft"),
  grid: { stroke: css("--line"), width: 1 },
  ticks: { stroke: css("--line"), width: 1, size: 4 },
  values: (_, values) => values.map((value) => (value === null ? "" : format(value))),
  size,
});

function options(plot, width, onCursor) {
  const { series, xlabel, ylabel, logX, logY, height, format = figure, formatX = count } = plot;
  const style = ({ colour = 0, width: thick = 1.5, dash, dots, faint, band }) => {
    const stroke = colourOf(colour);
    const ink = faint ? `${stroke}55` : stroke;
    return {
      stroke: ink,
      width: dots === "only" ? 0 : thick,
      dash,
      paths: dots === "only" ? () => null : undefined,
      points: { show: Boolean(dots), size: 5, fill: ink, stroke: ink },
      fill: band ? `${stroke}22` : undefined,
    };
  };
  return {
    width,
    height,
    legend: { show: false },
    cursor: { sync: { key: plot.sync ?? "x", scales: ["x", null] }, points: { size: 6 }, drag: { x: true, y: false } },
    scales: {
      x: { time: false, distr: logX ? 3 : 1 },
      y: { distr: logY ? 3 : 1 },
    },
    axes: [axis(xlabel, formatX, 28), { ...axis(ylabel, format === figure ? tick : format, format === bytes ? 80 : 68), ...(format === bytes ? { incrs: POWERS } : {}) }],
    series: [{}, ...series.map(style)],
    hooks: { setCursor: [onCursor] },
  };
}

export function Plot(plot) {
  const { series, xlabel, logX, logY, height = 280, format = figure, formatX = count, label, legend = true } = plot;
  const place = useRef(null);
  const made = useRef({ chart: null, key: "" });
  const [under, setUnder] = useState(null);
  const dark = useTheme();

  const key = JSON.stringify([xlabel, plot.ylabel, logX, logY, height, dark, series.map((s) => [s.label, s.colour, s.dots, s.faint])]);
  useEffect(() => {
    const data = joined(series, logX, logY);
    const now = made.current;
    if (now.chart && now.key === key) {
      const { min, max } = now.chart.scales.x;
      const all = now.chart.data[0];
      const zoomed = all.length > 1 && (min > all[0] || max < all[all.length - 1]);
      now.chart.setData(data, !zoomed);
      return;
    }
    now.chart?.destroy();
    const cursor = (chart) => setUnder(chart.cursor.idx ?? null);
    now.chart = new uPlot(options({ ...plot, height }, place.current.clientWidth || 300, cursor), data, place.current);
    now.key = key;
  });
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => made.current.chart?.setSize({ width: entry.contentRect.width, height }));
    watch.observe(place.current);
    return () => {
      watch.disconnect();
      made.current.chart?.destroy();
      made.current.chart = null;
    };
  }, []);

  const chart = made.current.chart;
  const at = under === null || !chart ? null : chart.data[0][under];
  return html`<figure class="plot" role="group" aria-label=${label ?? `${plot.ylabel} over ${xlabel}`}>
    ${legend && html`<figcaption>
      ${series.map((one, i) => one.label && html`<span class="key"><i class=${`ink c${(one.colour ?? 0) % COLOURS} ${one.dots === "only" ? "dot" : one.dash ? "dashed" : ""} ${one.faint ? "faint" : ""}`}></i>${one.label}
        <b>${format(at === null ? last(one.y) : before(chart.data[i + 1], under))}</b></span>`)}
      ${at !== null && html`<span class="key at">${xlabel} <b>${formatX(at)}</b></span>`}
    </figcaption>`}
    <div ref=${place} class="canvas"></div>
  </figure>`;
}

const last = (values) => values.findLast((value) => value !== null && value !== undefined) ?? null;

// The value at a place, or the nearest one before it: series do not have all points.
function before(values, place) {
  for (let i = place; values && i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

// Exponential running mean, corrected for its start; as in curves.png.
export function smooth(values, weight) {
  if (!weight) return values;
  let [mean, norm] = [0, 0];
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

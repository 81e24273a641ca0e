// Small pieces that several pages share.
import { html } from "./vendor.js";
import { ask } from "./route.js";

const MARKS = { running: "▶", done: "✓", stopped: "■", failed: "✕", dead: "†" };

// How a run goes: by sign and word, not by colour alone.
export const Status = ({ word, why }) =>
  html`<span class="status ${word}" title=${why || null}><span aria-hidden="true">${MARKS[word] ?? "?"}</span> ${word}</span>`;

const VERDICTS = { holds: "✓", "not seen": "○", contrary: "✕", refused: "–", confounded: "≠", stale: "↻", planned: "·", "no evidence yet": "·" };

export const Verdict = ({ word, times }) =>
  html`<span class="verdict v-${word.replaceAll(" ", "-")}"><span aria-hidden="true">${VERDICTS[word] ?? "?"}</span> ${times ? `${times} ` : ""}${word}</span>`;

export const Tile = ({ name, value, note }) => html`<div class="tile"><dt>${name}</dt><dd>${value}${note && html`<small>${note}</small>`}</dd></div>`;

export const Loading = ({ error }) => (error ? html`<p class="empty" role="alert">${error}</p>` : html`<p class="empty reading">Reading …</p>`);

export const Select = ({ label, name, value, choices, first }) => html`
  <label class="control">${label}
    <select name=${name} value=${value} onChange=${(event) => ask({ [name]: event.target.value === first ? "" : event.target.value })}>
      ${choices.map(([key, word]) => html`<option value=${key} selected=${key === value}>${word}</option>`)}
    </select>
  </label>`;

export const Check = ({ label, name, on }) => html`
  <label class="control"><input type="checkbox" checked=${on} onChange=${(event) => ask({ [name]: event.target.checked ? "1" : "" })} /> ${label}</label>`;

export const Search = ({ value, hint }) => html`
  <input class="search" type="search" value=${value} placeholder=${hint} aria-label=${hint} onInput=${(event) => ask({ q: event.target.value })} />`;

// A table whose cells know their column: below the width of a phone each row becomes a card.
export const Table = ({ head, rows, label, numeric = [] }) => html`
  <div class="scroll"><table class="grid" aria-label=${label}>
    <thead><tr>${head.map((word, i) => html`<th scope="col" class=${numeric.includes(i) ? "num" : null}>${word}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr>${row.map((cell, i) => html`<td data-label=${head[i]} class=${numeric.includes(i) ? "num" : null}>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;

// A curve of a few points as a picture in a line of text.
export function Spark({ points, label }) {
  if (points.length < 2) return html`<span class="spark"></span>`;
  const [wide, high] = [120, 28];
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = ([x, y]) =>
    `${(2 + ((x - x0) / (x1 - x0 || 1)) * (wide - 4)).toFixed(1)} ${(high - 3 - ((y - y0) / (y1 - y0 || 1)) * (high - 6)).toFixed(1)}`;
  return html`<svg class="spark" viewBox="0 0 ${wide} ${high}" role="img" aria-label=${label}><path d=${`M${points.map(at).join("L")}`} /></svg>`;
}

// Curves of one run, or of several over each other: loss first, then every other column of metrics.jsonl.
import { html, useMemo } from "./vendor.js";
import { useData } from "./data.js";
import { Plot, smooth } from "./draw.js";
import { Check, Loading, Select } from "./parts.js";
import { ask } from "./route.js";
import { bytes, clock, count, figure, percent } from "./words.js";

export const AXES = [
  ["step", "step", count],
  ["tokens", "tokens", count],
  ["elapsed", "seconds", clock],
  ["flops", "FLOPs", count],
  ["joules_so_far", "joules", count],
];
const UNITS = { memory_bytes: bytes, saved_bytes: bytes, state_bytes: bytes, mfu: percent, tokens_per_second: count, seconds: clock };
const WORDS = {
  loss: "loss (nats per token)",
  val_loss: "validation loss",
  val_bits_per_byte: "validation, bits per byte",
  grad_norm: "gradient norm",
  lr: "learning rate",
  tokens_per_second: "tokens per second",
  memory_bytes: "memory",
  mfu: "MFU",
  seconds: "seconds a step",
};
const FIRST = ["grad_norm", "lr", "tokens_per_second", "memory_bytes", "mfu"];
const APART = new Set(["step", "tokens", "elapsed", "flops", "joules_so_far", "loss", "val_loss"]);

export function Controls({ query, axes }) {
  const x = query.get("x") ?? "step";
  const weight = query.get("smooth") ?? "0.9";
  return html`<div class="controls" role="group" aria-label="How curves are drawn">
    <${Select} label="x" name="x" value=${x} first="step" choices=${axes.map(([key, word]) => [key, word])} />
    <label class="control">smooth
      <input type="range" min="0" max="0.99" step="0.01" value=${weight} onInput=${(event) => ask({ smooth: event.target.value })} />
      <output>${weight}</output>
    </label>
    <${Check} label="log x" name="logx" on=${query.get("logx") === "1"} />
    <${Check} label="log y" name="logy" on=${query.get("logy") === "1"} />
  </div>`;
}

// `runs`: [{ name, data }], with what /curves answers. One run shows its raw losses behind the smooth ones.
export function Curves({ runs, query }) {
  const there = runs.filter((run) => run.data && run.data.rows > 0);
  const axes = AXES.filter(([key]) => there.some((run) => run.data.steps[key]));
  const [x, xlabel, formatX] = axes.find(([key]) => key === query.get("x")) ?? AXES[0];
  const weight = Number(query.get("smooth") ?? "0.9");
  const drawn = { xlabel, formatX, logX: query.get("logx") === "1", logY: query.get("logy") === "1" };
  const losses = useMemo(() => lossSeries(there, x, weight), [...there.map((run) => run.data), x, weight]);
  if (!there.length) return html`<p class="empty">No step has run yet.</p>`;
  const columns = [...new Set(there.flatMap((run) => [...Object.keys(run.data.steps), ...Object.keys(run.data.checks)]))].filter((name) => !APART.has(name));
  const first = FIRST.filter((name) => columns.includes(name));
  const rest = columns.filter((name) => !FIRST.includes(name)).sort();
  const small = (name) => html`<${Plot} ...${drawn} key=${name} series=${columnSeries(there, x, name)} ylabel=${WORDS[name] ?? name} logY=${name === "grad_norm" || drawn.logY} height=${200} format=${UNITS[name] ?? figure} label=${`${WORDS[name] ?? name} over ${xlabel}`} />`;
  return html`
    <${Controls} query=${query} axes=${axes} />
    ${there.map(Doubts)}
    <section class="panel"><${Plot} ...${drawn} series=${losses} ylabel=${WORDS.loss} height=${360} label="Loss" /></section>
    <div class="small-plots">${first.map((name) => html`<section class="panel">${small(name)}</section>`)}</div>
    ${rest.length > 0 && html`<details class="more"><summary>${rest.length} more column${rest.length > 1 ? "s" : ""}: ${rest.slice(0, 4).join(", ")}${rest.length > 4 ? ", …" : ""}</summary>
      <div class="small-plots">${rest.map((name) => html`<section class="panel">${small(name)}</section>`)}</div></details>`}
  `;
}

// What the file says that a curve cannot show.
function Doubts({ name, data }) {
  const said = [];
  if (data.not_finite.length) said.push(`the loss was not finite at step ${data.not_finite.slice(0, 5).join(", ")}${data.not_finite.length > 5 ? ", …" : ""}`);
  if (data.damaged) said.push(`${data.damaged} damaged line${data.damaged > 1 ? "s" : ""} left out`);
  if (data.skipped_bytes) said.push(`the first ${bytes(data.skipped_bytes)} of a long file are left out`);
  return said.length > 0 && html`<p class="doubt" role="note">${name}: ${said.join("; ")}.</p>`;
}

function lossSeries(runs, x, weight) {
  const alone = runs.length === 1;
  return runs.flatMap(({ name, data: { steps, checks } }, place) => {
    const [xs, losses] = [steps[x] ?? [], steps.loss ?? []];
    const raw = { label: "each step", x: xs, y: losses, colour: place, width: 1, faint: true };
    const mean = { label: alone ? "training" : name, x: xs, y: smooth(losses, weight), colour: place, width: 2 };
    const check = { label: alone ? "validation" : `${name}, validation`, x: checks[x] ?? [], y: checks.val_loss ?? [], colour: alone ? 1 : place, dots: "only" };
    return [...(alone && weight > 0 ? [raw] : []), mean, ...(checks.val_loss ? [check] : [])];
  });
}

function columnSeries(runs, x, name) {
  return runs.flatMap((run, place) => {
    const table = run.data.steps[name] ? run.data.steps : run.data.checks;
    if (!table[name]) return [];
    const points = table[name].reduce((sum, value) => sum + (value !== null), 0);
    return [{ label: runs.length > 1 ? run.name : WORDS[name] ?? name, x: table[x] ?? [], y: table[name], colour: place, dots: points < 40, width: 1.25 }];
  });
}

export function OneRun({ id, name, query, live }) {
  const { value, error } = useData(`/api/runs/${id}/curves`, live ? 2 : 15);
  if (!value) return html`<${Loading} error=${error} />`;
  return html`<${Curves} runs=${[{ name, data: value }]} query=${query} />`;
}

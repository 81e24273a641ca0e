// Predicted against measured: memory by class, as the run told it, and the step on a cluster, as `lmworks plan --score`.
import { html } from "./vendor.js";
import { useData } from "./data.js";
import { Loading, Select, Table } from "./parts.js";
import { bytes, clock, figure } from "./words.js";

export function Plan({ id, run, query }) {
  return html`
    <section class="panel"><h2>Memory by class</h2>
      ${run.memory.length ? run.memory.slice(0, 16).map((one) => html`<${Memory} ...${one} several=${run.memory.length > 1} />`) : html`<p class="empty">This run has not measured its memory yet; it does in its second step.</p>`}
      ${run.memory.length > 16 && html`<p class="soft">${run.memory.length - 16} more ranks are not shown.</p>`}
    </section>
    <${Score} id=${id} query=${query} />`;
}

function Memory({ rank, classes, several }) {
  const most = Math.max(1, ...classes.flatMap((one) => [one.predicted ?? 0, one.measured ?? 0]));
  const total = (side) => classes.reduce((sum, one) => sum + (one[side] ?? 0), 0);
  const bar = (side, value) => html`<div class=${`bar ${side}`}><i style=${{ width: `${(100 * (value ?? 0)) / most}%` }}></i><span>${bytes(value)}</span></div>`;
  return html`
    ${several && html`<h3>rank ${rank}</h3>`}
    <table class="bars" aria-label=${`Memory of rank ${rank} by class`}>
      <thead><tr><th scope="col">class</th><th scope="col"><i class="ink c0"></i>predicted <i class="ink c1"></i>measured</th><th scope="col" class="num">measured / predicted</th></tr></thead>
      <tbody>
        ${classes.map((one) => html`<tr><th scope="row">${one.name}</th><td>${bar("predicted", one.predicted)}${bar("measured", one.measured)}</td><td class="num">${ratio(one)}</td></tr>`)}
        <tr class="total"><th scope="row">all</th><td>${bytes(total("predicted"))} predicted, ${bytes(total("measured"))} measured</td><td class="num">${ratio({ predicted: total("predicted"), measured: total("measured") })}</td></tr>
      </tbody>
    </table>`;
}

const ratio = ({ predicted, measured }) => (predicted && measured !== null ? figure(measured / predicted) : "–");

function Score({ id, query }) {
  const cluster = query.get("cluster") ?? "";
  const { value: known } = useData(`/api/runs/${id}/score`);
  const { value, error } = useData(cluster ? `/api/runs/${id}/score?cluster=${encodeURIComponent(cluster)}` : null);
  const choices = [["", "choose a cluster"], ...(known?.clusters ?? []).map((name) => [name, name])];
  return html`<section class="panel"><h2>A step, on the clock</h2>
    <p class="soft">What a plan tells of this run's own layout on a machine, beside its steady steps. It takes some seconds, and teaches the planner nothing; <code>lmworks plan --score</code> does.</p>
    <div class="controls"><${Select} label="machine it ran on" name="cluster" value=${cluster} first="" choices=${choices} /></div>
    ${cluster && (value ? html`<${Scored} found=${value} />` : html`<${Loading} error=${error} />`)}
  </section>`;
}

function Scored({ found }) {
  if (found.error) return html`<pre class="message" role="alert">${found.error}</pre>`;
  const parts = Object.entries(found.predicted_seconds_by_class).filter(([, value]) => value > 0);
  return html`
    <p>${found.on}; ${found.steady_steps} steady steps; ${found.cluster} with ${found.devices} device${found.devices > 1 ? "s" : ""}.</p>
    <${Table} label="Predicted and measured" numeric=${[1, 2, 3]} head=${["", "predicted", "measured", "measured / predicted"]} rows=${found.rows} />
    <p class="soft">The predicted step: ${parts.map(([name, value]) => `${name.replaceAll("_", " ")} ${clock(value)}`).join(", ")}.</p>
    ${found.doubts.map((doubt) => html`<p class="doubt">${doubt}</p>`)}`;
}

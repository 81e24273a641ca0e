// Several runs over each other, and the settings in which they differ.
import { html, useEffect, useState } from "./vendor.js";
import { Curves } from "./curves.js";
import { useData } from "./data.js";
import { COLOURS } from "./draw.js";
import { Loading, Status, Table } from "./parts.js";
import { ask, to } from "./route.js";
import { count, energy, figure, setting } from "./words.js";

export function Compare({ query }) {
  const ids = [...new Set(query.getAll("run"))];
  const words = ids.map((id) => `run=${encodeURIComponent(id)}`).join("&");
  const { value, error } = useData(ids.length ? `/api/compare?${words}` : null, 5);
  const { value: all } = useData("/api/runs", 10);
  return html`
    <div class="head"><h1>Compare</h1><${Add} all=${all?.runs ?? []} ids=${ids} /></div>
    ${!ids.length ? html`<p class="empty">Choose runs here, or tick them in the <a href=${to(["runs"])}>list</a>.</p>` : !value ? html`<${Loading} error=${error} />` : html`
      <ul class="compared">${value.runs.map((run, i) => html`<li><i class=${`ink c${i % COLOURS}`}></i><a href=${to(["runs", run.id])}>${run.name}</a> <${Status} word=${run.status} why=${run.why} />
        <button type="button" class="plain" aria-label=${`Leave out ${run.name}`} onClick=${() => ask({ run: ids.filter((id) => id !== run.id) })}>✕</button></li>`)}</ul>
      <${Differences} runs=${value.runs} found=${value.differences} />
      <${Overlay} runs=${value.runs} query=${query} />
      <section class="panel"><h2>Last values</h2><${Table} label="Last values" numeric=${[1, 2, 3, 4, 5, 6]} head=${["run", "step", "loss", "validation", "tokens", "tokens/s", "energy"]}
        rows=${value.runs.map((run) => [run.name, count(run.step), figure(run.loss), figure(run.val_loss), count(run.tokens), count(run.tokens_per_second), energy(run.kwh)])} /></section>
    `}`;
}

function Add({ all, ids }) {
  const rest = all.filter((run) => !ids.includes(run.id)).sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  return html`<label class="control">add a run
    <select value="" onChange=${(event) => event.target.value && ask({ run: [...ids, event.target.value] })}>
      <option value="" selected>choose</option>${rest.map((run) => html`<option value=${run.id}>${run.name}</option>`)}
    </select></label>`;
}

function Differences({ runs, found }) {
  if (runs.length < 2) return html`<p class="empty">One run alone does not differ. Add another.</p>`;
  const many = found.length > 1;
  return html`<details class="panel" open=${found.length <= 8}><summary><h2>${found.length ? `${found.length} setting${many ? "s" : ""} differ${many ? "" : "s"}` : "The same recipe"}</h2></summary>
    ${found.length > 0 && html`<${Table} label="Settings that differ" head=${["setting", ...runs.map((run) => run.name)]} rows=${found.map((one) => [html`<code>${one.path}</code>`, ...one.values.map((value) => html`<code class="value">${setting(value)}</code>`)])} />`}
  </details>`;
}

// A hook for each run would need a fixed number of runs; so each run reads its own curves and hands them up.
function Overlay({ runs, query }) {
  const [curves, set] = useState({});
  const take = (id, data) => set((old) => (old[id] === data ? old : { ...old, [id]: data }));
  return html`${runs.map((run) => html`<${Reader} key=${run.id} id=${run.id} live=${run.status === "running"} take=${take} />`)}
    <${Curves} runs=${runs.map((run) => ({ name: run.name, data: curves[run.id] }))} query=${query} />`;
}

function Reader({ id, live, take }) {
  const { value } = useData(`/api/runs/${id}/curves`, live ? 3 : 30);
  useEffect(() => {
    if (value) take(id, value);
  }, [value]);
  return null;
}

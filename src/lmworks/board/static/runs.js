// The list: how every run goes.
import { html } from "./vendor.js";
import { useData } from "./data.js";
import { Loading, Search, Select, Spark, Status } from "./parts.js";
import { ask, to } from "./route.js";
import { ago, clock, count, figure } from "./words.js";

const STATES = ["running", "dead", "failed", "stopped", "done"];
const ORDERS = {
  newest: (a, b) => (b.status === "running") - (a.status === "running") || (b.written ?? 0) - (a.written ?? 0),
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  loss: (a, b) => (a.val_loss ?? a.loss ?? Infinity) - (b.val_loss ?? b.loss ?? Infinity),
};

export function Runs({ query }) {
  const { value, error } = useData("/api/runs", 2);
  if (!value) return html`<${Loading} error=${error} />`;
  const words = (query.get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const [state, order] = [query.get("state") ?? "", query.get("sort") ?? "newest"];
  const chosen = query.getAll("pick").filter((id) => value.runs.some((run) => run.id === id));
  const named = value.runs.filter((run) => words.every((word) => run.name.toLowerCase().includes(word)));
  const shown = named.filter((run) => !state || run.status === state).sort(ORDERS[order] ?? ORDERS.newest);
  const pick = (id) => ask({ pick: chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id] });
  return html`
    <div class="head"><h1>Runs</h1>
      <a class=${`button ${chosen.length > 1 ? "" : "off"}`} href=${chosen.length > 1 ? to(["compare"], { run: chosen }) : null} aria-disabled=${chosen.length < 2}>
        ${chosen.length > 1 ? `Compare ${chosen.length} runs` : "Tick two runs to compare"}</a>
    </div>
    <div class="controls">
      <${Search} value=${query.get("q") ?? ""} hint="Search runs by name" />
      <${Select} label="sort" name="sort" value=${order} first="newest" choices=${[["newest", "newest first"], ["name", "by name"], ["loss", "by loss"]]} />
      <div class="chips" role="group" aria-label="Only runs that are">
        <button type="button" aria-pressed=${!state} onClick=${() => ask({ state: "" })}>all ${named.length}</button>
        ${STATES.map((word) => {
          const times = named.filter((run) => run.status === word).length;
          return times > 0 && html`<button type="button" aria-pressed=${state === word} onClick=${() => ask({ state: state === word ? "" : word })}>${word} ${times}</button>`;
        })}
      </div>
    </div>
    ${shown.length === 0
      ? html`<p class="empty">${value.runs.length ? "No run is called so." : html`No run yet below ${value.roots.map((root) => html`<code>${root}</code> `)}. <br /><code>lmworks train quickstart</code> starts one, and it appears here.`}</p>`
      : html`<ul class="runs">${shown.map((run) => html`<${Line} run=${run} key=${run.id} on=${chosen.includes(run.id)} pick=${pick} />`)}</ul>`}
  `;
}

function Line({ run, on, pick }) {
  const cut = run.name.lastIndexOf("/") + 1;
  const share = run.steps ? Math.min(1, (run.step ?? 0) / run.steps) : 0;
  return html`<li class="run">
    <input type="checkbox" checked=${on} onChange=${() => pick(run.id)} aria-label=${`Compare ${run.name}`} />
    <div class="what">
      <a class="name" href=${to(["runs", run.id])}><span class="folder">${run.name.slice(0, cut)}</span>${run.name.slice(cut)}</a>
      <div class="how"><${Status} word=${run.status} why=${run.why} /> <span class="soft">${run.status === "running" ? `${clock(run.seconds_left)} left` : ago(run.written)}${run.attempts > 1 ? ` · ${run.attempts} attempts` : ""}${run.parameters ? ` · ${count(run.parameters)} parameters` : ""}</span></div>
    </div>
    <${Spark} points=${run.curve} label="Loss over steps" />
    <div class="fact"><span>step</span><b>${count(run.step)}</b> <span class="of">of ${count(run.steps)}</span>
      <progress max="1" value=${share} aria-label="Steps done">${Math.round(100 * share)} %</progress></div>
    <div class="fact"><span>loss</span><b>${run.not_finite ? "not finite" : figure(run.loss)}</b> <span class="of">${run.val_loss !== null ? `val ${figure(run.val_loss)}` : ""}</span></div>
    <div class="fact"><span>tokens/s</span><b>${count(run.tokens_per_second)}</b></div>
  </li>`;
}

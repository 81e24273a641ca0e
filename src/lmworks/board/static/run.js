// One run: its numbers, and a page for each thing that one wants to know.
import { html } from "./vendor.js";
import { OneRun } from "./curves.js";
import { useData } from "./data.js";
import { Loading, Status, Table, Tile } from "./parts.js";
import { Plan } from "./plan.js";
import { to } from "./route.js";
import { System } from "./system.js";
import { bytes, clock, count, energy, figure, flops, percent } from "./words.js";

const TABS = [
  ["curves", "Curves"],
  ["system", "System"],
  ["plan", "Plan"],
  ["samples", "Samples"],
  ["recipe", "Recipe"],
  ["record", "Record"],
];

export function RunPage({ id, tab, query }) {
  const { value: run, error } = useData(`/api/runs/${id}`, 2);
  if (!run) return html`<${Loading} error=${error} />`;
  const live = run.status === "running";
  const pages = {
    curves: html`<${OneRun} id=${id} name=${run.name} query=${query} live=${live} />`,
    system: html`<${System} id=${id} run=${run} query=${query} live=${live} />`,
    plan: html`<${Plan} id=${id} run=${run} query=${query} />`,
    samples: html`<${Samples} samples=${run.samples} />`,
    recipe: html`<section class="panel"><pre class="file">${run.recipe || "There is no recipe."}</pre></section>`,
    record: html`<${Record} run=${run} />`,
  };
  return html`
    <p class="crumbs"><a href=${to(["runs"])}>Runs</a></p>
    <div class="head"><h1 class="run-name">${run.name}</h1><${Status} word=${run.status} /></div>
    ${run.why && html`<p class=${`why ${run.status}`}>${run.why}</p>`}
    <dl class="tiles">
      <${Tile} name="step" value=${count(run.step)} note=${` of ${count(run.steps)}`} />
      <${Tile} name="loss" value=${run.not_finite ? "not finite" : figure(run.loss)} />
      ${run.val_loss !== null && html`<${Tile} name="validation" value=${figure(run.val_loss)} />`}
      <${Tile} name="tokens" value=${count(run.tokens)} />
      <${Tile} name="tokens/s" value=${count(run.tokens_per_second)} />
      ${run.mfu !== null && html`<${Tile} name="MFU" value=${percent(run.mfu)} />`}
      ${live ? html`<${Tile} name="time left" value=${clock(run.seconds_left)} />` : run.summary.wall_seconds && html`<${Tile} name="wall time" value=${clock(run.summary.wall_seconds)} />`}
      ${run.summary.peak_memory_bytes && html`<${Tile} name="peak memory" value=${bytes(run.summary.peak_memory_bytes)} />`}
      ${run.kwh !== null && html`<${Tile} name="energy" value=${energy(run.kwh)} note=${run.energy.label ? ` ${run.energy.label}` : ""} />`}
    </dl>
    <nav class="tabs" aria-label="About this run">${TABS.map(([key, word]) => html`<a href=${to(["runs", id, key])} aria-current=${key === tab ? "page" : null}>${word}</a>`)}</nav>
    ${pages[tab] ?? html`<p class="empty">There is no such page.</p>`}
  `;
}

function Samples({ samples }) {
  if (!samples.length) return html`<p class="empty">This run has written no texts. A recipe's <code>samples.prompts</code> asks for some.</p>`;
  return html`<div class="samples">${samples.map((sample) => html`<article class="panel sample">
    <h2>step ${count(sample.step)}</h2><p class="said"><mark>${sample.prompt}</mark>${sample.text}</p></article>`)}</div>`;
}

function Record({ run }) {
  const { record } = run;
  const facts = [
    ["folder", run.folder],
    ["id", record.id],
    ["command", run.command],
    ["began", run.began],
    ["attempts", run.attempts],
    ["lmworks", record.code && `${record.code.version} ${record.code.commit ? `at ${record.code.commit.slice(0, 10)}${record.code.dirty ? " with changes" : ""}` : ""}`],
    ["recipe, SHA-256", record.recipe_sha256],
    ["parameters", record.parameters],
    ["rate of the hardware", record.peak_flops && `${flops(record.peak_flops)}, ${record.peak_flops_source}`],
    ["went on from", record.parent?.path],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  const tables = ["hardware", "versions"].filter((name) => record[name]);
  const sources = Object.entries(record.data?.sources ?? {});
  return html`
    <section class="panel"><${Table} label="Record" head=${["what", "value"]} rows=${facts.map(([name, value]) => [name, String(value)])} /></section>
    ${tables.map((name) => html`<section class="panel"><h2>${name}</h2><${Table} label=${name} head=${["what", "value"]} rows=${Object.entries(record[name]).map(([key, value]) => [key, key === "memory_bytes" ? bytes(value) : String(value)])} /></section>`)}
    ${sources.length > 0 && html`<section class="panel"><h2>Data</h2><${Table} label="Data" numeric=${[1, 2, 3, 4]} head=${["source", "weight", "documents kept", "left out", "tokens"]}
      rows=${sources.map(([name, source]) => [name, source.weight, count(source.documents?.kept), count(sum(source.documents?.dropped)), count(source.tokens)])} /></section>`}
  `;
}

const sum = (counts) => Object.values(counts ?? {}).reduce((total, value) => total + value, 0);

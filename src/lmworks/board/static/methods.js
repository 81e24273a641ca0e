// The ledger: published methods, what their papers claim, and what was seen of it.
import { html } from "./vendor.js";
import { useData } from "./data.js";
import { Plot } from "./draw.js";
import { Loading, Search, Select, Table, Verdict } from "./parts.js";
import { to } from "./route.js";
import { bytes } from "./words.js";

const ORDERS = {
  name: (a, b) => a.name.localeCompare(b.name),
  evidence: (a, b) => (b.date ?? "").localeCompare(a.date ?? "") || a.name.localeCompare(b.name),
  paper: (a, b) => b.year - a.year || a.name.localeCompare(b.name),
};
const VERDICTS = ["holds", "not seen", "contrary", "refused", "confounded", "stale", "no evidence yet", "planned"];

export function Methods({ query }) {
  const { value, error } = useData("/api/methods", 20);
  if (!value) return html`<${Loading} error=${error} />`;
  const words = (query.get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const [slot, verdict, year, order] = ["slot", "verdict", "year", "sort"].map((name) => query.get(name) ?? "");
  const slots = [...new Set(value.flatMap((one) => one.fills))].sort();
  const years = [...new Set(value.map((one) => String(one.year)))].sort().reverse();
  const shown = value
    .filter((one) => words.every((word) => one.words.toLowerCase().includes(word)))
    .filter((one) => !slot || one.fills.includes(slot))
    .filter((one) => !verdict || one.verdicts.includes(verdict))
    .filter((one) => !year || String(one.year) === year)
    .sort(ORDERS[order] ?? ORDERS.evidence);
  return html`
    <div class="head"><h1>Methods</h1><a class="button quiet" href="/feed.xml">Subscribe to new evidence (Atom)</a></div>
    <div class="controls">
      <${Search} value=${query.get("q") ?? ""} hint="Search papers, pages and claims" />
      <${Select} label="slot or stage" name="slot" value=${slot} first="" choices=${[["", "all"], ...slots.map((one) => [one, one])]} />
      <${Select} label="verdict" name="verdict" value=${verdict} first="" choices=${[["", "all"], ...VERDICTS.map((one) => [one, one])]} />
      <${Select} label="paper of" name="year" value=${year} first="" choices=${[["", "all years"], ...years.map((one) => [one, one])]} />
      <${Select} label="sort" name="sort" value=${order || "evidence"} first="evidence" choices=${[["evidence", "newest evidence"], ["paper", "newest paper"], ["name", "by name"]]} />
    </div>
    <p class="soft" role="status">${shown.length} of ${value.length} methods</p>
    <ul class="methods">${shown.map((one) => html`<li class="panel" key=${one.name}>
      <div class="head"><h2><a href=${to(["methods", one.name])}>${one.name}</a> <small>${one.year}</small></h2><div class="chips">${one.fills.map((fill) => html`<span class="chip">${fill}</span>`)}</div></div>
      <p>${one.line}</p>
      <p class="paper">${one.title}</p>
      <p class="verdicts">${one.verdicts.map((word) => html`<${Verdict} word=${word} times=${one.counts[word]} />`)}${one.date && html` <span class="soft">${one.grade}, ${one.date} at ${one.commit}</span>`}</p>
    </li>`)}</ul>
    ${shown.length === 0 && html`<p class="empty">No method is like that.</p>`}`;
}

export function Method({ name }) {
  const { value: method, error } = useData(`/api/methods/${encodeURIComponent(name)}`, 20);
  if (!method) return html`<${Loading} error=${error} />`;
  return html`
    <p class="crumbs"><a href=${to(["methods"])}>Methods</a></p>
    <div class="head"><h1>${method.name} <small>${method.year}</small></h1><p class="verdicts">${method.verdicts.map((word) => html`<${Verdict} word=${word} times=${method.counts[word]} />`)}</p></div>
    <p class="paper">${method.title}</p>
    <div class="chips">${method.fills.map((fill) => html`<a class="chip" href=${to(["methods"], { slot: fill })}>${fill}</a>`)}</div>
    ${method.planned && html`<p class="empty">Planned: ${method.line}. There is no code of it yet.</p>`}
    ${method.evidence.length > 0 && html`<h2 class="shelf">Evidence</h2>${method.evidence.map((one, i) => html`<${Evidence} found=${one} open=${i === 0} />`)}`}
    ${method.claims.length > 0 && html`<h2 class="shelf">Claims of the paper</h2><section class="panel"><ul class="claims">${method.claims.map((claim) => html`<li>
      <b>${claim.name}</b> ${claim.statement}<br /><span class="soft">${claim.figure}; ${claim.condition}. ${claim.source}</span>${claim.untested && html`<br /><span class="soft">Not tested here: ${claim.untested}</span>`}</li>`)}</ul></section>`}
    ${method.page.length > 0 && html`<h2 class="shelf">Page</h2><article class="panel prose"><${Tree} nodes=${method.page} /></article>`}
    ${method.parts.length > 0 && html`<h2 class="shelf">In a recipe</h2><section class="panel">${method.parts.map((part) => html`<p><code>${`${part.slot} = { use = "${part.name}" }`}</code> ${part.line}</p>`)}
      <p class="soft"><code>lmworks methods ${method.name}</code> tells every setting.</p></section>`}
  `;
}

// Names of elements come from a list on the server; texts are texts.
const Tree = ({ nodes }) => nodes.map((node) => (typeof node === "string" ? node : html`<${node[0]} ...${node[1].href ? { href: node[1].href, rel: "noreferrer noopener", target: "_blank" } : {}}><${Tree} nodes=${node[2]} /></${node[0]}>`));

function Evidence({ found, open }) {
  const series = found.arms.flatMap((arm, i) => (arm.curves.length ? [{ label: arm.plain_name, ...mean(arm.curves), colour: i, dash: i >= 8 ? [5, 4] : undefined, width: 1.75 }] : []));
  return html`<details class="panel evidence" open=${open}>
    <summary><b>${found.date}</b> ${found.summary} <span class="soft">${found.grade}, ${found.label}, commit ${found.commit}</span></summary>
    ${found.stale.length > 0 && html`<p class="doubt">Stale: changed since: ${found.stale.join(", ")}.</p>`}
    <ul class="findings">${found.findings.map((one) => html`<li><${Verdict} word=${one.word} /> <b>${one.claim}</b> <span>${one.test}</span><br />
      <span class="soft">seen ${one.seen} (${one.interval}), bound ${one.bound}, could have seen ${one.could_see}: ${one.why}.</span></li>`)}</ul>
    ${series.length > 0 && html`<${Plot} series=${series} xlabel=${found.axis} ylabel=${found.metric} height=${300} label=${`${found.metric} over ${found.axis}, mean over seeds`} sync=${found.file} />`}
    <${Table} label="Arms" numeric=${[2, 3, 4, 5, 6]} head=${["arm", "tuned", "tuning runs", "steps", found.metric, "seconds", "peak MiB"]} rows=${found.arms.map((arm) => [arm.name, arm.tuned, arm.tried, arm.steps, arm.metric, arm.seconds, arm.memory])} />
    <p class="soft">${found.hardware?.processor ?? ""}${found.hardware?.gpu ? `, ${found.hardware.gpu}` : ""}, ${found.hardware?.cores ?? "?"} cores, ${bytes(found.hardware?.memory_bytes)}, ${found.hardware?.system ?? ""}; torch ${found.versions?.torch ?? "?"}; seeds ${(found.seeds ?? []).join(", ")}; <code>${(found.command ?? []).join(" ")}</code></p>
  </details>`;
}

// The mean of the curves of all seeds, place by place, as far as all of them go.
function mean(curves) {
  const length = Math.min(...curves.map((curve) => curve.length));
  const places = Array.from({ length }, (_, i) => i);
  const average = (values) => (values.some((value) => value === null) ? null : values.reduce((a, b) => a + b, 0) / values.length);
  return { x: places.map((i) => average(curves.map((curve) => curve[i][0]))), y: places.map((i) => average(curves.map((curve) => curve[i][1]))), dots: length === 1 };
}

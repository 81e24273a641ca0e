// Where the time of a run went: effective time, heat map of ranks, timeline, and what happened.
import { html, useEffect, useRef } from "./vendor.js";
import { useData } from "./data.js";
import { useTheme } from "./draw.js";
import { Loading, Select, Table } from "./parts.js";
import { bytes, clock, count, moment, percent } from "./words.js";

const SPENT = { steps: "steps that count", again: "steps made again", validate: "validation", save: "checkpoints", sample: "samples", down: "between attempts", other: "everything else" };
const TOLD = { start: "start", stopped: "stopped", failed: "failed", note: "note", change: "change", alert: "alert" };

export function System({ id, run, query, live }) {
  const [name, steps] = [query.get("span") ?? "step", query.get("steps") ?? "20"];
  const { value, error } = useData(`/api/runs/${id}/system?name=${encodeURIComponent(name)}&steps=${encodeURIComponent(steps)}`, live ? 3 : 30);
  if (!value) return html`<${Loading} error=${error} />`;
  return html`
    <${Time} time=${value.time} />
    <${Heat} heat=${value.heat} names=${value.names} name=${value.name} />
    <${Timeline} found=${value.timeline} steps=${steps} />
    <${Happened} told=${run.told} />
    ${run.sent.length > 0 && html`<section class="panel"><h2>Sent between ranks</h2>
      <${Table} label="Sent between ranks" numeric=${[2, 3, 4]} head=${["axis", "operation", "ranks", "calls", "bytes of all"]} rows=${together(run.sent)} /></section>`}
  `;
}

// One line for each kind of exchange, over all ranks.
function together(sent) {
  const kinds = new Map();
  for (const { axis, operation, calls, bytes: size } of sent) {
    const key = `${axis} ${operation}`;
    const sum = kinds.get(key) ?? { axis, operation, ranks: 0, calls: 0, size: 0 };
    kinds.set(key, { ...sum, ranks: sum.ranks + 1, calls: sum.calls + (calls ?? 0), size: sum.size + (size ?? 0) });
  }
  return [...kinds.values()].map((one) => [String(one.axis), String(one.operation), one.ranks, count(one.calls), bytes(one.size)]);
}

function Time({ time }) {
  if (!time.spent) return html`<section class="panel"><h2>Time</h2><p class="empty">No events yet.</p></section>`;
  const parts = Object.entries(time.spent).filter(([, value]) => value > 0.0005 * time.wall);
  return html`<section class="panel"><h2>Effective training time: ${percent(time.effective)}</h2>
    <div class="stack" role="img" aria-label=${parts.map(([key, value]) => `${SPENT[key]} ${percent(value / time.wall)}`).join(", ")}>
      ${parts.map(([key, value]) => html`<i class=${`s-${key}`} style=${{ flexGrow: value / time.wall }} title=${`${SPENT[key]}: ${clock(value)}`}></i>`)}
    </div>
    <ul class="keys">${parts.map(([key, value]) => html`<li><i class=${`ink s-${key}`}></i>${SPENT[key]} <b>${clock(value)}</b> <span class="soft">${percent(value / time.wall)}</span></li>`)}</ul>
    <p class="soft">${clock(time.wall)} from the first start to the last event${time.attempts.length > 1 ? `, in ${time.attempts.length} attempts: ${time.attempts.map((one) => `${one.steps} steps from ${one.step}`).join("; ")}` : ""}.</p>
  </section>`;
}

function Heat({ heat, names, name }) {
  const worst = heat.excess.length ? heat.excess.indexOf(Math.max(...heat.excess)) : -1;
  const slow = worst >= 0 && heat.excess[worst] > 1.05;
  return html`<section class="panel"><div class="head"><h2>Seconds by rank and step</h2>
      <${Select} label="span" name="span" value=${name} first="step" choices=${names.map((one) => [one, one])} /></div>
    ${heat.ranks.length === 0 ? html`<p class="empty">No span is called so.</p>` : html`
      ${heat.ranks.length > 1 && html`<p>${slow ? html`<b>rank ${heat.ranks[worst]}</b> takes ${percent(heat.excess[worst] - 1)} longer than the median rank.` : "All ranks take about as long."}</p>`}
      <${Chart} draw=${(ink) => heatOptions(heat, ink)} of=${heat} height=${Math.min(600, 120 + 26 * heat.ranks.length)} label=${`Heat map: seconds of ${name} by rank and step`} />`}
  </section>`;
}

function heatOptions(heat, ink) {
  const values = heat.cells.map((cell) => cell[2]).sort((a, b) => a - b);
  const at = (share) => values[Math.floor(share * (values.length - 1))];
  return {
    ...plain(ink),
    grid: { left: 66, right: 12, top: 8, bottom: 84 },
    xAxis: { type: "category", data: heat.buckets, name: "step", nameLocation: "middle", nameGap: 24, ...axis(ink) },
    yAxis: { type: "category", data: heat.ranks.map((rank) => `rank ${rank}`), inverse: true, ...axis(ink) },
    visualMap: { min: at(0.02), max: at(0.98) || 1e-9, calculable: true, orient: "horizontal", left: "center", bottom: 0, itemHeight: 160, itemWidth: 12, precision: 4, textStyle: { color: ink("--soft") }, inRange: { color: [ink("--heat0"), ink("--heat1"), ink("--heat2")] }, formatter: (value) => clock(value) },
    tooltip: { ...plain(ink).tooltip, formatter: ({ value: [bucket, rank, seconds] }) => `rank ${heat.ranks[rank]}\nstep ${heat.buckets[bucket]}${heat.steps_a_bucket > 1 ? ` to ${heat.buckets[bucket] + heat.steps_a_bucket - 1}, median` : ""}\n${clock(seconds)}` },
    series: [{ type: "heatmap", data: heat.cells, progressive: 0 }],
  };
}

function Timeline({ found, steps }) {
  return html`<section class="panel"><div class="head"><h2>Timeline</h2>
      <${Select} label="show the last" name="steps" value=${steps} first="20" choices=${["2", "5", "20", "100", "1000"].map((one) => [one, `${one} steps`])} /></div>
    ${found.spans.length === 0 ? html`<p class="empty">No spans yet.</p>` : html`
      <ul class="keys">${found.names.map((name, i) => html`<li><i class=${`ink c${i % 8}`}></i>${name}</li>`)}</ul>
      <${Chart} draw=${(ink) => timeOptions(found, ink)} of=${found} height=${Math.min(700, 110 + 30 * found.lanes.length)} label="Timeline of spans by rank" />
      <p class="soft">From ${moment(found.zero)}.${found.left_out ? ` ${count(found.left_out)} earlier spans are not drawn.` : ""} Scroll or pinch to zoom.</p>`}
  </section>`;
}

function timeOptions(found, ink) {
  const shape = (params, api) => {
    const lane = api.value(0);
    const [start, end] = [api.coord([api.value(3), lane]), api.coord([api.value(4), lane])];
    const high = Math.max(4, api.size([0, 1])[1] * Math.max(0.25, 0.8 - 0.17 * api.value(5)));
    const area = params.coordSys;
    const left = Math.max(start[0], area.x);
    const right = Math.min(Math.max(end[0], start[0] + 1), area.x + area.width);
    if (right <= left) return undefined;
    return { type: "rect", shape: { x: left, y: start[1] - high / 2, width: right - left, height: high }, style: { fill: ink(`--c${api.value(1) % 8}`), stroke: ink("--panel"), lineWidth: 0.5 } };
  };
  return {
    ...plain(ink),
    grid: { left: 84, right: 16, top: 8, bottom: 74 },
    xAxis: { type: "value", min: 0, name: "seconds", nameLocation: "middle", nameGap: 24, ...axis(ink) },
    yAxis: { type: "category", data: found.lanes, inverse: true, ...axis(ink) },
    dataZoom: [
      { type: "inside", filterMode: "weakFilter" },
      { type: "slider", bottom: 4, height: 18, filterMode: "weakFilter", borderColor: ink("--line"), fillerColor: ink("--select"), showDataShadow: false, textStyle: { color: ink("--soft") } },
    ],
    tooltip: { ...plain(ink).tooltip, formatter: ({ value: [lane, name, step, start, end] }) => `${found.names[name]}\n${found.lanes[lane]}, step ${step}\n${clock(end - start)}` },
    series: [{ type: "custom", renderItem: shape, encode: { x: [3, 4], y: 0 }, data: found.spans, clip: true }],
  };
}

const axis = (ink) => ({ axisLabel: { color: ink("--soft") }, nameTextStyle: { color: ink("--soft") }, axisLine: { lineStyle: { color: ink("--line") } }, splitLine: { lineStyle: { color: ink("--line") } } });

// Tooltips are drawn on the canvas as text: a name from a file never becomes HTML.
const plain = (ink) => ({ animation: false, textStyle: { fontFamily: "system-ui, sans-serif" }, tooltip: { renderMode: "richText", backgroundColor: ink("--panel"), borderColor: ink("--line"), textStyle: { color: ink("--text") } } });

function Chart({ draw, of, height, label }) {
  const place = useRef(null);
  const chart = useRef(null);
  const dark = useTheme();
  useEffect(() => {
    let over = false;
    import("./vendor-echarts.js").then(({ echarts }) => {
      if (over || !place.current) return;
      chart.current ??= echarts.init(place.current);
      const style = getComputedStyle(document.documentElement);
      const zoom = chart.current.getOption()?.dataZoom?.map(({ start, end }) => ({ start, end }));
      const next = draw((name) => style.getPropertyValue(name).trim());
      if (zoom && next.dataZoom) next.dataZoom = next.dataZoom.map((one, i) => ({ ...one, ...zoom[i] }));
      chart.current.setOption(next, true);
      chart.current.resize();
    });
    return () => {
      over = true;
    };
  }, [of, dark, height]);
  useEffect(() => {
    const watch = new ResizeObserver(() => chart.current?.resize());
    watch.observe(place.current);
    return () => {
      watch.disconnect();
      chart.current?.dispose();
      chart.current = null;
    };
  }, []);
  return html`<div ref=${place} class="chart" style=${{ height: `${height}px` }} role="img" aria-label=${label}></div>`;
}

function Happened({ told }) {
  return html`<section class="panel"><h2>What happened</h2>
    ${told.length === 0 ? html`<p class="empty">Nothing but steps.</p>` : html`<ol class="log">${told.map((one) => html`<li class=${one.name.includes("failed") ? "bad" : null}>
      <time>${moment(one.at)}</time> <span class="soft">step ${one.step}${one.rank ? `, rank ${one.rank}` : ""}</span> <b>${TOLD[one.name] ?? one.name}</b> ${one.text}</li>`)}</ol>`}
  </section>`;
}

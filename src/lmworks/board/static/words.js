// Numbers and times as people read them. null and undefined become a dash.

const DASH = "–";
const LETTERS = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

// '134.5M' for 134515008.
export function count(value) {
  if (missing(value)) return DASH;
  for (const [size, letter] of LETTERS) if (Math.abs(value) >= size) return `${trim(value / size)}${letter}`;
  return Number.isInteger(value) ? String(value) : trim(value);
}

const trim = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(1).replace(/\.0$/, ""));

export function bytes(value) {
  if (missing(value)) return DASH;
  for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]])
    if (Math.abs(value) >= 1024 ** power) return `${(value / 1024 ** power).toFixed(power > 2 ? 2 : 1)} ${unit}`;
  return `${value} B`;
}

// A loss, a rate, a norm: four figures.
export function figure(value) {
  if (missing(value)) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return size >= 100 ? value.toFixed(1) : value.toPrecision(4);
}

// A loss, a rate, a norm beside an axis: no more figures than it needs.
export function tick(value) {
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(1).replace("e+", "e").replace(".0e", "e") : String(Number(value.toPrecision(4)));
}

// '23.9 GFLOP/s'
export function flops(value) {
  for (const [power, letter] of [[15, "P"], [12, "T"], [9, "G"], [6, "M"]]) if (value >= 10 ** power) return `${trim(value / 10 ** power)} ${letter}FLOP/s`;
  return `${count(value)} FLOP/s`;
}

export const percent = (value) => (missing(value) ? DASH : `${(100 * value).toFixed(value >= 0.1 ? 1 : 2)} %`);

// '42 s', '12:03', '3 h 05', '2 d 04 h'
export function clock(seconds) {
  if (missing(seconds)) return DASH;
  const whole = Math.round(seconds);
  if (seconds < 10) return `${seconds < 0.1 ? seconds.toPrecision(2) : seconds.toFixed(1)} s`;
  if (whole < 60) return `${whole} s`;
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)}:${two(whole % 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${two(Math.floor((whole % 86400) / 3600))} h`;
}

export function ago(seconds) {
  if (missing(seconds)) return DASH;
  const since = Math.max(0, Date.now() / 1000 - seconds);
  if (since < 5) return "now";
  if (since < 60) return `${Math.round(since)} s ago`;
  if (since < 3600) return `${Math.round(since / 60)} min ago`;
  if (since < 86400) return `${Math.round(since / 3600)} h ago`;
  return `${Math.round(since / 86400)} d ago`;
}

export const moment = (seconds) => (missing(seconds) ? DASH : new Date(seconds * 1000).toLocaleString());

export const energy = (kwh) =>
  missing(kwh) ? DASH : kwh >= 1 ? `${figure(kwh)} kWh` : kwh >= 1e-3 ? `${figure(kwh * 1e3)} Wh` : `${figure(kwh * 3.6e6)} J`;

// A setting's value on one line.
export const setting = (value) => (value === null || value === undefined ? "not set" : JSON.stringify(value));

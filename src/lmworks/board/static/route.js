// Where the reader is: the part of the address behind '#'. Filters and axes are in it too, so a reload loses nothing.
import { useEffect, useState } from "./vendor.js";

const parse = () => {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: path.split("/").filter(Boolean).map(decode), query: new URLSearchParams(query) };
};

function decode(piece) {
  try {
    return decodeURIComponent(piece);
  } catch {
    return piece;
  }
}

export function useRoute() {
  const [route, set] = useState(parse);
  useEffect(() => {
    const changed = () => set(parse());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

// '#/runs/ID?x=tokens'. A value that is empty is left out, a list is written several times.
export function to(pieces, query = {}) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(query))
    for (const one of Array.isArray(value) ? value : [value])
      if (one !== null && one !== undefined && one !== "" && one !== false) words.append(name, one);
  const text = words.toString();
  return `#/${pieces.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

// Change some words of the query; the way back leads to the page before, not through each letter of a search.
export function ask(changes) {
  const { path, query } = parse();
  const now = {};
  for (const name of query.keys()) now[name] = query.getAll(name);
  history.replaceState(null, "", to(path, { ...now, ...changes }));
  dispatchEvent(new HashChangeEvent("hashchange"));
}

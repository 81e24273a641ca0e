// What the board answers, asked again every few seconds. The browser sends what it has (ETag), so that nothing is sent
// twice; a page that is not looked at asks nothing.
import { useEffect, useState } from "./vendor.js";

export const heard = { at: null, lost: false, tell: () => {} };

export function useData(address, seconds = 0) {
  const [state, set] = useState({ address: null, value: null, error: null });
  useEffect(() => {
    if (!address) return undefined;
    let timer = null;
    let tag = null;
    let over = false;
    const look = async () => {
      clearTimeout(timer);
      if (!document.hidden || tag === null) {
        const answer = await get(address);
        if (over) return;
        mark(answer);
        if (answer.lost) set((old) => (old.address === address ? old : { address, value: null, error: null }));
        else if (answer.tag === null || answer.tag !== tag) set({ address, value: answer.value, error: answer.error });
        tag = answer.lost ? tag : answer.tag;
      }
      if (seconds) timer = setTimeout(look, seconds * 1000);
    };
    const shown = () => !document.hidden && seconds && look();
    document.addEventListener("visibilitychange", shown);
    look();
    return () => {
      over = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", shown);
    };
  }, [address, seconds]);
  return state.address === address ? state : { value: null, error: null };
}

async function get(address) {
  try {
    const answer = await fetch(address);
    const kind = answer.headers.get("content-type") ?? "";
    const value = kind.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
    if (!answer.ok) return { error: value.error ?? `the board answered ${answer.status}`, value: null, tag: null };
    return { value, error: null, tag: answer.headers.get("etag") };
  } catch {
    return { lost: true };
  }
}

function mark(answer) {
  const lost = Boolean(answer.lost);
  if (!lost) heard.at = new Date();
  if (lost !== heard.lost) {
    heard.lost = lost;
    heard.tell();
  }
}

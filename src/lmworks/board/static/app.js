// The frame: where one is, and which page is shown.
import { html, render, useEffect, useState } from "./vendor.js";
import { Compare } from "./compare.js";
import { heard } from "./data.js";
import { Method, Methods } from "./methods.js";
import { to, useRoute } from "./route.js";
import { RunPage } from "./run.js";
import { Runs } from "./runs.js";

const PLACES = [
  ["runs", "Runs"],
  ["compare", "Compare"],
  ["methods", "Methods"],
];

function Frame() {
  const { path, query } = useRoute();
  const [lost, setLost] = useState(false);
  useEffect(() => {
    heard.tell = () => setLost(heard.lost);
  }, []);
  const [place = "runs", name, tab] = path;
  const page = name
    ? { runs: html`<${RunPage} id=${name} tab=${tab ?? "curves"} query=${query} key=${name} />`, methods: html`<${Method} name=${name} key=${name} />` }[place]
    : { runs: html`<${Runs} query=${query} />`, compare: html`<${Compare} query=${query} />`, methods: html`<${Methods} query=${query} />` }[place];
  return html`
    <a class="skip" href="#main" onClick=${skip}>To the content</a>
    <header class="top">
      <a class="brand" href=${to(["runs"])}><img src="/static/icon.svg" alt="" width="22" height="22" />lmworks</a>
      <nav aria-label="Pages">
        ${PLACES.map(([key, word]) => html`<a href=${to([key])} aria-current=${key === place ? "page" : null}>${word}</a>`)}
      </nav>
    </header>
    ${lost && html`<p class="lost" role="alert">The board does not answer. What you see is of ${heard.at?.toLocaleTimeString() ?? "before"}; start <code>lmworks board</code> again.</p>`}
    <main id="main" tabindex="-1">${page ?? html`<p class="empty">There is no such page. <a href=${to(["runs"])}>All runs</a></p>`}</main>
  `;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

const root = document.getElementById("board");
root.replaceChildren();
render(html`<${Frame} />`, root);

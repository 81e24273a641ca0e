// What every page stands on: preact renders, htm writes its elements without a compiler, uPlot draws curves.
export { h, render, Fragment } from "preact";
export { useEffect, useMemo, useRef, useState } from "preact/hooks";
import htm from "htm";
import { h } from "preact";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export const html = htm.bind(h);
export { uPlot };

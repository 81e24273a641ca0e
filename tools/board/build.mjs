// Bundles what package-lock.json pins into src/lmworks/board/static/: vendor.js, vendor-echarts.js, vendor.css,
// LICENSES.txt with the licence of every package in them, and vendor.json with versions and SHA-256. The results are
// committed, so that neither a user nor CI needs npm.
//
//     cd tools/board && npm ci && node build.mjs
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { build } from "esbuild";

const target = resolve("../../src/lmworks/board/static");

const result = await build({
  entryPoints: ["vendor.js", "vendor-echarts.js"],
  outdir: target,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
  metafile: true,
  define: { "process.env.NODE_ENV": '"production"' },
});

const packages = [...new Set(Object.keys(result.metafile.inputs).flatMap(packageOf))].sort();
const versions = {};
const texts = ["The files vendor.js, vendor-echarts.js and vendor.css are bundles of these packages.\n"];
for (const name of packages) {
  const folder = join("node_modules", name);
  const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  versions[name] = version;
  texts.push(`${"=".repeat(100)}\n${name} ${version} (${license})\n${"=".repeat(100)}\n`);
  const found = readdirSync(folder, { recursive: true })
    .filter((file) => /^(licen[cs]es\/|licen[cs]e(\.|$)|notice|copyright)/i.test(file))
    .sort();
  if (found.length === 0) throw new Error(`${name} has no licence file`);
  for (const file of found) texts.push(readFileSync(join(folder, file), "utf8").trim() + "\n");
}
writeFileSync(join(target, "LICENSES.txt"), texts.join("\n"));

const files = {};
for (const name of ["LICENSES.txt", "vendor-echarts.js", "vendor.css", "vendor.js"])
  files[name] = createHash("sha256").update(readFileSync(join(target, name))).digest("hex");
writeFileSync(join(target, "vendor.json"), JSON.stringify({ packages: versions, files }, null, 2) + "\n");

// The package that a bundled file belongs to; nothing for a file of our own.
function packageOf(path) {
  const match = path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  return match ? [match[1]] : [];
}

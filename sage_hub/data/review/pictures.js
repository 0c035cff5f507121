"use strict";
// Each picture as a mark-up of Observable Plot, and the same figures as the rows of a table.
const pictures = (() => {
  const colour = (name) => `var(--${name})`;
  const three = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(3));
  const interval = (pair) => (pair ? ` [${three(pair[0])}, ${three(pair[1])}]` : "");
  const SYMBOLS = { base: "square", unlearned: "times", control: "triangle2", sanitized: "circle", reference: "plus" };

  function models(rows, x, y, title) {
    return Plot.dot(rows, {
      x, y, r: 6, symbol: (d) => SYMBOLS[d.model], stroke: (d) => colour(d.model),
      fill: (d) => (d.model === "unlearned" || d.model === "reference" ? "none" : colour(d.model)),
      strokeWidth: 2, title, tip: true,
    });
  }

  function names(rows, x, y) {
    return Plot.text(rows, { x, y, text: (d) => d.shown, dy: -14, fill: (d) => colour(d.model), fontSize: 12 });
  }

  const plain = { color: { type: "identity" }, symbol: { type: "identity" }, grid: true, inset: 18 };

  function tradeoff(data) {
    const { metric, models: rows } = data;
    const title = (d) => `${d.shown}\nforget ${three(d.forget)}${interval(d.forget_interval)}\nheld-out ${three(d.heldout)}${interval(d.heldout_interval)}`;
    const along = ["base", "control", "unlearned"].map((name) => rows.find((d) => d.model === name)).filter(Boolean);
    return {
      title: "Kept and forgotten",
      caption: `Held-out ${metric} (up is better) against forget ${metric} (left is better), with 95 % intervals. Dashed: the whole update scaled down, αΔ, from the base (α = 0) to the unlearned model (α = 1), between the points of it that were measured.`,
      header: ["model", `forget ${metric}`, `held-out ${metric}`],
      rows: rows.map((d) => [d.shown, three(d.forget) + interval(d.forget_interval), three(d.heldout) + interval(d.heldout_interval)]),
      draw: (width) => Plot.plot({
        ...plain, width, ariaLabel: "Held-out against forget figures of all models",
        x: { label: `forget ${metric} →` }, y: { label: `↑ held-out ${metric}` },
        marks: [
          Plot.line(along, { x: "forget", y: "heldout", stroke: colour("control"), strokeDasharray: "5 4" }),
          Plot.ruleY(rows.filter((d) => d.forget_interval), { y: "heldout", x1: (d) => d.forget_interval[0], x2: (d) => d.forget_interval[1], stroke: (d) => colour(d.model) }),
          Plot.ruleX(rows.filter((d) => d.heldout_interval), { x: "forget", y1: (d) => d.heldout_interval[0], y2: (d) => d.heldout_interval[1], stroke: (d) => colour(d.model) }),
          names(rows, "forget", "heldout"), models(rows, "forget", "heldout", title),
        ],
      }),
    };
  }

  function search(data) {
    const { metric, tried, first_looks: looks, models: placed, along, target, gain } = data;
    const rows = Object.entries(placed).map(([model, at]) => ({ model, shown: model === "control" ? "αΔ" : model, ...at }));
    const ways = [
      { name: "tried on all rows", own: tried, dash: null },
      { name: "first look, by shares", own: looks.filter((d) => d.shares), dash: "2 4" },
      { name: "first look, one gain", own: looks.filter((d) => !d.shares), dash: "6 3 1 3" },
    ].filter((way) => way.own.length);
    const all = ways.flatMap((way) => way.own.map((d) => ({ ...d, way: way.name })));
    const told = (d) => `γ = ${d.gain}${d.gain === gain && d.way === ways[0].name ? " (the release)" : ""}\n${d.way}\nforget ${three(d.forget)}\nretain ${three(d.retain)}`;
    return {
      title: "Every gain that was tried",
      caption: `What the search for the gain saw: retain ${metric} against forget ${metric}. Solid: gains on all rows; dotted and dash-dotted: first looks at a part of the rows, by each weight's share and with one gain. Dashed: αΔ between the points of it that were measured. The vertical line is the level to reach. Calibration has seen the retain rows, so this proves nothing of retention.`,
      header: ["way", "γ", `forget ${metric}`, `retain ${metric}`],
      rows: [...all.map((d) => [d.way, String(d.gain), three(d.forget), three(d.retain)]), ...rows.map((d) => [d.shown, "", three(d.forget), three(d.retain)])],
      draw: (width) => Plot.plot({
        ...plain, width, ariaLabel: "Retain against forget level of every gain that was tried",
        x: { label: `forget ${metric} →` }, y: { label: `↑ retain ${metric}` },
        marks: [
          Plot.ruleX([target], { stroke: "var(--quiet)", strokeDasharray: "1 3" }),
          Plot.line(along.map((name) => placed[name]), { x: "forget", y: "retain", stroke: colour("control"), strokeDasharray: "5 4" }),
          ...ways.map((way) => Plot.line(way.own, { x: "forget", y: "retain", stroke: colour("sanitized"), strokeDasharray: way.dash, strokeOpacity: way.dash ? 0.6 : 1 })),
          Plot.dot(all, { x: "forget", y: "retain", r: 3, fill: colour("sanitized"), title: told, tip: true }),
          names(rows, "forget", "retain"), models(rows, "forget", "retain", (d) => `${d.shown}${d.model === "sanitized" ? `, γ = ${three(gain)}` : ""}\nforget ${three(d.forget)}\nretain ${three(d.retain)}`),
        ],
      }),
    };
  }

  function keeping(data) {
    const { tried, base, source, gain } = data;
    return {
      title: "Every gain that was tried",
      caption: "How well rows that the base wrote are still known at each gain. Lines: the base above, the unlearned model below. How much is forgotten was not measured.",
      header: ["γ", "guard rows"],
      rows: tried.map((d) => [String(d.gain), three(d.guard)]),
      draw: (width) => Plot.plot({
        ...plain, width, ariaLabel: "Level on guard rows at every gain that was tried",
        x: { type: "log", label: "γ →" }, y: { label: "↑ known of guard rows" },
        marks: [
          Plot.ruleY([base], { stroke: colour("base") }), Plot.ruleY([source], { stroke: colour("unlearned") }),
          Plot.line(tried, { x: "gain", y: "guard", stroke: colour("sanitized") }),
          Plot.dot(tried, { x: "gain", y: "guard", r: (d) => (d.gain === gain ? 7 : 4), fill: colour("sanitized"), title: (d) => `γ = ${d.gain}${d.gain === gain ? " (the release)" : ""}\n${three(d.guard)}`, tip: true }),
        ],
      }),
    };
  }

  function relearning(data) {
    const { metric, base, models: attacked } = data;
    const all = attacked.flatMap((d) => d.points.map((point) => ({ ...point, model: d.model })));
    const sure = all.filter((d) => d.interval);
    const last = (rows) => rows.filter((d) => d.steps === Math.max(...rows.map((one) => one.steps)));
    const ends = attacked.flatMap((d) => last(all.filter((point) => point.model === d.model))).sort((a, b) => b.value - a.value);
    const steps = [...new Set(all.map((d) => d.steps))].sort((a, b) => a - b);
    const known = base === null ? [] : [base];
    return {
      title: "Taught some of it again",
      caption: `An attack: the model is trained on a part of the forget set. Drawn is the ${metric} of the other forget rows, which it is not taught, after so many steps, with 95 % intervals (lower is better).${known.length ? " Dotted: what the base knows of them." : ""} A release whose curve rises above the unlearned model's is easier to undo.`,
      header: ["model", ...steps.map((step) => `${step} steps`)],
      rows: attacked.map((d) => [d.model, ...steps.map((step) => { const at = d.points.find((point) => point.steps === step); return at ? three(at.value) + interval(at.interval) : "–"; })]),
      draw: (width) => Plot.plot({
        ...plain, width, marginRight: 80, ariaLabel: "Forget figures of rows that are not taught, step by step of relearning",
        x: { label: "steps of training →", ticks: steps }, y: { label: `↑ forget ${metric}` },
        marks: [
          Plot.ruleY(known, { stroke: colour("base"), strokeDasharray: "1 3" }),
          Plot.text(known, { x: 0, y: (d) => d, text: () => "base", dy: -8, textAnchor: "start", fill: colour("base"), fontSize: 12 }),
          Plot.ruleX(sure, { x: "steps", y1: (d) => d.interval[0], y2: (d) => d.interval[1], stroke: (d) => colour(d.model), strokeOpacity: 0.5 }),
          Plot.line(all, { x: "steps", y: "value", z: "model", stroke: (d) => colour(d.model) }),
          Plot.dot(all, { x: "steps", y: "value", r: 4, symbol: (d) => SYMBOLS[d.model], stroke: (d) => colour(d.model), title: (d) => `${d.model}, ${d.steps} steps\n${three(d.value)}${interval(d.interval)}`, tip: true }),
          ...ends.map((end, place) => Plot.text([end], { x: "steps", y: "value", text: "model", dx: 8, dy: 12 * (place - (ends.length - 1) / 2), textAnchor: "start", fill: colour(end.model), fontSize: 12 })),
        ],
      }),
    };
  }

  function bias(data) {
    const both = data.flatMap((d) => ["before", "after"].map((when) => ({ ...d, when, bias: d[when] })));
    return {
      title: "Bias per layer and kind of module",
      caption: "Retention activation bias relative to the base's outputs, before and after; of a kind with several weights in a layer their median.",
      header: ["module", "layer", "before", "after"],
      rows: data.map((d) => [d.kind, String(d.layer), three(d.before), three(d.after)]),
      draw: (width) => Plot.plot({
        width, grid: true, ariaLabel: "Retention activation bias per layer, before and after",
        color: { legend: true, scheme: "Observable10" }, fx: { domain: ["before", "after"], label: null },
        x: { label: "layer →", ticks: Math.min(8, new Set(data.map((d) => d.layer)).size), tickFormat: (d) => (Number.isInteger(d) ? String(d) : "") },
        y: { type: "log", label: "↑ bias", tickFormat: "~e" },
        marks: [
          Plot.line(both, { fx: "when", x: "layer", y: "bias", z: "kind", stroke: "kind" }),
          Plot.dot(both, { fx: "when", x: "layer", y: "bias", fill: "kind", r: 3, title: (d) => `${d.kind}, layer ${d.layer}, ${d.when}\n${three(d.bias)}${d.weights > 1 ? `\nmedian of ${d.weights} weights` : ""}`, tip: true }),
        ],
      }),
    };
  }

  function profile(data) {
    const { curve, chosen } = data;
    const at = chosen ? [chosen] : [];
    return {
      title: "What other strengths would leave",
      caption: "The share of the source's retention bias that each λ would leave, at γ = 1.",
      header: ["λ", "share left"],
      rows: curve.map((d) => [three(d.strength), three(d.kept)]),
      draw: (width) => Plot.plot({
        ...plain, width, height: 300, ariaLabel: "Share of the bias left against the strength",
        x: { type: "log", label: "strength λ →", tickFormat: "~g" }, y: { label: "↑ share left", zero: true },
        marks: [
          Plot.line(curve, { x: "strength", y: "kept", stroke: colour("unlearned") }),
          Plot.dot(curve, { x: "strength", y: "kept", r: 2, fill: colour("unlearned"), title: (d) => `λ = ${three(d.strength)}\n${three(d.kept)}`, tip: true }),
          Plot.dot(at, { x: "strength", y: "kept", r: 6, fill: colour("sanitized"), title: (d) => `this release: λ = ${d.strength}, γ = ${three(d.gain)}\n${three(d.kept)}`, tip: true }),
        ],
      }),
    };
  }

  function rows(answers) {
    const known = answers.rows.filter((d) => d.known[1] !== undefined && d.known[1] !== null && d.known[2] !== null);
    const points = known.map((d) => ({ set: d.set, unlearned: d.known[1], sanitized: d.known[2], d }));
    const short = (text) => (text.length > 90 ? `${text.slice(0, 90)}…` : text);
    return points.length === 0 ? null : {
      title: "Row by row, source against release",
      caption: "How well the release knows the answer of each row (up) against its source (to the right). Above the line a row came back.",
      header: ["set", "rows", "better known than in the source", "less known"],
      rows: [...new Set(points.map((d) => d.set))].map((set) => {
        const own = points.filter((d) => d.set === set);
        return [set, String(own.length), String(own.filter((d) => d.sanitized > d.unlearned).length), String(own.filter((d) => d.sanitized < d.unlearned).length)];
      }),
      draw: (width) => Plot.plot({
        width, grid: true, ariaLabel: "Probability of each row's answer, release against source",
        color: { legend: true, scheme: "Observable10" }, symbol: { legend: false },
        x: { domain: [0, 1], label: "unlearned →" }, y: { domain: [0, 1], label: "↑ sanitized" },
        marks: [
          Plot.line([[0, 0], [1, 1]], { stroke: "var(--quiet)", strokeDasharray: "1 3" }),
          Plot.dot(points, { x: "unlearned", y: "sanitized", stroke: "set", symbol: "set", r: 3.5, title: (p) => `${p.set}, ${p.d.row}: ${three(p.unlearned)} → ${three(p.sanitized)}\n${short(p.d.question || p.d.wanted)}`, tip: true }),
        ],
      }),
    };
  }

  return { tradeoff, search, keeping, relearning, rows, bias, profile };
})();

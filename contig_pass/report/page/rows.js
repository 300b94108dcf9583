// The table of fixes, skips and the program's own copies: filter, sort, open.
const ROWS_A_PAGE = 100;
const KINDS = { fix: "fixed", skip: "left alone" };
const filters = byId("filters");
const COLUMNS = [
  { key: "kind", label: "kind", value: (row) => kindOf(row) },
  { key: "module", label: "module", value: (row) => row.module },
  { key: "op", label: "operand", value: (row) => `${row.op} ${row.operand}` },
  { key: "reason", label: "what was wrong", value: (row) => row.reason },
  { key: "memory", label: "before \u2192 after", value: (row) => row.before.strides },
  { key: "bytes", label: "bytes", value: (row) => row.bytes ?? -1 },
  { key: "us", label: "time", value: (row) => row.us ?? -1 },
  { key: "source", label: "source line", value: (row) => sourceOf(row) },
];
const state = { sort: null, descending: false, shown: ROWS_A_PAGE, open: new Set() };
let visible = [];

const kindOf = (row) => KINDS[row.kind] ?? row.kind;
const isOwnCopy = (row) => row.kind.startsWith("own copy");

function sourceOf(row) {
  if (row.excerpt === null) return "no source line";
  const { short, lineno } = DATA.sources[row.excerpt];
  return `${short}:${lineno}`;
}

const placeText = (place) => `(${place.strides}) @${place.offset} a${place.alignment}`;

/** All that the free text is looked for in, lower case, made once. */
function wordsOf(row) {
  if (row.words === undefined) {
    const source = row.excerpt === null ? {} : DATA.sources[row.excerpt];
    row.words = [
      kindOf(row), row.graph, row.module, row.op, row.operand, row.memory, row.device, row.reason,
      ...row.rules, row.source, placeText(row.before), row.after ? placeText(row.after) : "",
      row.order ?? "", ...row.notes, source.file ?? "", sourceOf(row), source.code ?? "",
      ...row.members.flat(),
    ].join(" ").toLowerCase();
  }
  return row.words;
}

function wanted() {
  const given = new FormData(filters);
  const words = given.get("text").toLowerCase().split(/\s+/).filter(Boolean);
  return DATA.rows.filter((row) =>
    (!given.get("kind") || kindOf(row) === given.get("kind"))
    && (!given.get("module") || row.module === given.get("module"))
    && (!given.get("op") || row.op === given.get("op"))
    && (!given.get("rule") || row.rules.includes(given.get("rule")))
    && words.every((word) => wordsOf(row).includes(word)));
}

function sorted(rows) {
  const column = COLUMNS.find(({ key }) => key === state.sort);
  if (column === undefined) return rows;
  const sign = state.descending ? -1 : 1;
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return [...rows].sort((a, b) => sign * compare(column.value(a), column.value(b)));
}

function refresh() {
  visible = sorted(wanted());
  const uses = visible.reduce((sum, row) => sum + row.count, 0);
  const all = DATA.rows.length;
  byId("count").textContent = all === 0
    ? "No row: nothing was broken and nothing was inserted."
    : `${plural(visible.length, "row")} of ${all.toLocaleString("en")}, for ${plural(uses, "use")}`;
  byId("body").replaceChildren(...visible.slice(0, state.shown).flatMap(rowElements));
  const left = visible.length - state.shown;
  byId("more").replaceChildren();
  if (left > 0) {
    const next = Math.min(left, ROWS_A_PAGE);
    byId("more").append(make("button", { type: "button", onclick: moreRows },
      `Show ${next} more of ${plural(left, "row")}`));
  }
}

function moreRows() {
  const first = state.shown;
  state.shown += ROWS_A_PAGE;
  refresh();
  byId("body").querySelectorAll(".toggle")[first]?.focus();
}

function refreshFromStart() {
  state.shown = ROWS_A_PAGE;
  refresh();
}

// -- one row ------------------------------------------------------------------------------------

function rowElements(row) {
  const number = DATA.rows.indexOf(row);
  const open = state.open.has(row);
  const toggle = make("button", {
    type: "button", class: "toggle", "aria-expanded": String(open),
    "aria-controls": open ? `detail-${number}` : null,
    "aria-label": `details of ${row.op} ${row.operand} in ${row.module}`,
  });
  const cell = (label, ...children) => make("td", { role: "cell", "data-label": label }, ...children);
  const broken = row.kind === "skip" && row.rules.length > 0;
  const memory = [make("span", { class: "mono memory" }, placeText(row.before))];
  if (row.after) memory.push(" \u2192 ", make("span", { class: "mono memory" }, placeText(row.after)));
  const element = make("tr", { class: "row", role: "row", id: `row-${number}` },
    make("td", { role: "cell" }, toggle),
    make("td", { role: "cell" },
      make("span", { class: `kind ${isOwnCopy(row) ? "own" : row.kind}${broken ? " broken" : ""}` }, kindOf(row))),
    cell("module", make("span", { class: "mono" }, row.module),
      row.count > 1 ? make("span", { class: "times" }, ` \u00d7${row.count.toLocaleString("en")}`) : null),
    cell("operand", make("span", { class: "mono" }, `${row.op} `), make("b", {}, row.operand)),
    cell("why", row.reason),
    cell("memory", ...memory),
    make("td", { role: "cell", class: "number", "data-label": "bytes" }, priceOf(row, 0)),
    make("td", { role: "cell", class: "number", "data-label": "time" }, priceOf(row, 1)),
    cell("source", sourceOf(row)));
  element.addEventListener("click", (event) => {
    const reading = event.target !== toggle && String(getSelection()) !== "";
    if (!reading) toggleRow(row, number, element, toggle);
  });
  return open ? [element, detail(row, number)] : [element];
}

function priceOf(row, index) {
  if (row.price !== null) return row.price[index];
  return row.after ? "symbolic" : "\u2013";
}

function toggleRow(row, number, element, toggle) {
  const open = !state.open.delete(row);
  toggle.setAttribute("aria-expanded", String(open));
  if (open) {
    state.open.add(row);
    element.after(detail(row, number));
    toggle.setAttribute("aria-controls", `detail-${number}`);
  } else {
    byId(`detail-${number}`).remove();
    toggle.removeAttribute("aria-controls");
  }
}

function detail(row, number) {
  const terms = isOwnCopy(row) ? [
    ["call", `${row.op} of ${row.memory} on ${row.device}`],
    [row.kind, row.reason],
    ["graph", row.graph || "unnamed"],
  ] : [
    ["operand", `${row.operand}: ${row.memory} on ${row.device}`],
    [row.kind === "skip" ? "left alone because" : "what was wrong", row.reason],
    ["rules not kept", row.rules.join("; ") || "none"],
    ["demanded by", row.source],
    ...(row.order ? [["copied", `in ${row.order} order`]] : []),
    ...row.notes.map((note) => ["note", note]),
    ["graph", row.graph || "unnamed"],
  ];
  const facts = make("dl", {}, ...terms.flatMap(([term, words]) =>
    [make("dt", {}, term), make("dd", {}, words)]));
  const heading = isOwnCopy(row) ? "The copy" : "The use";
  const left = make("div", {}, make("h3", {}, heading), facts, places(row), members(row));
  const right = make("div", {}, make("h3", {}, "Your line"), ...source(row));
  return make("tr", { class: "detail", role: "row", id: `detail-${number}` },
    make("td", { role: "cell", colspan: COLUMNS.length + 1 },
      make("div", { class: "columns" }, right, left)));
}

function places(row) {
  const line = (name, place) => make("tr", {}, make("th", { scope: "row" }, name),
    make("td", { class: "mono" }, `(${place.strides})`), make("td", { class: "mono" }, place.offset),
    make("td", { class: "mono" }, String(place.alignment)));
  const heads = ["memory", "strides", "offset, B", "aligned to, B"];
  return make("table", { class: "places", "aria-label": "memory before and after" },
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, line("before", row.before), row.after ? line("after", row.after) : null));
}

function members(row) {
  const box = make("div", { class: "actions" });
  for (const [module, node] of row.members.slice(0, 1)) {
    if (canShow(module, node)) {
      box.append(make("button", { type: "button", onclick: () => showNode(row.graph, module, node) },
        "Show in the graph"));
    }
  }
  if (row.count === 1) return make("div", {}, make("p", { class: "mono" }, row.members[0][1]), box);
  const items = row.members.map(([module, node, copy]) =>
    make("li", { class: "mono" }, `${module || "top level"}: ${node}${copy ? ` reads ${copy}` : ""}`));
  const hidden = row.count - row.members.length;
  const rest = hidden ? make("li", {}, `and ${plural(hidden, "more use")}`) : null;
  return make("div", {}, box,
    make("details", {}, make("summary", {}, `all ${plural(row.count, "use")} that read alike`),
      make("ul", {}, ...items, rest)));
}

function source(row) {
  if (row.excerpt === null) return [make("p", {}, "Nothing recorded which line this came from.")];
  const { file, lineno, first, lines, stale, code } = DATA.sources[row.excerpt];
  const where = `${file}:${lineno}`;
  const copy = make("button", { type: "button", onclick: () => copyText(where, copy) }, "Copy");
  const parts = [make("div", { class: "actions" }, make("code", {}, where), copy)];
  if (/^(\/|[A-Za-z]:\\)/.test(file)) {
    const path = file.replaceAll("\\", "/").split("/").map(encodeURIComponent).join("/");
    parts[0].append(make("a", { href: `vscode://file${path.startsWith("/") ? "" : "/"}${path}:${lineno}` },
      "Open in VS Code"));
  }
  const read = lines.length ? lines : [code];
  const from = lines.length ? first : lineno;
  parts.push(make("div", { class: "excerpt", tabindex: "0", role: "region", "aria-label": where },
    ...read.map((line, index) => make("div", { class: from + index === lineno ? "here" : "" },
      make("i", {}, String(from + index)), line || " "))));
  if (!lines.length) parts.push(make("p", { class: "quiet" }, "The file could not be read when this page was made."));
  if (stale) parts.push(make("p", { class: "quiet" }, `The file has changed since; the line read: ${code}`));
  return parts;
}

// -- controls -----------------------------------------------------------------------------------

function sortBy(key, descending) {
  Object.assign(state, { sort: key, descending });
  for (const head of byId("columns").querySelectorAll("[data-key]")) {
    const mine = head.dataset.key === key;
    head.setAttribute("aria-sort", mine ? (descending ? "descending" : "ascending") : "none");
  }
  filters.elements.sort.value = key === null ? "" : `${key} ${descending ? "down" : "up"}`;
  refresh();
}

function startRows() {
  const options = (name, every, values) => {
    const unique = [...new Set(values)].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    filters.elements[name].append(make("option", { value: "" }, every),
      ...unique.map((value) => make("option", { value }, value)));
  };
  options("kind", "all", DATA.rows.map(kindOf));
  options("module", "all", DATA.rows.map((row) => row.module));
  options("op", "all", DATA.rows.map((row) => row.op));
  options("rule", "all", DATA.rows.flatMap((row) => row.rules));
  filters.elements.sort.append(make("option", { value: "" }, "graph order"),
    ...COLUMNS.flatMap(({ key, label }) => [
      make("option", { value: `${key} up` }, `${label}, rising`),
      make("option", { value: `${key} down` }, `${label}, falling`)]));
  byId("columns").append(make("th", { role: "columnheader" }, make("span", { class: "hidden" }, "open")),
    ...COLUMNS.map(({ key, label }) => {
      const numeric = key === "bytes" || key === "us";
      const press = () => sortBy(key, state.sort === key ? !state.descending : numeric);
      return make("th", { role: "columnheader", scope: "col", "data-key": key, "aria-sort": "none" },
        make("button", { type: "button", onclick: press }, label));
    }));
  filters.addEventListener("input", (event) => {
    if (event.target.name !== "sort") refreshFromStart();
  });
  filters.elements.sort.addEventListener("change", ({ target }) => {
    const [key, way] = target.value.split(" ");
    sortBy(key || null, way === "down");
  });
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(() => { sortBy(null, false); refreshFromStart(); }));
  addEventListener("beforeprint", () => { state.shown = Infinity; refresh(); });
  refresh();
}

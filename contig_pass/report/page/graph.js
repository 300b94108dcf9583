// The graph before and after, side by side. Everything folded is made when it is opened.
const LINES_A_PAGE = 300;
const AROUND = 3; // unchanged lines left in sight on each side of a change
const WORTH_FOLDING = 5;
const OPEN_AT_FIRST = 120; // changed lines that are in sight without a click
let matches = [];
let current = -1;

/** `name: memory = call` in its three parts. */
function partsOf(line) {
  const colon = line.indexOf(": ");
  const equals = line.indexOf(" = ", colon);
  if (colon < 0 || equals < 0) return { name: line, memory: "", call: "" };
  return { name: line.slice(0, colon), memory: line.slice(colon + 2, equals), call: line.slice(equals + 3) };
}

/** Lines of a block as pairs of before and after; `-` lines meet the `+` line of their name. */
function pairsOf(block) {
  if (block.pairs) return block.pairs;
  block.pairs = [];
  for (const [module, lines] of block.parts) {
    let heading = module;
    const add = (before, after) => {
      block.pairs.push({ heading, module, before, after });
      heading = null;
    };
    for (let i = 0; i < lines.length; i++) {
      const [mark, text] = [lines[i][0], lines[i].slice(1)];
      const next = lines[i + 1] ?? "";
      if (mark === " ") add(text, text);
      else if (mark === "+") add(null, text);
      else if (next[0] === "+" && partsOf(next.slice(1)).name === partsOf(text).name) {
        add(text, next.slice(1));
        i++;
      } else add(text, null);
    }
  }
  return block.pairs;
}

const same = (pair) => pair.before === pair.after;

/** Pairs in sight, and runs of unchanged ones that are folded: [first, last, folded] each. */
function segmentsOf(pairs) {
  const near = new Uint8Array(pairs.length);
  pairs.forEach((pair, at) => {
    if (same(pair)) return;
    near.fill(1, Math.max(at - AROUND, 0), at + AROUND + 1);
  });
  const segments = [];
  for (let at = 0; at < pairs.length;) {
    let end = at;
    while (end < pairs.length && near[end] === near[at]) end++;
    const fold = !near[at] && end - at >= WORTH_FOLDING;
    if (fold) segments.push([at, end, true]);
    else for (let i = at; i < end; i++) segments.push([i, i + 1, false]);
    at = end;
  }
  return segments;
}

// -- elements -----------------------------------------------------------------------------------

/** Text with what differs from the other marked: words where their numbers agree, else a stretch. */
function marked(text, other) {
  if (other === null || text === other) return [text];
  const [words, others] = [text, other].map((line) => line.match(/[\w.]+|[^\w.]/g) ?? []);
  if (words.length === others.length) {
    return words.map((word, at) => (word === others[at] ? word : make("mark", {}, word)));
  }
  let head = 0;
  while (head < Math.min(words.length, others.length) && words[head] === others[head]) head++;
  let tail = 0;
  const room = Math.min(words.length, others.length) - head;
  while (tail < room && words.at(-1 - tail) === others.at(-1 - tail)) tail++;
  const cut = words.length - tail;
  return [words.slice(0, head).join(""), make("mark", {}, words.slice(head, cut).join("")),
    words.slice(cut).join("")];
}

function side(line, other, kind, place) {
  if (line === null) return make("div", { class: `side none ${place}` });
  const { name, memory, call } = partsOf(line);
  const against = other === null ? { memory: null, call: null } : partsOf(other);
  const spoken = kind && make("span", { class: "hidden" }, kind === "old" ? "before: " : "after: ");
  return make("div", { class: `side ${kind} ${place}` }, spoken || null, make("b", {}, name), " ",
    make("span", { class: "memory" }, ...marked(memory, against.memory)),
    make("span", { class: "call" }, "= ", ...marked(call, against.call)));
}

function pairElement(pair) {
  const unchanged = same(pair);
  const element = make("div", { class: `pair ${unchanged ? "same" : "changed"}` },
    side(pair.before, unchanged ? null : pair.after, unchanged ? "" : "old", "before"),
    side(pair.after, unchanged ? null : pair.before, unchanged ? "" : "new", "after"));
  if (pair.heading === null) return element;
  return make("div", {}, make("div", { class: "module" }, pair.heading || "top level"), element);
}

/** A foldable whose content is made by `fill` when it is first opened. */
function foldable(kind, summary, fill, open = false) {
  const element = make("details", { class: kind }, make("summary", {}, ...summary));
  element.fill = () => {
    if (!element.filled) {
      element.filled = true;
      element.pages = fill(element);
    }
    return element.pages;
  };
  element.addEventListener("toggle", () => { if (element.open) element.fill(); });
  if (open) reveal(element);
  return element;
}

function reveal(element) {
  element.open = true;
  return element.fill();
}

function blockElement(block, open) {
  const copies = block.copies ? `, ${plural(block.copies, "copy")}` : "";
  const changes = block.changed
    ? make("span", { class: "changes" }, plural(block.changed, "changed line") + copies)
    : "nothing changed";
  const count = block.count > 1 ? ` \u00d7${block.count}, the first shown` : "";
  const summary = [`${block.name || "top level"}${count}: ${plural(block.nodes, "node")}, `, changes];
  return foldable("block", summary, (element) => {
    const pairs = pairsOf(block);
    element.append(make("div", { class: "heads", "aria-hidden": "true" },
      make("div", {}, "before"), make("div", {}, "after")));
    block.segments = segmentsOf(pairs);
    return new Pages(element, block.segments, ([first, last, folded]) =>
      folded ? runElement(pairs, first, last) : pairElement(pairs[first]), LINES_A_PAGE, "line");
  }, open);
}

/** Blocks that are like earlier ones: one line, or a foldable with a line for each. */
function likeElement({ like, nodes }, graph) {
  const line = ([name, earlier, count]) =>
    `${name || "top level"}: ${plural(count, "node")} like ${graph.blocks[earlier].name || "top level"}`;
  if (like.length === 1) return make("div", { class: "like" }, line(like[0]));
  const names = [...new Set(like.map(([name]) => name || "top level"))];
  const named = names.length === 1 ? names[0] : `${names[0]} \u2026 ${names.at(-1)}`;
  return foldable("block", [`${named}: ${plural(nodes, "node")} like those above`], (element) =>
    new Pages(element, like, (entry) => make("div", { class: "like" }, line(entry)), LINES_A_PAGE, "line"));
}

function runElement(pairs, first, last) {
  const run = pairs.slice(first, last);
  return foldable("run", [`${run.length.toLocaleString("en")} unchanged nodes`], (element) =>
    new Pages(element, run, pairElement, LINES_A_PAGE, "node"));
}

function graphElement(graph, open) {
  const whole = graph.whole ? "" : " (only what stands around each fix was kept)";
  return foldable("graph", [`graph ${graph.name || "unnamed"}${whole}`], (element) => {
    let budget = OPEN_AT_FIRST;
    for (const block of graph.blocks) {
      if (block.like !== undefined) {
        element.append(likeElement(block, graph));
        continue;
      }
      // Those with copies; held layouts alone are no reason to look.
      const visible = block.copies > 0 && budget > 0;
      if (visible) budget -= block.changed;
      block.element = blockElement(block, visible);
      element.append(block.element);
    }
    return null;
  }, open);
}

// -- finding ------------------------------------------------------------------------------------

/** Every pair of every graph that is shown, with where it stands. */
function* everyPair() {
  for (const graph of DATA.graphs) {
    for (const block of graph.blocks) {
      if (block.like !== undefined) continue;
      const pairs = pairsOf(block);
      for (let at = 0; at < pairs.length; at++) yield { graph, block, at, pair: pairs[at] };
    }
  }
}

function place({ graph, block, at }) {
  reveal(graph.element);
  const pages = reveal(block.element);
  const index = block.segments.findIndex(([first, last]) => first <= at && at < last);
  const [first, , folded] = block.segments[index];
  let element = pages.until(index);
  if (folded) element = reveal(element).until(at - first);
  document.querySelector(".target")?.classList.remove("target");
  element.classList.add("target");
  element.tabIndex = -1;
  element.scrollIntoView({ block: "center" });
  return element;
}

const nameOf = ({ before, after }) => partsOf(after ?? before).name;

function findNode(graphName, module, node) {
  let other = null;
  for (const spot of everyPair()) {
    if (spot.pair.module !== module || nameOf(spot.pair) !== node) continue;
    if (graphName.split(", ").includes(spot.graph.name)) return spot;
    other ??= spot;
  }
  return other;
}

/** Whether the graph shows this node; one look at all names serves every row. */
function canShow(module, node) {
  canShow.names ??= new Set([...everyPair()].map(({ pair }) => JSON.stringify([pair.module, nameOf(pair)])));
  return canShow.names.has(JSON.stringify([module, node]));
}

function showNode(graphName, module, node) {
  place(findNode(graphName, module, node)).focus({ preventScroll: true });
}

function search() {
  const text = byId("finder").elements.text.value.trim().toLowerCase();
  current = -1;
  matches = text === "" ? [] : [...everyPair()].filter(({ pair }) =>
    `${pair.before ?? ""}\n${pair.after ?? ""}`.toLowerCase().includes(text));
  byId("found").textContent = text === "" ? "" : plural(matches.length, "line");
}

function step(by) {
  if (!matches.length) search();
  if (!matches.length) return;
  current = (current + by + matches.length + (current < 0 && by < 0 ? 1 : 0)) % matches.length;
  place(matches[current]);
  byId("found").textContent = `line ${(current + 1).toLocaleString("en")} of ${matches.length.toLocaleString("en")}`;
}

function startGraphs() {
  DATA.graphs.forEach((graph, index) => {
    graph.element = graphElement(graph, index === 0);
    byId("graphs").append(graph.element);
  });
  if (!DATA.graphs.length) {
    byId("finder").hidden = true;
    byId("graphs").append(make("p", {}, "This report keeps no graph."));
  }
  const finder = byId("finder");
  finder.elements.text.addEventListener("input", search);
  finder.addEventListener("submit", (event) => { event.preventDefault(); step(1); });
  byId("previous").addEventListener("click", () => step(-1));
  byId("open-changes").addEventListener("click", () => {
    for (const graph of DATA.graphs) {
      reveal(graph.element);
      for (const block of graph.blocks) if (block.changed) reveal(block.element);
    }
  });
  byId("fold-all").addEventListener("click", () => {
    for (const element of byId("graphs").querySelectorAll("details:not(.graph)")) element.open = false;
  });
}

startRows();
startGraphs();

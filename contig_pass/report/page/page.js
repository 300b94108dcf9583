"use strict";
// Shared by rows.js and graph.js. Text from a report is only ever set as text.
document.documentElement.classList.add("scripts");
const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes; children are elements or text, `null` ones are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const byId = (id) => document.getElementById(id);
const plural = (count, word) =>
  `${count.toLocaleString("en")} ${count === 1 ? word : word.replace(/(y?)$/, (y) => (y ? "ies" : "s"))}`;

/** Shows `items` in `box`, `size` of them at first and more on request, each made once. */
class Pages {
  constructor(box, items, show, size, word) {
    Object.assign(this, { box, items, show, size, word, made: [] });
    this.button = make("button", { type: "button", onclick: () => this.more(true) });
    this.until(size - 1);
  }

  /** Makes the items up to that index; returns that one's element. */
  until(index) {
    const last = Math.min(index, this.items.length - 1);
    if (last >= this.made.length) {
      const chunk = make("div", { class: "chunk" });
      for (let i = this.made.length; i <= last; i++) {
        this.made.push(this.show(this.items[i], i));
        chunk.append(this.made[i]);
      }
      chunk.style.containIntrinsicSize = `auto ${2.6 * chunk.childElementCount}em`;
      this.box.append(chunk);
    }
    const left = this.items.length - this.made.length;
    this.button.textContent = `Show ${Math.min(left, this.size)} more of ${plural(left, this.word)}`;
    if (left) this.box.append(this.button);
    else this.button.remove();
    return this.made[last];
  }

  more(focus) {
    const first = this.made.length;
    this.until(first + this.size - 1);
    if (!focus || this.made.length === this.items.length) {
      this.made[first].tabIndex = -1;
      this.made[first].focus();
    }
  }
}

/** Copies text without any network; says on the button whether that worked. */
async function copyText(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { class: "hidden", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.textContent;
  button.textContent = done ? "Copied" : "Copying is not allowed here";
  setTimeout(() => { button.textContent = label; }, 1500);
}

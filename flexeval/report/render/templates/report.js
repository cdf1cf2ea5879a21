"use strict";
// Lists the questions, a few at a time. Texts of the model enter the page as text nodes only.
(() => {
  const STEP = 50;
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const rows = document.getElementById("rows");
  const more = document.getElementById("more");
  const [TASK, ID, PROMPT, REFERENCE, SCORES, OUTPUTS] = [0, 1, 2, 3, 4, 5];
  let found = [];
  let wanted = null;

  const element = (tag, className, ...children) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const output = (question, setting) => question[OUTPUTS][setting] ?? question[OUTPUTS][data.baseline];
  const score = (question, setting) => String(Number(question[SCORES][setting].toPrecision(3)));
  const gain = (question, setting) =>
    Math.sign(question[SCORES][setting] - question[SCORES][data.baseline]) * data.tasks[question[TASK]].sign;

  const changeTests = {
    "": () => true,
    flipped: (question) => data.settings.some((_, setting) => gain(question, setting) !== 0),
    worse: (question, setting) => gain(question, setting) < 0,
    better: (question, setting) => gain(question, setting) > 0,
    text: (question, setting) => question[OUTPUTS][setting] !== null,
  };

  function matcher() {
    const task = form.elements.task.value;
    const [kind, setting] = (form.elements.change?.value ?? "").split("-");
    const text = form.elements.text.value.trim().toLowerCase();
    const holds = (part) => part !== null && part.toLowerCase().includes(text);
    return (question) =>
      (task === "" || question[TASK] === Number(task)) &&
      changeTests[kind](question, Number(setting)) &&
      (text === "" || [question[ID], question[PROMPT], question[REFERENCE], ...question[OUTPUTS]].some(holds));
  }

  function chip(question, setting) {
    const change = ["worse", "", "better"][gain(question, setting) + 1];
    const words = `${data.settings[setting]} ${score(question, setting)}`;
    const node = element("span", `chip ${change}`, words);
    if (change) node.title = change;
    return node;
  }

  function box(title, text, className = "") {
    return element("div", className, element("h4", "", title), element("pre", "", text));
  }

  function texts(question) {
    const header = data.tasks[question[TASK]].header;
    const grid = element("div", "texts");
    if (header) {
      const shared = element("details", "whole", element("summary", "", "What all prompts of this task begin with"));
      shared.append(element("pre", "", header));
      grid.append(shared);
    }
    grid.append(box("Prompt", question[PROMPT], "whole"), box("Correct", question[REFERENCE], "whole"));
    data.settings.forEach((name, setting) => {
      grid.append(box(`${name}: ${score(question, setting)}`, output(question, setting)));
    });
    return grid;
  }

  // How the question itself begins: the last block of lines that is more than a cue such as "Answer:".
  function excerpt(prompt) {
    const blocks = prompt.split(/\n\s*\n/).map((block) => block.trim().replace(/\s+/g, " "));
    return (blocks.filter((block) => block.length > 20).pop() ?? blocks.join(" ")).slice(0, 160);
  }

  function row(index) {
    const question = data.questions[index];
    const summary = element(
      "summary", "",
      element("strong", "", `${data.tasks[question[TASK]].name} ${question[ID]}`),
      element("span", "excerpt", excerpt(question[PROMPT])),
      ...data.settings.map((_, setting) => chip(question, setting)),
    );
    const node = element("details", "question", summary);
    node.addEventListener("toggle", () => {
      if (node.open && node.children.length === 1) node.append(texts(question));
      if (node.open && wanted !== index) remember(index);
    });
    node.open = wanted === index;
    return node;
  }

  function showMore(count = STEP) {
    const shown = rows.children.length;
    rows.append(...found.slice(shown, shown + count).map(row));
    more.hidden = rows.children.length >= found.length;
  }

  function list() {
    const matches = matcher();
    found = [...data.questions.keys()].filter((index) => matches(data.questions[index]));
    rows.replaceChildren();
    const position = found.indexOf(wanted);
    showMore(Math.max(STEP, position + 1));
    if (position >= 0) rows.children[position].scrollIntoView();
    const [some, all] = [found.length, data.questions.length].map((number) => number.toLocaleString("en"));
    document.getElementById("found").value = `${some} of ${all} questions`;
  }

  function remember(index) {
    wanted = index;
    const state = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
    if (index !== null) state.set("question", index);
    history.replaceState(null, "", `#${state}`);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of ["task", "change", "text"]) {
      if (form.elements[name]) form.elements[name].value = state.get(name) ?? "";
      if (form.elements[name]?.selectedIndex === -1) form.elements[name].value = "";
    }
    wanted = state.has("question") ? Number(state.get("question")) : null;
    list();
  }

  let pause;
  form.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => { remember(null); list(); }, 150);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => showMore());
  addEventListener("hashchange", () => {
    if (location.hash === "" || location.hash.includes("=")) recall();  // others name a part of the page
  });
  recall();
})();

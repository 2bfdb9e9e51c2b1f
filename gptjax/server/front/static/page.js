// The chat page: which conversation is shown, and what its buttons and keys do.

import {Article, button, element} from "./page_article.js";
import {CUT, turn} from "./page_asking.js";
import * as store from "./page_store.js";

const EXAMPLES = {
  tools: [{
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city",
      parameters: {
        type: "object",
        properties: {city: {type: "string"}},
        required: ["city"],
        additionalProperties: false,
      },
    },
  }],
  schema: {
    type: "object",
    properties: {name: {type: "string"}, age: {type: "integer", minimum: 0, maximum: 150}},
    required: ["name", "age"],
    additionalProperties: false,
  },
};
const UNSAVED =
  "The browser's storage is full or forbidden: what is new is lost when this page is closed. Delete a conversation.";
const OPTIONS = ["effort", "tools", "schema"];
const byId = (id) => document.getElementById(id);
const turns = byId("turns"), next = byId("next"), box = byId("message");
let conversation = store.create();
let articles = [];  // of the conversation's messages, in their order
let running = null;  // cancels the current turn
let editing = null;  // the index of the message that the next one replaces
let leaving = false;  // the page is being closed, which cuts the current turn
let draft = "";  // what was in the box before

// Changes the conversation's display; its end stays in view if it was.
function following(change) {
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
  change();
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

// Shows

function nameOfCall(id) {
  const calls = conversation.messages.flatMap(({tool_calls}) => tool_calls ?? []);
  return calls.find((call) => call.id === id)?.function.name ?? id;
}

// Shows the messages. What is there already stays, or screen readers would read it again.
function showMessages() {
  const {messages} = conversation;
  let kept = 0;
  while (kept < articles.length && articles[kept].message === messages[kept]) kept++;
  for (const {root} of articles.splice(kept)) root.remove();
  for (const message of messages.slice(kept)) {
    const edit = () => startEditing(conversation.messages.indexOf(message));
    articles.push(new Article(byId("log"), message, nameOfCall(message.tool_call_id), edit));
    if (!running || message !== messages.at(-1)) articles.at(-1).end();
  }
}

// Below the messages: what can be done about the last one.
function showNext(fault = "") {
  next.replaceChildren();
  const last = conversation.messages.at(-1);
  const calls = last?.note ? [] : last?.tool_calls ?? [];
  if (calls.length) {
    const results = calls.map(({function: {name}}) => {
      const label = element(next, "label", "", `Result of ${name} (Enter to send) `);
      const result = element(label, "textarea", "result");
      onEnter(result, sendResults);
      return result;
    });
    button(next, "", results.length > 1 ? "Send results" : "Send result", sendResults);
    function sendResults() {
      const texts = results.map(({value}) => value);
      const said = calls.map(({id}, index) => ({role: "tool", tool_call_id: id, content: texts[index]}));
      answer([...conversation.messages, ...said], () => {
        next.querySelectorAll(".result").forEach((result, index) => result.value = texts[index]);
      });
    }
  }
  if (last) button(next, "regenerate", last.role === "assistant" ? "Regenerate" : "Answer", regenerate);
  if (fault) element(next, "div", "error", fault).setAttribute("role", "alert");
}

function showList() {
  const list = byId("list");
  byId("title").placeholder = store.titleOf({...conversation, title: ""});
  list.replaceChildren();
  for (const {id, conversation: found} of store.list()) {
    const item = element(list, "li", "");
    const title = found ? store.titleOf(found) : "Cannot be read";
    const opens = button(item, "open", title, () => open(found));
    opens.disabled = !found;
    if (id === conversation.id) opens.setAttribute("aria-current", "true");
    button(item, "delete", "×", () => remove(id, title)).setAttribute("aria-label", `Delete "${title}"`);
  }
  byId("notice").textContent = store.areUnsaved() ? UNSAVED : "";
}

function showFieldFault(field, message = "") {
  for (const name of ["tools", "schema"]) {
    byId(name + "-fault").textContent = name === field ? message : "";
    byId(name).setAttribute("aria-invalid", name === field);
  }
  if (field) byId("options").open = true;
}

function showIdle() {
  byId("send").disabled = byId("side").inert = running !== null;
  byId("stop").disabled = running === null;
  document.body.classList.toggle("running", running !== null);
  byId("log").setAttribute("aria-busy", running !== null);
}

function showStats(usage, began, first) {
  const seconds = (performance.now() - first) / 1000, count = usage.completion_tokens;
  const rate = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  byId("stats").textContent =
    `${usage.prompt_tokens} + ${count} tokens, first after ${((first - began) / 1000).toFixed(2)} s${rate}`;
}

// Conversations

function save() {
  const {messages} = conversation;
  if (!messages.length && !conversation.title) {  // nothing worth keeping; but its first question may have been kept
    store.remove(conversation.id);
    showList();
    return;
  }
  const begun = running && isEmpty(messages.at(-1)) ? messages.slice(0, -1) : messages;
  store.save({...conversation, messages: begun});
  showList();
}

function open(found) {
  if (running) return;
  conversation = found;
  history.replaceState(null, "", "#" + found.id);  // what a reload opens
  byId("title").value = found.title;
  byId("stats").textContent = "";
  for (const name of OPTIONS) byId(name).value = found[name];
  stopEditing();
  showFieldFault(null);
  showMessages();
  showNext();
  showList();
  showMenu(false);
  turns.scrollTop = turns.scrollHeight;
}

function remove(id, title) {
  if (!confirm(`Delete "${title}"?`)) return;
  store.remove(id);
  if (id === conversation.id) open(store.create(conversation));
  else showList();
  byId("reset").focus();
}

function showMenu(shown) {
  document.body.classList.toggle("menu", shown);
  byId("menu").setAttribute("aria-expanded", shown);
  if (shown) byId("options").open = false;  // a narrow screen has no room for both
}

// Turns

const isEmpty = ({content, reasoning_content, tool_calls}) => !content && !reasoning_content && !tool_calls;

// Writes the turn that follows `asked` as it arrives.
async function receive(article, asked, signal) {
  const began = performance.now();
  let first = null, reason = null;
  for await (const {delta, finish, usage} of turn({...conversation, messages: asked}, byId("key").value, signal)) {
    if (usage) showStats(usage, began, first ?? performance.now());
    if (delta.content || delta.reasoning_content || delta.tool_calls) first ??= performance.now();
    following(() => article.add(delta));
    reason ??= finish;
  }
  if (reason === "length") article.message.note = "Cut off: no room for more.";
  else delete article.message.note;
}

// Has `asked` answered. A turn that brings nothing leaves the conversation as it was; `restore` brings back what was
// typed.
async function answer(asked, restore = () => {}) {
  if (running) return;
  const before = conversation.messages;
  const message = {role: "assistant", content: "", note: CUT};  // as it is if the page is closed meanwhile
  running = new AbortController();
  conversation.messages = [...asked, message];
  conversation.changed = Date.now();
  byId("stats").textContent = "";
  showFieldFault(null);
  showIdle();
  showMessages();
  showNext();
  turns.scrollTop = turns.scrollHeight;
  save();
  const article = articles.at(-1);
  let fault = null;
  try {
    await receive(article, asked, running.signal);
  } catch (error) {
    if (leaving) return;  // what there is was saved
    fault = error.name === "AbortError" ? new Error("Stopped.") : error;
    message.note = fault.message;
  }
  const nothing = fault !== null && isEmpty(message);
  running = null;
  if (nothing) conversation.messages = before;
  following(() => {
    if (nothing) showMessages();
    else article.end();
    showNext(nothing && !fault.field ? fault.message : "");
  });
  if (fault) showFieldFault(fault.field, fault.message);
  showIdle();
  if (nothing) restore();
  save();
  if (document.activeElement === document.body) (next.querySelector(".result") ?? box).focus();
}

function send() {
  const text = box.value, at = editing, {messages} = conversation;
  if (running || !text.trim()) return;
  let asked = [...messages, {role: "user", content: text}];
  if (at !== null) {
    const after = messages.slice(at + 1);
    const end = after.findIndex(({role}) => role !== "tool");
    const siblings = messages[at].role === "tool" ? after.slice(0, end < 0 ? after.length : end) : [];
    asked = [...messages.slice(0, at), {...messages[at], content: text}, ...siblings];
  }
  box.value = "";
  stopEditing();
  answer(asked, () => {
    if (at !== null) startEditing(at);  // which keeps what is in the box
    else if (box.value) return;
    box.value = text;
  });
}

function regenerate() {
  const {messages} = conversation;
  answer(messages.at(-1).role === "assistant" ? messages.slice(0, -1) : messages);
}

function startEditing(at) {
  if (running) return;
  if (editing === null) draft = box.value;
  editing = at;
  box.value = conversation.messages[at].content;
  byId("editing").hidden = false;
  box.focus();
}

function stopEditing() {
  if (editing === null) return;
  box.value = draft;
  editing = null;
  draft = "";
  byId("editing").hidden = true;
}

// Events

function onEnter(area, act) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    act();
  });
}

onEnter(box, send);
byId("send").addEventListener("click", send);
byId("stop").addEventListener("click", () => running?.abort());
byId("cancel").addEventListener("click", () => {
  stopEditing();
  box.focus();
});
byId("reset").addEventListener("click", () => {
  open(store.create(conversation));
  box.focus();
});
byId("menu").addEventListener("click", () => showMenu(!document.body.classList.contains("menu")));
byId("title").addEventListener("change", (event) => {
  conversation.title = event.target.value;
  save();
});
for (const name of OPTIONS) {
  byId(name).addEventListener("change", (event) => {
    conversation[name] = event.target.value;
    save();
  });
}
for (const [name, example] of Object.entries(EXAMPLES)) {
  byId(name + "-example").addEventListener("click", () => {
    byId(name).value = JSON.stringify(example, null, 2);
    byId(name).dispatchEvent(new Event("change"));
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort();
  else if (editing !== null) stopEditing();
  else showMenu(false);
});
// Another tab has changed what is stored.
window.addEventListener("storage", ({key}) => {
  const found = store.isKey(key, conversation.id) ? store.load(conversation.id) : null;
  if (found && !running) open(found);
  else showList();
});
window.addEventListener("pagehide", () => {
  if (running) save();
  leaving = running !== null;
});
window.addEventListener("beforeunload", (event) => {
  if (store.areUnsaved()) event.preventDefault();
});

open(store.load(location.hash.slice(1)) ?? conversation);
fetch("health").then((response) => response.json()).then((health) => {
  byId("model").textContent = document.title = health.model;
}).catch(() => {});

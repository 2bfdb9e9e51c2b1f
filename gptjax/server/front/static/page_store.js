// Conversations that the browser keeps: each under a key of its own, so that two tabs do not overwrite each other's.

const PREFIX = "gptjax.conversation.";
const unsaved = new Map();  // id -> conversation that the browser does not keep: its storage is full or forbidden

// The browser's storage, whose mere mention throws where a user has forbidden it.
function storage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

const isText = (value) => typeof value === "string";
const isObject = (value) => typeof value === "object" && value !== null;
const isCall = (value) => isObject(value) && isText(value.id) && value.type === "function" &&
  isObject(value.function) && isText(value.function.name) && isText(value.function.arguments);
const isMessage = (value) => isObject(value) && ["user", "assistant", "tool"].includes(value.role) &&
  isText(value.content) &&
  [value.reasoning_content, value.tool_call_id, value.note].every((text) => text === undefined || isText(text)) &&
  (value.role !== "tool" || isText(value.tool_call_id)) &&
  (value.tool_calls === undefined || Array.isArray(value.tool_calls) && value.tool_calls.every(isCall));

// What is stored may be from an older page, or from another one at the same address.
const isConversation = (value) => isObject(value) && Number.isFinite(value.changed) &&
  [value.title, value.effort, value.tools, value.schema].every(isText) &&
  Array.isArray(value.messages) && value.messages.every(isMessage);

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return isConversation(value) ? value : null;
  } catch {
    return null;
  }
}

// A new conversation, with the options of another one. (crypto.randomUUID is for HTTPS and this machine only.)
export function create({effort = "", tools = "", schema = ""} = {}) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
  return {id, title: "", changed: Date.now(), effort, tools, schema, messages: []};
}

export function titleOf({title, messages}) {
  const said = messages.find(({role}) => role === "user")?.content ?? "";
  return title.trim() || said.trim().split("\n")[0].slice(0, 80) || "New conversation";
}

export function save(conversation) {
  const {id, ...rest} = conversation;
  try {
    storage().setItem(PREFIX + id, JSON.stringify(rest));
    unsaved.delete(id);
  } catch {
    unsaved.set(id, conversation);
  }
}

export const isKey = (key, id) => key === PREFIX + id;

export const areUnsaved = () => unsaved.size > 0;

export function load(id) {
  if (unsaved.has(id)) return unsaved.get(id);
  const found = parsed(storage()?.getItem(PREFIX + id) ?? null);
  return found && {...found, id};
}

// Removes one. That may make room for those that there was none for.
export function remove(id) {
  unsaved.delete(id);
  storage()?.removeItem(PREFIX + id);
  [...unsaved.values()].forEach(save);
}

// All, the latest first; `conversation` is null where it cannot be read.
export function list() {
  const ids = new Set(unsaved.keys());
  for (const key of Object.keys(storage() ?? {})) if (key.startsWith(PREFIX)) ids.add(key.slice(PREFIX.length));
  const all = [...ids].map((id) => ({id, conversation: load(id)}));
  return all.sort((one, other) => (other.conversation?.changed ?? 0) - (one.conversation?.changed ?? 0));
}

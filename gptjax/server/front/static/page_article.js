// What a message looks like. A model's output is text, never markup: it only ever becomes a text node.

export function element(parent, tag, kind, text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(text);
  parent.append(made);
  return made;
}

export function button(parent, kind, text, act) {
  const made = element(parent, "button", kind, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export class Article {
  #reasoning;
  #heading;
  #thoughts;
  #answer;
  #calls;
  #arguments = [];  // of each call, as they are shown

  // `tool` is the name of the function that a tool's message is the result of. What is given may be edited.
  constructor(parent, message, tool, edit) {
    this.message = message;
    this.root = element(parent, "article", message.role);
    if (message.role === "tool") element(this.root, "div", "label", "Result of " + tool);
    this.#reasoning = element(this.root, "details", "reasoning");
    this.#reasoning.hidden = true;
    this.#heading = element(this.#reasoning, "summary", "");
    this.#thoughts = element(this.#reasoning, "div", "");
    this.#answer = element(this.root, "div", "answer");
    this.#calls = element(this.root, "div", "");
    if (message.role !== "assistant") button(this.root, "edit", "Edit", edit);
    this.#show(message);
    for (const call of message.tool_calls ?? []) this.#showCall(call).append(call.function.arguments);
    this.#heading.textContent = "Reasoning";
  }

  #show({content, reasoning_content}) {
    if (reasoning_content) {
      this.#reasoning.hidden = false;
      this.#thoughts.append(reasoning_content);
    }
    if (content) this.#answer.append(content);
    this.#heading.textContent = this.#answer.hasChildNodes() ? "Reasoning" : "Reasoning…";
  }

  #showCall({function: {name}}) {
    const shown = element(this.#calls, "div", "call");
    element(shown, "div", "label", "Call of ").append(name);
    const given = element(shown, "pre", "");
    this.#arguments.push(given);
    return given;
  }

  // Adds a piece of the stream to the message, and to what is seen of it.
  add(delta) {
    const {message} = this, thought = delta.reasoning_content;
    if (delta.content) message.content += delta.content;
    if (thought) message.reasoning_content = (message.reasoning_content ?? "") + thought;
    this.#show(delta);
    for (const {index, id, function: part} of delta.tool_calls ?? []) {
      message.tool_calls ??= [];
      if (!message.tool_calls[index]) {
        message.tool_calls[index] = {id, type: "function", function: {name: part.name, arguments: ""}};
        this.#showCall(message.tool_calls[index]);
      }
      message.tool_calls[index].function.arguments += part.arguments ?? "";
      this.#arguments[index].append(part.arguments ?? "");
    }
  }

  // The turn is over; `note` says why, if it was cut off.
  end() {
    this.#heading.textContent = "Reasoning";
    if (this.message.note) element(this.root, "div", "error", this.message.note);
  }
}

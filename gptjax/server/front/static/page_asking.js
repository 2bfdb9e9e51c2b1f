// Asks the server for a turn, and reads the stream that it answers with.

const FIELDS = {tools: "tools", response_format: "schema", guided_json: "schema"};  // of the request -> of the page

export const CUT = "the connection was cut before the answer was complete";

// An error that belongs to a field of the page.
function faulty(field, message) {
  return Object.assign(new Error(message), {field});
}

function parsed(field, text) {
  if (!text.trim()) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw faulty(field, "This is not JSON: " + error.message);
  }
}

// The objects of a stream of server-sent events. A stream that ends without [DONE] was cut.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(CUT);
    });
    if (done) throw new Error(CUT);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const line of parts.flatMap((part) => part.split("\n"))) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const object = JSON.parse(line.slice(6));
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
}

async function post(path, body, key, signal) {
  const headers = {"Content-Type": "application/json"};
  if (key) headers.Authorization = "Bearer " + key;
  const response = await fetch(path, {method: "POST", headers, body: JSON.stringify(body), signal});
  if (response.ok) return response;
  const said = (await response.json().catch(() => null))?.error;
  const error = faulty(FIELDS[said?.param], said?.message ?? "the server answered with status " + response.status);
  error.code = said?.code;
  throw error;
}

// A message as the API takes it. One with a note was cut off, so its last call is not a call.
function sent({role, content, reasoning_content, tool_calls, tool_call_id, note}) {
  return {role, content, reasoning_content, tool_calls: note ? undefined : tool_calls, tool_call_id};
}

// The next turn; a model that cannot chat continues the last message as text.
async function ask({messages, effort, tools, schema}, key, signal) {
  const options = {stream: true, stream_options: {include_usage: true}};
  const form = parsed("schema", schema), functions = parsed("tools", tools);
  const chat = {
    ...options,
    messages: messages.map(sent),
    reasoning_effort: effort || undefined,
    tools: functions,
    response_format: form && {type: "json_schema", json_schema: {name: "answer", schema: form, strict: true}},
  };
  try {
    return await post("v1/chat/completions", chat, key, signal);
  } catch (error) {
    if (error.code !== "model_not_chat") throw error;
    if (functions) throw faulty("tools", "This model does not chat, so it cannot call tools.");
    const prompt = messages.at(-1).content;
    return post("v1/completions", {...options, prompt, max_tokens: 200, guided_json: form}, key, signal);
  }
}

// The pieces of the next turn: {delta, finish, usage}.
export async function* turn(asked, key, signal) {
  for await (const {choices: [choice], usage} of events(await ask(asked, key, signal))) {
    yield {delta: choice?.delta ?? {content: choice?.text}, finish: choice?.finish_reason, usage};
  }
}

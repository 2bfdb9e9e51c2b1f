// The Vercel AI SDK and OpenAI's own library against a server, whose address is the argument. Prints JSON: by the
// client's name, the answer after a tool call, how many steps it took, and a structured answer.
import { generateObject, generateText, isStepCount, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import OpenAI from "openai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [loop, forms] = process.argv.slice(2);
const name = "gpt-oss-tales";
const weather = tool({
  description: "Of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `rain in ${city}`,
});
const pet = z.object({ name: z.enum(["Tom", "Rex"]), age: z.number().int().min(0).max(20) });
const found = {};

async function vercel(label, choose) {
  const [model, former] = [loop, forms].map((baseURL) => choose(createOpenAI({ baseURL, apiKey: "any" })));
  const asked = { model, tools: { weather }, stopWhen: isStepCount(4), prompt: "Weather in Oslo?" };
  const whole = await generateText({ ...asked, maxRetries: 0 });
  const streamed = streamText({ ...asked, maxRetries: 0 });
  const { object } = await generateObject({ model: former, schema: pet, prompt: "A pet.", maxRetries: 0 });
  found[label] = [whole.text, whole.steps.length, await streamed.text, (await streamed.steps).length, object];
}

await vercel("chat", (provider) => provider.chat(name));
await vercel("responses", (provider) => provider(name)); // with references to what the server remembers

const client = new OpenAI({ baseURL: loop, apiKey: "any", maxRetries: 0 });
const run = (parameters) => ({
  type: "function",
  function: { name: "weather", description: "Of a city", parse: JSON.parse, parameters, function: async () => "rain" },
});
for (const stream of [false, true]) {
  const messages = [{ role: "user", content: "Weather in Oslo?" }];
  const tools = [run({ type: "object", properties: { city: { type: "string" } } })];
  const runner = client.chat.completions.runTools({ model: name, stream, messages, tools });
  found[`runTools ${stream}`] = await runner.finalContent();
}
console.log(JSON.stringify(found));

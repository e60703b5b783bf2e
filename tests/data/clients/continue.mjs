// Continue's adapter of OpenAI's API against a server (BITGEN_URL), as its configuration in docs/guide/clients.md
// makes it; says what it saw as JSON. Needs a folder of `npm install @continuedev/openai-adapters`.
import { constructLlmApi } from "@continuedev/openai-adapters";

const api = constructLlmApi({ provider: "openai", apiBase: `${process.env.BITGEN_URL}/v1`, apiKey: "none" });
const signal = new AbortController().signal;
const messages = [
  { role: "system", content: "You are a programming assistant." },
  { role: "user", content: [{ type: "text", text: "Who was Moses?" }] },
];
const tool = {
  type: "function",
  function: {
    name: "read_file",
    description: "Read a file",
    parameters: { type: "object", properties: { filepath: { type: "string" } }, required: ["filepath"] },
  },
};
const options = { model: "tiny", messages, max_tokens: 12, temperature: 0 };
const complete = {
  model: "tiny", prompt: "In the beginning", max_tokens: 12, temperature: 0,
  stop: ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "/src/", "#- coding: utf-8", "```"],
};

let streamed = "";
let usage = null;
for await (const part of api.chatCompletionStream({ ...options, tools: [tool], stream: true }, signal)) {
  streamed += part.choices[0]?.delta.content ?? "";
  usage = part.usage ?? usage;
}
let completed = "";
for await (const part of api.completionStream({ ...complete, stream: true }, signal)) {
  completed += part.choices[0].text;
}
const whole = await api.chatCompletionNonStream({ ...options, tools: [tool], stream: false }, signal);
const text = await api.completionNonStream({ ...complete, stream: false }, signal);
const refused = await api.embed({ model: "tiny", input: ["a"] }).catch((error) => error);
console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  streamed,
  tokens: [whole.usage.completion_tokens, usage.completion_tokens],
  text: text.choices[0].text,
  completed,
  refused: refused.status,
  models: (await api.list()).map((model) => model.id),
}));

// node main.js TARGET SOURCE [SINCE]: the main job from Node. Prints one JSON object a line.

import { call, connect, follow, packTexts, reasonOf, watch } from "./modelhost.js";

const [target = "127.0.0.1:7411", source = "hf://sentence-transformers/all-MiniLM-L6-v2", since = "0"] =
  process.argv.slice(2);
const print = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
const clients = connect(target);

const name = await register();
const download = await call(clients.models, "DownloadModel", { name });
let samples = 0;
const downloaded = await follow(clients, download, () => (samples += 1));
print({ step: "download", samples, ...pick(downloaded.progress, ["done_bytes", "total_bytes"]) });

await follow(clients, await call(clients.residency, "LoadModel", { name }));
const texts = ["a sentence from Node", "and another"];
const answer = await call(clients.inference, "ModelInfer", {
  model_name: name.replace("models/", ""),
  inputs: [{ name: "text", datatype: "BYTES", shape: [String(texts.length)] }],
  outputs: [{ name: "embedding" }],
  raw_input_contents: [packTexts(texts)],
});
const raw = answer.raw_output_contents[0];
print({ step: "infer", shape: answer.outputs[0].shape, first: raw.readFloatLE(0) });

const failure = await call(clients.models, "GetModel", { name: "models/nobody" }).catch((error) => error);
print({ step: "error", code: failure.code, reason: reasonOf(failure) });

// Until the model is READY, then the watch is broken off and taken up again behind what was seen.
let last = since;
for (const goal of ["AVAILABLE", "READY"]) {
  const stop = new AbortController();
  for await (const event of watch(clients, last, stop.signal)) {
    last = event.sequence;
    print({ step: "event", sequence: event.sequence, name: event.name, reason: event.reason });
    if (event.reason === goal) break;
  }
  stop.abort();
}
for (const client of Object.values(clients)) client.close();

async function register() {
  try {
    const model = await call(clients.models, "CreateModel", { model: { source: { uri: source } } });
    print({ step: "register", name: model.name });
    return model.name;
  } catch (error) {
    if (reasonOf(error) !== "ALREADY_EXISTS") throw error;
    return `models/${source.split("/").pop().toLowerCase()}`;
  }
}

function pick(object, keys) {
  return Object.fromEntries(keys.map((key) => [key, object[key]]));
}

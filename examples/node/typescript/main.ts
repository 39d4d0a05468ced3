// npm run typescript -- TARGET SOURCE: the main job with the contract's types, generated from the proto files.
// The compiler knows every request, answer, event and state; what the contract does not have is an error.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import type { ProtoGrpcType as Events } from "./generated/event_service";
import type { ModelInferResponse__Output as Inferred } from "./generated/inference/ModelInferResponse";
import type { ProtoGrpcType as Models } from "./generated/model_service";
import type { Model__Output as Model } from "./generated/modelhost/v1/Model";
import type { Operation__Output as Operation } from "./generated/modelhost/v1/Operation";
import type { WatchEventsResponse__Output as Watched } from "./generated/modelhost/v1/WatchEventsResponse";
import type { ProtoGrpcType as Inference } from "./generated/open_inference";
import type { ProtoGrpcType as Operations } from "./generated/operation_service";
import type { ProtoGrpcType as Residency } from "./generated/residency_service";

// From build/main.js to the proto files.
const PROTOS = fileURLToPath(new URL("../../../../protos", import.meta.url));
const FILES = ["model", "residency", "operation", "event"].map((name) => `modelhost/v1/${name}_service.proto`);
// As the types were generated (package.json): int64 as text, names as in the protos.
const OPTIONS = { includeDirs: [PROTOS], keepCase: true, longs: String, enums: String, defaults: true };

const [target = "127.0.0.1:7411", source = "hf://sentence-transformers/all-MiniLM-L6-v2"] = process.argv.slice(2);
const print = (value: object) => process.stdout.write(`${JSON.stringify(value)}\n`);

const root = grpc.loadPackageDefinition(
  protoLoader.loadSync([...FILES, "modelhost/oip/open_inference.proto"], OPTIONS),
) as unknown as Models & Residency & Operations & Events & Inference;
const insecure = grpc.credentials.createInsecure();
const models = new root.modelhost.v1.ModelService(target, insecure);
const residency = new root.modelhost.v1.ResidencyService(target, insecure);
const operations = new root.modelhost.v1.OperationService(target, insecure);
const events = new root.modelhost.v1.EventService(target, insecure);
const inference = new root.inference.GRPCInferenceService(target, insecure);

const soon = () => ({ deadline: Date.now() + 30_000 });

// One unary call as a promise.
function answered<A>(start: (done: grpc.requestCallback<A>) => void): Promise<A> {
  return new Promise((resolve, reject) => start((error, answer) => (error ? reject(error) : resolve(answer!))));
}

// Follows an operation to its end and returns the samples of its bytes; throws what it failed with.
async function follow(operation: Operation): Promise<string[]> {
  const bytes: string[] = [];
  let last = operation;
  for await (const step of operations.WatchOperation({ name: operation.name }) as AsyncIterable<Operation>) {
    last = step;
    bytes.push(step.progress?.done_bytes ?? "0");
  }
  if (last.state !== "SUCCEEDED") throw new Error(`${last.name}: ${last.state} ${last.error?.message ?? ""}`);
  return bytes;
}

const name = `models/${source.split("/").pop()!.toLowerCase()}`;
const model = await answered<Model>((done) =>
  models.CreateModel({ model: { source: { uri: source } } }, soon(), done),
).catch((error: grpc.ServiceError) => {
  if (error.code !== grpc.status.ALREADY_EXISTS) throw error;
  return answered<Model>((done) => models.GetModel({ name }, soon(), done));
});
const samples = await follow(await answered((done) => models.DownloadModel({ name: model.name }, soon(), done)));
print({ step: "download", name: model.name, samples: samples.length });

await follow(await answered((done) => residency.LoadModel({ name: model.name }, soon(), done)));
const text = Buffer.from("a sentence from TypeScript");
const length = Buffer.alloc(4);
length.writeUInt32LE(text.length);
const vectors = await answered<Inferred>((done) =>
  inference.ModelInfer(
    {
      model_name: model.name.replace("models/", ""),
      inputs: [{ name: "text", datatype: "BYTES", shape: [1] }],
      outputs: [{ name: "embedding" }],
      raw_input_contents: [Buffer.concat([length, text])],
    },
    soon(),
    done,
  ),
);
print({ step: "infer", shape: vectors.outputs[0]?.shape });

// What happened so far, up to the event that the model is READY.
const stream = events.WatchEvents({ start_sequence: 1 });
watching: for await (const batch of stream as AsyncIterable<Watched>) {
  for (const event of batch.events) {
    if (event.kind !== "INSTANCE" || event.reason !== "READY") continue;
    print({ step: "event", sequence: event.sequence, name: event.name, reason: event.reason });
    break watching;
  }
}
stream.cancel();
for (const client of [models, residency, operations, events, inference]) client.close();

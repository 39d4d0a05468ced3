// A client of modelhost in 80 lines, from the proto files alone: what a reader would copy into a project.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const FILES = [
  "modelhost/v1/model_service.proto",
  "modelhost/v1/residency_service.proto",
  "modelhost/v1/operation_service.proto",
  "modelhost/v1/event_service.proto",
  "modelhost/oip/open_inference.proto",
];
// int64 as text: a sequence may pass 2^53.
const OPTIONS = { includeDirs: [PROTOS], keepCase: true, longs: String, enums: String, defaults: true };
const BYTES_MAX = 64 * 1024 * 1024;

// Connects to "127.0.0.1:7411" or "unix:/run/modelhost/modelhost.sock".
export function connect(target) {
  const root = grpc.loadPackageDefinition(protoLoader.loadSync(FILES, OPTIONS));
  const channel = {
    "grpc.max_receive_message_length": BYTES_MAX,
    "grpc.max_send_message_length": BYTES_MAX,
  };
  const make = (Service) => new Service(target, grpc.credentials.createInsecure(), channel);
  const v1 = root.modelhost.v1;
  return {
    models: make(v1.ModelService),
    residency: make(v1.ResidencyService),
    operations: make(v1.OperationService),
    events: make(v1.EventService),
    inference: make(root.inference.GRPCInferenceService),
  };
}

// One unary call as a promise; an error has .code and .details of gRPC.
export function call(client, method, request, deadlineSeconds = 30) {
  const deadline = new Date(Date.now() + deadlineSeconds * 1000);
  return new Promise((resolve, reject) =>
    client[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

// The reason of an error ("MODEL_NOT_FOUND"), from google.rpc.ErrorInfo in its trailing metadata.
export function reasonOf(error) {
  const [details] = error.metadata?.get("grpc-status-details-bin") ?? [];
  // ErrorInfo.reason is followed by the domain "modelhost": enough to find it without another library.
  return details?.toString("latin1").match(/([A-Z][A-Z_]+)\x12\x09modelhost/)?.[1] ?? "";
}

// Follows an operation to its end; `onStep` sees each state and sample. Throws what the operation failed with.
export async function follow(clients, operation, onStep = () => {}) {
  let last = operation;
  for await (const step of clients.operations.WatchOperation({ name: operation.name })) {
    onStep((last = step));
  }
  if (last.state !== "SUCCEEDED") throw new Error(`${last.name}: ${last.state} ${last.error?.message ?? ""}`);
  return last;
}

// Yields every event after `since`, for ever: a broken stream goes on behind the last sequence seen.
export async function* watch(clients, since = "0", signal = undefined) {
  let next = BigInt(since) + 1n;
  while (!signal?.aborted) {
    const stream = clients.events.WatchEvents({ start_sequence: String(next) });
    signal?.addEventListener("abort", () => stream.cancel(), { once: true });
    try {
      for await (const message of stream) {
        for (const event of message.events) {
          next = BigInt(event.sequence) + 1n;
          yield event;
        }
      }
    } catch (error) {
      if (signal?.aborted) return;
      if (error.code !== grpc.status.UNAVAILABLE) throw error;
      await new Promise((resume) => setTimeout(resume, 200));
    } finally {
      stream.cancel();
    }
  }
}

// BYTES tensors on the wire: for each text a little-endian length of 4 bytes, then the bytes.
export function packTexts(texts) {
  return Buffer.concat(
    texts.flatMap((text) => {
      const body = Buffer.from(text, "utf8");
      const length = Buffer.alloc(4);
      length.writeUInt32LE(body.length);
      return [length, body];
    }),
  );
}

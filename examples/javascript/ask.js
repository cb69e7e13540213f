// A library component: ask(graph, question) answers through wasi:nn. Build and run: see README.md.
import { Tensor } from "wasi:nn/tensor@0.2.0-rc-2024-10-28";
import { loadByName } from "wasi:nn/graph@0.2.0-rc-2024-10-28";

const CONFIG = { prompt_mode: "chat", max_tokens: 64, temperature: 0 };

function textTensor(text) {
  const data = new TextEncoder().encode(text);
  return new Tensor([data.length], "U8", data);
}

export function ask(graph, question) {
  try {
    const context = loadByName(graph).initExecutionContext();
    const outputs = context.compute([
      ["config", textTensor(JSON.stringify(CONFIG))],
      ["prompt", textTensor(question)],
    ]);
    const [, output] = outputs.find(([name]) => name === "output");
    return new TextDecoder().decode(output.data());
  } catch (failure) {
    // A failed call throws an object whose payload is the error resource; a string thrown here is this function's error.
    const error = failure.payload ?? failure;
    throw typeof error.code === "function" ? `${error.code()}: ${error.data()}` : String(error);
  }
}

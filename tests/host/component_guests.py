"""A component that lets a test make each call of ``wasi:nn`` by hand.

It exports each imported function with plain numbers in place of resources: the numbers of its own handle table, so that
a test can pass any number at all. Calls go test -> export -> core function -> lowered import, so the host sees a real
component with a real memory.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from wasmtime import Store
from wasmtime.component import Component, Instance, Linker, Variant

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import HostLimits, create_engine, define_wasi_nn_component

NEWEST = "0.2.0-rc-2024-10-28"
VERSIONS = (NEWEST, "0.2.0-rc-2024-08-19", "0.2.0-rc-2024-06-25")
CODES = [
    "invalid-argument",
    "invalid-encoding",
    "timeout",
    "runtime-error",
    "unsupported-operation",
    "too-large",
    "not-found",
    "security",
    "unknown",
]
GGML, U8 = 5, 4
_ENUM = " ".join(f'"{code}"' for code in CODES)

TENSOR_IMPORT = """
  (import "wasi:nn/tensor@VERSION" (instance $nn-tensor
    (export "tensor" (type $tensor (sub resource)))
    (type $dimensions (list u32))
    (type $kind (enum "FP16" "FP32" "FP64" "BF16" "U8" "I32" "I64"))
    (export "tensor-type" (type $tensor-type (eq $kind)))
    (type $data (list u8))
    (export "[constructor]tensor"
      (func (param "dimensions" $dimensions) (param "ty" $tensor-type) (param "data" $data) (result (own $tensor))))
    (export "[method]tensor.dimensions" (func (param "self" (borrow $tensor)) (result $dimensions)))
    (export "[method]tensor.ty" (func (param "self" (borrow $tensor)) (result $tensor-type)))
    (export "[method]tensor.data" (func (param "self" (borrow $tensor)) (result $data)))))
  (alias export $nn-tensor "tensor" (type $tensor))"""
ERRORS_IMPORT = f"""
  (import "wasi:nn/errors@VERSION" (instance $nn-errors
    (type $codes (enum {_ENUM}))
    (export "error-code" (type $code (eq $codes)))
    (export "error" (type $error (sub resource)))
    CONSTRUCTOR
    (export "[method]error.code" (func (param "self" (borrow $error)) (result $code)))
    (export "[method]error.data" (func (param "self" (borrow $error)) (result string)))))
  (alias export $nn-errors "error" (type $error))"""
#: Only the older release candidates have it.
ERROR_CONSTRUCTOR = """(export "[constructor]error"
      (func (param "code" $code) (param "data" string) (result (own $error))))"""
INFERENCE_IMPORT = """
  (import "wasi:nn/inference@VERSION" (instance $nn-inference
    (alias outer 1 $tensor (type $t)) (export "tensor" (type $tensor (eq $t)))
    (alias outer 1 $error (type $e)) (export "error" (type $error (eq $e)))
    (export "graph-execution-context" (type $context (sub resource)))
    (type $pair (tuple string (own $tensor)))
    (type $pairs (list $pair))
    (export "[method]graph-execution-context.compute" (func
      (param "self" (borrow $context)) (param "inputs" $pairs) (result (result $pairs (error (own $error))))))))
  (alias export $nn-inference "graph-execution-context" (type $context))"""
GRAPH_IMPORT = """
  (import "wasi:nn/graph@VERSION" (instance $nn-graph
    (alias outer 1 $error (type $e)) (export "error" (type $error (eq $e)))
    (alias outer 1 $context (type $c)) (export "graph-execution-context" (type $context (eq $c)))
    (export "graph" (type $graph (sub resource)))
    (type $encodings (enum "openvino" "onnx" "tensorflow" "pytorch" "tensorflowlite" "ggml" "autodetect"))
    (export "graph-encoding" (type $encoding (eq $encodings)))
    (type $targets (enum "cpu" "gpu" "tpu"))
    (export "execution-target" (type $target (eq $targets)))
    (type $builder (list u8))
    (type $builders (list $builder))
    (export "[method]graph.init-execution-context"
      (func (param "self" (borrow $graph)) (result (result (own $context) (error (own $error))))))
    (export "load" (func (param "builder" $builders) (param "encoding" $encoding) (param "target" $target)
      (result (result (own $graph) (error (own $error))))))
    (export "load-by-name" (func (param "name" string) (result (result (own $graph) (error (own $error))))))))
  (alias export $nn-graph "graph" (type $graph))"""

#: ``realloc`` only ever takes more; ``reset`` begins anew. The first page is for results.
MEMORY = """
  (core module $Memory
    (memory (export "memory") 2)
    (global $next (mut i32) (i32.const 65536))
    (func (export "reset") (global.set $next (i32.const 65536)))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32) (local $n_missing i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
      (global.set $next (i32.add (local.get $at) (local.get 3)))
      (local.set $n_missing (i32.sub (global.get $next) (i32.shl (memory.size) (i32.const 16))))
      (if (i32.gt_s (local.get $n_missing) (i32.const 0)) (then
        (if (i32.eq (memory.grow (i32.shr_u (i32.add (local.get $n_missing) (i32.const 65535)) (i32.const 16)))
                    (i32.const -1))
          (then (unreachable)))))
      (local.get $at)))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias core export $memory "realloc" (core func $realloc))
  (alias core export $memory "reset" (core func $reset))"""

LOWER = "(memory $mem) (realloc (core func $realloc))"
#: Export name -> (lowered function, flat parameters, whether its result goes to memory, parameters, result).
#: Handles are u32, and so are enums: with a wrong one, wasmtime traps.
CALLS = {
    "tensor-new": (
        '$nn-tensor "[constructor]tensor"',
        5,
        False,
        '(param "d" (list u32)) (param "t" u32) (param "data" (list u8))',
        "(result u32)",
    ),
    "tensor-dimensions": ('$nn-tensor "[method]tensor.dimensions"', 1, True, '(param "t" u32)', "(result (list u32))"),
    "tensor-ty": ('$nn-tensor "[method]tensor.ty"', 1, False, '(param "t" u32)', "(result u32)"),
    "tensor-data": ('$nn-tensor "[method]tensor.data"', 1, True, '(param "t" u32)', "(result (list u8))"),
    "error-code": ('$nn-errors "[method]error.code"', 1, False, '(param "e" u32)', "(result u32)"),
    "error-data": ('$nn-errors "[method]error.data"', 1, True, '(param "e" u32)', "(result string)"),
    "compute": (
        '$nn-inference "[method]graph-execution-context.compute"',
        3,
        True,
        '(param "c" u32) (param "inputs" (list (tuple string u32)))',
        "(result (result (list (tuple string u32)) (error u32)))",
    ),
    "init-execution-context": (
        '$nn-graph "[method]graph.init-execution-context"',
        1,
        True,
        '(param "g" u32)',
        "(result (result u32 (error u32)))",
    ),
    "load": (
        '$nn-graph "load"',
        4,
        True,
        '(param "b" (list (list u8))) (param "e" u32) (param "t" u32)',
        "(result (result u32 (error u32)))",
    ),
    "load-by-name": ('$nn-graph "load-by-name"', 2, True, '(param "n" string)', "(result (result u32 (error u32)))"),
}
ERROR_NEW = ('$nn-errors "[constructor]error"', 3, False, '(param "c" u32) (param "d" string)', "(result u32)")
DROPS = {"drop-tensor": "$tensor", "drop-error": "$error", "drop-context": "$context", "drop-graph": "$graph"}


def imports_wat(version: str = NEWEST, *, has_error_constructor: bool = False) -> str:
    """The four interfaces as a component imports them."""
    errors = ERRORS_IMPORT.replace("CONSTRUCTOR", ERROR_CONSTRUCTOR if has_error_constructor else "")
    return (TENSOR_IMPORT + errors + INFERENCE_IMPORT + GRAPH_IMPORT).replace("VERSION", version)


def driver_wat(version: str = NEWEST) -> str:
    has_error_constructor = version != NEWEST
    calls = CALLS | ({"error-new": ERROR_NEW} if has_error_constructor else {})
    lowered, imported, wrappers, exports = [], [], [], []
    for name, (function, n_words, through_memory, parameters, result) in calls.items():
        lowered.append(f"(core func ${name} (canon lower (func {function}) {LOWER}))")
        imported.append(f'(export "{name}" (func ${name}))')
        core_result = "" if through_memory else "(result i32)"
        words = "i32 " * n_words
        get = " ".join(f"(local.get {i})" for i in range(n_words))
        # A lowered function writes a large result where it is told to; a lifted one returns where that is.
        body = f"(call ${name} {get} (i32.const 16)) (i32.const 16)" if through_memory else f"(call ${name} {get})"
        wrappers.append(
            f'(import "nn" "{name}" (func ${name} (param {words}{"i32" * through_memory}) {core_result}))\n'
            f'(func (export "{name}") (param {words}) (result i32) {body})'
        )
        exports.append(
            f'(func (export "{name}") {parameters} {result} (canon lift (core func $main "{name}") {LOWER}))'
        )
    for name, resource in DROPS.items():
        lowered.append(f"(core func ${name} (canon resource.drop {resource}))")
        exports.append(f'(func (export "{name}") (param "h" u32) (canon lift (core func ${name})))')
    imports, functions = _split(wrappers)
    return f"""(component {imports_wat(version, has_error_constructor=has_error_constructor)} {MEMORY}
  {" ".join(lowered)}
  (core module $Main
    {imports}
    (import "memory" "memory" (memory 1))
    (import "memory" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
    {functions}
    (func (export "zeros") (param i32) (result i32)
      (call $tensor-new (i32.const 0) (i32.const 0) (i32.const {U8})
        (call $realloc (i32.const 0) (i32.const 0) (i32.const 1) (local.get 0)) (local.get 0)))
    (func (export "hoard") (param i32)
      (loop
        (drop (call $tensor-new (i32.const 0) (i32.const 0) (i32.const {U8}) (i32.const 0) (i32.const 0)))
        (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))))
    (func (export "spin") (loop (br 0)))
    (func $recurse (export "recurse") (call $recurse)))
  (core instance $main (instantiate $Main
    (with "memory" (instance $memory)) (with "nn" (instance {" ".join(imported)}))))
  {" ".join(exports)}
  (func (export "reset") (canon lift (core func $reset)))
  (func (export "zeros") (param "n" u32) (result u32) (canon lift (core func $main "zeros")))
  (func (export "hoard") (param "n" u32) (canon lift (core func $main "hoard")))
  (func (export "spin") (canon lift (core func $main "spin")))
  (func (export "recurse") (canon lift (core func $main "recurse"))))"""


WASI_IMPORTS = """
  (import "wasi:io/error@0.2.0" (instance $io-error (export "error" (type (sub resource)))))
  (alias export $io-error "error" (type $io-failure))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $stream (sub resource)))
    (alias outer 1 $io-failure (type $f)) (export "error" (type $failure (eq $f)))
    (type $problems (variant (case "last-operation-failed" (own $failure)) (case "closed")))
    (export "stream-error" (type $problem (eq $problems)))
    (type $bytes (list u8))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $stream)) (param "contents" $bytes) (result (result (error $problem)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $cli-stdout
    (alias outer 1 $stream (type $s)) (export "output-stream" (type $output (eq $s)))
    (export "get-stdout" (func (result (own $output))))))
  (import "wasi:cli/exit@0.2.0" (instance $cli-exit (export "exit" (func (param "status" (result))))))"""


def command_component(body: str) -> bytes:
    """A command whose ``run`` is ``body``, which leaves 0 for success.

    It can ``$say`` a text of the first page to standard output, ``$exit`` with 0 or 1, and ``$generate``: load the
    graph "default" and compute "once upon", streaming five tokens to standard output.
    """
    return f"""(component {WASI_IMPORTS} {imports_wat()} {MEMORY}
  (core func $load-by-name (canon lower (func $nn-graph "load-by-name") {LOWER}))
  (core func $init (canon lower (func $nn-graph "[method]graph.init-execution-context") {LOWER}))
  (core func $new (canon lower (func $nn-tensor "[constructor]tensor") {LOWER}))
  (core func $compute (canon lower (func $nn-inference "[method]graph-execution-context.compute") {LOWER}))
  (core func $stdout (canon lower (func $cli-stdout "get-stdout")))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush") {LOWER}))
  (core func $exit (canon lower (func $cli-exit "exit")))
  (core module $Main
    (import "x" "load-by-name" (func $load-by-name (param i32 i32 i32)))
    (import "x" "init" (func $init (param i32 i32)))
    (import "x" "new" (func $new (param i32 i32 i32 i32 i32) (result i32)))
    (import "x" "compute" (func $compute (param i32 i32 i32 i32)))
    (import "x" "stdout" (func $stdout (result i32)))
    (import "x" "write" (func $write (param i32 i32 i32 i32)))
    (import "x" "exit" (func $exit (param i32)))
    (import "memory" "memory" (memory 1))
    (data (i32.const 256) "before after prompt config default once upon")
    (data (i32.const 512) "{{\\"stream_stdout\\": true, \\"max_tokens\\": 5}}")
    (func $say (param i32 i32) (call $write (call $stdout) (local.get 0) (local.get 1) (i32.const 16)))
    (func $text (param i32 i32) (result i32)
      (call $new (i32.const 0) (i32.const 0) (i32.const {U8}) (local.get 0) (local.get 1)))
    (func $generate
      (call $load-by-name (i32.const 283) (i32.const 7) (i32.const 16))
      (call $init (i32.load (i32.const 20)) (i32.const 16))
      (i32.store (i32.const 64) (i32.const 276)) (i32.store (i32.const 68) (i32.const 6))
      (i32.store (i32.const 72) (call $text (i32.const 512) (i32.const 40)))
      (i32.store (i32.const 76) (i32.const 269)) (i32.store (i32.const 80) (i32.const 6))
      (i32.store (i32.const 84) (call $text (i32.const 291) (i32.const 9)))
      (call $compute (i32.load (i32.const 20)) (i32.const 64) (i32.const 2) (i32.const 16))
      (if (i32.load8_u (i32.const 16)) (then (unreachable))))
    (func (export "run") (result i32) {body}))
  (core instance $main (instantiate $Main
    (with "memory" (instance $memory))
    (with "x" (instance
      (export "load-by-name" (func $load-by-name)) (export "init" (func $init)) (export "new" (func $new))
      (export "compute" (func $compute)) (export "stdout" (func $stdout)) (export "write" (func $write))
      (export "exit" (func $exit))))))
  (func $run (result (result)) (canon lift (core func $main "run")))
  (instance $cli (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $cli)))""".encode()


def _split(wrappers: list[str]) -> tuple[str, str]:
    pairs = [wrapper.split("\n", 1) for wrapper in wrappers]
    return "\n".join(pair[0] for pair in pairs), "\n".join(pair[1] for pair in pairs)


class NNError(Exception):
    """An error that a call gave the component."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class ComponentDriver:
    """A component whose calls a test makes one by one; failures come as ``NNError``, their resources dropped.

    After a trap wasmtime lets nobody enter the store again.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        version: str = NEWEST,
        limits: HostLimits | None = None,
    ) -> None:
        self.engine = engine = create_engine(use_cache=False)
        self.store = Store(engine)
        self.store.set_epoch_deadline(1)
        self.streamed = bytearray()
        self._linker = Linker(engine)
        self.state = define_wasi_nn_component(self._linker, backend, limits=limits, write_stdout=self.streamed.extend)
        self._instance: Instance = self._linker.instantiate(self.store, Component(engine, driver_wat(version)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.state.close()
        self.store.close()
        self._linker.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """One call, as it is; a ``result`` comes as wasmtime-py gives it."""
        function = self._instance.get_func(self.store, name)
        assert function is not None, name
        return function(self.store, *arguments)

    def ask(self, name: str, *arguments: Any) -> Any:
        """A call that returns a result: its value, or ``NNError``."""
        answer = self.call(name, *arguments)
        self.call("reset")
        if isinstance(answer, Variant):  # both cases are a number
            if answer.tag == "ok":
                return answer.payload
            answer = answer.payload
        elif isinstance(answer, list):
            return answer
        error = NNError(CODES[self.call("error-code", answer)], self.call("error-data", answer))
        self.call("drop-error", answer)
        raise error

    # Whole steps.

    def load(self, name: str = "default") -> int:
        return int(self.ask("load-by-name", name))

    def open(self, name: str = "default") -> int:
        """Load a graph; returns a context on it."""
        return int(self.ask("init-execution-context", self.load(name)))

    def tensor(self, data: bytes, dimensions: list[int] | None = None, kind: int = U8) -> int:
        return int(self.call("tensor-new", [len(data)] if dimensions is None else dimensions, kind, data))

    def take(self, tensor: int) -> bytes:
        """A tensor's data; the tensor is gone then."""
        data = bytes(self.call("tensor-data", tensor))
        self.call("drop-tensor", tensor)
        return data

    def compute(self, context: int, **inputs: bytes) -> dict[str, bytes]:
        """Named inputs (``_0`` for "0") to named outputs."""
        named = [(name.removeprefix("_"), self.tensor(data)) for name, data in inputs.items()]
        return {name: self.take(tensor) for name, tensor in self.ask("compute", context, named)}

    def generate(self, context: int, prompt: bytes) -> bytes:
        return self.compute(context, prompt=prompt)["output"]

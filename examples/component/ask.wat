;; A component written by hand: ask(graph, question) answers through wasi:nn.
;; Run: wasi-nn run --nn-graph default=smollm2 --invoke ask ask.wat default "What is the capital of France?"
;;
;; The outer part says in the component model's types what comes in and goes out; "canon lower" and "canon lift" turn
;; that into core functions on numbers and memory, which $Main below calls and is.
(component
  ;; --- what it imports: the interfaces of ../wit/deps/nn.wit, as far as it uses them ---
  (import "wasi:nn/tensor@0.2.0-rc-2024-10-28" (instance $nn-tensor
    (export "tensor" (type $tensor (sub resource)))
    (type $dimensions (list u32))
    (type $types (enum "FP16" "FP32" "FP64" "BF16" "U8" "I32" "I64"))
    (export "tensor-type" (type $tensor-type (eq $types)))
    (type $data (list u8))
    (export "[constructor]tensor"
      (func (param "dimensions" $dimensions) (param "ty" $tensor-type) (param "data" $data) (result (own $tensor))))
    (export "[method]tensor.data" (func (param "self" (borrow $tensor)) (result $data)))))
  (alias export $nn-tensor "tensor" (type $tensor))

  (import "wasi:nn/errors@0.2.0-rc-2024-10-28" (instance $nn-errors
    (export "error" (type $error (sub resource)))
    (export "[method]error.data" (func (param "self" (borrow $error)) (result string)))))
  (alias export $nn-errors "error" (type $error))

  (import "wasi:nn/inference@0.2.0-rc-2024-10-28" (instance $nn-inference
    (alias outer 1 $tensor (type $t)) (export "tensor" (type $tensor (eq $t)))
    (alias outer 1 $error (type $e)) (export "error" (type $error (eq $e)))
    (export "graph-execution-context" (type $context (sub resource)))
    (type $named-tensor (tuple string (own $tensor)))
    (type $named-tensors (list $named-tensor))
    (export "[method]graph-execution-context.compute" (func
      (param "self" (borrow $context)) (param "inputs" $named-tensors)
      (result (result $named-tensors (error (own $error))))))))
  (alias export $nn-inference "graph-execution-context" (type $context))

  (import "wasi:nn/graph@0.2.0-rc-2024-10-28" (instance $nn-graph
    (alias outer 1 $error (type $e)) (export "error" (type $error (eq $e)))
    (alias outer 1 $context (type $c)) (export "graph-execution-context" (type $context (eq $c)))
    (export "graph" (type $graph (sub resource)))
    (export "[method]graph.init-execution-context"
      (func (param "self" (borrow $graph)) (result (result (own $context) (error (own $error))))))
    (export "load-by-name" (func (param "name" string) (result (result (own $graph) (error (own $error))))))))
  (alias export $nn-graph "graph" (type $graph))

  ;; --- memory: what is passed in goes behind the last thing, and all of it is forgotten after a call ---
  (core module $Memory
    (memory (export "memory") 2)
    (global $next (mut i32) (i32.const 65536))
    (func (export "forget") (param i32) (global.set $next (i32.const 65536)))
    (func (export "realloc") (param $old i32) (param $n_old i32) (param $alignment i32) (param $n_bytes i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
      (global.set $next (i32.add (local.get $at) (local.get $n_bytes)))
      (block $fits
        (loop $grow
          (br_if $fits (i32.le_u (global.get $next) (i32.shl (memory.size) (i32.const 16))))
          (br_if $grow (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
        (unreachable))
      (memory.copy (local.get $at) (local.get $old) (local.get $n_old))
      (local.get $at)))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias core export $memory "realloc" (core func $realloc))
  (alias core export $memory "forget" (core func $forget))

  ;; --- its imports as core functions ---
  (core func $new-tensor (canon lower (func $nn-tensor "[constructor]tensor") (memory $mem)))
  (core func $tensor-data
    (canon lower (func $nn-tensor "[method]tensor.data") (memory $mem) (realloc (core func $realloc))))
  (core func $error-data
    (canon lower (func $nn-errors "[method]error.data") (memory $mem) (realloc (core func $realloc))))
  (core func $compute (canon lower (func $nn-inference "[method]graph-execution-context.compute")
    (memory $mem) (realloc (core func $realloc))))
  (core func $init (canon lower (func $nn-graph "[method]graph.init-execution-context") (memory $mem)))
  (core func $load (canon lower (func $nn-graph "load-by-name") (memory $mem)))
  (core func $drop-tensor (canon resource.drop $tensor))
  (core func $drop-error (canon resource.drop $error))
  (core func $drop-context (canon resource.drop $context))
  (core func $drop-graph (canon resource.drop $graph))

  ;; --- the program ---
  (core module $Main
    (import "nn" "new-tensor" (func $new-tensor (param i32 i32 i32 i32 i32) (result i32)))
    (import "nn" "tensor-data" (func $tensor-data (param i32 i32)))
    (import "nn" "error-data" (func $error-data (param i32 i32)))
    (import "nn" "compute" (func $compute (param i32 i32 i32 i32)))
    (import "nn" "init" (func $init (param i32 i32)))
    (import "nn" "load" (func $load (param i32 i32 i32)))
    (import "nn" "drop-tensor" (func $drop-tensor (param i32)))
    (import "nn" "drop-error" (func $drop-error (param i32)))
    (import "nn" "drop-context" (func $drop-context (param i32)))
    (import "nn" "drop-graph" (func $drop-graph (param i32)))
    (import "memory" "memory" (memory 2))

    ;; Results lie at 16: a byte that says whether it is an error, and from 20 on what it is.
    ;; At 64 is the list of inputs: name, length of the name, tensor; twice.
    (data (i32.const 128) "prompt")
    (data (i32.const 136) "config")
    (data (i32.const 256) "{\"prompt_mode\": \"chat\", \"max_tokens\": 64, \"temperature\": 0}")

    ;; A one-dimensional tensor of bytes (type 4, U8).
    (func $text (param $at i32) (param $n_bytes i32) (result i32)
      (i32.store (i32.const 32) (local.get $n_bytes))
      (call $new-tensor (i32.const 32) (i32.const 1) (i32.const 4) (local.get $at) (local.get $n_bytes)))

    ;; One entry of the list of inputs, whose name has six letters.
    (func $input (param $entry i32) (param $name i32) (param $tensor i32)
      (i32.store (local.get $entry) (local.get $name))
      (i32.store offset=4 (local.get $entry) (i32.const 6))
      (i32.store offset=8 (local.get $entry) (local.get $tensor)))

    ;; Makes an error's text the result.
    (func $fail (param $error i32) (result i32)
      (call $error-data (local.get $error) (i32.const 20))
      (call $drop-error (local.get $error))
      (i32.store8 (i32.const 16) (i32.const 1))
      (i32.const 16))

    ;; Makes the first output's bytes the result, and drops all of them.
    (func $succeed (param $outputs i32) (param $n_outputs i32) (result i32)
      (call $tensor-data (i32.load offset=8 (local.get $outputs)) (i32.const 20))
      (loop $drop
        (call $drop-tensor (i32.load offset=8 (local.get $outputs)))
        (local.set $outputs (i32.add (local.get $outputs) (i32.const 12)))
        (br_if $drop (local.tee $n_outputs (i32.sub (local.get $n_outputs) (i32.const 1)))))
      (i32.store8 (i32.const 16) (i32.const 0))
      (i32.const 16))

    (func (export "ask")
      (param $name i32) (param $n_name i32) (param $question i32) (param $n_question i32) (result i32)
      (local $context i32)
      (call $load (local.get $name) (local.get $n_name) (i32.const 16))
      (if (i32.load8_u (i32.const 16)) (then (return (call $fail (i32.load (i32.const 20))))))
      (i32.load (i32.const 20))  ;; the graph, which a context keeps alive
      (call $init (i32.load (i32.const 20)) (i32.const 16))
      (call $drop-graph)
      (if (i32.load8_u (i32.const 16)) (then (return (call $fail (i32.load (i32.const 20))))))
      (local.set $context (i32.load (i32.const 20)))
      (call $input (i32.const 64) (i32.const 136) (call $text (i32.const 256) (i32.const 59)))
      (call $input (i32.const 76) (i32.const 128) (call $text (local.get $question) (local.get $n_question)))
      (call $compute (local.get $context) (i32.const 64) (i32.const 2) (i32.const 16))
      (call $drop-context (local.get $context))
      (if (i32.load8_u (i32.const 16)) (then (return (call $fail (i32.load (i32.const 20))))))
      (call $succeed (i32.load (i32.const 20)) (i32.load (i32.const 24)))))
  (core instance $main (instantiate $Main
    (with "memory" (instance $memory))
    (with "nn" (instance
      (export "new-tensor" (func $new-tensor))
      (export "tensor-data" (func $tensor-data))
      (export "error-data" (func $error-data))
      (export "compute" (func $compute))
      (export "init" (func $init))
      (export "load" (func $load))
      (export "drop-tensor" (func $drop-tensor))
      (export "drop-error" (func $drop-error))
      (export "drop-context" (func $drop-context))
      (export "drop-graph" (func $drop-graph))))))

  ;; --- what it exports; bytes, since a text that ends at its limit may end inside a character ---
  (type $answer (list u8))
  (func (export "ask") (param "graph" string) (param "question" string) (result (result $answer (error string)))
    (canon lift (core func $main "ask") (memory $mem) (realloc (core func $realloc)) (post-return (core func $forget)))))

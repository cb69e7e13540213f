;; A module with a 64-bit memory, as HyperBEAM's nodes call it: no _start, an export that takes texts and returns one.
;;
;; Run: wasi-nn run --nn-graph default=smollm2,temperature=0 --invoke handle handle64.wat "Name the capital city of France."
;;
;; Pointers are i64 here; lengths and handles stay i32.
(module
  (import "wasi_ephemeral_nn" "load_by_name_with_config"
    (func $load_by_name_with_config (param i64 i32 i64 i32 i64) (result i32)))
  (import "wasi_ephemeral_nn" "init_execution_context" (func $init_execution_context (param i32 i64) (result i32)))
  (import "wasi_ephemeral_nn" "run_inference" (func $run_inference (param i64 i32) (result i64)))

  (memory (export "memory") i64 2)
  (data (i64.const 16) "default")
  (data (i64.const 32) "{\"prompt_mode\": \"chat\"}")
  (global $free (mut i64) (i64.const 4096))

  ;; The host allocates through this. It gives out memory once, page after page, and 0 when there is no more.
  (func (export "malloc") (param $n_bytes i64) (result i64)
    (local $block i64)
    (local.set $block (global.get $free))
    (global.set $free
      (i64.and (i64.add (i64.add (local.get $block) (local.get $n_bytes)) (i64.const 7)) (i64.const -8)))
    (block $done
      (loop $grow
        (br_if $done (i64.le_u (global.get $free) (i64.mul (memory.size) (i64.const 65536))))
        (if (i64.eq (memory.grow (i64.const 1)) (i64.const -1)) (then (return (i64.const 0))))
        (br $grow)))
    (local.get $block))
  (func (export "free") (param i64))

  (func $length (param $text i64) (result i32)
    (local $n_bytes i64)
    (loop $next
      (if (i32.load8_u (i64.add (local.get $text) (local.get $n_bytes)))
        (then
          (local.set $n_bytes (i64.add (local.get $n_bytes) (i64.const 1)))
          (br $next))))
    (i32.wrap_i64 (local.get $n_bytes)))

  ;; The answer's address, or 0 when a call failed.
  (func (export "handle") (param $prompt i64) (result i64)
    (if (call $load_by_name_with_config (i64.const 16) (i32.const 7) (i64.const 32) (i32.const 23) (i64.const 0))
      (then (return (i64.const 0))))
    (if (call $init_execution_context (i32.load (i64.const 0)) (i64.const 4))
      (then (return (i64.const 0))))
    (call $run_inference (local.get $prompt) (call $length (local.get $prompt)))))

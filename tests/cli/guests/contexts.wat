;; "open" opens $n execution contexts on the graph "default" and gives each a prompt, with $runs not 0 the first step of
;; a token-by-token run, too; then computes the first one. Returns the number of the first call that fails. As a command
;; it asks for a context's metadata as llama-core does, with a buffer of length 0, and exits with that call's number.
(module
  (import "wasi_ephemeral_nn" "load_by_name" (func $load (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "init_execution_context" (func $init (param i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "set_input" (func $set_input (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "compute" (func $compute (param i32) (result i32)))
  (import "wasi_ephemeral_nn" "compute_single" (func $compute_single (param i32) (result i32)))
  (import "wasi_ephemeral_nn" "get_output" (func $get_output (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  ;; 0 graph, 4 context, 8 length, 32 tensor: 64 dims, 1 of them, u8, 128 prompt, 9 bytes
  (data (i32.const 32) "\40\00\00\00\01\00\00\00\03\00\00\00\80\00\00\00\09\00\00\00")
  (data (i32.const 64) "\01\00\00\00")
  (data (i32.const 100) "default")
  (data (i32.const 128) "once upon")

  (func (export "_start")
    (drop (call $load (i32.const 100) (i32.const 7) (i32.const 0)))
    (drop (call $init (i32.load (i32.const 0)) (i32.const 4)))
    (call $proc_exit
      (call $get_output (i32.load (i32.const 4)) (i32.const 1) (i32.const 1024) (i32.const 0) (i32.const 8))))

  (func (export "open") (param $n i32) (param $runs i32) (result i32)
    (local $errno i32)
    (block $failed
      (br_if $failed (local.tee $errno (call $load (i32.const 100) (i32.const 7) (i32.const 0))))
      (loop $next
        (br_if $failed (local.tee $errno (call $init (i32.load (i32.const 0)) (i32.const 4))))
        (br_if $failed
          (local.tee $errno (call $set_input (i32.load (i32.const 4)) (i32.const 0) (i32.const 32))))
        (if (local.get $runs)
          (then (br_if $failed (local.tee $errno (call $compute_single (i32.load (i32.const 4)))))))
        (local.set $n (i32.sub (local.get $n) (i32.const 1)))
        (br_if $next (local.get $n)))
      (local.set $errno (call $compute (i32.const 0))))
    (local.get $errno)))

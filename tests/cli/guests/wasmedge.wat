;; wasmedge.wat GRAPH PROMPT CONFIG: one answer and, on a line of its own, its metadata.
;; As modules built for WasmEdge do it: dims = [1] whatever the length, rubbish in the padding behind the tensor's type,
;; metadata at output 1. Exits with the number of the first call that fails.
(module
  (import "wasi_ephemeral_nn" "load_by_name_with_config"
    (func $load (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "init_execution_context" (func $init (param i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "set_input" (func $set_input (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "compute" (func $compute (param i32) (result i32)))
  (import "wasi_ephemeral_nn" "get_output" (func $get_output (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 4)
  ;; 0 graph, 4 context, 8 length, 16 iovec, 32 tensor, 64 dims, 100 newline, 128 argv, 256 its text, 65536 output
  (data (i32.const 64) "\01\00\00\00")
  (data (i32.const 100) "\n")

  (func $length (param $text i32) (result i32)
    (local $end i32)
    (local.set $end (local.get $text))
    (block $found
      (loop $next
        (br_if $found (i32.eqz (i32.load8_u (local.get $end))))
        (local.set $end (i32.add (local.get $end) (i32.const 1)))
        (br $next)))
    (i32.sub (local.get $end) (local.get $text)))

  (func $argument (param $n i32) (result i32)
    (i32.load (i32.add (i32.const 128) (i32.mul (local.get $n) (i32.const 4)))))

  (func $check (param $errno i32)
    (if (local.get $errno) (then (call $proc_exit (local.get $errno)))))

  (func $print (param $text i32) (param $n_bytes i32)
    (i32.store (i32.const 16) (local.get $text))
    (i32.store (i32.const 20) (local.get $n_bytes))
    (call $check (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 8))))

  (func $print_output (param $index i32)
    (call $check (call $get_output
      (i32.load (i32.const 4)) (local.get $index) (i32.const 65536) (i32.const 65536) (i32.const 8)))
    (call $print (i32.const 65536) (i32.load (i32.const 8)))
    (call $print (i32.const 100) (i32.const 1)))

  (func (export "_start")
    (call $check (call $args_get (i32.const 128) (i32.const 256)))
    (call $check (call $load
      (call $argument (i32.const 1)) (call $length (call $argument (i32.const 1)))
      (call $argument (i32.const 3)) (call $length (call $argument (i32.const 3)))
      (i32.const 0)))
    (call $check (call $init (i32.load (i32.const 0)) (i32.const 4)))
    (i32.store (i32.const 32) (i32.const 64))
    (i32.store (i32.const 36) (i32.const 1))
    (i32.store (i32.const 40) (i32.const 0xabcdef03))
    (i32.store (i32.const 44) (call $argument (i32.const 2)))
    (i32.store (i32.const 48) (call $length (call $argument (i32.const 2))))
    (call $check (call $set_input (i32.load (i32.const 4)) (i32.const 0) (i32.const 32)))
    (call $check (call $compute (i32.load (i32.const 4))))
    (call $print_output (i32.const 0))
    (call $print_output (i32.const 1))))

;; Asks a language model one question with the six official WASI-NN calls, and prints the answer.
;;
;; Run: wasi-nn run --nn-graph default=smollm2,prompt_mode=chat,temperature=0 ask.wat
;;
;; Memory: 0 graph, 4 context, 8 answer's length | 16 WASI's list of texts | 32 tensor | 64 name | 80 dimensions
;;         128 prompt | 4096 answer
(module
  (import "wasi_ephemeral_nn" "load_by_name" (func $load_by_name (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "init_execution_context" (func $init_execution_context (param i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "set_input" (func $set_input (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "compute" (func $compute (param i32) (result i32)))
  (import "wasi_ephemeral_nn" "get_output" (func $get_output (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  (memory (export "memory") 2)
  (data (i32.const 64) "default")
  (data (i32.const 80) "\01\00\00\00")
  (data (i32.const 128) "Name the capital city of France.")
  ;; The tensor, 20 bytes: dimensions and how many, type (3 is u8), data and its length.
  (data (i32.const 32) "\50\00\00\00" "\01\00\00\00" "\03\00\00\00" "\80\00\00\00" "\20\00\00\00")

  ;; Every call answers 0 or an error number, which becomes the exit status.
  (func $check (param $error i32)
    (if (local.get $error) (then (call $proc_exit (local.get $error)))))

  (func $print (param $text i32) (param $n_bytes i32)
    (i32.store (i32.const 16) (local.get $text))
    (i32.store (i32.const 20) (local.get $n_bytes))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24))))

  (func (export "_start")
    (call $check (call $load_by_name (i32.const 64) (i32.const 7) (i32.const 0)))
    (call $check (call $init_execution_context (i32.load (i32.const 0)) (i32.const 4)))
    (call $check (call $set_input (i32.load (i32.const 4)) (i32.const 0) (i32.const 32)))
    (call $check (call $compute (i32.load (i32.const 4))))
    (call $check
      (call $get_output (i32.load (i32.const 4)) (i32.const 0) (i32.const 4096) (i32.const 65536) (i32.const 8)))
    (i32.store8 (i32.add (i32.const 4096) (i32.load (i32.const 8))) (i32.const 10)) ;; a newline
    (call $print (i32.const 4096) (i32.add (i32.load (i32.const 8)) (i32.const 1)))))

;; Prints what the guest can see of its world: its arguments, its environment, the name of its first directory; each
;; text ends with a NUL. The other exports end in the ways in which a guest can end; "open" opens "file" there.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_dir_name" (func $fd_prestat_dir_name (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 80) "file")
  (data (i32.const 64) "ready\n")

  (func $print (param $text i32) (param $n_bytes i32)
    (i32.store (i32.const 16) (local.get $text))
    (i32.store (i32.const 20) (local.get $n_bytes))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 8))))

  (func (export "_start")
    (drop (call $args_sizes_get (i32.const 0) (i32.const 4)))
    (drop (call $args_get (i32.const 128) (i32.const 1024)))
    (call $print (i32.const 1024) (i32.load (i32.const 4)))
    (drop (call $environ_sizes_get (i32.const 0) (i32.const 4)))
    (drop (call $environ_get (i32.const 128) (i32.const 1024)))
    (call $print (i32.const 1024) (i32.load (i32.const 4)))
    (if (i32.eqz (call $fd_prestat_get (i32.const 3) (i32.const 0)))
      (then
        (drop (call $fd_prestat_dir_name (i32.const 3) (i32.const 1024) (i32.load (i32.const 4))))
        (call $print (i32.const 1024) (i32.load (i32.const 4))))))

  (func (export "exit") (param i32) (call $proc_exit (local.get 0)))
  (func (export "trap") unreachable)
  (func (export "spin") (call $print (i32.const 64) (i32.const 6)) (loop (br 0)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  ;; The flags are 1 to create it; the rights 2 to read it and 64 to write it. Returns WASI's error number.
  (func (export "open") (param $flags i32) (param $rights i64) (result i32)
    (call $path_open (i32.const 3) (i32.const 0) (i32.const 80) (i32.const 4)
      (local.get $flags) (local.get $rights) (i64.const 0) (i32.const 0) (i32.const 8)))
  ;; Rust's println! panics when it cannot write.
  (func (export "must_write")
    (i32.store (i32.const 16) (i32.const 64))
    (i32.store (i32.const 20) (i32.const 6))
    (if (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 8)) (then unreachable))))

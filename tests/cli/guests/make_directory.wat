;; A component. "make" makes the directory "made" in its first directory; returns 0, or 100 and the number of the error.
(component
  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $d (sub resource)))
    (type $ec (enum "access" "would-block" "already" "bad-descriptor" "busy" "deadlock" "quota" "exist" "file-too-large"
      "illegal-byte-sequence" "in-progress" "interrupted" "invalid" "io" "is-directory" "loop" "too-many-links"
      "message-size" "name-too-long" "no-device" "no-entry" "no-lock" "insufficient-memory" "insufficient-space"
      "not-directory" "not-empty" "not-recoverable" "unsupported" "no-tty" "no-such-device" "overflow" "not-permitted"
      "pipe" "read-only" "invalid-seek" "text-file-busy" "cross-device"))
    (export "error-code" (type $error (eq $ec)))
    (export "[method]descriptor.create-directory-at"
      (func (param "self" (borrow $d)) (param "path" string) (result (result (error $error)))))))
  (alias export $types "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $d0))
    (export "descriptor" (type $d (eq $d0)))
    (export "get-directories" (func (result (list (tuple (own $d) string)))))))
  (core module $mem
    (memory (export "memory") 1)
    (data (i32.const 64) "made")
    (global $b (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.get $b)
      (global.set $b
        (i32.add (global.get $b) (i32.and (i32.add (local.get 3) (i32.const 7)) (i32.const -8))))))
  (core instance $m (instantiate $mem))
  (core func $dirs (canon lower (func $preopens "get-directories")
    (memory (core memory $m "memory")) (realloc (core func $m "realloc"))))
  (core func $mkdir (canon lower (func $types "[method]descriptor.create-directory-at")
    (memory (core memory $m "memory"))))
  (core module $main
    (import "m" "memory" (memory 1))
    (import "h" "dirs" (func $dirs (param i32)))
    (import "h" "mkdir" (func $mkdir (param i32 i32 i32 i32)))
    ;; 0 the list of directories, 16 the answer: whether it is an error, and which
    (func (export "make") (result i32)
      (call $dirs (i32.const 0))
      (call $mkdir (i32.load (i32.load (i32.const 0))) (i32.const 64) (i32.const 4) (i32.const 16))
      (i32.add (i32.mul (i32.load8_u (i32.const 16)) (i32.const 100)) (i32.load8_u (i32.const 17)))))
  (core instance $i (instantiate $main
    (with "m" (instance $m))
    (with "h" (instance (export "dirs" (func $dirs)) (export "mkdir" (func $mkdir))))))
  (func (export "make") (result u32) (canon lift (core func $i "make"))))

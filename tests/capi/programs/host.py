"""A Python program that opens the library as a foreign one. Usage: host.py CDLL|PyDLL MODEL WHAT LIBRARY..."""

from __future__ import annotations

import ctypes
import os
import sys
import threading

CONFIG = b'{"max_tokens": 8, "temperature": 0, "n_ctx": 256}'
U8 = 2


class Tensor(ctypes.Structure):
    _fields_ = (("dimensions", ctypes.c_void_p), ("type", ctypes.c_int), ("data", ctypes.c_char_p))


class TensorData(ctypes.Structure):
    _fields_ = (("buf", ctypes.c_char_p), ("size", ctypes.c_uint32))


class WamrTensor(ctypes.Structure):
    _fields_ = (("dimensions", ctypes.c_void_p), ("type", ctypes.c_uint8), ("data", TensorData))


def check(code: int) -> None:
    if code != 0:
        raise SystemExit(f"error {code}")


def open_backend(library: ctypes.CDLL) -> ctypes.c_void_p:
    ctx = ctypes.c_void_p()
    check(library.init_backend(ctypes.byref(ctx)))
    return ctx


def ask(library: ctypes.CDLL, ctx: ctypes.c_void_p, model: str) -> str:
    graph, context, size = ctypes.c_uint32(), ctypes.c_uint32(), ctypes.c_uint32(4096)
    name, text = model.encode(), ctypes.create_string_buffer(4096)
    check(library.load_by_name_with_config(ctx, name, len(name), CONFIG, len(CONFIG), ctypes.byref(graph)))
    check(library.init_execution_context(ctx, graph, ctypes.byref(context)))
    if "llamacpp" in library._name:
        tensor, output = WamrTensor(None, U8, TensorData(b"hello", 5)), TensorData()
        output.buf, output.size = ctypes.cast(text, ctypes.c_char_p), 4096
        check(library.run_inference(ctx, context, 0, ctypes.byref(tensor), ctypes.byref(output), ctypes.byref(size)))
    else:
        tensor = Tensor(None, U8, b"hello")
        check(library.run_inference(ctx, context, 0, ctypes.byref(tensor), text, ctypes.byref(size)))
    return text.raw[: size.value].hex()


def serve(library: ctypes.CDLL, model: str) -> None:
    ctx = open_backend(library)
    text = ask(library, ctx, model)
    check(library.deinit_backend(ctx))
    sys.stdout.write(text + "\n")


def main(kind: str, model: str, what: str, paths: list[str]) -> None:
    libraries = [getattr(ctypes, kind)(path) for path in paths]
    if what == "together":
        threads = [threading.Thread(target=serve, args=(library, model)) for library in libraries for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif what == "leave-open":
        sys.stdout.write(ask(libraries[0], open_backend(libraries[0]), model) + "\n")
    elif what == "fork":
        ctx = open_backend(libraries[0])
        child = os.fork()
        if child == 0:
            os._exit(libraries[0].compute(ctx, 1) + 10 * libraries[0].init_backend(ctypes.byref(ctypes.c_void_p())))
        _, status = os.waitpid(child, 0)
        check(libraries[0].deinit_backend(ctx))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
    else:
        serve(libraries[0], model)


main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])

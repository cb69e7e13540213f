"""Whether layers on a GPU give the text that the CPU gives: llama.cpp with Vulkan, on Mesa's software driver.

    apt-get install mesa-vulkan-drivers libvulkan-dev glslc spirv-headers
    python tools/vulkan_check.py            # 15 to 40 minutes on two cores the first time: it compiles llama.cpp

Not part of the tests: it compiles for long, and computes a prompt slowly. A machine with a GPU and its driver is tested
by the same command. Makes an environment of its own (``--keep DIR`` leaves it there).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mesa-vulkan-drivers", "libvulkan-dev", "glslc", "spirv-headers")
PROGRAM = """
import json, sys
from wasi_nn_backend import Backend
n_gpu_layers = int(sys.argv[1])
config = {"temperature": 0, "max_tokens": 12, "n_ctx": 256, "max_concurrent": 1, "default_task_timeout_ms": 0}
config["n_gpu_layers"] = n_gpu_layers
with Backend(config) as backend:
    with backend.load_by_name("smollm2") as graph, graph.init_execution_context() as context:
        print(json.dumps({"text": context.run_inference("Name the capital city of France.")}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environment there, or go on with it")
    arguments = parser.parse_args()
    if shutil.which("glslc") is None:
        raise SystemExit(
            "vulkan: glslc is missing: apt-get install mesa-vulkan-drivers libvulkan-dev glslc spirv-headers"
        )
    # llama.cpp passes over devices that are a CPU, as Mesa's software driver is, unless they are named.
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wasi-nn-vulkan-")))
        python = install(folder)
        doctor = json.loads(run([python, "-m", "wasi_nn_backend.cli", "doctor", "--json"]))
        (gpu,) = [finding for finding in doctor if finding["name"] == "GPU"]
        print(f"GPU: {gpu['detail']}", flush=True)
        if "can take layers" not in gpu["detail"]:
            raise SystemExit("vulkan: llama.cpp sees no Vulkan device; is a driver installed (mesa-vulkan-drivers)?")
        answers = {place: answer(python, n) for place, n in (("CPU", 0), ("Vulkan", 98))}
    for place, text in answers.items():
        print(f"{place:>7}: {text}")
    if answers["CPU"] != answers["Vulkan"]:
        raise SystemExit("vulkan: the texts differ")
    print("the texts are equal")
    return 0


def install(folder: Path) -> str:
    """An environment with this project over a llama.cpp with Vulkan; returns its Python."""
    python = str(folder / "bin" / "python")
    if (folder / "done").exists():
        return python
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (llama,) = [one for one in project["dependencies"] if one.startswith("llama-cpp-python")]
    run([sys.executable, "-m", "venv", str(folder)])
    print("compiling llama.cpp with Vulkan", flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(folder), llama])
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    allow_old_headers(folder / archive.name.removesuffix(".tar.gz"))
    run([*pip, "install", "-q", str(folder / archive.name.removesuffix(".tar.gz"))], {"CMAKE_ARGS": "-DGGML_VULKAN=on"})
    run([*pip, "install", "-q", "--only-binary", "llama-cpp-python", f"{ROOT}[demo]"])
    (folder / "done").touch()
    return python


def allow_old_headers(source: Path) -> None:
    """Debian 12's Vulkan headers (1.3.239) lack the layer settings that llama.cpp names for validation.

    They come into play with GGML_VULKAN_VALIDATE alone, so leaving them out changes nothing here.
    """
    path = source / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-vulkan" / "ggml-vulkan.cpp"
    text = path.read_text(encoding="utf-8")
    start = text.index("    std::vector<vk::LayerSettingEXT> settings = {")
    end = text.index("    vk::InstanceCreateInfo instance_create_info(", start)
    call_end = text.index(";", end) + 1
    call = text[end:call_end]
    text = (
        f"{text[:start]}#ifdef VK_EXT_layer_settings\n{text[start:call_end]}\n#else\n"
        f"{call.replace(', &layer_setting_info', '')}\n#endif{text[call_end:]}"
    )
    path.write_text(text, encoding="utf-8")


def answer(python: str, n_gpu_layers: int) -> str:
    return str(json.loads(run([python, "-c", PROGRAM, str(n_gpu_layers)]))["text"])


def run(command: list[str], environ: dict[str, str] | None = None) -> str:
    """Standard output; ends the script where a command fails."""
    done = subprocess.run(
        command, env={**os.environ, **(environ or {})}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode and "doctor" not in command:  # which ends with 1 where something else is wrong
        raise SystemExit(f"vulkan: {' '.join(command)[:200]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

/* A module as HyperBEAM's nodes call it: no main, an export that takes texts and returns one.
 *
 * Build: python -m ziglang cc -target wasm32-wasi -O2 -s -mexec-model=reactor -Wl,--export=malloc,--export=free -o hyperbeam.wasm hyperbeam.c
 * Run:   wasi-nn run --nn-graph default=smollm2 --invoke handle hyperbeam.wasm "Name the capital city of France." '{"prompt_mode": "chat"}'
 *
 * The host copies the arguments in through malloc, and the answer of run_inference, too.
 */
#include <stdint.h>
#include <string.h>

#include "wasi_nn.h"

/* A NUL-terminated text of malloc's, for the caller to free; NULL when it failed. It is the context's opened last. */
WASI_NN_IMPORT("run_inference")
char *run_inference(const char *prompt, uint32_t n_prompt_bytes);

__attribute__((export_name("handle")))
char *handle(const char *prompt, const char *config) {
    static const char name[] = "default";
    wasi_nn_graph graph;
    wasi_nn_context context;
    if (wasi_nn_load_by_name_with_config(name, sizeof name - 1, config, (uint32_t)strlen(config), &graph)) return NULL;
    if (wasi_nn_init_execution_context(graph, &context)) return NULL;
    return run_inference(prompt, (uint32_t)strlen(prompt));
}

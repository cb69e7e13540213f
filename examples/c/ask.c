/* Asks a language model one question with the official WASI-NN calls and prints the answer.
 *
 * Build: python -m ziglang cc -target wasm32-wasi -O2 -s -o ask.wasm ask.c
 * Run:   wasi-nn run --nn-graph default=smollm2,prompt_mode=chat ask.wasm default "Name the capital city of France."
 *
 * The prompt goes to the model as it is; prompt_mode=chat lets the host put the model's chat template around it.
 */
#include <stdio.h>
#include <string.h>

#include "wasi_nn.h"

static char answer[65536];

/* Exits with the error's number, so that a script can tell errors apart. */
static int fail(const char *call, wasi_nn_error error) {
    fprintf(stderr, "ask: %s failed with WASI-NN error %u\n", call, (unsigned)error);
    return (int)error;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: ask.wasm GRAPH PROMPT\n");
        return 64;
    }

    wasi_nn_graph graph;
    wasi_nn_error error = wasi_nn_load_by_name(argv[1], (uint32_t)strlen(argv[1]), &graph);
    if (error) return fail("load_by_name", error);

    wasi_nn_context context;
    error = wasi_nn_init_execution_context(graph, &context);
    if (error) return fail("init_execution_context", error);

    uint32_t n_prompt_bytes = (uint32_t)strlen(argv[2]);
    wasi_nn_tensor prompt = {&n_prompt_bytes, 1, WASI_NN_TYPE_U8, argv[2], n_prompt_bytes};
    error = wasi_nn_set_input(context, WASI_NN_PROMPT, &prompt);
    if (error) return fail("set_input", error);

    /* A full context is an error, but what was generated until then can be read like any other text. */
    wasi_nn_error computed = wasi_nn_compute(context);
    if (computed && computed != WASI_NN_CONTEXT_FULL) return fail("compute", computed);

    uint32_t n_answer_bytes;
    error = wasi_nn_get_output(context, WASI_NN_TEXT, answer, sizeof answer, &n_answer_bytes);
    if (error) return fail("get_output", error);

    fwrite(answer, 1, n_answer_bytes, stdout);
    putchar('\n');
    return computed ? fail("compute", computed) : 0;
}

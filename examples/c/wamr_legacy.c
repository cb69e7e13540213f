/* ask.c for WAMR's older header: the module is called "wasi_nn", and a tensor has no length but its dimensions'.
 *
 * Build: python -m ziglang cc -target wasm32-wasi -O2 -s -o wamr_legacy.wasm wamr_legacy.c
 * Run:   wasi-nn run --nn-graph default=smollm2,prompt_mode=chat wamr_legacy.wasm default "Name the capital city of France."
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define IMPORT(name) __attribute__((import_module("wasi_nn"), import_name(name)))

enum { TYPE_U8 = 2, CONTEXT_FULL = 101 };

typedef struct {
    const uint32_t *dimensions;
    uint32_t n_dimensions;
} shape;

typedef struct {
    const shape *shape;
    uint32_t type;
    const void *data; /* as many bytes as the dimensions multiply to */
} tensor;

_Static_assert(sizeof(tensor) == 12, "the layout that hosts read");

IMPORT("load_by_name") uint32_t load_by_name(const char *name, uint32_t n_name_bytes, uint32_t *graph);
IMPORT("init_execution_context") uint32_t init_execution_context(uint32_t graph, uint32_t *context);
IMPORT("set_input") uint32_t set_input(uint32_t context, uint32_t index, const tensor *tensor);
IMPORT("compute") uint32_t compute(uint32_t context);
/* n_bytes: the buffer's size on the way in, the output's on the way out */
IMPORT("get_output") uint32_t get_output(uint32_t context, uint32_t index, void *buffer, uint32_t *n_bytes);

static char answer[65536];

static int fail(const char *call, uint32_t error) {
    fprintf(stderr, "wamr_legacy: %s failed with WASI-NN error %u\n", call, (unsigned)error);
    return (int)error;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: wamr_legacy.wasm GRAPH PROMPT\n");
        return 64;
    }
    uint32_t graph, context, error;
    if ((error = load_by_name(argv[1], (uint32_t)strlen(argv[1]), &graph))) return fail("load_by_name", error);
    if ((error = init_execution_context(graph, &context))) return fail("init_execution_context", error);

    uint32_t n_prompt_bytes = (uint32_t)strlen(argv[2]);
    shape dimensions = {&n_prompt_bytes, 1};
    tensor prompt = {&dimensions, TYPE_U8, argv[2]};
    if ((error = set_input(context, 0, &prompt))) return fail("set_input", error);

    uint32_t computed = compute(context);
    if (computed && computed != CONTEXT_FULL) return fail("compute", computed);

    uint32_t n_answer_bytes = sizeof answer;
    if ((error = get_output(context, 0, answer, &n_answer_bytes))) return fail("get_output", error);
    fwrite(answer, 1, n_answer_bytes, stdout);
    putchar('\n');
    return computed ? fail("compute", computed) : 0;
}
